// SPDX-License-Identifier: Apache-2.0
// Ranks that are missing, late, gone or different: what the others are told, and that life goes on.
#include <atomic>
#include <functional>
#include <optional>
#include <stdexcept>

#include "octet/comm/collectives.hpp"
#include "octet/comm/detail/stall_clock.hpp"
#include "octet/engine/engine.hpp"
#include "support/catch.hpp"
#include "support/comm_errors.hpp"
#include "support/devices.hpp"
#include "support/errors.hpp"
#include "support/ranks.hpp"

namespace octet::test {
namespace {

using std::chrono::milliseconds;
using Clock = std::chrono::steady_clock;
using Ranks = std::vector<int>;

std::size_t at(int rank) { return static_cast<std::size_t>(rank); }

using Errors = std::vector<std::optional<CommError>>;

// Each rank's CommError out of fn(comm), if any.
Errors errors_of_ranks(int n, const std::function<void(Communicator&)>& fn,
                       milliseconds deadline = std::chrono::seconds(60)) {
  Errors errors(at(n));
  run_ranks(
      n, [&](Communicator& comm) { errors[at(comm.rank())] = comm_error_of([&] { fn(comm); }); },
      DeviceType::cpu, deadline);
  return errors;
}

// Two tensors on two or more ranks, dealt out in turn; every rank's own memory.
struct Bucket {
  explicit Bucket(Communicator& comm, int number)
      : gradient(comm.context(), 64 * sizeof(float)),
        scale(comm.context(), sizeof(TensorScale)),
        flag(comm.context(), sizeof(std::uint32_t)) {
    const Context& ctx = comm.context();
    zero_bytes(ctx, gradient.data(), gradient.bytes());
    write(ctx, scale.data(), std::vector<TensorScale>(1));
    Owners owners(at(comm.size()));
    for (int i = 0; i < 64; ++i) owners[at(i % comm.size())].push_back({0, i, 1});
    const TensorView view{gradient.data(), DType::f32, Shape{64}, ctx.device()};
    reducer.emplace(comm, MeanReducer::Path::two_shot, std::vector<ReduceTensor>{{view, {}}},
                    scale.as<TensorScale>(), owners, number);
  }
  void run() { reducer->run(flag.as<std::uint32_t>()); }

