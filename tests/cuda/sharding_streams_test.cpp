// SPDX-License-Identifier: Apache-2.0
// All shardings with the communicator on a stream of its own: the bits of the CPU, with either
// stream late. The ranks are threads.
#include "support/catch.hpp"
#include "support/late_streams.hpp"
#include "support/unit_passes.hpp"

namespace octet::test {
namespace {

constexpr Sharding kShardings[] = {Sharding::none, Sharding::optimizer, Sharding::gradients,
                                   Sharding::parameters};
constexpr int kSteps = 3, kMostRanks = 3;
enum class LateOne { none, compute, collectives };

std::vector<PassesResult> run_on_two_streams(const RunOptions& options, LateOne late) {
  std::vector<PassesResult> results(static_cast<std::size_t>(options.ranks));
  run_ranks(
      options.ranks,
      [&](Communicator& inner) {
        Late slow(inner);
        Communicator& comm =
            late == LateOne::collectives ? static_cast<Communicator&>(slow) : inner;
        const Context ctx = beside(inner);
        PassesRun run(ctx, comm, options);
        results[static_cast<std::size_t>(inner.rank())] = run([&] {
          if (late == LateOne::compute) delay(ctx.stream());
        });
      },
      options.rank_devices());
  return results;
}

void check_shardings(RunOptions options, const std::vector<PassesResult>& expected) {
  options.device = DeviceType::cuda;
  for (Sharding sharding : kShardings) {
    if (sharding == Sharding::none && options.config.reduced_gradient == DType::f32) continue;
    for (bool windows : {false, true}) {
      for (LateOne late : {LateOne::none, LateOne::compute, LateOne::collectives}) {
        // A window is not made through a communicator that is late.
        if (windows && (options.ranks == 1 || late == LateOne::collectives)) continue;
        options.config.sharding = sharding;
        options.config.windows = windows;
        INFO(name_of(sharding) << ", " << options.ranks << " ranks, windows " << windows
                               << ", late " << static_cast<int>(late) << ", micro-batches "
                               << options.config.micro_batches << ", offload "
                               << options.config.offload_states);
        CHECK(passes_difference(run_on_two_streams(options, late), expected) == "");
      }
    }
  }
}

}  // namespace

TEST_CASE("on two streams every sharding has the CPU's bits, whichever is late") {
  if (cuda_device_count() == 0) {
    WARN("no CUDA device: nothing to overlap");
    return;
  }
  const GradientFn gradient = remembered(own_gradient, kMostRanks, kSteps, 2);
  for (DType reduced : {DType::e4m3, DType::f32}) {
    for (int ranks = 1; ranks <= kMostRanks; ++ranks) {
      for (int micro_batches : {1, 2}) {
        RunOptions options;
        options.config = {.level = Level::O2,
                          .sharding = Sharding::optimizer,
                          .adamw = {.weight_decay = 0.1f, .seed = 5},
                          .reduced_gradient = reduced,
                          .bucket_elements = 20000,
                          .micro_batches = micro_batches};
        options.gradient = gradient;
        options.ranks = ranks;
        options.steps = kSteps;
        options.max_norm = 0.5f;
        options.clip_every = 2;
        const std::vector<PassesResult> expected = run_passes(options);
        options.config.offload_states = micro_batches == 2;
        check_shardings(options, expected);
      }
    }
  }
}

}  // namespace octet::test
