// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "cuda/check.hpp"
#include "cuda/device/reduce.cuh"
#include "cuda/device/vector8.cuh"
#include "cuda/ops/cuda_ops.hpp"
#include "octet/ops/detail/block_mean_math.hpp"

namespace octet::detail::cuda {
namespace {

using Code = Element<DType::e4m3>;
using Wide = Element<DType::f32>;

constexpr unsigned kThreads = 256;
/// A block of 128 elements has this many threads, with eight elements each.
constexpr unsigned kLanes = kMeanBlock / 8;
/// Thread blocks in flight over all pieces, enough to fill the largest GPUs several times over, and
/// for one piece; where a piece is small the others idle.
constexpr std::int64_t kTargetBlocks = 2048;
constexpr std::int64_t kMinBlocksPerPiece = 8;
constexpr std::int64_t kMaxGridY = 65535;

dim3 grid_for(std::int64_t pieces) {
  const std::int64_t y = std::min(pieces, kMaxGridY);
  const std::int64_t x = std::max(kMinBlocksPerPiece, (kTargetBlocks + y - 1) / y);
  return {static_cast<unsigned>(x), static_cast<unsigned>(y)};
}

__device__ bool is_aligned8(const void* data) {
  return reinterpret_cast<std::uintptr_t>(data) % 8 == 0;
}

/// Eight means from the codes at `at` on; `left` of them exist, the others are 0.
__device__ void sum8(const BlockMeanArgs& args, const BlockMeanPiece& piece, unsigned block,
                     std::int64_t at, std::int64_t left, float (&means)[8]) {
  for (int r = 0; r < args.ranks; ++r) {
    const std::uint8_t* codes = codes_of(args, piece, r) + at;
    const Vector8<Code> v = load8<Code>(codes, left, is_aligned8(codes));
    const float inv = block_scale_inv_of(args, piece, r, block);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const auto code = static_cast<std::uint8_t>(v.word[i / 4] >> (8 * (i % 4)));
      const float term = mean_term<DType::e4m3>(code, inv);
      means[i] = r == 0 ? term : means[i] + term;
    }
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) means[i] = i < left ? mean_of(means[i], args.ranks) : 0.0f;
}

/// Half a warp for a block; `exists` is whether it has one. Returns the bits of the largest
/// magnitude as it is stored.
template <class Out>
__device__ std::uint32_t reduce_block(const BlockMeanArgs& args, const BlockMeanPiece& piece,
                                      unsigned block, bool exists) {
  const unsigned lane = threadIdx.x % kLanes;
  const auto across = static_cast<unsigned>(blocks_of(piece));
  const std::int64_t column = std::int64_t{block % across} * kMeanBlock + 8 * lane;
  const std::int64_t at = block / across * piece.columns + column;
  const std::int64_t left = exists ? piece.columns - column : 0;
  float means[8] = {};
  if (left > 0) sum8(args, piece, block, at, left, means);
  std::uint32_t amax = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) amax = max(amax, magnitude_bits(means[i]));
#pragma unroll
  for (unsigned away = kLanes / 2; away > 0; away /= 2) {
    amax = max(amax, __shfl_xor_sync(0xFFFFFFFFu, amax, away));
  }
  if (!exists) return 0;
  auto* out = static_cast<typename Out::Storage*>(piece.out) + at;
  if constexpr (Out::kDType == DType::f32) {
    // Two vectors of four: 16 bytes is what an access can have.
    const bool aligned = reinterpret_cast<std::uintptr_t>(out) % 16 == 0;
    store8<Wide>(out, encode8<Wide>(means), left, aligned);
    return amax;
  } else {
    const TensorScale scale = block_mean_scale(amax);
#pragma unroll
    for (float& mean : means) mean *= scale.scale;
    store8<Code>(out, encode8<Code>(means), left, is_aligned8(out));
    // All lanes have read the old one: the shuffles lie between.
    if (lane == 0) args.own_scales[piece.packed + block] = scale.scale_inv;
    return magnitude_bits(stored_amax(scale, DType::e4m3));
  }
}

