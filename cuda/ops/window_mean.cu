// SPDX-License-Identifier: Apache-2.0
// A reduction over the memory of all ranks in one kernel. Every block takes a run of this rank's
// elements: 16-byte loads from all ranks are in flight together, sums and rounding stay in
// registers, 16-byte stores go to all ranks.
#include "cuda/check.hpp"
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

/// What a block needs to know about the piece that it is at. Called by all threads: request() sends
/// for it, arrive() waits, so that other loads can be sent for in between.
struct PieceScales {
  TensorScale on_rank[kMaxPeers];
  float mean_scale;

  __device__ TensorScale request(const WindowMeanArgs& args, std::int32_t tensor) const {
    const int rank = static_cast<int>(threadIdx.x);
    return rank < args.peers.ranks ? scales_on(args, rank)[tensor] : TensorScale{};
  }
  __device__ void arrive(const WindowMeanArgs& args, const TensorScale& requested) {
    __syncthreads();  // who still works with those of the piece before
    if (static_cast<int>(threadIdx.x) < args.peers.ranks) on_rank[threadIdx.x] = requested;
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
struct PackReducer {
  using Mean = PackMean<In, Out>;
  const WindowMeanArgs& args;
  const Run& run;
  const PieceScales& scales;

  __device__ uint4* packs_on(int rank) const {
    return reinterpret_cast<uint4*>(args.peers.windows[rank] + run.piece.offset);
  }
  /// to(r) is where the packs of rank r are.
  template <class To>
  __device__ void store(const Mean& mean, std::int64_t i, const To& to) const {
    const int ranks = Ranks != 0 ? Ranks : args.peers.ranks;
    uint4 packs[Mean::kOutPacks];
    mean.round(ranks, scales.mean_scale, packs);
    if (run.piece.out != nullptr) {
#pragma unroll
      for (int k = 0; k < Mean::kOutPacks; ++k) {
        static_cast<uint4*>(run.piece.out)[i * Mean::kOutPacks + k] = packs[k];
      }
    } else {
#pragma unroll
      for (int r = 0; r < ranks; ++r) to(r)[i] = packs[0];
    }
  }
};

/// For a number of ranks that is known: what all ranks have is in flight at once.
template <class In, class Out, int Ranks>
__device__ void reduce_packs(const WindowMeanArgs& args, const Run& run, PieceScales& scales) {
  constexpr int kAtOnce = kPacksAtOnce<Ranks>;
  const PackReducer<In, Out, Ranks> reducer{args, run, scales};
  uint4* packs[Ranks];
#pragma unroll
  for (int r = 0; r < Ranks; ++r) packs[r] = reducer.packs_on(r);
  uint4 codes[kAtOnce][Ranks];
  const auto load = [&](std::int64_t i) {
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      if (i + u * kThreads >= run.end) continue;
#pragma unroll
      for (int r = 0; r < Ranks; ++r) codes[u][r] = packs[r][i + u * kThreads];
    }
  };
  const TensorScale requested = scales.request(args, run.piece.tensor);
  std::int64_t i = run.begin + threadIdx.x;
  load(i);
  scales.arrive(args, requested);
  while (i < run.end) {
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      if (i + u * kThreads >= run.end) continue;
      PackMean<In, Out> mean;
#pragma unroll
      for (int r = 0; r < Ranks; ++r) mean.add(r, codes[u][r], scales.on_rank[r].scale_inv);
      reducer.store(mean, i + u * kThreads, [&](int r) { return packs[r]; });
    }
    i += kThreads * kAtOnce;
    load(i);
  }
}

/// For any number.
template <class In, class Out>
__device__ void reduce_packs_of_any(const WindowMeanArgs& args, const Run& run,
                                    const PieceScales& scales) {
  const PackReducer<In, Out, 0> reducer{args, run, scales};
  for (std::int64_t i = run.begin + threadIdx.x; i < run.end; i += kThreads) {
    PackMean<In, Out> mean;
#pragma unroll 4
    for (int r = 0; r < args.peers.ranks; ++r) {
      mean.add(r, reducer.packs_on(r)[i], scales.on_rank[r].scale_inv);
    }
    reducer.store(mean, i, [&](int r) { return reducer.packs_on(r); });
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
    auto sum = mean_term<In::kDType>(code_on(0), scales.on_rank[0].scale_inv);
    for (int r = 1; r < ranks; ++r)
      sum += mean_term<In::kDType>(code_on(r), scales.on_rank[r].scale_inv);
    const auto code = mean_code<Out::kDType>(mean_of(sum, ranks), scales.mean_scale);
    using Storage = typename Out::Storage;
    if (piece.out != nullptr) {
      static_cast<Storage*>(piece.out)[i] = code;
      continue;
    }
    for (int r = 0; r < ranks; ++r) {
      reinterpret_cast<Storage*>(args.peers.windows[r] + piece.offset)[i] = code;
    }
  }
}

