// SPDX-License-Identifier: Apache-2.0
// All shardings over NCCL, a GPU for each rank: the bits of the CPU after 50 steps, and checkpoints
// that go on there. With one GPU one rank runs.
#include <array>

#include "support/catch.hpp"
#include "support/checkpoint_run.hpp"
#include "support/folder.hpp"
#include "support/nccl_ranks.hpp"
#include "support/unit_passes.hpp"

namespace octet::test {
namespace {

constexpr Sharding kShardings[] = {Sharding::none, Sharding::optimizer, Sharding::gradients,
                                   Sharding::parameters};
constexpr int kSteps = 50;

RunOptions options_of(DType reduced, int ranks, const GradientFn& gradient) {
  RunOptions options;
  options.config = {
      .level = Level::O2,
      .sharding = reduced == DType::e4m3 ? Sharding::none : Sharding::optimizer,
      .adamw = {.weight_decay = 0.1f, .seed = 5},
      .reduced_gradient = reduced,
      .bucket_elements = 20000,
  };
  options.ranks = ranks;
  options.steps = kSteps;
  options.gradient = gradient;
  options.max_norm = 0.5f;
  options.clip_every = 2;
  return options;
}

struct Way {
  Sharding sharding;
  bool windows, two_streams;
};

std::string describe(const Way& way) {
  return std::string(name_of(way.sharding)) + ", windows " + std::to_string(way.windows) +
         ", two streams " + std::to_string(way.two_streams);
}

std::vector<Way> ways_of(DType reduced) {
  std::vector<Way> ways;
  for (Sharding sharding : kShardings) {
    if (sharding == Sharding::none && reduced == DType::f32) continue;
    for (bool windows : {false, true}) {
      for (bool two_streams : {false, true}) ways.push_back({sharding, windows, two_streams});
    }
  }
  return ways;
}

/// Every way on NCCL ranks against a run on the CPU.
void check_ways(const RunOptions& options, const std::vector<PassesResult>& expected, int ranks) {
  const std::vector<Way> ways = ways_of(*options.config.reduced_gradient);
  std::vector<std::vector<PassesResult>> results(ways.size());
  for (auto& each : results) each.resize(static_cast<std::size_t>(ranks));
  std::string refusal;
  const std::string errors = run_nccl_ranks(ranks, [&](Communicator& comm) {
    const Context apart = beside(comm);
    const std::string no_window = window_refusal(comm);
    if (comm.rank() == 0) refusal = no_window;
    for (std::size_t w = 0; w < ways.size(); ++w) {
      if (ways[w].windows && !no_window.empty()) continue;
      RunOptions mine = options;
      mine.config.sharding = ways[w].sharding;
      mine.config.windows = ways[w].windows;
      const Context& ctx = ways[w].two_streams ? apart : comm.context();
      PassesResult& result = results[w][static_cast<std::size_t>(comm.rank())];
      result = run_passes(ctx, comm, mine);
      // Many megabytes: one copy of what is equal will do.
      if (result.seen == expected[0].seen) result.seen.clear();
    }
  });
  REQUIRE(errors == "");
  std::vector<PassesResult> cleared = expected;
  for (PassesResult& each : cleared) each.seen.clear();
  for (std::size_t w = 0; w < ways.size(); ++w) {
    if (ways[w].windows && !refusal.empty()) continue;
    INFO(ranks << " NCCL ranks, " << describe(ways[w]) << ", means in "
               << name_of(*options.config.reduced_gradient));
    for (const PassesResult& each : results[w]) {
      CHECK((each.seen.empty() ? "" : first_difference(each.seen, expected[0].seen)) == "");
    }
    for (PassesResult& each : results[w]) each.seen.clear();
    CHECK(passes_difference(results[w], cleared) == "");
  }
  if (ranks > 1 && !refusal.empty()) WARN("skipped: windows, because " << refusal);
}

int ranks_or_warning() {
  const int ranks = nccl_ranks();
  if (ranks == 0) WARN("skipped: there is no CUDA device");
  if (ranks == 1) WARN("skipped: two NCCL ranks, because there is one CUDA device");
  return ranks;
}

}  // namespace

TEST_CASE("50 steps, the same gradient on all NCCL ranks: the bits of one rank on the CPU") {
  const int most = ranks_or_warning();
  if (most == 0) return;
  const GradientFn gradient = remembered(common_gradient, 1, kSteps, 1);
  for (DType reduced : {DType::e4m3, DType::f32}) {
    const RunOptions options = options_of(reduced, 1, gradient);
    const std::vector<PassesResult> expected = run_passes(options);
    REQUIRE(expected[0].held.step == kSteps);
    for (int ranks = 1; ranks <= most; ++ranks) check_ways(options, expected, ranks);
  }
}

TEST_CASE("50 steps, gradients of their own: the bits of as many threads on the CPU") {
  const int ranks = ranks_or_warning();
  if (ranks < 2) return;
  const GradientFn gradient = remembered(own_gradient, ranks, kSteps, 1);
  for (DType reduced : {DType::e4m3, DType::f32}) {
    const RunOptions options = options_of(reduced, ranks, gradient);
    check_ways(options, run_passes(options), ranks);
  }
}

namespace {

constexpr int kSavedAt = 3, kEnd = 5;

/// Trains on NCCL ranks, the same gradient on each, and saves. Memory is taken before the first
/// step and kept, so that no rank frees any while another waits for it.
std::string save_by_nccl(const std::string& directory, const EngineConfig& config, int ranks) {
  return run_nccl_ranks(ranks, [&](Communicator& comm) {
    const Context ctx = beside(comm);
    Engine engine(ctx, comm, config);
    std::vector<Buffer> keep, gradients;
    add_saved_params(engine, ctx, keep);
    engine.freeze();
    const std::vector<SavedParam> params = saved_params();
    for (int step = 1; step <= kSavedAt; ++step) {
      for (std::size_t p = 0; p < params.size(); ++p) {
        gradients.push_back(upload(ctx, leg_gradient(p, params[p].shape, step, comm.rank(), true)));
      }
    }
    for (int step = 1; step <= kSavedAt; ++step) {
      for (std::size_t p = params.size(); p-- > 0;) {
        const std::size_t at = static_cast<std::size_t>(step - 1) * params.size() + p;
        engine.add_gradient({static_cast<int>(p)},
                            view_of(ctx, gradients[at], DType::f32, params[p].shape));
      }
      engine.step({.lr = 1e-3f, .max_norm = step % 2 == 0 ? 0.01f : 0.0f});  // as take_step()
    }
    const CheckpointInfo info = save_checkpoint(engine, comm, directory);
    require(info.step == kSavedAt && info.ranks == ranks, "a checkpoint of step ", info.step,
            " by ", info.ranks, " ranks");
  });
}

EngineConfig saved_config(Sharding sharding, const Formats& formats) {
  return {.level = Level::O2,
          .sharding = sharding,
          .formats = formats,
          .adamw = {.weight_decay = 0.1f, .seed = 5},
          .reduced_gradient = formats.gradient,
          .bucket_elements = 20000};
}

}  // namespace

TEST_CASE("what NCCL ranks have saved goes on with threads on the CPU, to the bit") {
  const int saved_by = ranks_or_warning();
  if (saved_by == 0) return;
  for (const Formats& formats : {formats_of(Level::O2), small_formats()}) {
    for (Sharding from : kShardings) {
      const Folder folder;
      REQUIRE(save_by_nccl(folder.file("run"), saved_config(from, formats), saved_by) == "");
      for (const auto& [to, ranks] :
           {std::pair{Sharding::none, 1}, {Sharding::parameters, 3}, {Sharding::optimizer, 3}}) {
        const Leg whole{
            .config = saved_config(to, formats), .ranks = ranks, .end = kEnd, .watched = kSavedAt};
        Leg resumed = whole;
        resumed.begin = kSavedAt;
        resumed.before = [&](Engine& engine, Communicator& comm) {
          load_checkpoint(engine, comm, folder.file("run"));
        };
        const LegResult expected = run_leg(whole), got = run_leg(resumed);
        for (std::size_t r = 0; r < got.after.size(); ++r) {
          INFO("m in " << name_of(formats.state.m) << ", saved by " << saved_by << ", "
                       << name_of(from) << "; loaded by " << ranks << ", " << name_of(to)
                       << "; rank " << r);
          CHECK(first_difference(got.before[r], expected.watched[r]) == "");
          CHECK(first_difference(got.after[r], expected.after[r]) == "");
        }
      }
    }
  }
}

}  // namespace octet::test
