// SPDX-License-Identifier: Apache-2.0
// The second half of a step. One kernel for every combination of formats, which it reads from the
// table; some rows of formats have a path with formats known at compile time, and the same bits.
#include "cuda/check.hpp"
#include "cuda/device/dependent.cuh"
#include "cuda/ops/adamw_rows.cuh"
#include "cuda/ops/adamw_vector.cuh"
#include "cuda/ops/cuda_ops.hpp"

namespace octet::detail::cuda {
namespace {

constexpr int kThreads = 128;
// 80 registers a thread. With 7 blocks the row of block formats is 1 % faster and the others are 1
// to 3 % slower.
constexpr int kBlocksPerSm = 6;
// Side of a tile: what a block of threads handles of a weight that is also written transposed.
constexpr std::int64_t kTile = 128;

/// The first elements of a segment in the buffers of its tensor.
struct Streams {
  char *gradient, *master, *m, *v, *weight;
  float *m_blocks, *v_blocks;
};

/// What the threads of a block share.
struct Work {
  AdamwTensor tensor;
  AdamwTensorStep step;
  Streams streams;
};

struct UpdateArgs {
  AdamwArgs adamw;
  PhiloxKeys keys;
};

/// The elements of a segment as blocks of 128: where the first starts and how far the next is.
/// Usually they follow one another; for a transposed weight they are the rows of a 128 x 128 tile
/// of the panel, as many tiles as the panel has segments.
struct Walk {
  std::int64_t first;  ///< counted in the tensor
  std::int64_t stride;
  bool is_tile;
};

__device__ Walk walk_of(const AdamwTensor& t, const Segment& segment) {
  const std::int64_t panel = kTile * t.columns;
  if (t.formats.weight == WeightFormat::e4m3_and_transpose && t.columns % kTile == 0) {
    const std::int64_t start = segment.begin / panel * panel;
    if (start + panel <= t.rows * t.columns) {
      return {start + (segment.begin - start) / kSegmentElements * kTile, t.columns, true};
    }
  }
  return {segment.begin, kStateBlock, false};
}

__device__ AdamwOffsets offsets_at(const AdamwTensor& t, const Segment& segment,
                                   std::int64_t first) {
  const AdamwOffsets at = offsets_of(t, segment);
  const std::int64_t shift = first - segment.begin;
  return {at.gradient + shift, at.master + shift, at.state + shift, at.weight + shift};
}

__device__ Streams streams_of(const AdamwTensor& t, const AdamwOffsets& at) {
  const auto start = [](const void* data, std::int64_t i, std::size_t bytes) {
    return static_cast<char*>(const_cast<void*>(data)) + i * static_cast<std::int64_t>(bytes);
  };
  return {start(t.gradient, at.gradient, size_of(t.gradient_dtype)),
          start(t.master, at.master, size_of(t.formats.master)),
          start(t.m, at.state, size_of(t.formats.m)),
          start(t.v, at.state, size_of(t.formats.v)),
          start(t.weight, at.weight, size_of(dtype_of(t.formats.weight))),
          t.m_blocks + at.state / kStateBlock,
          t.v_blocks + at.state / kStateBlock};
}

/// The codes of a vector.
template <AdamwRow R>
struct Codes {
  Packed<size_of(R.gradient)> gradient;
  Packed<size_of(R.formats.master)> master;
  Packed<size_of(R.formats.m)> m;
  Packed<size_of(R.formats.v)> v;
  Packed<size_of(dtype_of(R.formats.weight))> weight;

