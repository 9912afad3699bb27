// SPDX-License-Identifier: Apache-2.0
// A reduction over the memory of all ranks in one kernel. Every block takes a run of this rank's
// elements: 16-byte loads from all ranks are in flight together, sums and rounding stay in
// registers, 16-byte stores go to all ranks.
#include "cuda/check.hpp"
#include "cuda/device/dependent.cuh"
#include "cuda/device/launch.cuh"
#include "cuda/device/mean_pack.cuh"
#include "cuda/device/peer_barrier.cuh"
#include "cuda/ops/cuda_ops.hpp"
#include "octet/ops/detail/mean_math.hpp"

namespace octet::detail::cuda {
namespace {

constexpr int kThreads = 512;

/// Number of ranks for which the loads of all are unrolled; 0 stands for any.
template <int Ranks>
constexpr int kPacksAtOnce = Ranks == 2   ? 4
                             : Ranks == 4 ? 2
                                          : 1;

__device__ TensorScale* scales_on(const WindowMeanArgs& args, int rank) {
  return reinterpret_cast<TensorScale*>(args.peers.windows[rank] + args.scales_offset);
}

/// What a block needs to know about the piece that it is at.
struct PieceScales {
  float inv[kMaxPeers];
  TensorScale on_rank[kMaxPeers];
  float mean_scale;

  /// Called by all threads.
  __device__ void load(const WindowMeanArgs& args, std::int32_t tensor) {
    __syncthreads();
    const int rank = static_cast<int>(threadIdx.x);
    if (rank < args.peers.ranks) {
      on_rank[rank] = scales_on(args, rank)[tensor];
      inv[rank] = on_rank[rank].scale_inv;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      const float bound = mean_bound(args.dtype, args.peers.ranks,
                                     [&](int r) -> const TensorScale& { return on_rank[r]; });
      mean_scale = detail::mean_scale(args.out_dtype, bound).scale;
    }
    __syncthreads();
  }
};

/// The part of a piece that a block works on, in packs.
struct Run {
  const WindowPiece& piece;
  std::int64_t begin, end;
};

template <class In, class Out, int Ranks>
__device__ void reduce_packs(const WindowMeanArgs& args, const Run& run,
                             const PieceScales& scales) {
  using Mean = PackMean<In, Out>;
  constexpr int kAtOnce = kPacksAtOnce<Ranks>;
  const int ranks = Ranks != 0 ? Ranks : args.peers.ranks;
  const auto packs_on = [&](int r) {
    return reinterpret_cast<uint4*>(args.peers.windows[r] + run.piece.offset);
  };
  const auto finish = [&](const Mean& mean, std::int64_t i) {
    uint4 packs[Mean::kOutPacks];
    mean.round(ranks, scales.mean_scale, packs);
    if (run.piece.out != nullptr) {
#pragma unroll
      for (int k = 0; k < Mean::kOutPacks; ++k) {
        reinterpret_cast<uint4*>(run.piece.out)[i * Mean::kOutPacks + k] = packs[k];
      }
    } else {
      for (int r = 0; r < ranks; ++r) packs_on(r)[i] = packs[0];
    }
  };
  if constexpr (Ranks == 0) {
    for (std::int64_t i = run.begin + threadIdx.x; i < run.end; i += kThreads) {
      Mean mean;
#pragma unroll 4
      for (int r = 0; r < ranks; ++r) mean.add(r, packs_on(r)[i], scales.inv[r]);
      finish(mean, i);
    }
  } else {
    const uint4* from[Ranks];
#pragma unroll
    for (int r = 0; r < Ranks; ++r) from[r] = packs_on(r);
    for (std::int64_t i = run.begin + threadIdx.x; i < run.end; i += kThreads * kAtOnce) {
      uint4 codes[kAtOnce][Ranks];
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        if (i + u * kThreads >= run.end) continue;
#pragma unroll
        for (int r = 0; r < Ranks; ++r) codes[u][r] = from[r][i + u * kThreads];
      }
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        if (i + u * kThreads >= run.end) continue;
        Mean mean;
#pragma unroll
        for (int r = 0; r < Ranks; ++r) mean.add(r, codes[u][r], scales.inv[r]);
        finish(mean, i + u * kThreads);
      }
    }
  }
}

