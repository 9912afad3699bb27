// SPDX-License-Identifier: Apache-2.0
// Norm, decision and set-up of a step; the update itself is in adamw_update.cu.
#include <cooperative_groups.h>

#include <algorithm>

#include "cuda/check.hpp"
#include "cuda/device/dependent.cuh"
#include "cuda/device/reduce.cuh"
#include "cuda/ops/adamw_rows.cuh"
#include "cuda/ops/adamw_vector.cuh"
#include "cuda/ops/cuda_ops.hpp"
#include "octet/ops/detail/adamw_initial.hpp"

namespace octet::detail::cuda {
namespace {

// 256 lanes per segment, each taking runs of 16 elements: the order of summation of the norm.
constexpr int kLanes = 256;
constexpr int kRun = 16;
// The decision: a cluster of blocks, every thread taking every 4096th tensor. A device without
// clusters has one block of it.
constexpr int kPrepareThreads = 512;
constexpr int kPrepareBlocks = 8;
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

/// The blocks that decide a step together.
struct Team {
#if __CUDA_ARCH__ >= 900
  __device__ static unsigned rank() { return cooperative_groups::this_cluster().block_rank(); }
  __device__ static unsigned size() { return cooperative_groups::this_cluster().num_blocks(); }
  __device__ static void sync() { cooperative_groups::this_cluster().sync(); }
  /// The variable of another block's shared memory.
  template <class T>
  __device__ static const T& of(T& shared, unsigned rank) {
    return *cooperative_groups::this_cluster().map_shared_rank(&shared, rank);
  }
#else
  __device__ static unsigned rank() { return 0; }
  __device__ static unsigned size() { return 1; }
  __device__ static void sync() { __syncthreads(); }
  template <class T>
  __device__ static const T& of(T& shared, unsigned) {
    return shared;
  }
#endif
};

/// The binary tree over all segments: every thread sums an aligned run of a power of two, then the
/// runs are paired up, in the block and then over the blocks. The same tree as pairwise_sum over
/// everything. Valid in thread 0.
__device__ double sum_of_segments(const AdamwArgs& args) {
  __shared__ double runs[kPrepareThreads];
  std::int64_t length = 1;
  while (length * kPrepareThreads * Team::size() < args.total_segments) length *= 2;
  const std::int64_t begin = (std::int64_t{Team::rank()} * kPrepareThreads + threadIdx.x) * length;
  const std::int64_t left = args.total_segments - begin;
  const std::int64_t count = left < 0 ? 0 : left < length ? left : length;
  runs[threadIdx.x] = pairwise_sum(
      count, [&](std::int64_t i) { return static_cast<double>(args.segment_sums[begin + i]); });
  for (unsigned stride = 1; stride < kPrepareThreads; stride *= 2) {
    __syncthreads();
    if (threadIdx.x % (2 * stride) == 0) runs[threadIdx.x] += runs[threadIdx.x + stride];
  }
  Team::sync();
  if (threadIdx.x != 0) return 0.0;
  return pairwise_sum(Team::size(),
                      [&](std::int64_t r) { return Team::of(runs[0], static_cast<unsigned>(r)); });
}

/// Whether any thread of any block says so.
__device__ bool any_of_team(bool mine) {
  __shared__ int any;
  const int block = __syncthreads_or(mine ? 1 : 0);
  if (threadIdx.x == 0) any = block;
  Team::sync();
  const bool of_other = threadIdx.x < Team::size() && Team::of(any, threadIdx.x) != 0;
  return __syncthreads_or(of_other ? 1 : 0) != 0;
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

// Groups that a block keeps in shared memory; with more, every tensor computes its own.
constexpr std::int64_t kSharedGroups = 256;

/// The tensors of a thread are few, usually one: its first is prepared once and kept.
__global__ void __launch_bounds__(kPrepareThreads)
    prepare_kernel(const __grid_constant__ AdamwArgs args) {
  __shared__ AdamwScalars s;
  __shared__ alignas(16) char group_bytes[kSharedGroups * sizeof(AdamwGroupScalars)];
  allow_next_kernel();
  auto* groups = reinterpret_cast<AdamwGroupScalars*>(group_bytes);
  const std::int64_t first = std::int64_t{Team::rank()} * kPrepareThreads + threadIdx.x;
  const std::int64_t threads = std::int64_t{Team::size()} * kPrepareThreads;
  Prepared p{};
  // These loads run while the scalars are computed.
  const auto load = [&](std::int64_t t) {
    p.tensor = load_entry(args.tensors + t);
    p.old = old_scales_of(p.tensor);
  };
  if (first < args.tensor_count) load(first);
  const double sum = args.max_norm > 0.0f ? sum_of_segments(args) : 0.0;
  if (threadIdx.x == 0) {
    s = *args.scalars;
    measure_clip(s, args.max_norm, args.config.maximize, sum);
    s.lr = args.lr_device != nullptr ? *args.lr_device : args.lr;
  }
  __syncthreads();
  const auto scalars_of_group = [&](std::int64_t g) {
    return group_scalars(args.groups[g], args.config.decoupled_weight_decay, s.step, s.lr);
  };
  for (std::int64_t g = threadIdx.x; g < args.group_count; g += kPrepareThreads) {
    if (g >= kSharedGroups && Team::rank() != 0) break;
    const AdamwGroupScalars group = scalars_of_group(g);
    if (g < kSharedGroups) groups[g] = group;
    if (Team::rank() == 0) args.group_scalars[g] = group;
  }
  __syncthreads();
  bool skip = must_skip(s, args.nonfinite);
  const auto prepare = [&] {
    const std::int32_t g = p.tensor.group;
    p.group = g < kSharedGroups ? groups[g] : scalars_of_group(g);
    p.bounds = bounds_of(s, p.group, p.tensor.gradient_dtype, p.old);
  };
#pragma unroll 1
  for (std::int64_t t = first; t < args.tensor_count; t += threads) {
    if (t != first) load(t);
    prepare();
    skip = skip || !bounds_are_finite(p.bounds, p.group, p.tensor.formats);
  }
  skip = any_of_team(skip);  // from here on no block needs the old scalars
#pragma unroll 1
  for (std::int64_t t = first; t < args.tensor_count; t += threads) {
    if (args.tensor_count > threads) {
      load(t);
      prepare();
    }
    if (!skip) {
      AdamwTensorStep step;
      begin_tensor(s, p.group, p.tensor, p.old, p.bounds, step);
      const bool may_be_special = args.config.stochastic_rounding;
      step.path =
          static_cast<std::uint32_t>(may_be_special ? path_of(p.tensor, step) : AdamwPath::general);
      store_entry(args.steps + t, step);
    }
    end_gradient(p.tensor);
  }
  if (first == 0) {
    AdamwScalars decided = s;  // others may still compute with the step's number
    end_decision(decided, skip, args.nonfinite);
    *args.scalars = decided;
  }
  Team::sync();  // no block leaves while another reads its shared memory
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

void adamw_measure(const Context& ctx, const AdamwArgs& args, float* sums) {
  set_device(ctx);
  measure_kernel<<<static_cast<unsigned>(args.segment_count), kLanes, 0, ctx.stream()>>>(args,
                                                                                         sums);
  OCTET_CUDA_CHECK(cudaGetLastError());
}

void adamw_prepare(const Context& ctx, const AdamwArgs& args) {
  set_device(ctx);
  const bool has_clusters = is_built_for(prepare_kernel, 90);
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {kPrepareBlocks, 1, 1};
  cudaLaunchConfig_t launch{};
  launch.gridDim = has_clusters ? kPrepareBlocks : 1;
  launch.blockDim = kPrepareThreads;
  launch.stream = ctx.stream();
  launch.attrs = &cluster;
  launch.numAttrs = has_clusters ? 1 : 0;
  OCTET_CUDA_CHECK(cudaLaunchKernelEx(&launch, prepare_kernel, args));
}

}  // namespace octet::detail::cuda
