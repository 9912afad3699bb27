// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "kernels.hpp"

namespace train_gpt {

inline void check_cuda(cudaError_t status, const char* what) {
  octet::require(status == cudaSuccess, what, " failed: ", cudaGetErrorString(status));
}

/// The stream of a context whose device is made current for the launch that follows.
inline cudaStream_t enter(const octet::Context& ctx) {
  check_cuda(cudaSetDevice(ctx.device().index), "cudaSetDevice");
  return ctx.stream();
}

inline void check_launch(const char* kernel) { check_cuda(cudaGetLastError(), kernel); }

inline unsigned blocks_for(std::int64_t count, std::int64_t per_block) {
  return static_cast<unsigned>((count + per_block - 1) / per_block);
}

constexpr unsigned kAllLanes = 0xFFFFFFFFu;

/// Sum over a group of 2^k neighbouring lanes, the same in each of them.
template <int kLanes>
__device__ inline float lane_sum(float x) {
  for (int step = kLanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

template <int kLanes>
__device__ inline float lane_max(float x) {
  for (int step = kLanes / 2; step > 0; step /= 2) {
    x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, step));
  }
  return x;
}

void attention_forward_cuda(const octet::Context& ctx, const AttentionShape& shape,
                            const float* qkv, float* out, float* log_sum);
void attention_backward_cuda(const octet::Context& ctx, const AttentionShape& shape,
                             const float* dout, const float* qkv, const float* out,
                             const float* log_sum, float* dqkv);

}  // namespace train_gpt
