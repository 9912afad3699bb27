// SPDX-License-Identifier: Apache-2.0
// Reduction during backward: the bits of reduction afterwards, whatever becomes ready when.
#include <algorithm>

#include "support/catch.hpp"
#include "support/compare.hpp"
#include "support/engine_model.hpp"

namespace octet::test {
namespace {

constexpr Level kLevels[] = {Level::O0, Level::O2, Level::O3};

RunOptions options_of(Level level, int ranks) {
  RunOptions options;
  options.config = {.level = level, .adamw = {.weight_decay = 0.1f, .seed = 5}};
  options.ranks = ranks;
  options.steps = 2;
  options.gradient = own_gradient;
  options.max_norm = 0.5f;
  return options;
}

/// Another order on every rank and in every step.
std::vector<std::size_t> random_order(int rank, int step) {
  std::vector<std::size_t> order(model_params().size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  Draws draws(static_cast<std::uint32_t>(1000 * rank + step));
  std::shuffle(order.begin(), order.end(), draws);
  return order;
}

void overlap(RunOptions& options) {
  options.engine_context = [](const Communicator&) { return Context::cpu(); };
}

std::string describe(const RunOptions& options) {
  return std::string(name_of(options.config.level)) + ", " + std::to_string(options.ranks) +
         " ranks, buckets of " + std::to_string(options.config.bucket_elements);
}

}  // namespace

TEST_CASE("overlap has the bits of a reduction after backward, in any order of readiness") {
  for (Level level : kLevels) {
    for (int ranks : {1, 2, 3, 5, 8}) {
      RunOptions options = options_of(level, ranks);
      const std::vector<RankResult> sequential = train(options);
      const Bytes expected = everything(sequential);
      overlap(options);
      options.order = random_order;
      for (bool windows : {false, true}) {
        for (std::int64_t elements :
             {std::int64_t{1}, std::int64_t{20000}, std::int64_t{1} << 40}) {
          options.config.windows = windows;
          options.config.bucket_elements = elements;
          const std::vector<RankResult> results = train(options);
          INFO(describe(options) << ", windows " << windows);
          CHECK(rank_difference(results) == "");
          CHECK(first_difference(everything(results), expected) == "");
          CHECK(first_difference(results[0].norms, sequential[0].norms) == "");
          CHECK(results[0].payload_per_step == results[0].plan.wire_bytes_per_step);
        }
      }
    }
  }
}

TEST_CASE("parameters unused on one rank or on all count as zero, with overlap too") {
  // On rank r in step s: every third parameter; "embedding" nowhere; all of rank 1's in step 2.
  const auto is_unused = [](int rank, std::size_t p, int step) {
    return p == 0 || (static_cast<int>(p) + rank + step) % 3 == 0 || (rank == 1 && step == 2);
  };
  for (Level level : kLevels) {
    for (int ranks : {1, 2, 3}) {
      RunOptions options = options_of(level, ranks);
      options.steps = 3;
      options.gradient = [&](int rank, std::size_t p, int step) {
        if (!is_unused(rank, p, step)) return own_gradient(rank, p, step);
        return std::vector<float>(numel_of(model_params()[p]), 0.0f);
      };
      const Bytes expected = everything(train(options));
      options.gradient = [&](int rank, std::size_t p, int step) {
        return is_unused(rank, p, step) ? std::vector<float>() : own_gradient(rank, p, step);
      };
      options.order = random_order;
      for (bool overlapped : {false, true}) {
        if (overlapped) overlap(options);
        for (std::int64_t elements : {1, 20000}) {
          options.config.bucket_elements = elements;
          const std::vector<RankResult> results = train(options);
          INFO(describe(options) << ", overlap " << overlapped);
          CHECK(rank_difference(results) == "");
          CHECK(first_difference(everything(results), expected) == "");
        }
      }
    }
  }
}

TEST_CASE("a non-finite gradient skips the step on all ranks, with overlap too") {
  for (Level level : kLevels) {
    for (std::size_t poisoned = 0; poisoned < model_params().size(); ++poisoned) {
      RunOptions options = options_of(level, 3);
      options.config.bucket_elements = 1;
      overlap(options);
      const Bytes clean = everything(train(options));
      options.steps = 3;
      options.gradient = [&](int rank, std::size_t p, int step) {
        std::vector<float> g = own_gradient(rank, p, step < 2 ? step : step - 1);
        if (step == 2 && rank == 1 && p == poisoned) g[g.size() / 2] = NAN;
        return g;
      };
      const std::vector<RankResult> results = train(options);
      INFO(describe(options) << ", NaN in \"" << model_params()[poisoned].name << "\"");
      CHECK(first_difference(everything(results), clean) == "");
      for (const RankResult& result : results) {
        CHECK(result.step == 2);
        CHECK(result.skipped == 1);
      }
    }
  }
}

TEST_CASE("collectives are launched by add_gradient with overlap, by step without") {
  for (bool overlapped : {false, true}) {
    std::vector<std::uint64_t> during(2), after(2);
    std::vector<std::string> schedules(2);
    run_ranks(2, [&](Communicator& comm) {
      const Context ctx = Context::cpu();
      EngineConfig config{.level = Level::O2, .bucket_elements = 1};
      if (!overlapped) config.schedule = Schedule::after_backward;
      Engine engine(ctx, comm, config);
      std::vector<Buffer> keep;
      add_parameters(engine, ctx, keep);
      engine.freeze();
      const auto rank = static_cast<std::size_t>(comm.rank());
      schedules[rank] = engine.plan().schedule;
      const std::uint64_t before = comm.wire_bytes().payload;
      hand_over(engine, ctx, own_gradient, comm.rank(), 1);
      during[rank] = comm.wire_bytes().payload - before;
      engine.step({.lr = 1e-3f});
      after[rank] = comm.wire_bytes().payload - before;
      if (after[rank] != engine.plan().wire_bytes_per_step) after[rank] = 0;
    });
    for (std::size_t rank = 0; rank < 2; ++rank) {
      CAPTURE(overlapped, rank, schedules[rank]);
      CHECK(after[rank] > 0);
      // Two-shot: what a step sends are the buckets, all of them during backward.
      CHECK(during[rank] == (overlapped ? after[rank] : 0));
      CHECK((schedules[rank].find("during backward") != std::string::npos) == overlapped);
      CHECK((schedules[rank].find("after backward") == std::string::npos) == overlapped);
    }
  }
}

TEST_CASE("the context knows of reductions beside it, and of ranks on its device") {
  const struct {
    Sharding sharding;
    Schedule schedule;
    bool apart, windows, shares;
  } cases[] = {
      {Sharding::optimizer, Schedule::after_backward, false, false, false},
      {Sharding::optimizer, Schedule::after_backward, true, false, false},
      {Sharding::optimizer, Schedule::overlap, true, false, true},
      {Sharding::optimizer, Schedule::after_backward, false, true, true},
      // Their memory is wanted again during the backward pass.
      {Sharding::gradients, Schedule::after_backward, false, false, false},
      {Sharding::gradients, Schedule::after_backward, true, false, true},
      {Sharding::gradients, Schedule::after_backward, false, true, true},
      {Sharding::parameters, Schedule::after_backward, true, false, true},
      {Sharding::parameters, Schedule::after_backward, false, true, true},
  };
  for (const auto& c : cases) {
    std::vector<int> shares(2, -1);
    run_ranks(2, [&](Communicator& comm) {
      const Context ctx = c.apart ? Context::cpu() : comm.context();
      std::vector<Buffer> keep;
      Engine engine(ctx, comm,
                    {.sharding = c.sharding, .schedule = c.schedule, .windows = c.windows});
      add_parameters(engine, ctx, keep);
      engine.freeze();
      shares[static_cast<std::size_t>(comm.rank())] = ctx.shares_device() ? 1 : 0;
    });
    INFO(name_of(c.sharding) << ", " << name_of(c.schedule) << ", two contexts " << c.apart
                             << ", windows " << c.windows);
    CHECK(shares == std::vector<int>(2, c.shares ? 1 : 0));
  }
}

TEST_CASE("the plan counts the memory of both contexts") {
  for (Level level : kLevels) {
    for (int ranks : {1, 3}) {
      std::vector<std::uint64_t> held(static_cast<std::size_t>(ranks));
      std::vector<Plan> plans(static_cast<std::size_t>(ranks));
      run_ranks(ranks, [&](Communicator& comm) {
        const Context ctx = Context::cpu();
        std::vector<Buffer> keep;
        Engine engine(ctx, comm, {.level = level, .bucket_elements = 20000, .micro_batches = 2});
        add_parameters(engine, ctx, keep);
        const std::size_t before = ctx.memory_use().current + comm.context().memory_use().current;
        engine.freeze();
        const auto rank = static_cast<std::size_t>(comm.rank());
        held[rank] = ctx.memory_use().current + comm.context().memory_use().current - before;
        plans[rank] = engine.plan();
      });
      for (std::size_t rank = 0; rank < plans.size(); ++rank) {
        std::uint64_t sum = 0;
        for (const MemoryRow& row : plans[rank].memory) {
          INFO(name_of(level) << ", " << ranks << " ranks, " << row.what);
          CHECK(row.predicted == row.measured);
          sum += row.measured;
        }
        CHECK(sum <= held[rank]);
        CHECK(held[rank] - sum < 1024);  // flags
      }
    }
  }
}

}  // namespace octet::test
