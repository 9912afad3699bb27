// SPDX-License-Identifier: Apache-2.0
// The first half of a step: what is decided before an element changes.
#include <cooperative_groups.h>

#include <cuda/atomic>

#include <algorithm>

#include "cuda/device/dependent.cuh"
#include "cuda/device/launch.cuh"
#include "cuda/ops/adamw_rows.cuh"
#include "cuda/ops/cuda_ops.hpp"
#include "octet/ops/detail/adamw_math.hpp"

namespace octet::detail::cuda {
namespace {

// Few tensors a block, because an access of a warp to 32 entries of a table takes 32 cycles of its
// multiprocessor. The last warp computes the scalars while the others load.
constexpr int kMaxBlocks = AdamwScratch::kMaxBlocks;
constexpr int kTensorThreads = 64;
constexpr int kWarp = 32;
constexpr int kThreads = kTensorThreads + kWarp;
static_assert(kMaxBlocks <= kTensorThreads);
// A thread adds up at most 16 sums of segments, until the blocks run out.
constexpr std::int64_t kSumsOfBlock = 16 * kTensorThreads;
// Groups that a block keeps in shared memory; with more, every tensor computes its own.
constexpr std::int64_t kSharedGroups = 256;

/// The sum of a value of each of the tensor threads, in thread 0's place: a binary tree.
__device__ void add_up(double (&values)[kTensorThreads]) {
  for (unsigned stride = 1; stride < kTensorThreads; stride *= 2) {
    __syncthreads();
    if (threadIdx.x < kTensorThreads && threadIdx.x % (2 * stride) == 0) {
      values[threadIdx.x] += values[threadIdx.x + stride];
    }
  }
  __syncthreads();
}

/// The binary tree over all segments: every thread sums an aligned run of a power of two, then the
/// runs are paired up, in the block and then over the blocks. The same tree as pairwise_sum over
/// everything. All threads must call it.
__device__ double sum_of_segments(const AdamwArgs& args) {
  __shared__ double runs[kTensorThreads];
  std::int64_t length = 1;
  while (length * kTensorThreads * gridDim.x < args.total_segments) length *= 2;
  const std::int64_t begin = (std::int64_t{blockIdx.x} * kTensorThreads + threadIdx.x) * length;
  const std::int64_t left = args.total_segments - begin;
  const std::int64_t count = left < 0 ? 0 : left < length ? left : length;
  if (threadIdx.x < kTensorThreads) {
    runs[threadIdx.x] = pairwise_sum(
        count, [&](std::int64_t i) { return static_cast<double>(args.segment_sums[begin + i]); });
  }
  add_up(runs);
  if (threadIdx.x == 0) args.scratch->sums[blockIdx.x] = runs[0];
  cooperative_groups::this_grid().sync();
  if (threadIdx.x < kTensorThreads) {
    runs[threadIdx.x] = threadIdx.x < gridDim.x ? args.scratch->sums[threadIdx.x] : 0.0;
  }
  add_up(runs);
  return runs[0];
}

/// Whether any thread of any block says so; meanwhile() runs while other blocks are awaited. All
/// threads must call it. One atomic a block is barrier and vote in one, which the barrier of
/// cooperative groups is not.
template <class Meanwhile>
__device__ bool any_of_grid(AdamwScratch* scratch, unsigned turn, bool mine,
                            const Meanwhile& meanwhile) {
  using Votes = ::cuda::atomic_ref<std::uint64_t, ::cuda::thread_scope_device>;
  __shared__ bool result;
  const bool of_block = __syncthreads_or(mine ? 1 : 0) != 0;
  const Votes votes(scratch->votes[turn]);
  if (threadIdx.x == 0) {
    votes.fetch_add(1 + (std::uint64_t{of_block} << 32), ::cuda::memory_order_release);
  }
  meanwhile();
  if (threadIdx.x == 0) {
    std::uint64_t seen = 0;
    do seen = votes.load(::cuda::memory_order_acquire);
    while (static_cast<std::uint32_t>(seen) != gridDim.x);
    result = (seen >> 32) != 0;
    if (blockIdx.x == 0) {  // nobody looks at the other word in this step
      scratch->votes[1 - turn] = 0;
      scratch->turn = 1 - turn;
    }
  }
  __syncthreads();
  return result;
}

// A table is read and written by one thread per entry: 16 bytes at a time, because every access of
// a warp goes to as many lines as it has threads.
template <class T>
__device__ T load_entry(const T* from) {
  static_assert(alignof(T) % 16 == 0);
  struct alignas(16) Words {
    uint4 word[sizeof(T) / 16];
  } words;
#pragma unroll
  for (std::size_t i = 0; i < sizeof(T) / 16; ++i) {
    words.word[i] = reinterpret_cast<const uint4*>(from)[i];
  }
  return bit_cast<T>(words);
}
template <class T>
__device__ void store_entry(T* to, const T& entry) {
  static_assert(alignof(T) % 16 == 0);
  struct alignas(16) Words {
    uint4 word[sizeof(T) / 16];
  };
  const Words words = bit_cast<Words>(entry);
#pragma unroll
  for (std::size_t i = 0; i < sizeof(T) / 16; ++i) {
    reinterpret_cast<uint4*>(to)[i] = words.word[i];
  }
}

/// What is known of a tensor before the step is decided.
struct Prepared {
  AdamwTensor tensor;
  AdamwOldScales old;
  AdamwGroupScalars group;
  AdamwBounds bounds;
};

/// The scalars of the step.
__device__ AdamwScalars begin_scalars(const AdamwArgs& args, double sum_squares) {
  AdamwScalars s = *args.scalars;
  s.lr = args.lr_device != nullptr ? *args.lr_device : args.lr;
  measure_clip(s, args.max_norm, args.config.maximize, sum_squares);
  return s;
}

/// A thread usually has one tensor, prepared once and kept; with more all are prepared again after
/// the decision. What goes to `steps` is scratch, so it need not wait for that.
__global__ void __launch_bounds__(kThreads) prepare_kernel(const __grid_constant__ AdamwArgs args) {
  __shared__ AdamwScalars s;
  __shared__ bool scalars_forbid;
  __shared__ alignas(16) char group_bytes[kSharedGroups * sizeof(AdamwGroupScalars)];
  // The update starts when all blocks here run, so that it cannot keep one of them out.
  allow_next_kernel();
  auto* groups = reinterpret_cast<AdamwGroupScalars*>(group_bytes);
  const auto scalars_of_group = [&](std::int64_t g) {
    return group_scalars(args.groups[g], args.config.decoupled_weight_decay, s.step, s.lr);
  };
  const auto keep_group = [&](std::int64_t g, const AdamwGroupScalars& group) {
    if (g < kSharedGroups) groups[g] = group;
    if (blockIdx.x == 0) args.group_scalars[g] = group;
  };
  const unsigned turn = args.scratch->turn;
  const bool has_tensors = threadIdx.x < kTensorThreads;
  const std::int64_t count = has_tensors ? args.tensor_count : 0;
  const std::int64_t first = std::int64_t{blockIdx.x} * kTensorThreads + threadIdx.x;
  const std::int64_t threads = std::int64_t{gridDim.x} * kTensorThreads;
  Prepared p{};
  const auto load = [&](std::int64_t t) {
    p.tensor = load_entry(args.tensors + t);
    p.old = old_scales_of(p.tensor);
  };
  if (first < count) load(first);
  const int lane = static_cast<int>(threadIdx.x) - kTensorThreads;  // of the last warp
  const bool has_group = !has_tensors && lane < args.group_count;
  AdamwHyper hyper{};
  if (has_group) hyper = args.groups[lane];
  const double sum = args.max_norm > 0.0f ? sum_of_segments(args) : 0.0;
  if (!has_tensors) {
    const AdamwScalars begun = begin_scalars(args, sum);
    if (lane == 0) {
      scalars_forbid = must_skip(begun, args.nonfinite);
      s = begun;
    }
    if (has_group) {
      keep_group(lane,
                 group_scalars(hyper, args.config.decoupled_weight_decay, begun.step, begun.lr));
    }
  }
  __syncthreads();
  if (args.group_count > kWarp) {
    const std::int64_t end =
        blockIdx.x == 0 ? args.group_count : min(args.group_count, kSharedGroups);
    for (std::int64_t g = kWarp + threadIdx.x; g < end; g += kThreads) {
      keep_group(g, scalars_of_group(g));
    }
    __syncthreads();
  }

  bool skip = scalars_forbid;
  const auto prepare = [&] {
    const std::int32_t g = p.tensor.group;
    p.group = g < kSharedGroups ? groups[g] : scalars_of_group(g);
    p.bounds = bounds_of(s, p.group, p.tensor.gradient_dtype, p.old);
  };
#pragma unroll 1
  for (std::int64_t t = first; t < count; t += threads) {
    if (t != first) load(t);
    prepare();
    skip = skip || !bounds_are_finite(p.bounds, p.group, p.tensor.formats);
  }
  AdamwNewScales next{};
  const auto begin = [&](std::int64_t t) {
    AdamwTensorStep step;
    next = begin_tensor(s, p.group, p.tensor.formats, p.old, p.bounds, step);
    step.row = !args.config.stochastic_rounding ? 0
               : args.exchanges == nullptr
                   ? row_of(p.tensor, p.tensor.gradient_dtype, step)
                   : row_of(p.tensor, args.exchanges[t], args.sums_contributions, step);
    store_entry(args.steps + t, step);
  };
  const bool has_one = args.tensor_count <= threads;
  // From here on no block needs the old scalars.
  skip = any_of_grid(args.scratch, turn, skip, [&] {
    if (has_one && first < count) begin(first);
  });
#pragma unroll 1
  for (std::int64_t t = first; t < count; t += threads) {
    if (!has_one) {
      load(t);
      prepare();
      begin(t);
    }
    if (!skip) store_scales(p.tensor, next);
    if (skip && args.nonfinite_counts != nullptr &&
        has_nonfinite_gradient(p.old.gradient, p.tensor.gradient_dtype)) {
      ++args.nonfinite_counts[t];
    }
    end_gradient(p.tensor);
  }
  if (blockIdx.x == 0 && threadIdx.x == kTensorThreads) {
    AdamwScalars decided = s;  // others may still compute with the step's number
    end_decision(decided, skip, args.nonfinite);
    *args.scalars = decided;
  }
}

}  // namespace

void adamw_prepare(const Context& ctx, const AdamwArgs& args) {
  set_device(ctx);
  const std::int64_t sums = args.max_norm > 0.0f ? args.total_segments : 0;
  const std::int64_t wanted = std::max((args.tensor_count + kTensorThreads - 1) / kTensorThreads,
                                       (sums + kSumsOfBlock - 1) / kSumsOfBlock);
  // All must run at once, and one always fits a multiprocessor.
  int multiprocessors = 0;
  OCTET_CUDA_CHECK(
      cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, ctx.device().index));
  const std::int64_t blocks =
      std::clamp<std::int64_t>(wanted, 1, std::min(kMaxBlocks, multiprocessors));
  launch_cooperative(ctx, prepare_kernel, blocks, kThreads, 0, args);
}

}  // namespace octet::detail::cuda
