// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "cuda/check.hpp"
#include "cuda/device/mean_pack.cuh"
#include "cuda/ops/cuda_ops.hpp"
#include "octet/ops/detail/mean_math.hpp"

namespace octet::detail::cuda {
namespace {

constexpr int kThreads = 256;
// Blocks in flight over all pieces: enough to fill the largest GPUs several times over.
constexpr std::int64_t kTargetBlocks = 2048;
// A piece gets at least so many blocks; small pieces leave the others idle.
constexpr std::int64_t kMinBlocksPerPiece = 16;
constexpr std::int64_t kMaxGridY = 65535;

template <class In, class Out>
__device__ void reduce_element(const MeanArgs& args, const MeanPiece& piece, std::int64_t i) {
  using Storage = typename In::Storage;
  auto sum = mean_term<In::kDType>(contribution_of<Storage>(args, piece, 0)[i],
                                   scale_inv_of(args, piece, 0));
  for (int r = 1; r < args.ranks; ++r) {
    sum += mean_term<In::kDType>(contribution_of<Storage>(args, piece, r)[i],
                                 scale_inv_of(args, piece, r));
  }
  static_cast<typename Out::Storage*>(piece.out)[i] =
      mean_code<Out::kDType>(mean_of(sum, args.ranks), args.mean_scales[piece.tensor].scale);
}

// The same for one 16-byte pack of contributions.
template <class In, class Out>
__device__ void reduce_pack(const MeanArgs& args, const MeanPiece& piece, std::int64_t p) {
  using Mean = PackMean<In, Out>;
  Mean mean;
#pragma unroll 4
  for (int r = 0; r < args.ranks; ++r) {
    const auto* from = contribution_of<typename In::Storage>(args, piece, r);
    mean.add(r, reinterpret_cast<const uint4*>(from)[p], scale_inv_of(args, piece, r));
  }
  uint4 packs[Mean::kOutPacks];
  mean.round(args.ranks, args.mean_scales[piece.tensor].scale, packs);
  auto* out = static_cast<uint4*>(piece.out) + p * Mean::kOutPacks;
#pragma unroll
  for (int k = 0; k < Mean::kOutPacks; ++k) out[k] = packs[k];
}

__device__ bool is_aligned(const MeanArgs& args, const MeanPiece& piece) {
  const auto staging = reinterpret_cast<std::uintptr_t>(args.staging);
  const auto bits = reinterpret_cast<std::uintptr_t>(piece.own) |
                    reinterpret_cast<std::uintptr_t>(piece.out) | staging |
                    static_cast<std::uintptr_t>(args.stride) |
                    static_cast<std::uintptr_t>(piece.staged);
  return bits % 16 == 0;
}

template <class In, class Out>
__global__ void __launch_bounds__(kThreads) reduce_mean_kernel(MeanArgs args) {
  constexpr std::int64_t kPack = Pack16<typename In::Storage>::kCount;
  const std::int64_t thread = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const std::int64_t threads = std::int64_t{gridDim.x} * kThreads;
  for (std::int64_t p = blockIdx.y; p < args.piece_count; p += gridDim.y) {
    const MeanPiece piece = args.pieces[p];
    const std::int64_t packs = is_aligned(args, piece) ? piece.count / kPack : 0;
    for (std::int64_t i = thread; i < packs; i += threads) reduce_pack<In, Out>(args, piece, i);
    for (std::int64_t i = packs * kPack + thread; i < piece.count; i += threads) {
      reduce_element<In, Out>(args, piece, i);
    }
  }
}

__global__ void __launch_bounds__(kThreads) mean_scales_kernel(MeanArgs args) {
  const std::int64_t t = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (t >= args.tensor_count) return;
  const float bound = mean_bound(args, t);
  if (!is_finite_bits(magnitude_bits(bound))) atomicOr(args.nonfinite, 1u);
  args.mean_scales[t] = mean_scale(args.out_dtype, bound);
}

__global__ void __launch_bounds__(kThreads)
    max_amax_kernel(const TensorScale* gathered, int ranks, std::int64_t count, TensorScale* out) {
  const std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i < count) out[i].amax = largest_amax(gathered, ranks, count, i);
}

unsigned blocks_for(std::int64_t threads) {
  return static_cast<unsigned>((threads + kThreads - 1) / kThreads);
}

}  // namespace

void mean_scales(const Context& ctx, const MeanArgs& args) {
  set_device(ctx);
  mean_scales_kernel<<<blocks_for(args.tensor_count), kThreads, 0, ctx.stream()>>>(args);
  OCTET_CUDA_CHECK(cudaGetLastError());
}

void reduce_mean(const Context& ctx, const MeanArgs& args) {
  set_device(ctx);
  const std::int64_t y = std::min(args.piece_count, kMaxGridY);
  const std::int64_t x = std::max(kMinBlocksPerPiece, (kTargetBlocks + y - 1) / y);
  const dim3 grid(static_cast<unsigned>(x), static_cast<unsigned>(y));
  for_mean_dtypes(args.dtype, args.out_dtype, [&]<class In, class Out>(In, Out) {
    reduce_mean_kernel<In, Out><<<grid, kThreads, 0, ctx.stream()>>>(args);
  });
  OCTET_CUDA_CHECK(cudaGetLastError());
}

void max_amax(const Context& ctx, const TensorScale* gathered, int ranks, std::int64_t count,
              TensorScale* out) {
  set_device(ctx);
  max_amax_kernel<<<blocks_for(count), kThreads, 0, ctx.stream()>>>(gathered, ranks, count, out);
  OCTET_CUDA_CHECK(cudaGetLastError());
}

}  // namespace octet::detail::cuda
