// SPDX-License-Identifier: Apache-2.0
// The names of the parameters whose gradients made steps be skipped.
#include <limits>
#include <utility>

#include "support/catch.hpp"
#include "support/engine_model.hpp"
#include "support/errors.hpp"

namespace octet::test {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

/// One value of one gradient that one rank hands over in one step.
struct Fault {
  int step, rank;
  std::size_t param;
  float value;
};

struct Run {
  EngineConfig config;
  int ranks = 1;
  std::vector<Fault> faults = {};
  int flagged_step = 0;  ///< in which rank 0 raises the trainer's own flag
  float max_norm = 0.0f;
  DeviceType device = DeviceType::cpu;
};

constexpr int kSteps = 5;

using Names = std::vector<std::pair<std::string, std::int64_t>>;

struct RankNames {
  std::vector<Names> after_step;  ///< and first before any
  std::int64_t step = 0, skipped = 0;
};

Names names_of(const Engine& engine) {
  Names names;
  for (const NonfiniteGradient& each : engine.nonfinite_gradients_sync()) {
    names.emplace_back(each.name, each.steps);
  }
  return names;
}

std::vector<RankNames> run(const Run& r) {
  std::vector<RankNames> results(static_cast<std::size_t>(r.ranks));
  RunOptions options;
  options.config = r.config;
  // The fault is in the first micro-batch, so that the others are added to it.
  options.gradient = [&r](int rank, std::size_t p, int step) {
    std::vector<float> values = own_gradient(rank, p, step);
    for (const Fault& f : r.faults) {
      if (f.step == step && f.rank == rank && f.param == p) values.back() = f.value;
    }
    return values;
  };
  run_ranks(
      r.ranks,
      [&](Communicator& comm) {
        const Context ctx = comm.context();
        RankNames& result = results[static_cast<std::size_t>(comm.rank())];
        Engine engine(ctx, comm, r.config);
        std::vector<Buffer> keep;
        add_parameters(engine, ctx, keep);
        engine.freeze();
        result.after_step.push_back(names_of(engine));
        for (int step = 1; step <= kSteps; ++step) {
          hand_over(engine, ctx, options, comm.rank(), step);
          if (step == r.flagged_step && comm.rank() == 0) {
            write_one(ctx, engine.nonfinite_flag(), std::uint32_t{1});
          }
          const StepResult done = engine.step({.lr = 1e-3f, .max_norm = r.max_norm});
          result.after_step.push_back(names_of(engine));
          result.step = done.step.read_sync();
          result.skipped = done.skipped.read_sync();
        }
      },
      r.device);
  return results;
}

/// Parameters of model_params().
constexpr std::size_t kVector = 1, kMatrix = 2, kOptedOut = 8;

/// A matrix, a vector, both, one twice, and a step that is skipped for another reason.
void check_names(Run r) {
  const int last = r.ranks - 1;
  r.faults = {{1, last, kMatrix, kNaN},
              {3, 0, kMatrix, -kInf},
              {3, last, kVector, kInf},
              {4, last, kOptedOut, kNaN}};
  r.flagged_step = 5;
  const Names first = {{"odd", 1}}, both = {{"bias", 1}, {"odd", 2}};
  Names all = both;
  all.emplace_back("opted out", 1);
  for (const RankNames& result : run(r)) {
    CHECK(result.after_step == std::vector<Names>{{}, first, first, both, all, all});
    CHECK(result.step == 1);
    CHECK(result.skipped == 4);
  }
}

}  // namespace

TEST_CASE("every rank names the parameters whose gradients are not finite on any rank") {
  for (DeviceType device : rank_devices()) {
    for (Level level : {Level::O0, Level::O1, Level::O2, Level::O3}) {
      for (int ranks : {1, 2, 3}) {
        for (float max_norm : {0.0f, 1.0f}) {
          INFO(name_of(level) << ", " << ranks << " ranks, max_norm " << max_norm);
          check_names(
              {.config = {.level = level}, .ranks = ranks, .max_norm = max_norm, .device = device});
        }
      }
    }
  }
}

TEST_CASE("windows and fused steps name them too") {
  for (const bool windows : {false, true}) {
    for (Level level : {Level::O0, Level::O2, Level::O3}) {
      INFO(name_of(level) << ", windows " << windows);
      check_names({.config = {.level = level, .windows = windows}, .ranks = 3});
    }
    for (const bool clipping : {false, true}) {
      for (Level level : {Level::O0, Level::O3}) {
        INFO("fused, " << name_of(level) << ", windows " << windows << ", clipping " << clipping);
        check_names({.config = {.level = level,
                                .sharding = Sharding::optimizer,
                                .schedule = Schedule::fused,
                                .windows = windows,
                                .clipping = clipping},
                     .ranks = 3});
      }
    }
  }
}

TEST_CASE("sums of micro-batches keep what was not finite in one of them") {
  for (DeviceType device : rank_devices()) {
    for (DType accumulator : {DType::f32, DType::bf16, DType::e4m3}) {
      for (int ranks : {1, 2}) {
        INFO(name_of(accumulator) << ", " << ranks << " ranks");
        check_names({.config = {.level = Level::O2, .micro_batches = 3, .accumulator = accumulator},
                     .ranks = ranks,
                     .device = device});
      }
    }
  }
}

TEST_CASE("a finite value that its format cannot hold is named") {
  // BF16 rounds the largest FP32 value to infinity.
  Run r{.config = {.level = Level::O0}};
  r.faults = {{2, 0, kMatrix, std::numeric_limits<float>::max()}};
  for (int ranks : {1, 2}) {
    r.ranks = ranks;
    for (const RankNames& result : run(r)) {
      CHECK(result.after_step.back() == Names{{"odd", 1}});
      CHECK(result.skipped == 1);
    }
  }
}

TEST_CASE("a norm that overflows and a bad learning rate name nobody") {
  // The value is finite, its square is not.
  Run r{.config = {.level = Level::O2}, .max_norm = 1.0f};
  r.faults = {{2, 0, kVector, 1e25f}};
  for (const RankNames& result : run(r)) {
    CHECK(result.after_step.back().empty());
    CHECK(result.skipped == 1);
  }
  const Context ctx = Context::cpu();
  const auto comm = make_single(ctx);
  Engine engine(ctx, *comm, {.level = Level::O2});
  std::vector<Buffer> keep;
  add_parameters(engine, ctx, keep);
  engine.freeze();
  const Buffer lr = upload<float>(ctx, {kNaN});
  hand_over(engine, ctx, common_gradient, 0, 1);
  CHECK(engine.step({.lr_device = lr.as<float>()}).skipped.read_sync() == 1);
  CHECK(names_of(engine).empty());
}

TEST_CASE("names are there after freeze() only") {
  const Context ctx = Context::cpu();
  const auto comm = make_single(ctx);
  const Engine engine(ctx, *comm, {});
  CHECK(missing(error_of([&] { engine.nonfinite_gradients_sync(); }),
                {"nonfinite_gradients_sync", "freeze"}) == "");
}

}  // namespace octet::test