  __device__ void load(const Streams& from, int i) {
    gradient = load_packed<size_of(R.gradient)>(from.gradient, i);
    master = load_packed<size_of(R.formats.master)>(from.master, i);
    m = load_packed<size_of(R.formats.m)>(from.m, i);
    v = load_packed<size_of(R.formats.v)>(from.v, i);
    if constexpr (R.formats.master == StateFormat::split) weight = load_packed<1>(from.weight, i);
  }
  /// Asks the second-level cache for a vector that will be loaded later: unlike a load it takes no
  /// registers.
  __device__ static void prefetch(const Streams& from, int i) {
    const auto ask = [i](const char* data, std::size_t bytes) {
      asm volatile("prefetch.global.L2 [%0];" ::"l"(data + std::int64_t{i} * bytes));
    };
    ask(from.gradient, size_of(R.gradient));
    ask(from.master, size_of(R.formats.master));
    ask(from.m, size_of(R.formats.m));
    ask(from.v, size_of(R.formats.v));
    if constexpr (R.formats.master == StateFormat::split) ask(from.weight, 1);
    if constexpr (is_block(R.formats.m)) {
      const std::int64_t block = i / static_cast<int>(kStateBlock);
      asm volatile("prefetch.global.L2 [%0];" ::"l"(from.m_blocks + block));
      asm volatile("prefetch.global.L2 [%0];" ::"l"(from.v_blocks + block));
    }
  }
  __device__ void store(const Streams& to, int i) const {
    store_packed(to.master, i, master);
    store_packed(to.m, i, m);
    store_packed(to.v, i, v);
    store_packed(to.weight, i, weight);
  }
};

template <AdamwRow R, class Math>
__device__ void update_values(const AdamwTensorStep& s, const Codes<R>& codes, float m_inv,
                              float v_inv, AdamwValues (&values)[kVector], Math& math) {
  float gradient[kVector], master[kVector], m[kVector], v[kVector];
  decode<R.gradient>(codes.gradient, gradient);
  if constexpr (R.formats.master == StateFormat::split) {
    decode_split(codes.weight, codes.master, master);
  } else {
    decode<R.formats.master>(codes.master, master);
  }
  decode<R.formats.m>(codes.m, m);
  decode<R.formats.v>(codes.v, v);
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    values[i] = updated(s, R.formats, {gradient[i], master[i], m[i], v[i]}, m_inv, v_inv, math);
  }
}

/// Whether both moments are quantised, so that no small number is left over from long ago.
constexpr bool takes_fast_math(const StateFormats& f) {
  return f.m != StateFormat::f32 && f.v != StateFormat::f32;
}

/// The same by IeeeMath, for the rare vector that FastMath cannot do. Reads it once more, so that
/// the usual path need not keep it.
template <AdamwRow R>
__device__ __noinline__ void update_values_again(const Work& work, int i, float m_inv, float v_inv,
                                                 AdamwValues* values) {
  Codes<R> codes;
  codes.load(work.streams, i);
  IeeeMath math;
  AdamwTensorStep s = work.step;
  if (R.formats.master == StateFormat::split) s.master_inv *= 0x1p120f;
  AdamwValues result[kVector];
  update_values<R>(s, codes, m_inv, v_inv, result, math);
  for (int k = 0; k < kVector; ++k) values[k] = result[k];
}

/// Writes the tile of weights that the block of threads has left in shared memory, transposed:
/// every thread 8 x 8 of it at a time, 16 threads 128 consecutive bytes.
__device__ void store_transposed(const uint2* tile, std::uint8_t* out, std::int64_t rows) {
  __syncthreads();
  const unsigned group = threadIdx.x % 16;  // of rows
  for (unsigned columns = threadIdx.x / 16; columns < 16; columns += kThreads / 16) {
    uint2 in[8];
#pragma unroll
    for (unsigned r = 0; r < 8; ++r) in[r] = tile[(8 * group + r) * 16 + (columns ^ group)];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      std::uint32_t word[4][2];
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const auto row = [&](int r) { return half == 0 ? in[4 * k + r].x : in[4 * k + r].y; };
        const std::uint32_t low = __byte_perm(row(0), row(1), 0x5140);
        const std::uint32_t high = __byte_perm(row(0), row(1), 0x7362);
        const std::uint32_t low2 = __byte_perm(row(2), row(3), 0x5140);
        const std::uint32_t high2 = __byte_perm(row(2), row(3), 0x7362);
        word[0][k] = __byte_perm(low, low2, 0x5410);
        word[1][k] = __byte_perm(low, low2, 0x7632);
        word[2][k] = __byte_perm(high, high2, 0x5410);
        word[3][k] = __byte_perm(high, high2, 0x7632);
      }
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        *reinterpret_cast<uint2*>(out + (8 * columns + 4 * half + c) * rows + 8 * group) = {
            word[c][0], word[c][1]};
      }
    }
  }
}

