// SPDX-License-Identifier: Apache-2.0
// Norm of a step and set-up; the decision is in adamw_prepare.cu, the update in adamw_update.cu.
#include <algorithm>

#include "cuda/check.hpp"
#include "cuda/device/reduce.cuh"
#include "cuda/ops/adamw_weight.cuh"
#include "cuda/ops/cuda_ops.hpp"
#include "octet/ops/detail/adamw_initial.hpp"

namespace octet::detail::cuda {
namespace {

// 256 lanes per segment, each taking runs of 16 elements: the order of summation of the norm.
constexpr int kLanes = 256;
constexpr int kRun = 16;
constexpr std::int64_t kMaxBlocks = 2048;

/// A run of gradients as they decode, with 16-byte loads where the address allows it.
template <DType D>
__device__ void load_run(const void* data, std::int64_t at, std::int64_t count,
                         float (&run)[2][kVector]) {
  constexpr std::size_t kBytes = size_of(D);
  const char* first = static_cast<const char*>(data) + at * static_cast<std::int64_t>(kBytes);
  if (count >= kRun && reinterpret_cast<std::uintptr_t>(first) % 16 == 0) {
    Packed<kBytes> half[2];
    if constexpr (kBytes == 1) {
      const uint4 all = __ldcs(reinterpret_cast<const uint4*>(first));
      half[0] = {all.x, all.y};
      half[1] = {all.z, all.w};
    } else {
      half[0] = load_packed<kBytes>(first, 0);
      half[1] = load_packed<kBytes>(first, kVector);
    }
    decode<D>(half[0], run[0]);
    decode<D>(half[1], run[1]);
    return;
  }
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    run[i / kVector][i % kVector] = i < count ? load_element(data, D, at + i) : 0.0f;
  }
}

template <DType D>
__device__ float sum_lane(const AdamwTensor& tensor, const Segment& segment,
                          std::uint32_t& largest) {
  const float inv = tensor.gradient_scale->scale_inv;
  const std::int64_t first = offsets_of(tensor, segment).gradient;
  float sum = 0.0f;
#pragma unroll 4
  for (int i = threadIdx.x * kRun; i < segment.count; i += kLanes * kRun) {
    float run[2][kVector];
    load_run<D>(tensor.gradient, first + i, segment.count - i, run);
#pragma unroll
    for (int k = 0; k < kRun; ++k) {
      const float g = run[k / kVector][k % kVector] * inv;
      sum = fma_of(g, g, sum);
      largest = larger(largest, magnitude_bits(g));
    }
  }
  return sum;
}

__global__ void __launch_bounds__(kLanes) measure_kernel(AdamwArgs args, float* sums) {
  __shared__ float lanes[kLanes];
  const Segment segment = args.segments[blockIdx.x];
  const AdamwTensor& tensor = args.tensors[segment.tensor];
  std::uint32_t largest = 0;
  switch (tensor.gradient_dtype) {
    case DType::e4m3: lanes[threadIdx.x] = sum_lane<DType::e4m3>(tensor, segment, largest); break;
    case DType::bf16: lanes[threadIdx.x] = sum_lane<DType::bf16>(tensor, segment, largest); break;
    default: lanes[threadIdx.x] = sum_lane<DType::f32>(tensor, segment, largest); break;
  }
  if (tensor.measure_amax) {
    block_atomic_max(largest, reinterpret_cast<std::uint32_t*>(&tensor.gradient_scale->amax));
  }
  if (args.nonfinite != nullptr && !is_finite_bits(largest)) atomicOr(args.nonfinite, 1u);
  for (unsigned width = kLanes / 2; width > 0; width /= 2) {
    __syncthreads();
    if (threadIdx.x < width) lanes[threadIdx.x] += lanes[threadIdx.x + width];
  }
  if (threadIdx.x == 0) sums[segment.index] = lanes[0];
}

__global__ void initialise_scales_kernel(AdamwTensor tensor) {
  initialise_scales(tensor, tensor.master_scale->amax);
}

// The weights of a piece, stored from element `stored` on.
__global__ void __launch_bounds__(kLanes)
    initialise_weight_kernel(AdamwTensor tensor, TensorView values, Piece piece,
                             std::int64_t stored) {
  const std::int64_t threads = std::int64_t{gridDim.x} * kLanes;
  for (std::int64_t i = std::int64_t{blockIdx.x} * kLanes + threadIdx.x; i < piece.count;
       i += threads) {
    initialise_weight(tensor, values, piece.begin + i, stored + i);
  }
}

/// A block of threads for each tile.
__global__ void __launch_bounds__(kLanes)
    initialise_tiles_kernel(AdamwTensor tensor, TensorView values, Piece piece,
                            std::int64_t stored) {
  const std::int64_t across = (tensor.columns + kTileSide - 1) / kTileSide;
  const std::int64_t begin = piece.begin + blockIdx.x / across * kTileSide * tensor.columns;
  const AdamwTile tile =
      tile_of(tensor, panel_of(tensor, Segment{.begin = begin}), blockIdx.x % across);
  cast_tile(tensor, initial_step(tensor), nullptr, tile, stored - piece.begin,
            [&](std::int64_t i) { return initial_master(tensor, values, i); });
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

void initialise_weights(const Context& ctx, const AdamwTensor& tensor, const TensorView& values,
                        const Piece& piece, std::int64_t stored) {
  if (piece.count == 0) return;
  if (has_block_scales(tensor.formats.weight)) {
    const auto tiles_of = [](std::int64_t side) { return (side + kTileSide - 1) / kTileSide; };
    const std::int64_t tiles = tiles_of(piece.count / tensor.columns) * tiles_of(tensor.columns);
    initialise_tiles_kernel<<<static_cast<unsigned>(tiles), kLanes, 0, ctx.stream()>>>(
        tensor, values, piece, stored);
  } else {
    initialise_weight_kernel<<<blocks_for(piece.count), kLanes, 0, ctx.stream()>>>(tensor, values,
                                                                                   piece, stored);
  }
}

}  // namespace

void adamw_initialise(const Context& ctx, const AdamwInit& init) {
  cuda::measure_amax(ctx, init.values, init.tensor.master_scale);
  initialise_scales_kernel<<<1, 1, 0, ctx.stream()>>>(init.tensor);
  const AdamwTensor& tensor = init.tensor;
  if (!tensor.weight_is_shard) {
    initialise_weights(ctx, tensor, init.values, {.count = init.values.numel()}, 0);
  }
  std::int64_t local = 0;
  for (std::int64_t p = 0; p < init.piece_count; ++p) {
    const Piece piece = init.pieces[p];
    if (tensor.weight_is_shard) initialise_weights(ctx, tensor, init.values, piece, local);
    initialise_state_kernel<<<blocks_for(piece.count), kLanes, 0, ctx.stream()>>>(
        tensor, init.values, piece, local);
    local += piece.count;
  }
  OCTET_CUDA_CHECK(cudaGetLastError());
}

void adamw_measure(const Context& ctx, const AdamwArgs& args, float* sums) {
  set_device(ctx);
  measure_kernel<<<static_cast<unsigned>(args.segment_count), kLanes, 0, ctx.stream()>>>(args,
                                                                                         sums);
  OCTET_CUDA_CHECK(cudaGetLastError());
}

}  // namespace octet::detail::cuda