/// The same, element by element: pieces that are not aligned, and what is left of a pack.
template <class In, class Out>
__device__ void reduce_elements(const WindowMeanArgs& args, const WindowPiece& piece,
                                std::int64_t begin, std::int64_t end, const PieceScales& scales) {
  const int ranks = args.peers.ranks;
  for (std::int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    const auto code_on = [&](int r) {
      return reinterpret_cast<const typename In::Storage*>(args.peers.windows[r] + piece.offset)[i];
    };
    auto sum = mean_term<In::kDType>(code_on(0), scales.inv[0]);
    for (int r = 1; r < ranks; ++r) sum += mean_term<In::kDType>(code_on(r), scales.inv[r]);
    const auto code = mean_code<Out::kDType>(mean_of(sum, ranks), scales.mean_scale);
    using Storage = typename Out::Storage;
    if (piece.out != nullptr) {
      reinterpret_cast<Storage*>(piece.out)[i] = code;
      continue;
    }
    for (int r = 0; r < ranks; ++r) {
      reinterpret_cast<Storage*>(args.peers.windows[r] + piece.offset)[i] = code;
    }
  }
}

template <class In, class Out, int Ranks>
__device__ void reduce_run(const WindowMeanArgs& args, const Run& run, const PieceScales& scales) {
  constexpr std::int64_t kPack = Pack16<typename In::Storage>::kCount;
  const WindowPiece& piece = run.piece;
  const bool aligned =
      piece.offset % 16 == 0 && reinterpret_cast<std::uintptr_t>(piece.out) % 16 == 0;
  const std::int64_t whole = aligned ? min(run.end, piece.count / kPack) : run.begin;
  if (whole > run.begin) {
    reduce_packs<In, Out, Ranks>(args, {piece, run.begin, whole}, scales);
  }
  reduce_elements<In, Out>(args, piece, max(whole, run.begin) * kPack,
                           min(run.end * kPack, piece.count), scales);
}

/// The scales of all tensors of the bucket, of which every rank needs a copy.
__device__ void set_mean_scales(const WindowMeanArgs& args) {
  const std::int64_t stride = std::int64_t{gridDim.x} * kThreads;
  for (std::int64_t t = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; t < args.tensor_count;
       t += stride) {
    const float bound =
        mean_bound(args.dtype, args.peers.ranks, [&](int r) { return scales_on(args, r)[t]; });
    if (!is_finite_bits(magnitude_bits(bound))) atomicOr(args.nonfinite, 1u);
    args.mean_scales[t] = mean_scale(args.out_dtype, bound);
  }
}

/// The piece that holds pack `at` of all pieces.
__device__ std::int64_t piece_at(const WindowMeanArgs& args, std::int64_t at) {
  std::int64_t low = 0, high = args.piece_count;
  while (high - low > 1) {
    const std::int64_t middle = (low + high) / 2;
    (args.pieces[middle].begin <= at ? low : high) = middle;
  }
  return low;
}

template <class In, class Out, int Ranks>
__global__ void __launch_bounds__(kThreads, 2)
    window_mean_kernel(const __grid_constant__ WindowMeanArgs args) {
  __shared__ PieceScales scales;
  const std::uint32_t epoch = args.peers.epochs[blockIdx.x];
  if (!meet_peers(args.peers, epoch + 1)) return;
  set_mean_scales(args);
  std::int64_t at = args.pack_count * blockIdx.x / gridDim.x;
  const std::int64_t end = args.pack_count * (blockIdx.x + 1) / gridDim.x;
  for (std::int64_t p = at < end ? piece_at(args, at) : args.piece_count; at < end; ++p) {
    const WindowPiece piece = args.pieces[p];
    const std::int64_t next = p + 1 < args.piece_count ? args.pieces[p + 1].begin : args.pack_count;
    scales.load(args, piece.tensor);
    reduce_run<In, Out, Ranks>(args, {piece, at - piece.begin, min(end, next) - piece.begin},
                               scales);
    at = min(end, next);
  }
  if (!meet_peers(args.peers, epoch + 2)) return;
  if (threadIdx.x == 0) args.peers.epochs[blockIdx.x] = epoch + 2;
  // All blocks of all ranks are through: nobody reads this rank's scales any more.
  if (!is_last_block(args.peers)) return;
  TensorScale* own = scales_on(args, args.peers.rank);
  for (std::int64_t t = threadIdx.x; t < args.tensor_count; t += kThreads) {
    own[t] = args.mean_scales[t];
  }
}

template <class In, class Out>
auto kernel_for(int ranks) {
  switch (ranks) {
    case 2: return window_mean_kernel<In, Out, 2>;
    case 4: return window_mean_kernel<In, Out, 4>;
    case 8: return window_mean_kernel<In, Out, 8>;
    default: return window_mean_kernel<In, Out, 0>;
  }
}

}  // namespace

void window_mean(const Context& ctx, const WindowMeanArgs& args) {
  set_device(ctx);
  const auto blocks = static_cast<unsigned>(args.peers.blocks);
  for_mean_dtypes(args.dtype, args.out_dtype, [&]<class In, class Out>(In, Out) {
    kernel_for<In, Out>(args.peers.ranks)<<<blocks, kThreads, 0, ctx.stream()>>>(args);
  });
  OCTET_CUDA_CHECK(cudaGetLastError());
}

}  // namespace octet::detail::cuda
