// SPDX-License-Identifier: Apache-2.0
// All shardings on every device have the bits of the CPU: states, scales, norms, and weights
// whenever they are used. The ranks are threads; on CUDA they share the GPUs.
#include "support/catch.hpp"
#include "support/unit_passes.hpp"

namespace octet::test {
namespace {

constexpr int kRanks[] = {1, 2, 3};
constexpr int kSteps = 10, kMicroBatches = 2;

/// How a run is made, beside what its bits depend on.
struct Way {
  const char* name;
  bool windows = false, apart = false, offload = false;
  std::int64_t bucket_elements = 20000;
};
constexpr Way kWays[] = {
    {.name = "one stream"},
    {.name = "small groups, states in host memory", .offload = true, .bucket_elements = 1},
    {.name = "windows", .windows = true},
    {.name = "two contexts", .apart = true},
    {.name = "two contexts and windows", .windows = true, .apart = true}};

/// tests/cuda has the streams that two contexts of a GPU need.
bool runs_on(const Way& way, DeviceType device, int ranks) {
  return !(way.apart && device == DeviceType::cuda) && !(way.windows && ranks == 1);
}

bool has(Sharding sharding, DType reduced) {
  return sharding != Sharding::none || reduced == DType::e4m3;
}

RunOptions options_of(DType reduced, int micro_batches, const Formats& formats) {
  RunOptions options;
  options.config = {.level = Level::O2,
                    .sharding = has(Sharding::none, reduced) ? Sharding::none : Sharding::optimizer,
                    .formats = formats,
                    .adamw = {.weight_decay = 0.1f, .seed = 5},
                    .reduced_gradient = reduced,
                    .micro_batches = micro_batches};
  options.steps = kSteps;
  options.max_norm = 0.5f;
  options.clip_every = 2;
  return options;
}

/// Every sharding on every device in every way.
void check_everywhere(RunOptions options, const std::vector<PassesResult>& expected) {
  for (DeviceType device : rank_devices()) {
    for (const Way& way : kWays) {
      if (!runs_on(way, device, options.ranks)) continue;
      for (Sharding sharding :
           {Sharding::none, Sharding::optimizer, Sharding::gradients, Sharding::parameters}) {
        if (!has(sharding, *options.config.reduced_gradient)) continue;
        options.device = device;
        options.config.sharding = sharding;
        options.config.windows = way.windows;
        options.config.offload_states = way.offload;
        options.config.bucket_elements = way.bucket_elements;
        options.engine_context = {};
        if (way.apart) options.engine_context = [](const Communicator&) { return Context::cpu(); };
        INFO((device == DeviceType::cpu ? "cpu, " : "cuda, ")
             << options.ranks << " ranks, " << name_of(sharding) << ", " << way.name
             << ", means in " << name_of(*options.config.reduced_gradient) << ", micro-batches "
             << options.config.micro_batches);
        CHECK(passes_difference(run_passes(options), expected) == "");
      }
    }
  }
}

}  // namespace

TEST_CASE("with the same gradient on all ranks every sharding has the CPU's bits everywhere") {
  const GradientFn gradient = remembered(common_gradient, 1, kSteps, kMicroBatches);
  for (const auto& [reduced, micro_batches] :
       {std::pair{DType::e4m3, 1}, {DType::e4m3, kMicroBatches}, {DType::f32, kMicroBatches}}) {
    RunOptions options = options_of(reduced, micro_batches, formats_of(Level::O2));
    options.gradient = gradient;
    const std::vector<PassesResult> expected = run_passes(options);
    REQUIRE(expected[0].held.step == kSteps);
    for (int ranks : kRanks) {
      options.ranks = ranks;
      check_everywhere(options, expected);
    }
  }
}

TEST_CASE("with gradients of their own all shardings of as many ranks have the CPU's bits") {
  constexpr int kFewSteps = 3;
  const GradientFn gradient = remembered(own_gradient, 3, kFewSteps, kMicroBatches);
  for (DType reduced : {DType::e4m3, DType::f32}) {
    for (const Formats& formats : {formats_of(Level::O2), small_formats()}) {
      for (int ranks : {2, 3}) {
        RunOptions options = options_of(reduced, kMicroBatches, formats);
        options.gradient = gradient;
        options.steps = kFewSteps;
        options.ranks = ranks;
        options.config.sharding = Sharding::optimizer;
        options.config.windows = false;
        INFO("m in " << name_of(formats.state.m));
        check_everywhere(options, run_passes(options));
      }
    }
  }
}

}  // namespace octet::test