/// All whole vectors of a segment (of block formats all whole blocks); returns the number of
/// elements done.
template <AdamwRow R>
__device__ int update_vectors(const UpdateArgs& args, const Work& work, const Segment& segment,
                              const Walk& walk, AdamwAmax& of_thread) {
  constexpr StateFormats F = R.formats;
  constexpr bool kHasBlocks = is_block(F.m);
  static_assert(is_block(F.m) == is_block(F.v));  // renew_blocks sees to both
  // Measured: FP32 states are faster without.
  constexpr bool kPrefetches = takes_fast_math(F);
  constexpr bool kTransposes = F.weight == WeightFormat::e4m3_and_transpose;
  const AdamwTensor& t = work.tensor;
  AdamwTensorStep s = work.step;
  s.group.l2 = 0.0f;
  if (F.master == StateFormat::split) s.master_inv *= 0x1p120f;  // what decode_split left out
  const auto step = static_cast<std::uint64_t>(args.adamw.scalars->step);
  // Groups of four elements share a call of the generator.
  const std::uint64_t first = (t.random_base + static_cast<std::uint64_t>(walk.first)) / 4;
  const __half2 ratio = __float2half2_rn(s.master_scale_inv * s.weight_scale);
  const int vectors =
      kHasBlocks ? segment.count / kStateBlock * kBlockThreads : segment.count / kVector;
  const int stride = static_cast<int>(walk.stride);
  const int in_block = threadIdx.x % kBlockThreads;
  __shared__ uint2 tile[kTransposes ? kTile * kTile / kVector : 1];
  AdamwAmax largest;
  std::uint32_t largest_inv = 0;
  int i = threadIdx.x / kBlockThreads * stride + in_block * kVector;
  // A warp stays together for the exchanges within blocks.
  for (int vector = threadIdx.x; vector - static_cast<int>(threadIdx.x % 32) < vectors;
       vector += kThreads, i += kThreads / kBlockThreads * stride) {
    const bool active = vector < vectors;
    if (!kHasBlocks && !active) break;
    Codes<R> codes{};
    if (active) codes.load(work.streams, i);
    if (kPrefetches && vector + kThreads < vectors) {
      Codes<R>::prefetch(work.streams, i + kThreads / kBlockThreads * stride);
    }
    float m_inv = s.m_inv, v_inv = s.v_inv, m_scale = s.m_scale, v_scale = s.v_scale;
    const int block = i / static_cast<int>(kStateBlock);
    if (kHasBlocks && active) {
      m_inv = work.streams.m_blocks[block];
      v_inv = work.streams.v_blocks[block];
    }
    AdamwValues values[kVector];
    if constexpr (takes_fast_math(F)) {
      FastMath math;
      update_values<R>(s, codes, m_inv, v_inv, values, math);
      if (active && !math.is_exact()) {
        AdamwValues again[kVector];
        update_values_again<R>(work, i, m_inv, v_inv, again);
#pragma unroll
        for (int k = 0; k < kVector; ++k) values[k] = again[k];
      }
    } else {
      IeeeMath math;
      update_values<R>(s, codes, m_inv, v_inv, values, math);
    }
    RandomWords words[kVector / 4];
#pragma unroll
    for (int quad = 0; quad < kVector / 4; ++quad) {
      words[quad] = philox(args.keys, step, first + static_cast<unsigned>(i) / 4 + quad);
    }
    if constexpr (kHasBlocks) {
      float m_amax = 0.0f, v_amax = 0.0f;
#pragma unroll
      for (const AdamwValues& x : values) {
        m_amax = fmaxf(m_amax, fabsf(x.m));
        v_amax = fmaxf(v_amax, x.second);
      }
      const BlockScales scales = renew_blocks(m_amax, v_amax);
      m_scale = scales.m;
      v_scale = scales.v;
      largest_inv = larger(largest_inv, float_bits(scales.inv));
      if (active && in_block == 0) work.streams.m_blocks[block] = scales.inv;
      if (active && in_block == kBlockThreads / 2) work.streams.v_blocks[block] = scales.inv;
    }
    std::uint32_t m[kVector], v[kVector], master[kVector];
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      const AdamwValues& x = values[k];
      const std::uint32_t word = words[k / 4].word[k % 4];
      m[k] = rounded<F.m>(fabsf(x.m), m_scale, noise_m<F.m>(word));
      v[k] = rounded<F.v>(x.second, v_scale, noise_v<F.v>(word));
      master[k] = rounded<F.master>(fabsf(x.master), s.master_scale, noise_master(word));
      if constexpr (F.v != StateFormat::f32) {
        // A positive v, which here is no subnormal, is at least the smallest code.
        const std::uint32_t least = min(float_bits(x.second), 1u << top_of(F.v));
        v[k] = max(v[k], least);
      }
      if (!kHasBlocks) largest.m = max(largest.m, m[k]);
      if (!kHasBlocks) largest.v = max(largest.v, v[k]);
      largest.master = max(largest.master, master[k]);
      m[k] = with_sign<F.m>(m[k], x.m);
      master[k] = with_sign<F.master>(master[k], x.master);
    }
    if (!active) continue;
    codes.m = pack<top_of(F.m)>(m);
    codes.v = pack<top_of(F.v)>(v);
    if constexpr (F.master == StateFormat::split) {
      halve_split(pack<16>(master), codes.weight, codes.master);
    } else {
      codes.master = pack<top_of(F.master)>(master);
      if constexpr (F.weight == WeightFormat::bf16) {
        codes.weight = bf16_weight(codes.master);
      } else {
        codes.weight = e4m3_weight(codes.master, ratio);
      }
    }
    codes.store(work.streams, i);
    if constexpr (kTransposes) {
      const unsigned row = vector / kBlockThreads;
      tile[row * kBlockThreads + (in_block ^ (row / 8))] = {codes.weight.word[0],
                                                            codes.weight.word[1]};
    }
  }
  if constexpr (kTransposes) {
    const std::int64_t row = walk.first / t.columns, column = walk.first % t.columns;
    store_transposed(tile, static_cast<std::uint8_t*>(t.weight_transposed) + column * t.rows + row,
                     t.rows);
  }
  if (kHasBlocks) {
    (in_block < kBlockThreads / 2 ? of_thread.m : of_thread.v) = largest_inv;
  } else {
    of_thread.m = largest.m >> top_of(F.m);
    of_thread.v = largest.v >> top_of(F.v);
  }
  of_thread.master = largest.master >> top_of(F.master);
  return vectors * kVector;
}

