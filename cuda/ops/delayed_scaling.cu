// SPDX-License-Identifier: Apache-2.0
#include "cuda/device/dependent.cuh"
#include "cuda/device/launch.cuh"
#include "cuda/ops/cuda_ops.hpp"
#include "octet/ops/detail/delayed_math.hpp"

namespace octet::detail::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarp = 32;

/// A warp for a tensor. Casts before it still raise amaxes and products read scales until the wait;
/// a cast after it waits likewise before it takes its scale.
__global__ void __launch_bounds__(kThreads)
    delayed_kernel(const __grid_constant__ DelayedArgs args) {
  allow_next_kernel();
  wait_for_previous_kernel();
  const DelayedScalingConfig& config = args.config;
  const std::int64_t i = std::int64_t{blockIdx.x} * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (i >= args.tensor_count) return;
  const DelayedTensor t = args.tensors[i];
  const unsigned lane = threadIdx.x % kWarp;
  if (is_recorded(t.scale->amax)) {
    const std::uint32_t oldest = *t.next;
    std::uint32_t others = 0;
    for (unsigned h = lane; h < static_cast<unsigned>(config.amax_history_len); h += kWarp) {
      if (h != oldest) others = max(others, float_bits(t.history[h]));
    }
    others = __reduce_max_sync(0xFFFFFFFFu, others);
    if (lane == 0) record_amax(t, config, bits_float(others));
  }
  __syncwarp();
  if (lane == 0) t.scale->amax = 0.0f;
}

}  // namespace

void delayed_update(const Context& ctx, const DelayedArgs& args) {
  set_device(ctx);
  constexpr int kTensors = kThreads / kWarp;
  launch_dependent(ctx, delayed_kernel, (args.tensor_count + kTensors - 1) / kTensors, kThreads,
                   args);
}

}  // namespace octet::detail::cuda