template <class Out>
__global__ void __launch_bounds__(kThreads)
    block_mean_kernel(const __grid_constant__ BlockMeanArgs args) {
  for (std::int64_t p = blockIdx.y; p < args.piece_count; p += gridDim.y) {
    const BlockMeanPiece piece = args.pieces[p];
    const auto blocks = static_cast<unsigned>(piece.rows * blocks_of(piece));
    std::uint32_t amax = 0;
    // The same number of rounds for all threads of a block: they meet in shuffles and in the end.
    for (unsigned first = blockIdx.x * (kThreads / kLanes); first < blocks;
         first += gridDim.x * (kThreads / kLanes)) {
      const unsigned block = first + threadIdx.x / kLanes;
      amax = max(amax, reduce_block<Out>(args, piece, block, block < blocks));
    }
    block_atomic_max(amax, args.amaxes + piece.tensor);
  }
}

template <bool kPack>
__global__ void __launch_bounds__(kThreads)
    block_scales_kernel(const BlockScalePiece* pieces, std::int64_t count, float* packed) {
  for (std::int64_t p = blockIdx.y; p < count; p += gridDim.y) {
    const BlockScalePiece piece = pieces[p];
    const auto blocks = static_cast<unsigned>(piece.blocks);
    const auto scales = static_cast<unsigned>(piece.rows) * blocks;
    for (unsigned i = blockIdx.x * kThreads + threadIdx.x; i < scales; i += gridDim.x * kThreads) {
      float& in_matrix = piece.scales[i % blocks * piece.pitch + i / blocks];
      float& in_pack = packed[piece.packed + i];
      if constexpr (kPack) {
        in_pack = in_matrix;
      } else {
        in_matrix = in_pack;
      }
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    merge_amaxes_kernel(const std::uint32_t* gathered, int ranks, std::int64_t count,
                        TensorScale* scales, std::uint32_t* nonfinite) {
  const std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i <= count && merge_amax(gathered, ranks, count, i, scales)) atomicOr(nonfinite, 1u);
}

}  // namespace

void pack_block_scales(const Context& ctx, const BlockScalePiece* pieces, std::int64_t count,
                       float* packed) {
  set_device(ctx);
  block_scales_kernel<true><<<grid_for(count), kThreads, 0, ctx.stream()>>>(pieces, count, packed);
  OCTET_CUDA_CHECK(cudaGetLastError());
}

void unpack_block_scales(const Context& ctx, const BlockScalePiece* pieces, std::int64_t count,
                         const float* packed) {
  set_device(ctx);
  block_scales_kernel<false>
      <<<grid_for(count), kThreads, 0, ctx.stream()>>>(pieces, count, const_cast<float*>(packed));
  OCTET_CUDA_CHECK(cudaGetLastError());
}

void block_mean(const Context& ctx, const BlockMeanArgs& args) {
  set_device(ctx);
  const dim3 grid = grid_for(args.piece_count);
  if (args.out_dtype == DType::f32) {
    block_mean_kernel<Wide><<<grid, kThreads, 0, ctx.stream()>>>(args);
  } else {
    block_mean_kernel<Code><<<grid, kThreads, 0, ctx.stream()>>>(args);
  }
  OCTET_CUDA_CHECK(cudaGetLastError());
}

void merge_amaxes(const Context& ctx, const std::uint32_t* gathered, int ranks, std::int64_t count,
                  TensorScale* scales, std::uint32_t* nonfinite) {
  set_device(ctx);
  const auto blocks = static_cast<unsigned>(count / kThreads + 1);
  merge_amaxes_kernel<<<blocks, kThreads, 0, ctx.stream()>>>(gathered, ranks, count, scales,
                                                             nonfinite);
  OCTET_CUDA_CHECK(cudaGetLastError());
}

}  // namespace octet::detail::cuda
