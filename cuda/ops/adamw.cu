// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "cuda/check.hpp"
#include "cuda/device/reduce.cuh"
#include "cuda/ops/cuda_ops.hpp"
#include "octet/ops/detail/adamw_math.hpp"

namespace octet::detail::cuda {
namespace {

// 256 lanes per segment: the order of summation of the gradient norm.
constexpr int kLanes = 256;
// One block decides the step; every thread takes every 1024th tensor.
constexpr int kPrepareThreads = 1024;
constexpr std::int64_t kMaxBlocks = 2048;

__global__ void __launch_bounds__(kLanes) sum_squares_kernel(AdamwArgs args, float* sums) {
  __shared__ float lanes[kLanes];
  const Segment segment = args.segments[blockIdx.x];
  const AdamwTensor tensor = args.tensors[segment.tensor];
  const float inv = tensor.gradient_scale->scale_inv;
  float sum = 0.0f;
  for (std::int64_t i = threadIdx.x; i < segment.count; i += kLanes) {
    const float g = gradient_at(tensor, inv, segment, i);
    sum = fma_of(g, g, sum);
  }
  lanes[threadIdx.x] = sum;
  for (unsigned width = kLanes / 2; width > 0; width /= 2) {
    __syncthreads();
    if (threadIdx.x < width) lanes[threadIdx.x] += lanes[threadIdx.x + width];
  }
  if (threadIdx.x == 0) sums[segment.index] = lanes[0];
}

/// The binary tree over all segments: every thread sums an aligned run of a power of two, then the
/// runs are paired up. The same tree as pairwise_sum over everything.
__device__ double sum_of_segments(const AdamwArgs& args) {
  __shared__ double runs[kPrepareThreads];
  std::int64_t length = 1;
  while (length * kPrepareThreads < args.total_segments) length *= 2;
  const std::int64_t begin = std::int64_t{threadIdx.x} * length;
  const std::int64_t left = args.total_segments - begin;
  const std::int64_t count = left < 0 ? 0 : left < length ? left : length;
  runs[threadIdx.x] = pairwise_sum(
      count, [&](std::int64_t i) { return static_cast<double>(args.segment_sums[begin + i]); });
  for (unsigned stride = 1; stride < kPrepareThreads; stride *= 2) {
    __syncthreads();
    if (threadIdx.x % (2 * stride) == 0) runs[threadIdx.x] += runs[threadIdx.x + stride];
  }
  __syncthreads();
  return runs[0];
}

__global__ void __launch_bounds__(kPrepareThreads) prepare_kernel(AdamwArgs args) {
  __shared__ AdamwScalars s;
  const double sum = args.max_norm > 0.0f ? sum_of_segments(args) : 0.0;
  if (threadIdx.x == 0) {
    s = *args.scalars;
    begin_step(s, args.config, args.lr_device != nullptr ? *args.lr_device : args.lr);
    measure_clip(s, args.max_norm, args.config.maximize, [&] { return sum; });
  }
  __syncthreads();
  bool skip = must_skip(s, args.nonfinite);
  for (std::int64_t t = threadIdx.x; t < args.tensor_count; t += kPrepareThreads) {
    skip = skip || !bounds_are_finite(bounds_of(s, args.tensors[t]), args.tensors[t]);
  }
  skip = __syncthreads_or(skip ? 1 : 0) != 0;
  if (threadIdx.x == 0) {
    end_decision(s, skip, args.nonfinite);
    *args.scalars = s;
  }
  if (skip) return;
  for (std::int64_t t = threadIdx.x; t < args.tensor_count; t += kPrepareThreads) {
    renew_scales(args.tensors[t], bounds_of(s, args.tensors[t]), args.scales[t]);
  }
}

__global__ void initialise_scales_kernel(AdamwTensor tensor) {
  initialise_scales(tensor, tensor.master_scale->amax);
}

__global__ void __launch_bounds__(kLanes)
    initialise_weight_kernel(AdamwTensor tensor, TensorView values, std::int64_t count) {
  const std::int64_t threads = std::int64_t{gridDim.x} * kLanes;
  for (std::int64_t i = std::int64_t{blockIdx.x} * kLanes + threadIdx.x; i < count; i += threads) {
    initialise_weight(tensor, values, i);
  }
}

__global__ void __launch_bounds__(kLanes)
    initialise_state_kernel(AdamwTensor tensor, TensorView values, Piece piece,
                            std::int64_t local) {
  const std::int64_t threads = std::int64_t{gridDim.x} * kLanes;
  for (std::int64_t i = std::int64_t{blockIdx.x} * kLanes + threadIdx.x; i < piece.count;
       i += threads) {
    initialise_state(tensor, values, piece.begin + i, local + i);
  }
}

unsigned blocks_for(std::int64_t threads) {
  return static_cast<unsigned>(
      std::clamp<std::int64_t>((threads + kLanes - 1) / kLanes, 1, kMaxBlocks));
}

}  // namespace

void adamw_initialise(const Context& ctx, const AdamwInit& init) {
  cuda::measure_amax(ctx, init.values, init.tensor.master_scale);
  initialise_scales_kernel<<<1, 1, 0, ctx.stream()>>>(init.tensor);
  const std::int64_t count = init.values.numel();
  initialise_weight_kernel<<<blocks_for(count), kLanes, 0, ctx.stream()>>>(init.tensor, init.values,
                                                                           count);
  std::int64_t local = 0;
  for (std::int64_t p = 0; p < init.piece_count; ++p) {
    const Piece piece = init.pieces[p];
    initialise_state_kernel<<<blocks_for(piece.count), kLanes, 0, ctx.stream()>>>(
        init.tensor, init.values, piece, local);
    local += piece.count;
  }
  OCTET_CUDA_CHECK(cudaGetLastError());
}

void adamw_sum_squares(const Context& ctx, const AdamwArgs& args, float* sums) {
  set_device(ctx);
  sum_squares_kernel<<<static_cast<unsigned>(args.segment_count), kLanes, 0, ctx.stream()>>>(args,
                                                                                             sums);
  OCTET_CUDA_CHECK(cudaGetLastError());
}

void adamw_prepare(const Context& ctx, const AdamwArgs& args) {
  set_device(ctx);
  prepare_kernel<<<1, kPrepareThreads, 0, ctx.stream()>>>(args);
  OCTET_CUDA_CHECK(cudaGetLastError());
}

}  // namespace octet::detail::cuda
