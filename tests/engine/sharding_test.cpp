// SPDX-License-Identifier: Apache-2.0
// All shardings give the same bits; sharded gradients come group by group.
#include <algorithm>

#include "support/catch.hpp"
#include "support/compare.hpp"
#include "support/engine_model.hpp"
#include "support/errors.hpp"

namespace octet::test {
namespace {

constexpr Sharding kCuts[] = {Sharding::optimizer, Sharding::gradients};
/// Four groups of the model, two of which have both kinds of gradients.
constexpr std::int64_t kBucket = 20000;

/// As a backward pass produces gradients.
std::vector<std::size_t> backward_order(int, int) {
  std::vector<std::size_t> order(model_params().size());
  std::iota(order.rbegin(), order.rend(), std::size_t{0});
  return order;
}

RunOptions options_of(Level level, Sharding sharding, int ranks) {
  RunOptions options;
  options.config = {.level = level,
                    .sharding = sharding,
                    .adamw = {.weight_decay = 0.1f, .seed = 5},
                    .bucket_elements = kBucket};
  options.ranks = ranks;
  options.order = backward_order;
  return options;
}

std::string describe(const RunOptions& options) {
  const EngineConfig& config = options.config;
  return std::string(name_of(config.level)) + ", sharding " +
         std::string(name_of(config.sharding.value_or(Sharding::none))) + ", " +
         std::to_string(options.ranks) + " ranks, buckets of " +
         std::to_string(config.bucket_elements) + ", windows " +
         std::to_string(config.windows.value_or(false)) + ", micro-batches " +
         std::to_string(config.micro_batches) + ", two contexts " +
         std::to_string(static_cast<bool>(options.engine_context));
}

void check_equal(const RunOptions& options, const std::vector<RankResult>& expected) {
  INFO(describe(options));
  const std::vector<RankResult> results = train(options);
  CHECK(rank_difference(results) == "");
  CHECK(first_difference(everything(results), everything(expected)) == "");
  CHECK(first_difference(results[0].norms, expected[0].norms) == "");
  for (const RankResult& result : results) {
    CHECK(result.step == expected[0].step);
    CHECK(result.skipped == expected[0].skipped);
    CHECK(result.payload_per_step == result.plan.wire_bytes_per_step);
  }
}

/// Sharded gradients in every way they can be reduced, against a sharded optimizer.
void check_gradients(RunOptions options) {
  options.config.sharding = Sharding::optimizer;
  const std::vector<RankResult> expected = train(options);
  options.config.sharding = Sharding::gradients;
  for (bool windows : {false, true}) {
    for (bool apart : {false, true}) {
      for (std::int64_t elements : {std::int64_t{1}, kBucket}) {
        options.config.windows = windows;
        options.config.bucket_elements = elements;
        options.engine_context = {};
        if (apart) options.engine_context = [](const Communicator&) { return Context::cpu(); };
        check_equal(options, expected);
      }
    }
  }
}

}  // namespace

TEST_CASE("50 steps: one value of reduced_gradient has one set of bits, however cut, on 1 to 8") {
  for (DType reduced : {DType::e4m3, DType::f32}) {
    const bool rounded = reduced == DType::e4m3;
    RunOptions options = options_of(Level::O2, rounded ? Sharding::none : Sharding::optimizer, 1);
    options.config.reduced_gradient = reduced;
    options.steps = 50;
    options.max_norm = 0.5f;
    options.clip_every = 2;
    const std::vector<RankResult> expected = train(options);
    for (int ranks = 1; ranks <= 8; ++ranks) {
      options.ranks = ranks;
      for (Sharding sharding : {Sharding::none, Sharding::optimizer, Sharding::gradients}) {
        if (sharding == Sharding::none && !rounded) continue;
        options.config.sharding = sharding;
        check_equal(options, expected);
      }
    }
  }
}

TEST_CASE("sharded gradients have the bits of a sharded optimizer where ranks differ") {
  for (Level level : {Level::O0, Level::O1, Level::O2}) {
    for (int ranks : {2, 5}) {
      RunOptions options = options_of(level, Sharding::gradients, ranks);
      options.gradient = own_gradient;
      options.steps = 3;
      options.max_norm = 0.5f;
      options.clip_every = 2;
      for (DType reduced : {DType::f32, formats_of(level).gradient}) {
        options.config.reduced_gradient = reduced;
        check_gradients(options);
      }
    }
  }
}

TEST_CASE("sharded gradients with the smallest formats and with FP32") {
  for (const Formats& formats : {small_formats(), Formats{}}) {
    RunOptions options = options_of(Level::O2, Sharding::gradients, 3);
    options.config.formats = formats;
    options.config.reduced_gradient = formats.gradient;
    options.gradient = own_gradient;
    options.steps = 2;
    check_gradients(options);
  }
}

TEST_CASE("sharded gradients are summed over micro-batches first") {
  for (Level level : {Level::O0, Level::O2}) {
    for (DType accumulator : {DType::f32, DType::bf16, DType::e4m3}) {
      if (level == Level::O0 && accumulator == DType::e4m3) continue;
      RunOptions options = options_of(level, Sharding::gradients, 3);
      options.config.micro_batches = 3;
      options.config.accumulator = accumulator;
      options.gradient = own_gradient;
      options.steps = 2;
      // Of some parameters only the first micro-batches, of one none.
      options.gradient = [](int rank, std::size_t p, int at) {
        const bool used = p != 4 && !(at > 200 && (p + static_cast<std::size_t>(rank)) % 3 == 0);
        return used ? own_gradient(rank, p, at) : std::vector<float>();
      };
      INFO("accumulator " << name_of(accumulator));
      check_gradients(options);
    }
  }
}

TEST_CASE("parameters without a gradient on some ranks are zero in their group") {
  for (int ranks : {2, 3}) {
    RunOptions options = options_of(Level::O2, Sharding::gradients, ranks);
    options.config.reduced_gradient = DType::e4m3;
    options.steps = 4;
    options.gradient = [](int rank, std::size_t p, int step) {
      const auto at = static_cast<int>(p) + rank + step;
      const bool used = p != 5 && at % 3 != 0 && !(rank == 1 && step == 2);
      return used ? own_gradient(rank, p, step) : std::vector<float>();
    };
    check_gradients(options);
  }
}

TEST_CASE("gradients may come in another order within two groups, another on every rank") {
  RunOptions options = options_of(Level::O2, Sharding::optimizer, 3);
  options.gradient = own_gradient;
  options.steps = 3;
  const std::vector<RankResult> expected = train(options);
  options.config.sharding = Sharding::gradients;
  // Groups in the order of the backward pass: {9, 8}, {7}, {6, 5, 4, 3, 2}, {1, 0}.
  options.order = [](int rank, int step) {
    std::vector<std::size_t> order = backward_order(rank, step);
    Draws draws(static_cast<std::uint32_t>(1000 * rank + step));
    std::shuffle(order.begin(), order.begin() + 3, draws);
    std::shuffle(order.begin() + 3, order.end(), draws);
    return order;
  };
  for (bool apart : {false, true}) {
    if (apart) options.engine_context = [](const Communicator&) { return Context::cpu(); };
    check_equal(options, expected);
  }
}

TEST_CASE("a gradient for a group that has been reduced is an error, and the step goes on") {
  // The second group behind the first one gets a gradient before parameter 8, of the first.
  const auto gradient = [](int rank, std::size_t p, int step) {
    return p == 8 ? std::vector<float>() : own_gradient(rank, p, step);
  };
  RunOptions options = options_of(Level::O2, Sharding::gradients, 2);
  options.gradient = gradient;
  options.steps = 1;
  const Bytes expected = everything(train(options));
  std::vector<RankResult> results(2);
  std::vector<std::string> errors(2);
  run_ranks(2, [&](Communicator& comm) {
    const Context& ctx = comm.context();
    const auto rank = static_cast<std::size_t>(comm.rank());
    Engine engine(ctx, comm, options.config);
    std::vector<Buffer> keep;
    add_parameters(engine, ctx, keep);
    engine.freeze();
    hand_over(engine, ctx, options, comm.rank(), 1);
    const Buffer late = upload(ctx, own_gradient(comm.rank(), 8, 1));
    errors[rank] = error_of(
        [&] { engine.add_gradient({8}, view_of(ctx, late, DType::f32, model_params()[8].shape)); });
    engine.step({.lr = options.lr});
    results[rank] = read_back(engine, ctx);
  });
  for (const std::string& error : errors) {
    CHECK(missing(error, {"\"opted out\"", "group (0 of 4)", "two behind", "sharding = gradients",
                          "reverse order of registration"}) == "");
  }
  CHECK(first_difference(everything(results), expected) == "");
}

TEST_CASE("a non-finite gradient on one rank skips the step on all, whatever is sharded") {
  for (std::size_t poisoned : {0, 2, 7, 9}) {
    for (bool windows : {false, true}) {
      RunOptions options = options_of(Level::O2, Sharding::gradients, 3);
      options.config.windows = windows;
      options.config.reduced_gradient = DType::e4m3;
      options.steps = 2;
      options.gradient = own_gradient;
      const Bytes clean = everything(train(options));
      options.steps = 3;
      options.gradient = [&](int rank, std::size_t p, int step) {
        std::vector<float> g = own_gradient(rank, p, step < 2 ? step : step - 1);
        if (step == 2 && rank == 1 && p == poisoned) g[g.size() / 2] = NAN;
        return g;
      };
      const std::vector<RankResult> results = train(options);
      INFO("NaN in \"" << model_params()[poisoned].name << "\", windows " << windows);
      CHECK(first_difference(everything(results), clean) == "");
      for (const RankResult& result : results) {
        CHECK(result.step == 2);
        CHECK(result.skipped == 1);
      }
    }
  }
}

TEST_CASE("the plan tells of groups and slots, and the schedule fused is refused") {
  RunOptions options = options_of(Level::O2, Sharding::gradients, 3);
  options.steps = 1;
  const Plan plan = train(options)[0].plan;
  CHECK(missing(plan.to_markdown(),
                {"| sharding | gradients |", "4 groups lie in 2 slots", "into the owner's AdamW",
                 "when a gradient slot is wanted again", "| gradient slots |"}) == "");
  options.config.reduced_gradient = DType::e4m3;
  options.config.micro_batches = 2;
  CHECK(missing(train(options)[0].plan.to_markdown(),
                {"e4m3 means", "into the owner's shard", "whole on every rank"}) == "");
  for (Sharding sharding : kCuts) {
    std::string error;
    run_ranks(2, [&](Communicator& comm) {
      const std::string mine = error_of([&] {
        Engine(comm.context(), comm, {.sharding = sharding, .schedule = Schedule::fused});
      });
      if (comm.rank() == 0) error = mine;
    });
    if (sharding == Sharding::optimizer) CHECK(error == "no error");
    if (sharding == Sharding::gradients) {
      CHECK(missing(error, {"fused", "sharding is gradients", "sharding = optimizer"}) == "");
    }
  }
}

}  // namespace octet::test
