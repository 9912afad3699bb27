// SPDX-License-Identifier: Apache-2.0
// What a block of the update reads and writes of other ranks: contributions to the gradient, summed
// in registers, and copies of the compute weight.
#pragma once

#include "cuda/ops/adamw_codes.cuh"
#include "octet/ops/detail/adamw_exchange.hpp"

namespace octet::detail::cuda {

// Two warps: a tensor of 1,000 elements is two rounds of the loop, so that the tables are read for
// enough work, and no warp waits for many others.
constexpr int kUpdateThreads = 64;

/// What an update exchanges; each has a kernel of its own.
enum class Exchange {
  nothing,
  copies,  ///< copies of the weight; the gradient is stored
  means    ///< copies of the weight; the gradient is the mean of contributions
};

/// Of so many peers the E4M3 contributions are fetched ahead, so many vectors a thread: a link has
/// several times the latency of the device's own memory, and L2 does not keep what is a peer's (a
/// prefetch there is answered at a few GB/s).
constexpr int kAheadRanks = 3, kAheadStages = 4;

/// Where a row finds them: the first elements of its segment, or of its tile.
struct PeerStreams {
  const char* gradient[kMaxRowRanks];
  char* weight[kMaxRowRanks];
  float inv[kMaxRowRanks];  ///< of the contributions' scales
  bool is_remote[kMaxRowRanks];
  signed char slot[kMaxRowRanks];  ///< where it is fetched to; -1: nowhere
  const char* ahead[kAheadRanks];  ///< the gradients by slot
  int ahead_count;
};

/// In shared memory; every thread has its own.
struct AheadSlots {
  uint2 codes[kAheadStages][kAheadRanks][kUpdateThreads];
};
__device__ inline AheadSlots& ahead_slots() {
  __shared__ AheadSlots slots;
  return slots;
}

template <DType D>
constexpr bool kFetchesAhead = size_of(D) == 1;

/// Sends for element i and the seven after it; an empty turn counts too.
__device__ inline void fetch_ahead(const PeerStreams& from, bool exists, int stage, int i) {
  if (exists) {
    for (int k = 0; k < from.ahead_count; ++k) {
      const auto to = static_cast<unsigned>(
          __cvta_generic_to_shared(&ahead_slots().codes[stage][k][threadIdx.x]));
      asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(to), "l"(from.ahead[k] + i)
                   : "memory");
    }
  }
  asm volatile("cp.async.commit_group;" ::: "memory");
}
/// Waits for the oldest of kAheadStages turns.
__device__ inline void wait_for_ahead() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kAheadStages - 1) : "memory");
}

/// What the threads of a block share when there is something to exchange.
struct ExchangeWork : Work {
  AdamwExchange exchange;
  PeerStreams peers;
};
template <Exchange X>
using WorkOf = std::conditional_t<X == Exchange::nothing, Work, ExchangeWork>;

/// The exchange of a block's segment for general code; null where there is none.
inline __device__ const AdamwExchange* exchange_in(const Work&) { return nullptr; }
inline __device__ const AdamwExchange* exchange_in(const ExchangeWork& work) {
  return &work.exchange;
}

/// load_work() and the tables of the exchange, a contribution and a copy a thread: what no kernel
/// writes is read before the kernel before has ended. All threads must call it.
template <int Threads, Exchange X>
__device__ bool load_exchange_work(const AdamwArgs& args, ExchangeWork& work) {
  static_assert(kMaxRowRanks <= Threads);
  const int thread = static_cast<int>(threadIdx.x);
  const AdamwExchange x = args.exchanges[args.segments[blockIdx.x].tensor];
  RankGradient gradient;
  WeightCopy copy;
  if (X == Exchange::means && thread < x.ranks) gradient = x.gradients[thread];
  if (thread < x.copy_count) copy = x.copies[thread];
  if (!load_work<Threads>(args, work)) return false;
  const AdamwTensor& t = work.tensor;
  const Segment& segment = work.segment;
  const std::int64_t first = walk_of(t, segment).first;
  if (thread < kMaxRowRanks) {
    if (X == Exchange::means && thread < x.ranks) {
      const std::int64_t at = gradient.is_shard ? segment.local + (first - segment.begin) : first;
      work.peers.gradient[thread] = static_cast<const char*>(gradient.data) +
                                    at * static_cast<std::int64_t>(size_of(x.dtype));
      work.peers.inv[thread] = x.scales[thread * x.scale_stride].scale_inv;
      work.peers.is_remote[thread] = gradient.is_remote;
    }
    if (thread < x.copy_count) {
      work.peers.weight[thread] =
          static_cast<char*>(copy.data) +
          first * static_cast<std::int64_t>(size_of(dtype_of(t.formats.weight)));
    }
  }
  if (thread == 0) work.exchange = x;
  __syncthreads();
  if (X == Exchange::means && thread == 0) {
    PeerStreams& peers = work.peers;
    peers.ahead_count = 0;
    for (int r = 0; r < x.ranks; ++r) {
      const bool is_ahead = peers.is_remote[r] && peers.ahead_count < kAheadRanks;
      peers.slot[r] = static_cast<signed char>(is_ahead ? peers.ahead_count : -1);
      if (is_ahead) peers.ahead[peers.ahead_count++] = peers.gradient[r];
    }
  }
  __syncthreads();
  return true;
}