  Buffer gradient, scale, flag;
  std::optional<MeanReducer> reducer;
};

}  // namespace

TEST_CASE("a missing rank, the op, the bucket and the number are named, in time") {
  constexpr CollectiveName kName{"two_shot", 3};
  std::atomic<int> waiting = 2;
  const auto start = Clock::now();
  const Errors errors = errors_of_ranks(
      3,
      [&](Communicator& comm) {
        gather_nothing(comm, {"sharded", 2});
        if (comm.rank() == 1) {  // there, but elsewhere
          while (waiting > 0) std::this_thread::sleep_for(milliseconds(1));
          comm.check();
          return;
        }
        const auto error = comm_error_of([&] { gather_nothing(comm, kName); });
        --waiting;
        if (error.has_value()) throw CommError(*error);
      },
      milliseconds(100));
  CHECK(Clock::now() - start >= milliseconds(100));
  CHECK(Clock::now() - start < std::chrono::seconds(20));
  for (int r = 0; r < 3; ++r) {
    // Rank 1 was in no collective: check() tells it what the others have noticed.
    CHECK(wrong_in(errors[at(r)], r, kName, 2, {1}, "rank 1 of 3 did not come within 100 ms") ==
          "");
  }
}

TEST_CASE("a rank that is late by less than the deadline is no error") {
  const Errors errors = errors_of_ranks(
      3,
      [](Communicator& comm) {
        for (int round = 0; round < 3; ++round) {
          if (comm.rank() == round) std::this_thread::sleep_for(milliseconds(60));
          gather_nothing(comm, {"two_shot", round});
        }
        comm.synchronize();
      },
      std::chrono::seconds(30));
  for (const auto& error : errors) CHECK(!error.has_value());
}

TEST_CASE("a rank that leaves is named at once, with what the others were doing") {
  const auto start = Clock::now();
  const Errors errors = errors_of_ranks(3, [](Communicator& comm) {
    if (comm.rank() != 2) gather_nothing(comm, {"sharded", 0});
  });
  CHECK(Clock::now() - start < std::chrono::seconds(30));
  for (int r : {0, 1}) {
    CHECK(wrong_in(errors[at(r)], r, {"sharded", 0}, 1, {2}, "rank 2 of 3 left the group") == "");
  }
}

TEST_CASE("a rank that throws in the middle of a collective does not keep the others") {
  Errors errors(3);
  std::string thrown;
  run_ranks(3, [&](Communicator& comm) {
    const CollectiveScope scope(comm, {"two_shot", 5});
    comm.all_gather(nullptr, nullptr, 0);
    if (comm.rank() == 0) {
      const SendPart to_itself{&thrown, 1, 0};
      thrown = error_of([&] { comm.exchange(std::span(&to_itself, 1), {}); });
      return;
    }
    errors[at(comm.rank())] = comm_error_of([&] { comm.exchange({}, {}); });
  });
  CHECK(missing(thrown, {"is to this rank itself"}) == "");
  for (int r : {1, 2}) {
    CHECK(wrong_in(errors[at(r)], r, {"two_shot", 5}, 1, {0}, "rank 0 of 3 left the group") == "");
  }
}

TEST_CASE("different ops, buckets, calls and sizes are told apart") {
  const auto expect = [](const Errors& errors, const Ranks& ranks, const std::string& reason) {
    for (std::size_t r = 0; r < errors.size(); ++r) {
      REQUIRE(errors[r].has_value());
      CHECK(missing(errors[r]->what(), {reason}) == "");
      CHECK(errors[r]->where().ranks == ranks);
      CHECK(errors[r]->where().rank == static_cast<int>(r));
      CHECK(errors[r]->where().collective == 1);
    }
  };
  expect(errors_of_ranks(3,
                         [](Communicator& comm) {
                           gather_nothing(comm, {comm.rank() == 1 ? "sharded" : "two_shot", 4});
                         }),
         {0, 1},
         "rank 0 called two_shot of bucket 4 (all_gather) while rank 1 called sharded of "
         "bucket 4 (all_gather)");
  expect(errors_of_ranks(3,
                         [](Communicator& comm) {
                           gather_nothing(comm, {"two_shot", comm.rank() / 2});
                         }),
         {0, 2}, "while rank 2 called two_shot of bucket 1 (all_gather)");
  expect(errors_of_ranks(2,
                         [](Communicator& comm) {
                           const CollectiveScope scope(comm, {"two_shot", 0});
                           if (comm.rank() == 0) comm.exchange({}, {});
                           if (comm.rank() == 1) comm.all_gather(nullptr, nullptr, 0);
                         }),
         {0, 1},
         "rank 0 called two_shot of bucket 0 (exchange) while rank 1 called two_shot of "
         "bucket 0 (all_gather)");
  expect(errors_of_ranks(2,
                         [](Communicator& comm) {
                           char byte = 0, both[8];
                           comm.all_gather(&byte, both, comm.rank() == 0 ? 1 : 4);
                         }),
         {0, 1}, "rank 0 contributes 1 bytes but rank 1 4");
  expect(errors_of_ranks(3,
                         [](Communicator& comm) {
                           char bytes[4] = {};
                           comm.broadcast(bytes, comm.rank() == 2 ? 3 : 4, 1);
                         }),
         {1, 2}, "from rank 1 to rank 2 is 4 bytes on rank 1 but 3 on rank 2");
}

TEST_CASE("a failure stays, and later calls throw it again") {
  std::vector<std::string> first(2), again(2), checked(2), waited(2), reduced(2);
  std::vector<int> aborted(2);
  run_ranks(2, [&](Communicator& comm) {
    const std::size_t r = at(comm.rank());
    Bucket bucket(comm, 9);
    bucket.run();
    first[r] = error_of([&] { gather_nothing(comm, {"two_shot", comm.rank()}); });
    again[r] = error_of([&] { comm.exchange({}, {}); });
    checked[r] = error_of([&] { comm.check(); });
    waited[r] = error_of([&] { comm.synchronize(); });
    reduced[r] = error_of([&] { bucket.run(); });
    aborted[r] = comm.aborted();
  });
  for (std::size_t r : {0u, 1u}) {
    CHECK(missing(first[r], {"two_shot of bucket", "collective 4", "while rank 1 called"}) == "");
    CHECK(again[r] == first[r]);
    CHECK(checked[r] == first[r]);
    CHECK(waited[r] == first[r]);
    CHECK(reduced[r] == first[r]);
    CHECK(aborted[r] == 1);
  }
}

// Their set-up counts too: one for every exchange they plan.
TEST_CASE("reducers and gathers are one collective each, under their names") {
  const Errors errors = errors_of_ranks(2, [](Communicator& comm) {
    Bucket seven(comm, 7), eight(comm, 8);
    seven.run();
    seven.run();
    if (comm.rank() == 0) eight.run();
  });
  CHECK(wrong_in(errors[0], 0, {"two_shot", 8}, 7, {1}, "rank 1 of 2 left") == "");
  const Errors gather = errors_of_ranks(2, [](Communicator& comm) {
    char bytes[2] = {};
    const TensorView view{bytes, DType::e4m3, Shape{2}, comm.context().device()};
    PieceGather pieces(comm, {view}, {{{0, 0, 1}}, {{0, 1, 1}}});
    pieces.run();
    if (comm.rank() == 1) pieces.run();
  });
  CHECK(wrong_in(gather[1], 1, {"all_gather"}, 3, {0}, "rank 0 of 2 left") == "");
}

TEST_CASE("the engine's step names the bucket and changes nothing afterwards") {
  std::vector<std::string> errors(2);
  std::string handed;
  std::int64_t steps = -1;
  run_ranks(2, [&](Communicator& comm) {
    const Context& ctx = comm.context();
    const std::vector<float> values(200, 1.0f);
    const Buffer init = upload(ctx, values);
    const TensorView view{init.data(), DType::f32, Shape{200}, ctx.device()};
    Engine engine(ctx, comm);
    const ParamId id = engine.add({.name = "weight", .shape = Shape{200}, .init = view});
    engine.freeze();
    if (comm.rank() == 1) return;
    for (std::string& error : errors) {
      error = error_of([&] { engine.step({.lr = 0.1f}); });
    }
    handed = error_of([&] { engine.add_gradient(id, view); });
    std::vector<float> after(values.size());
    engine.weight_as(id, {after.data(), DType::f32, Shape{200}, ctx.device()});
    steps = after == values ? 0 : 1;
  });
  CHECK(missing(errors[0], {"of bucket 0 (collective", "on rank 0 of 2", "rank 1 of 2 left"}) ==
        "");
  CHECK(errors[1] == errors[0]);
  CHECK(handed == errors[0]);
  CHECK(steps == 0);
}

TEST_CASE("scopes nest: the outermost names and counts") {
  const Errors errors = errors_of_ranks(2, [](Communicator& comm) {
    const CollectiveScope outer(comm, {"outer", 1});
    {
      const CollectiveScope inner(comm, {"inner", 2});
      comm.all_gather(nullptr, nullptr, 0);
    }
    if (comm.rank() == 0) comm.exchange({}, {});
  });
  CHECK(wrong_in(errors[0], 0, {"outer", 1}, 1, {1}, "rank 1 of 2 left") == "");
}

TEST_CASE("new groups work in the process after any failure, twenty times") {
  for (int run = 0; run < 20; ++run) {
    CAPTURE(run);
    const int n = 2 + run % 4;
    const int culprit = run % n;
    const Errors errors = errors_of_ranks(
        n,
        [&](Communicator& comm) {
          Bucket bucket(comm, run);
          bucket.run();
          if (comm.rank() == culprit) {
            if (run % 3 == 0) return;                                         // leaves
            if (run % 3 == 1) std::this_thread::sleep_for(milliseconds(80));  // is late
            if (run % 3 == 2) return gather_nothing(comm, {"all_gather"});    // does else
          }
          bucket.run();
        },
        milliseconds(run % 3 == 1 ? 20 : 20'000));
    for (int r = 0; r < n; ++r) {
      if (r == culprit && run % 3 == 0) continue;
      REQUIRE(errors[at(r)].has_value());
    }
    const Errors fresh = errors_of_ranks(n, [&](Communicator& comm) {
      Bucket bucket(comm, run);
      for (int round = 0; round < 3; ++round) bucket.run();
      comm.synchronize();
    });
    for (const auto& error : fresh) CHECK(!error.has_value());
  }
}

TEST_CASE("a single rank has nothing to fail; a deadline must be positive") {
  for (const Context& ctx : test_contexts()) {
    const auto comm = make_single(ctx);
    comm->check();
    comm->synchronize();
    CHECK(!comm->aborted());
  }
  ThreadGroup group(1, milliseconds(0));
  CHECK(missing(error_of([&] { group.join(0, Context::cpu()); }), {"deadline is 0 ms"}) == "");
}

TEST_CASE("time is counted from the last sign of a collective in progress") {
  using detail::StallClock;
  StallClock clock(milliseconds(100));
  StallClock::Time now{};
  const auto stalled_after = [&](int ms, std::uint64_t begun, std::uint64_t ended) {
    now += milliseconds(ms);
    return clock.stalled(begun, ended, now);
  };
  CHECK(!stalled_after(0, 0, 0));
  CHECK(!stalled_after(1000, 0, 0));  // nothing in progress, for however long
  CHECK(!stalled_after(5, 1, 0));     // begins
  CHECK(!stalled_after(99, 1, 0));
  CHECK(!stalled_after(99, 2, 1));  // the next one
  CHECK(!stalled_after(99, 2, 1));
  CHECK(stalled_after(1, 2, 1));
  CHECK(!stalled_after(1, 2, 2));  // late, but done
  CHECK(!stalled_after(500, 3, 2));
  CHECK(stalled_after(100, 3, 2));
}

}  // namespace octet::test
