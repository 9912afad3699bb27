// SPDX-License-Identifier: Apache-2.0
#include "cuda/check.hpp"
#include "cuda/ops/cuda_ops.hpp"
#include "octet/ops/detail/delayed_math.hpp"

namespace octet::detail::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarp = 32;

/// A warp for a tensor.
__global__ void __launch_bounds__(kThreads)
    delayed_kernel(const DelayedTensor* tensors, std::int64_t count, DelayedScalingConfig config) {
  const std::int64_t i = std::int64_t{blockIdx.x} * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (i >= count) return;
  const DelayedTensor t = tensors[i];
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
  const auto blocks = static_cast<unsigned>((args.tensor_count + kTensors - 1) / kTensors);
  delayed_kernel<<<blocks, kThreads, 0, ctx.stream()>>>(args.tensors, args.tensor_count,
                                                        args.config);
  OCTET_CUDA_CHECK(cudaGetLastError());
}

}  // namespace octet::detail::cuda