template <class In, class Out, int Ranks>
__device__ void reduce_run(const WindowMeanArgs& args, const Run& run, PieceScales& scales) {
  constexpr std::int64_t kPack = Pack16<typename In::Storage>::kCount;
  const WindowPiece& piece = run.piece;
  const bool aligned =
      (static_cast<std::uintptr_t>(piece.offset) | reinterpret_cast<std::uintptr_t>(piece.out)) %
          16 ==
      0;
  const std::int64_t whole =
      aligned ? max(run.begin, min(run.end, piece.count / kPack)) : run.begin;
  if constexpr (Ranks != 0) {
    reduce_packs<In, Out, Ranks>(args, {piece, run.begin, whole}, scales);
  } else {
    scales.arrive(args, scales.request(args, piece.tensor));
    reduce_packs_of_any<In, Out>(args, {piece, run.begin, whole}, scales);
  }
  reduce_elements<In, Out>(args, piece, whole * kPack, min(run.end * kPack, piece.count), scales);
}

/// What was reduced is not to be used: the step that follows in the stream is skipped.
__device__ void give_up(const WindowMeanArgs& args) {
  if (threadIdx.x == 0) *args.nonfinite = 1;
}

/// One block's work beside the others: the scales of all tensors of the bucket, of which every rank
/// needs a copy. They take the place of this rank's own once nobody reads those any more, which the
/// other ranks' blocks of this kind and all workers say by their second meeting.
__device__ void set_mean_scales(const WindowMeanArgs& args, std::uint32_t epoch) {
  for (std::int64_t t = threadIdx.x; t < args.tensor_count; t += kThreads) {
    const float bound =
        mean_bound(args.dtype, args.peers.ranks, [&](int r) { return scales_on(args, r)[t]; });
    if (!is_finite_bits(magnitude_bits(bound))) *args.nonfinite = 1;
    args.mean_scales[t] = mean_scale(args.out_dtype, bound);
  }
  const int workers = static_cast<int>(gridDim.x) - 1;
  if (!meet_peers(args.peers, epoch + 2) || !wait_for_all_blocks(args.peers, workers)) {
    give_up(args);
    return;
  }
  TensorScale* own = scales_on(args, args.peers.rank);
  for (std::int64_t t = threadIdx.x; t < args.tensor_count; t += kThreads) {
    own[t] = args.mean_scales[t];
  }
  for (int b = static_cast<int>(threadIdx.x); b <= workers; b += kThreads) {
    args.peers.epochs[b] += 2;
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
  const unsigned workers = gridDim.x - 1;
  const bool is_worker = blockIdx.x < workers;
  std::int64_t at = args.pack_count * blockIdx.x / workers;
  const std::int64_t end = is_worker ? args.pack_count * (blockIdx.x + 1) / workers : at;
  std::int64_t p = at < end ? piece_at(args, at) : 0;
  WindowPiece piece = at < end ? args.pieces[p] : WindowPiece{};
  const std::uint32_t epoch = args.peers.epochs[blockIdx.x];
  if (!meet_peers(args.peers, epoch + 1)) {
    give_up(args);
    return;
  }
  while (at < end) {
    const bool is_last = p + 1 == args.piece_count;
    const WindowPiece next = is_last ? WindowPiece{.begin = args.pack_count} : args.pieces[p + 1];
    const std::int64_t stop = min(end, next.begin);
    reduce_run<In, Out, Ranks>(args, {piece, at - piece.begin, stop - piece.begin}, scales);
    at = stop;
    piece = next;
    ++p;
  }
  if (is_worker) {
    meet_peers(args.peers, epoch + 2);
  } else {
    set_mean_scales(args, epoch);
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
  const auto blocks = static_cast<unsigned>(args.peers.blocks + 1);
  for_mean_dtypes(args.dtype, args.out_dtype, [&]<class In, class Out>(In, Out) {
    // Not a dependent launch: blocks that wait beside those of the reduction before cost the large
    // ones 5 % and save the small ones nothing (measured).
    kernel_for<In, Out>(args.peers.ranks)<<<blocks, kThreads, 0, ctx.stream()>>>(args);
  });
  OCTET_CUDA_CHECK(cudaGetLastError());
}

}  // namespace octet::detail::cuda
