// SPDX-License-Identifier: Apache-2.0
// What an engine's stream waits for when the engine goes after a step that failed half-way, on a
// CPU that counts: the memory that collectives on the communicator's stream may still use goes back
// in the order of both.
#include "backend.hpp"
#include "support/catch.hpp"
#include "support/engine_model.hpp"
#include "support/errors.hpp"
#include "support/forwarding_rank.hpp"

namespace octet::test {
namespace {

/// Of the rank that is this thread: how often its engine's stream was told to wait.
thread_local int waits = 0;

const detail::Backend& counting_backend() {
  static const detail::Backend backend = [] {
    detail::Backend table = detail::cpu_backend();
    table.event_wait = [](const Context&, void*) { ++waits; };
    return table;
  }();
  return backend;
}

/// Hands everything on until it is to fail.
class FailingRank final : public ForwardingRank {
 public:
  using ForwardingRank::ForwardingRank;
  bool fails = false;

 protected:
  void do_exchange(std::span<const SendPart> sends, std::span<const RecvPart> recvs) override {
    require(!fails, "the exchange fails");
    ForwardingRank::do_exchange(sends, recvs);
  }
};

}  // namespace

TEST_CASE("an engine whose first reduction failed waits for it before its memory goes") {
  for (Sharding sharding : {Sharding::none, Sharding::optimizer, Sharding::gradients}) {
    std::vector<std::string> errors(2);
    std::vector<int> waited(2, 0);
    run_ranks(2, [&](Communicator& inner) {
      const auto rank = static_cast<std::size_t>(inner.rank());
      FailingRank comm(inner);
      const Context ctx = Context::cpu();
      ctx.state()->backend = &counting_backend();
      std::vector<Buffer> keep;
      {
        Engine engine(ctx, comm, {.sharding = sharding, .schedule = Schedule::after_backward});
        add_parameters(engine, ctx, keep);
        engine.freeze();
        comm.fails = true;
        errors[rank] = error_of([&] { engine.step({.lr = 1e-3f}); });
        waits = 0;
      }
      waited[rank] = waits;
    });
    INFO(name_of(sharding));
    for (const std::string& error : errors) CHECK(missing(error, {"the exchange fails"}) == "");
    for (int count : waited) CHECK(count > 0);
  }
}

}  // namespace octet::test