/// The elements from `begin` on, a multiple of 4 (of 128 for block formats): any formats, any
/// alignment. A warp takes a block of 128 at a time.
__device__ void update_elements(const UpdateArgs& args, const Work& work, const Segment& segment,
                                std::int64_t begin, AdamwAmax& largest) {
  const AdamwTensor& t = work.tensor;
  const AdamwTensorStep& s = work.step;
  const StateFormats& f = t.formats;
  const AdamwOffsets at = offsets_of(t, segment);
  const auto step = static_cast<std::uint64_t>(args.adamw.scalars->step);
  const std::uint64_t first = t.random_base + static_cast<std::uint64_t>(segment.begin);
  const unsigned lane = threadIdx.x % 32;
  const auto warp_max = [](float x) {
    return bits_float(__reduce_max_sync(0xFFFFFFFFu, float_bits(x)));
  };
  for (std::int64_t group = begin + threadIdx.x / 32 * kStateBlock; group < segment.count;
       group += kThreads / 32 * kStateBlock) {
    const std::int64_t mine = group + 4 * lane;
    const std::int64_t block = (at.state + group) / kStateBlock;
    const float m_inv = is_block(f.m) ? t.m_blocks[block] : s.m_inv;
    const float v_inv = is_block(f.v) ? t.v_blocks[block] : s.v_inv;
    AdamwValues values[4];
    float m_amax = 0.0f, v_amax = 0.0f;
    IeeeMath math;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (mine + k >= segment.count) continue;
      values[k] = updated(s, f, load_input(t, at, mine + k), m_inv, v_inv, math);
      m_amax = fmaxf(m_amax, abs_of(values[k].m));
      v_amax = fmaxf(v_amax, values[k].second);
    }
    float m_scale = s.m_scale, v_scale = s.v_scale;
    const auto renew = [&](float amax, float* blocks, float& scale, std::uint32_t& largest_inv) {
      const BlockScale next = block_scale(warp_max(amax));
      scale = next.scale;
      if (lane == 0) blocks[block] = next.inv;
      largest_inv = larger(largest_inv, float_bits(next.inv));
    };
    __syncwarp();  // all have read the old scales
    if (is_block(f.m)) renew(m_amax, t.m_blocks, m_scale, largest.m);
    if (is_block(f.v)) renew(v_amax, t.v_blocks, v_scale, largest.v);
    const RandomWords words =
        philox(args.keys, step, (first + static_cast<std::uint64_t>(mine)) >> 2);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (mine + k >= segment.count) continue;
      const AdamwCodes codes = encoded(s, f, args.adamw.config.stochastic_rounding, values[k],
                                       m_scale, v_scale, words.word[k]);
      largest.raise(f, codes);
      store_codes(t, at, mine + k, codes);
    }
  }
}

