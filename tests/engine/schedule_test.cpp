// SPDX-License-Identifier: Apache-2.0
// The schedules of a sharded optimizer: equal bits, whatever the ranks and the formats; what a step
// may not ask for.
#include <sstream>

#include "octet/engine/engine.hpp"
#include "support/catch.hpp"
#include "support/compare.hpp"
#include "support/engine_model.hpp"
#include "support/errors.hpp"

namespace octet::test {
namespace {

RunOptions options_of(Level level, int ranks, DeviceType device = DeviceType::cpu) {
  RunOptions options;
  options.config = {
      .level = level, .sharding = Sharding::optimizer, .adamw = {.weight_decay = 0.1f, .seed = 5}};
  options.ranks = ranks;
  options.device = device;
  options.gradient = own_gradient;
  return options;
}

std::string describe(const RunOptions& options) {
  std::ostringstream text;
  text << name_of(options.config.level) << ", " << options.ranks << " ranks, clipping "
       << options.config.clipping << ", max_norm " << options.max_norm << " every "
       << options.clip_every << " steps, cuda " << (options.device == DeviceType::cuda);
  return text.str();
}

/// The same over windows. Ranks that share a GPU keep to the schedule without kernels that wait for
/// one another.
void check_windows(RunOptions options, const std::vector<RankResult>& expected) {
  options.config.windows = true;
  for (Schedule schedule : {Schedule::after_backward, Schedule::fused}) {
    const bool waits = schedule == Schedule::after_backward || options.config.clipping;
    if (waits && options.device == DeviceType::cuda) continue;
    options.config.schedule = schedule;
    INFO(name_of(schedule) << ", windows");
    const std::vector<RankResult> results = train(options);
    CHECK(rank_difference(results) == "");
    CHECK(first_difference(everything(results), everything(expected)) == "");
    for (const RankResult& result : results) {
      CHECK(result.payload_per_step == result.plan.wire_bytes_per_step);
      CHECK(missing(result.plan.to_markdown(), {"memory", "window"}) == "");
    }
  }
}

/// The same run after backward and fused, and with overlap where streams are apart: on a CPU.
void check_schedules(RunOptions options) {
  INFO(describe(options));
  options.config.schedule = Schedule::after_backward;
  const std::vector<RankResult> after = train(options);
  options.config.schedule = Schedule::fused;
  const std::vector<RankResult> fused = train(options);
  CHECK(rank_difference(fused) == "");
  CHECK(first_difference(everything(fused), everything(after)) == "");
  for (std::size_t r = 0; r < fused.size(); ++r) {
    CHECK(first_difference(fused[r].norms, after[r].norms) == "");
    CHECK(fused[r].step == after[r].step);
    CHECK(fused[r].skipped == after[r].skipped);
    CHECK(fused[r].payload_per_step == after[r].payload_per_step);
    CHECK(fused[r].payload_per_step == fused[r].plan.wire_bytes_per_step);
  }
  check_windows(options, after);
  if (options.device != DeviceType::cpu) return;
  options.engine_context = [](const Communicator&) { return Context::cpu(); };
  for (Schedule schedule : {Schedule::overlap, Schedule::fused}) {
    options.config.schedule = schedule;
    INFO(name_of(schedule) << ", two contexts");
    CHECK(first_difference(everything(train(options)), everything(after)) == "");
  }
}

}  // namespace

TEST_CASE("all schedules give the same bits, at every level, for any number of ranks") {
  for (DeviceType device : rank_devices()) {
    for (Level level : {Level::O0, Level::O1, Level::O2, Level::O3}) {
      for (int ranks : {2, 3, 5, 8}) {
        RunOptions options = options_of(level, ranks, device);
        options.config.clipping = false;
        check_schedules(options);
      }
    }
  }
}

TEST_CASE("all schedules give the same bits with the smallest formats and with FP32") {
  for (DeviceType device : rank_devices()) {
    for (const Formats& formats : {small_formats(), Formats{}, Formats{DType::bf16, {}}}) {
      for (int ranks : {2, 3, 5}) {
        RunOptions options = options_of(Level::O2, ranks, device);
        options.config.formats = formats;
        options.config.clipping = false;
        check_schedules(options);
      }
    }
  }
}

TEST_CASE("steps that clip take the buffer, and the others do not, in turn") {
  for (DeviceType device : rank_devices()) {
    for (Level level : {Level::O0, Level::O3}) {
      for (int clip_every : {1, 2}) {
        RunOptions options = options_of(level, 3, device);
        options.max_norm = 0.5f;
        options.clip_every = clip_every;
        check_schedules(options);
      }
    }
  }
}

TEST_CASE("buckets of every size and micro-batches give the same bits with all schedules") {
  for (std::int64_t elements : {1, 20000}) {
    RunOptions options = options_of(Level::O3, 3);
    options.config.micro_batches = elements == 1 ? 3 : 1;
    options.config.clipping = false;
    options.config.bucket_elements = elements;
    check_schedules(options);
  }
}

TEST_CASE("more ranks than most parameters have panels") {
  RunOptions options = options_of(Level::O3, 64);
  options.steps = 2;
  options.config.clipping = false;
  check_schedules(options);
}

TEST_CASE("with the schedule fused a NaN on one rank skips the step on all") {
  for (DeviceType device : rank_devices()) {
    for (Level level : {Level::O0, Level::O3}) {
      for (std::size_t p : {0u, 3u}) {
        RunOptions options = options_of(level, 3, device);
        options.config.schedule = Schedule::fused;
        options.config.clipping = false;
        options.steps = 3;
        const std::vector<RankResult> clean = train(options);
        options.steps = 4;
        options.gradient = [p](int rank, std::size_t q, int step) {
          std::vector<float> g = own_gradient(rank, q, step < 3 ? step : step - 1);
          if (step == 3 && rank == 1 && q == p) g[g.size() / 2] = NAN;
          return g;
        };
        const std::vector<RankResult> results = train(options);
        INFO(describe(options) << ", parameter " << p);
        CHECK(rank_difference(results) == "");
        CHECK(first_difference(everything(results), everything(clean)) == "");
        for (const RankResult& result : results) {
          CHECK(result.step == 3);
          CHECK(result.skipped == 1);
        }
      }
    }
  }
}

TEST_CASE("a parameter without a gradient counts as zero with all schedules") {
  RunOptions options = options_of(Level::O3, 3);
  options.config.clipping = false;
  options.gradient = [](int rank, std::size_t p, int step) {
    const bool has_none = p % 3 == 0 && (rank == 1 || step == 2);
    return has_none ? std::vector<float>() : own_gradient(rank, p, step);
  };
  check_schedules(options);
}

TEST_CASE("the plan says which schedule runs and why; clipping that was ruled out is refused") {
  const auto schedule_of = [](Level level, int ranks, Schedule schedule, bool clipping) {
    RunOptions options = options_of(level, ranks);
    options.config.sharding.reset();
    options.config.schedule = schedule;
    options.config.clipping = clipping;
    options.steps = 1;
    const std::vector<RankResult> results = train(options);
    CHECK(missing(results[0].plan.to_markdown(), {results[0].plan.schedule}) == "");
    return results[0].plan.schedule;
  };
  const Schedule fused = Schedule::fused, after = Schedule::after_backward;
  CHECK(missing(schedule_of(Level::O3, 2, after, true), {"after backward"}) == "");
  CHECK(missing(schedule_of(Level::O3, 2, fused, true), {"fused", "clipping is true"}) == "");
  CHECK(missing(schedule_of(Level::O3, 2, fused, false), {"fused", "clipping is false"}) == "");
  CHECK(missing(schedule_of(Level::O2, 2, after, false), {"after backward"}) == "");
  CHECK(missing(schedule_of(Level::O3, 1, after, true), {"one rank"}) == "");
  for (Schedule schedule : {after, fused}) {
    RunOptions options = options_of(Level::O3, 2);
    options.config.schedule = schedule;
    options.config.clipping = false;
    options.max_norm = 0.5f;
    CHECK(missing(error_of([&] { train(options); }),
                  {"Engine::step", "max_norm is 0.5", "clipping is false"}) == "");
  }
}

}  // namespace octet::test
