// SPDX-License-Identifier: Apache-2.0
// What units count on in memory when CUDA graphs are about, on a CPU that says that its stream is
// being captured. Replays themselves: tests/cuda/units_graph_test.cpp.
#include "backend.hpp"
#include "support/catch.hpp"
#include "support/compare.hpp"
#include "support/engine_model.hpp"

namespace octet::test {
namespace {

/// Of the rank that is this thread: the capture that its stream is said to be in.
thread_local std::uint64_t current_capture = 0;

const detail::Backend& capturing_backend() {
  static const detail::Backend backend = [] {
    detail::Backend table = detail::cpu_backend();
    table.capture = [](const Context&) { return current_capture; };
    return table;
  }();
  return backend;
}

/// One rank's engine, and what is wrong with it.
class Units {
 public:
  Units(Communicator& comm, const Context& ctx)
      : ctx_(ctx), engine_(ctx, comm, {.sharding = Sharding::parameters}) {
    ctx.state()->backend = &capturing_backend();
    add_parameters(engine_, ctx, keep_);
    engine_.freeze();
  }

  /// A unit is used once; compares its gathers so far and those of the unit after it.
  void use(const std::string& when, int unit, std::int64_t gathers, std::int64_t gathers_of_next) {
    engine_.gather(unit);
    const auto expect = [&](int u, std::int64_t expected) {
      const std::int64_t got = engine_.unit_gathers(u);
      if (got == expected) return;
      wrong += when + ": " + std::to_string(got) + " gathers of unit " + std::to_string(u) +
               " instead of " + std::to_string(expected) + "; ";
    };
    expect(unit, gathers);
    expect(unit + 1, gathers_of_next);
    for (std::size_t p = 0; p < model_params().size(); ++p) {
      if (unit_of(p) != unit) continue;
      const TensorView weight = engine_.weight({static_cast<int>(p)}).data;
      Bytes bytes = download_bytes(ctx_, weight);
      if (first_[p].empty()) first_[p] = bytes;
      if (bytes != first_[p]) wrong += when + ": other weights; ";
      seen_.push_back(weight);
    }
    engine_.release(unit);
  }

  /// As a replay, which nobody sees, overwrites what is in memory.
  void overwrite() {
    for (const TensorView& view : seen_) {
      write(ctx_, view.data, std::vector<std::uint8_t>(view.bytes(), 0xFF));
    }
  }

  std::string wrong;

 private:
  Context ctx_;
  Engine engine_;
  std::vector<Buffer> keep_;
  std::vector<TensorView> seen_;
  std::vector<Bytes> first_{model_params().size()};
};

}  // namespace

TEST_CASE("a capture gathers what was in memory before, and after it nothing is counted on") {
  std::vector<std::string> wrong(2);
  run_ranks(2, [&](Communicator& comm) {
    Units units(comm, comm.context());
    units.use("before", 0, 1, 1);
    units.use("before, again", 0, 1, 1);
    current_capture = 7;
    units.use("in a capture", 0, 2, 2);
    units.use("in a capture, gathered ahead", 1, 2, 1);
    units.use("in a capture, again", 1, 2, 1);
    current_capture = 9;
    units.use("in another capture", 1, 3, 2);
    current_capture = 0;
    for (std::int64_t replay = 1; replay <= 3; ++replay) {
      units.overwrite();
      units.use("after replays", 0, 2 + replay, 2 + replay);
      units.use("after replays", 1, 3 + replay, 2);
    }
    wrong[static_cast<std::size_t>(comm.rank())] = units.wrong;
  });
  for (const std::string& each : wrong) CHECK(each == "");
}

}  // namespace octet::test