/// Raises the amax of the tensor's scales to the block's: one atomic each, exact in any order.
__device__ void publish(const Work& work, const AdamwAmax& mine, AdamwAmax& of_block) {
  const auto raise = [](std::uint32_t code, std::uint32_t* word) {
    const std::uint32_t of_warp = __reduce_max_sync(0xFFFFFFFFu, code);
    if (threadIdx.x % 32 == 0) atomicMax(word, of_warp);
  };
  raise(mine.m, &of_block.m);
  raise(mine.v, &of_block.v);
  raise(mine.master, &of_block.master);
  __syncthreads();
  if (threadIdx.x % 32 != 0) return;
  const AdamwTensor& t = work.tensor;
  const auto to_scale = [](std::uint32_t bits, TensorScale* scale) {
    // A reduction, which does not wait for the old value as atomicMax on a generic pointer does.
    if (bits != 0) asm volatile("red.global.max.u32 [%0], %1;" ::"l"(&scale->amax), "r"(bits));
  };
  static_assert(kThreads == 128);  // a warp for every scale
  switch (threadIdx.x / 32) {
    case 0: return to_scale(amax_of_m(t.formats, work.step, of_block), t.m_scale);
    case 1: return to_scale(amax_of_v(t.formats, work.step, of_block), t.v_scale);
    case 2: return to_scale(amax_of_master(t.formats, work.step, of_block), t.master_scale);
    default: return to_scale(amax_of_weight(t.formats, work.step, of_block), t.weight_scale);
  }
}

constexpr unsigned kTensorWords = sizeof(AdamwTensor) / 4;
constexpr unsigned kStepWords = sizeof(AdamwTensorStep) / 4;
static_assert(kTensorWords + kStepWords <= kThreads);

__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    update_kernel(const __grid_constant__ UpdateArgs args) {
  __shared__ alignas(16) char work_bytes[sizeof(Work)];
  __shared__ AdamwAmax of_block;
  Work& work = *reinterpret_cast<Work*>(work_bytes);
  // The tables of segments and tensors are as they were before prepare; its results are awaited.
  const Segment segment = args.adamw.segments[blockIdx.x];
  const auto words_of = [](const void* from) { return static_cast<const std::uint32_t*>(from); };
  std::uint32_t word = 0;
  if (threadIdx.x < kTensorWords) {
    word = words_of(args.adamw.tensors + segment.tensor)[threadIdx.x];
  }
  wait_for_previous_kernel();
  const std::uint32_t skip = args.adamw.scalars->skip;
  const unsigned in_step = threadIdx.x - kTensorWords;
  if (threadIdx.x >= kTensorWords && in_step < kStepWords) {
    word = words_of(args.adamw.steps + segment.tensor)[in_step];
  }
  if (skip != 0) return;
  if (threadIdx.x < kTensorWords) {
    reinterpret_cast<std::uint32_t*>(&work.tensor)[threadIdx.x] = word;
  } else if (in_step < kStepWords) {
    reinterpret_cast<std::uint32_t*>(&work.step)[in_step] = word;
  }
  __syncthreads();
  const Walk walk = walk_of(work.tensor, segment);
  const AdamwOffsets at = offsets_at(work.tensor, segment, walk.first);
  if (threadIdx.x == 0) {
    work.streams = streams_of(work.tensor, at);
    of_block = AdamwAmax{};
  }
  __syncthreads();
  AdamwAmax largest;
  int done = 0;
  const auto take = [&]<AdamwRow R>() {
    done = update_vectors<R>(args, work, segment, walk, largest);
  };
  switch (static_cast<AdamwPath>(work.step.path)) {
    case AdamwPath::o0: take.operator()<kRowO0>(); break;
    case AdamwPath::o1: take.operator()<kRowO1>(); break;
    case AdamwPath::o2: take.operator()<kRowO2>(); break;
    case AdamwPath::o2_transposed:
      if (walk.is_tile) take.operator()<kRowO2Transposed>();
      break;
    case AdamwPath::o3: take.operator()<kRowO3>(); break;
    case AdamwPath::blocks: take.operator()<kRowBlocks>(); break;
    case AdamwPath::general: break;
  }
  if (done < segment.count) update_elements(args, work, segment, done, largest);
  publish(work, largest, of_block);
}

}  // namespace

void adamw_update(const Context& ctx, const AdamwArgs& args) {
  set_device(ctx);
  const UpdateArgs update{args, philox_keys(args.config.seed)};
  int major = 0;
  OCTET_CUDA_CHECK(
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, ctx.device().index));
  cudaLaunchAttribute dependent{};
  dependent.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  dependent.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t launch{};
  launch.gridDim = static_cast<unsigned>(args.segment_count);
  launch.blockDim = kThreads;
  launch.stream = ctx.stream();
  launch.attrs = &dependent;
  launch.numAttrs = major >= 9 ? 1 : 0;
  OCTET_CUDA_CHECK(cudaLaunchKernelEx(&launch, update_kernel, update));
}

}  // namespace octet::detail::cuda