/// Adds the contributions of K ranks from `first` on, in order, after all have been asked for.
/// `stage` has those that were fetched ahead; -1: none.
template <int K, DType D, StateFormats F>
__device__ void add_ranks(const PeerStreams& from, int first, Place place, int stage,
                          MeanSum<D> (&sums)[kVector]) {
  Packed<size_of(D)> codes[K];
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if constexpr (kFetchesAhead<D>) {
      const int slot = stage >= 0 ? from.slot[first + k] : -1;
      if (slot >= 0) {
        const uint2 x = ahead_slots().codes[stage][slot][threadIdx.x];
        codes[k].word[0] = x.x, codes[k].word[1] = x.y;
        continue;
      }
    }
    load_at<F>(codes[k], from.gradient[first + k], place);
  }
#pragma unroll
  for (int k = 0; k < K; ++k) {
    float x[kVector];
    decode<D>(codes[k], x);
    const float inv = from.inv[first + k];
#pragma unroll
    for (int i = 0; i < kVector; ++i) sums[i] += mean_term_of<D>(x[i], inv);
  }
}

/// The means of a vector, as the codes of an f32 gradient.
template <DType D, StateFormats F>
__device__ Packed<4> mean_of_ranks(const PeerStreams& from, int ranks, Place place, int stage) {
  // As many at a time as 16 registers hold.
  constexpr int kAtOnce = 8 / static_cast<int>(size_of(D));
  using Sum = MeanSum<D>;
  Sum sums[kVector];
#pragma unroll
  for (int i = 0; i < kVector; ++i) sums[i] = kEmptySum<Sum>;
  int r = 0;
  for (; r + kAtOnce <= ranks; r += kAtOnce) add_ranks<kAtOnce, D, F>(from, r, place, stage, sums);
  if constexpr (kAtOnce > 4) {
    if (r + 4 <= ranks) add_ranks<4, D, F>(from, r, place, stage, sums), r += 4;
  }
  if constexpr (kAtOnce > 2) {
    if (r + 2 <= ranks) add_ranks<2, D, F>(from, r, place, stage, sums), r += 2;
  }
  if (r < ranks) add_ranks<1, D, F>(from, r, place, stage, sums);
  Packed<4> means;
  if (has_exact_inverse(ranks)) {
    const Sum inverse = Sum{1} / static_cast<Sum>(ranks);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      means.word[i] = float_bits(mean_by_product<Sum>(sums[i], inverse));
    }
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i) means.word[i] = float_bits(mean_of(sums[i], ranks));
  }
  return means;
}

/// Codes of a vector, or what of them an update of row R needs, with the gradient from where X says
/// it is; D is the dtype of contributions, `stage` as of add_ranks().
template <AdamwRow R, Exchange X, DType D>
__device__ void load_vector(const WorkOf<X>& work, Place place, int stage, Codes<R>& codes) {
  if constexpr (X == Exchange::means) {
    codes.load_states(work.streams, place);
    codes.gradient = mean_of_ranks<D, R.formats>(work.peers, work.exchange.ranks, place, stage);
  } else {
    codes.load_gradient(work.streams, place);
    codes.load_states(work.streams, place);
  }
}
template <AdamwRow R, Exchange X, DType D>
__device__ void prefetch_vector(const WorkOf<X>& work, int i) {
  if constexpr (X == Exchange::means) {
    for (int r = 0; r < work.exchange.ranks; ++r) {
      if (!work.peers.is_remote[r]) prefetch(work.peers.gradient[r], i, size_of(D));
    }
  } else {
    prefetch(work.streams.gradient, i, size_of(R.gradient));
  }
  Codes<R>::prefetch_states(work.streams, i, work.tensor.states_are_far);
}

/// Stores packed codes of the weight in its copies.
template <StateFormats F, std::size_t Bytes>
__device__ void store_copies_at(const ExchangeWork& work, Place place, const Packed<Bytes>& codes) {
  for (int c = 0; c < work.exchange.copy_count; ++c) {
    store_at<F>(work.peers.weight[c], place, codes);
  }
}

}  // namespace octet::detail::cuda
