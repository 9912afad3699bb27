// SPDX-License-Identifier: Apache-2.0
// Casts to and from FP8. Rows of a tensor go eight elements at a time; what is also wanted
// transposed, or summed by columns, goes in tiles of 128 x 128.
#include <cooperative_groups.h>

#include <algorithm>

#include "cuda/check.hpp"
#include "cuda/device/byte_tile.cuh"
#include "cuda/device/reduce.cuh"
#include "cuda/device/vector8.cuh"
#include "cuda/ops/cuda_ops.hpp"
#include "octet/core/detail/scaling_math.hpp"

namespace octet::detail::cuda {
namespace {

constexpr int kThreads = 256;
/// Vectors of eight that a thread holds at once.
constexpr int kVectors = 8;
/// What a block of threads takes: a tile, or as many elements in a row.
constexpr std::int64_t kBlockElements = std::int64_t{kThreads} * kVectors * 8;
static_assert(kBlockElements == kTile * kTile);
/// Rows of a tile that are read at once, and with that the lanes of a column's sum.
constexpr int kLanes = kThreads / kTileGroups;

/// A cast as the kernels see it. A tensor without columns is `rows` elements in a row.
struct Cast {
  const void* in;
  std::uint8_t *out, *transposed;  // either may be null
  std::int64_t rows, columns, pitch;
  std::int64_t tiles_across;
  TensorScale* scale;
  std::uint32_t* nonfinite;
  CastCounters* counters;
  float* column_sums;
  bool given;  // the scale stays, its amax is raised
  bool in_aligned, out_aligned, transposed_aligned;
};

OCTET_HD std::uint32_t* amax_word(TensorScale* scale) {
  return reinterpret_cast<std::uint32_t*>(&scale->amax);
}

/// The vectors of a thread: loaded, measured, cast.
template <class In, class Out>
class Vectors {
 public:
  /// Of a vector, counted from the first of a thread, where it is in the tensor and how many of its
  /// elements exist.
  struct Place {
    std::int64_t at;
    std::int64_t left;
  };

  template <class PlaceOf>
  __device__ void load(const Cast& cast, const PlaceOf& place_of) {
    const auto* in = static_cast<const typename In::Storage*>(cast.in);
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      const Place place = place_of(k);
      vectors_[k] = load8<In>(in + place.at, place.left, cast.in_aligned);
    }
  }
  __device__ std::uint32_t largest() const {
    std::uint32_t largest = 0;
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      float x[8];
      decode8<In>(vectors_[k], x);
#pragma unroll
      for (float value : x) largest = max(largest, magnitude_bits(value));
    }
    return largest;
  }
  /// Calls each(k, values, codes) for every vector.
  template <class Each>
  __device__ void cast(float scale, const Each& each) const {
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      float x[8], scaled[8];
      decode8<In>(vectors_[k], x);
#pragma unroll
      for (int i = 0; i < 8; ++i) scaled[i] = x[i] * scale;
      each(k, x, scaled, encode8<Out>(scaled));
    }
  }

 private:
  Vector8<In> vectors_[kVectors];
};

/// The scale of a cast. With current scaling it follows from the measured amax, and every block
/// works it out for itself; where amax is not finite nobody writes the old scale, so it can be
/// read.
__device__ float scale_of(const Cast& cast, DType dtype) {
  if (cast.given) return cast.scale->scale;
  const float amax = __ldcg(&cast.scale->amax);
  TensorScale old;
  const bool is_finite = is_finite_bits(magnitude_bits(amax));
  if (!is_finite) old = *cast.scale;
  const TensorScale next = rescaled(old, amax, dtype);
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    if (is_finite) {
      cast.scale->scale = next.scale;
      cast.scale->scale_inv = next.scale_inv;
    } else if (cast.nonfinite != nullptr) {
      *cast.nonfinite = 1;
    }
  }
  return next.scale;
}

/// A given scale's amax and flag. All threads must call it.
__device__ void record_amax(const Cast& cast, std::uint32_t largest) {
  block_atomic_max(largest, amax_word(cast.scale));
  if (!is_finite_bits(largest) && cast.nonfinite != nullptr) *cast.nonfinite = 1;
}

/// Counts of a thread: see CastCounters.
struct Counts {
  unsigned saturated = 0, flushed = 0;

  template <class Out>
  __device__ void add(const float (&x)[8], const float (&scaled)[8], const Vector8<Out>& codes) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const std::uint32_t code = codes.word[i / 4] >> (8 * (i % 4)) & 0x7Fu;
      saturated += is_saturated(scaled[i], Out::kMax) ? 1 : 0;
      flushed += is_flushed(x[i], code) ? 1 : 0;
    }
  }
  __device__ void publish(CastCounters* to) const {
    const auto raise = [](unsigned count, std::uint64_t* word) {
      const unsigned of_warp = __reduce_add_sync(0xFFFFFFFFu, count);
      if (threadIdx.x % 32 == 0 && of_warp != 0) {
        atomicAdd(reinterpret_cast<unsigned long long*>(word), of_warp);
      }
    };
    raise(saturated, &to->saturated);
    raise(flushed, &to->flushed);
  }
};

/// The sum of every column of a tile: lane l of a column has added rows l, l + 16, ...; then a
/// binary tree over the lanes.
__device__ void store_column_sums(float (*lanes)[kTile], const float (&mine)[8], float* out,
                                  std::int64_t columns) {
  const int group = static_cast<int>(threadIdx.x) % kTileGroups;
  const int lane = static_cast<int>(threadIdx.x) / kTileGroups;
  __syncthreads();  // the tile that was there is no longer needed
#pragma unroll
  for (int i = 0; i < 8; ++i) lanes[lane][8 * group + i] = mine[i];
  for (int width = kLanes / 2; width > 0; width /= 2) {
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < width * kTile; i += kThreads) {
      lanes[i / kTile][i % kTile] += lanes[i / kTile + width][i % kTile];
    }
  }
  __syncthreads();
  const int column = static_cast<int>(threadIdx.x);
  if (column < kTile && column < columns) out[column] = unscaled(lanes[0][column], 1.0f);
}

/// Measures while the vectors are in registers, so that the input is read once; all blocks must run
/// at once. amax must hold 0.
template <class V>
__device__ void measure(const Cast& cast, const V& vectors) {
  block_atomic_max(vectors.largest(), amax_word(cast.scale));
  cooperative_groups::this_grid().sync();
}

/// Blocks of a multiprocessor that `Vectors` leave room for.
template <class In>
constexpr int kBlocksPerSm = sizeof(typename In::Storage) == 4 ? 2 : 3;

template <class In, class Out, bool Measures>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm<In>)
    cast_rows_kernel(const __grid_constant__ Cast cast) {
  using V = Vectors<In, Out>;
  // From the end on, because after a pass over the input its end is in the cache.
  const std::int64_t block = gridDim.x - 1 - blockIdx.x;
  const auto place_of = [&](int k) -> typename V::Place {
    const std::int64_t at = block * kBlockElements + (std::int64_t{k} * kThreads + threadIdx.x) * 8;
    return {at, cast.rows - at};
  };
  V vectors;
  vectors.load(cast, place_of);
  if constexpr (Measures) measure(cast, vectors);
  const float scale = scale_of(cast, Out::kDType);
  Counts counts;
  std::uint32_t largest = 0;
  vectors.cast(scale,
               [&](int k, const float(&x)[8], const float(&scaled)[8], const Vector8<Out>& codes) {
                 const auto place = place_of(k);
                 if (place.left > 0)
                   store8<Out>(cast.out + place.at, codes, place.left, cast.out_aligned);
                 if (cast.counters != nullptr) counts.add<Out>(x, scaled, codes);
                 if constexpr (!Measures) {
#pragma unroll
                   for (float value : x) largest = max(largest, magnitude_bits(value));
                 }
               });
  if (cast.given) record_amax(cast, largest);
  if (cast.counters != nullptr) counts.publish(cast.counters);
}

template <class In, class Out, bool Measures>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm<In>)
    cast_tiles_kernel(const __grid_constant__ Cast cast) {
  using V = Vectors<In, Out>;
  __shared__ union {
    uint2 tile[kTileVectors];
    float lanes[kLanes][kTile];
  } shared;
  const std::int64_t block = gridDim.x - 1 - blockIdx.x;
  const std::int64_t row0 = block / cast.tiles_across * kTile;
  const std::int64_t column0 = block % cast.tiles_across * kTile;
  const unsigned group = threadIdx.x % kTileGroups, lane = threadIdx.x / kTileGroups;
  const std::int64_t column = column0 + 8 * group;
  const auto place_of = [&](int k) -> typename V::Place {
    const std::int64_t row = row0 + kLanes * k + lane;
    return {row * cast.columns + column, row < cast.rows ? cast.columns - column : 0};
  };
  V vectors;
  vectors.load(cast, place_of);
  if constexpr (Measures) measure(cast, vectors);
  const float scale = scale_of(cast, Out::kDType);
  Counts counts;
  std::uint32_t largest = 0;
  float sums[8] = {};
  vectors.cast(
      scale, [&](int k, const float(&x)[8], const float(&scaled)[8], const Vector8<Out>& codes) {
        const auto place = place_of(k);
        if (cast.out != nullptr && place.left > 0) {
          store8<Out>(cast.out + place.at, codes, place.left, cast.out_aligned);
        }
        shared.tile[place_in_tile(kLanes * k + lane, group)] = {codes.word[0], codes.word[1]};
        if (cast.counters != nullptr) counts.add<Out>(x, scaled, codes);
        if (cast.column_sums != nullptr) {
#pragma unroll
          for (int i = 0; i < 8; ++i) sums[i] += x[i];
        }
        if constexpr (!Measures) {
#pragma unroll
          for (float value : x) largest = max(largest, magnitude_bits(value));
        }
      });
  if (cast.transposed != nullptr) {
    store_transposed(shared.tile, cast.transposed + column0 * cast.pitch + row0, cast.pitch,
                     static_cast<int>(min(cast.columns - column0, std::int64_t{kTile})),
                     static_cast<int>(min(cast.pitch - row0, std::int64_t{kTile})),
                     cast.transposed_aligned);
  }
  if (cast.column_sums != nullptr) {
    store_column_sums(shared.lanes, sums, cast.column_sums + row0 / kTile * cast.columns + column0,
                      cast.columns - column0);
  }
  if (cast.given) record_amax(cast, largest);
  if (cast.counters != nullptr) counts.publish(cast.counters);
}

template <class In>
__global__ void __launch_bounds__(kThreads)
    amax_kernel(const typename In::Storage* in, std::int64_t count, bool aligned,
                std::uint32_t* amax) {
  std::uint32_t largest = 0;
  const std::int64_t threads = std::int64_t{gridDim.x} * kThreads;
  for (std::int64_t at = (std::int64_t{blockIdx.x} * kThreads + threadIdx.x) * 8; at < count;
       at += threads * 8) {
    float x[8];
    decode8<In>(load8<In>(in + at, count - at, aligned), x);
#pragma unroll
    for (float value : x) largest = max(largest, magnitude_bits(value));
  }
  block_atomic_max(largest, amax);
}

__global__ void __launch_bounds__(kThreads)
    transpose_kernel(const std::uint8_t* in, std::int64_t rows, std::int64_t columns,
                     std::uint8_t* out, std::int64_t pitch, std::int64_t tiles_across,
                     bool in_aligned, bool out_aligned) {
  __shared__ uint2 tile[kTileVectors];
  const std::int64_t row0 = blockIdx.x / tiles_across * kTile;
  const std::int64_t column0 = blockIdx.x % tiles_across * kTile;
  const unsigned group = threadIdx.x % kTileGroups, lane = threadIdx.x / kTileGroups;
  const std::int64_t column = column0 + 8 * group;
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    const std::int64_t row = row0 + kLanes * k + lane;
    const auto codes = load8<Element<DType::e4m3>>(in + row * columns + column,
                                                   row < rows ? columns - column : 0, in_aligned);
    tile[place_in_tile(kLanes * k + lane, group)] = {codes.word[0], codes.word[1]};
  }
  store_transposed(tile, out + column0 * pitch + row0, pitch,
                   static_cast<int>(min(columns - column0, std::int64_t{kTile})),
                   static_cast<int>(min(pitch - row0, std::int64_t{kTile})), out_aligned);
}

template <class In, class Out>
__global__ void __launch_bounds__(kThreads)
    convert_kernel(const typename In::Storage* in, typename Out::Storage* out, std::int64_t count,
                   const TensorScale* scale, bool in_aligned, bool out_aligned) {
  const float scale_inv = scale != nullptr ? scale->scale_inv : 1.0f;
  const std::int64_t threads = std::int64_t{gridDim.x} * kThreads;
  for (std::int64_t at = (std::int64_t{blockIdx.x} * kThreads + threadIdx.x) * 8; at < count;
       at += threads * 8) {
    float x[8];
    decode8<In>(load8<In>(in + at, count - at, in_aligned), x);
#pragma unroll
    for (float& value : x) value = unscaled(value, scale_inv);
    store8<Out>(out + at, encode8<Out>(x), count - at, out_aligned);
  }
}

/// Column c of all panels, one after the other in double.
template <class Out>
__global__ void __launch_bounds__(kThreads)
    sum_columns_kernel(const float* sums, std::int64_t panels, std::int64_t columns,
                       typename Out::Storage* out) {
  const std::int64_t column = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (column >= columns) return;
  double sum = 0.0;
  for (std::int64_t p = 0; p < panels; ++p) {
    sum += static_cast<double>(sums[p * columns + column]);
  }
  out[column] = Out::encode(unscaled(static_cast<float>(sum), 1.0f));
}

/// Grid-stride kernels: enough blocks to fill the largest GPUs several times over.
unsigned blocks_for(std::int64_t count) {
  constexpr std::int64_t kMaxBlocks = 4096;
  return static_cast<unsigned>(
      std::clamp<std::int64_t>((count + 8 * kThreads - 1) / (8 * kThreads), 1, kMaxBlocks));
}

bool is_aligned_to_vectors(const void* data, std::size_t width) {
  return reinterpret_cast<std::uintptr_t>(data) % std::min<std::size_t>(8 * width, 16) == 0;
}

std::int64_t tiles_of(std::int64_t elements) { return (elements + kTile - 1) / kTile; }

/// The input of a cast: one of the three types that are not FP8.
template <class F>
void for_wide_dtype(DType dtype, F&& f) {
  if (dtype == DType::bf16) return f(Element<DType::bf16>{});
  if (dtype == DType::f16) return f(Element<DType::f16>{});
  f(Element<DType::f32>{});
}

Cast cast_of(const QuantizeArgs& args) {
  const bool in_tiles =
      args.in.numel() != 0 && (!args.transposed.empty() || !args.column_sums.empty());
  Cast cast{};
  cast.in = args.in.data;
  cast.out = args.out.data.as<std::uint8_t>();
  cast.rows = in_tiles ? args.in.shape[0] : args.in.numel();
  cast.columns = in_tiles ? args.in.shape[1] : 0;
  cast.pitch = padded_rows(cast.rows);
  cast.tiles_across = tiles_of(cast.columns);
  cast.scale = args.out.scale;
  cast.nonfinite = args.nonfinite;
  cast.counters = args.counters;
  cast.given = args.scaling == Scaling::given;
  const bool whole_vectors = !in_tiles || cast.columns % 8 == 0;
  cast.in_aligned = whole_vectors && is_aligned_to_vectors(args.in.data, size_of(args.in.dtype));
  cast.out_aligned = whole_vectors && is_aligned_to_vectors(cast.out, 1);
  if (!args.transposed.empty()) {
    cast.transposed = args.transposed.as<std::uint8_t>();
    cast.transposed_aligned = is_aligned_to_vectors(cast.transposed, 1);
  }
  if (!args.column_sums.empty()) cast.column_sums = args.column_sums.as<float>();
  return cast;
}

template <class In, class Out>
void launch_cast(const Context& ctx, const QuantizeArgs& args) {
  const Cast cast = cast_of(args);
  const bool in_tiles = cast.columns != 0;
  const std::int64_t blocks = in_tiles ? tiles_of(cast.rows) * cast.tiles_across
                                       : (cast.rows + kBlockElements - 1) / kBlockElements;
  int multiprocessors = 0;
  OCTET_CUDA_CHECK(
      cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, ctx.device().index));
  // What fits in registers is read once. The launch bounds see to it that all blocks run at once.
  const bool measures = !cast.given && blocks <= std::int64_t{kBlocksPerSm<In>} * multiprocessors;
  if (!cast.given && !measures) {
    const std::int64_t count = args.in.numel();
    amax_kernel<In><<<blocks_for(count), kThreads, 0, ctx.stream()>>>(
        args.in.as<const typename In::Storage>(), count,
        is_aligned_to_vectors(args.in.data, size_of(args.in.dtype)), amax_word(cast.scale));
  }
  cudaLaunchAttribute cooperative{};
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = 1;
  cudaLaunchConfig_t launch{};
  launch.gridDim = static_cast<unsigned>(std::max<std::int64_t>(blocks, 1));
  launch.blockDim = kThreads;
  launch.stream = ctx.stream();
  launch.attrs = &cooperative;
  launch.numAttrs = measures ? 1 : 0;
  const auto kernel =
      in_tiles ? (measures ? cast_tiles_kernel<In, Out, true> : cast_tiles_kernel<In, Out, false>)
               : (measures ? cast_rows_kernel<In, Out, true> : cast_rows_kernel<In, Out, false>);
  OCTET_CUDA_CHECK(cudaLaunchKernelEx(&launch, kernel, cast));
}

void zero_amax(const Context& ctx, TensorScale* scale) {
  OCTET_CUDA_CHECK(cudaMemsetAsync(amax_word(scale), 0, sizeof(std::uint32_t), ctx.stream()));
}

}  // namespace

void measure_amax(const Context& ctx, const TensorView& in, TensorScale* scale) {
  set_device(ctx);
  zero_amax(ctx, scale);
  const std::int64_t count = in.numel();
  if (count == 0) return;
  for_wide_dtype(in.dtype, [&]<class In>(In) {
    amax_kernel<In><<<blocks_for(count), kThreads, 0, ctx.stream()>>>(
        in.as<const typename In::Storage>(), count,
        is_aligned_to_vectors(in.data, size_of(in.dtype)), amax_word(scale));
  });
  OCTET_CUDA_CHECK(cudaGetLastError());
}

void quantize(const Context& ctx, const QuantizeArgs& args) {
  set_device(ctx);
  if (args.scaling == Scaling::current) zero_amax(ctx, args.out.scale);
  for_wide_dtype(args.in.dtype, [&]<class In>(In) {
    if (args.out.data.dtype == DType::e4m3) {
      launch_cast<In, Element<DType::e4m3>>(ctx, args);
    } else {
      launch_cast<In, Element<DType::e5m2>>(ctx, args);
    }
  });
  OCTET_CUDA_CHECK(cudaGetLastError());
}

void convert(const Context& ctx, const ScaledView& in, const TensorView& out) {
  set_device(ctx);
  const std::int64_t count = out.numel();
  for_dtype(in.data.dtype, [&]<class In>(In) {
    for_wide_dtype(out.dtype, [&]<class Out>(Out) {
      convert_kernel<In, Out><<<blocks_for(count), kThreads, 0, ctx.stream()>>>(
          in.data.as<const typename In::Storage>(), out.as<typename Out::Storage>(), count,
          in.scale, is_aligned_to_vectors(in.data.data, size_of(in.data.dtype)),
          is_aligned_to_vectors(out.data, size_of(out.dtype)));
    });
  });
  OCTET_CUDA_CHECK(cudaGetLastError());
}

void transpose(const Context& ctx, const TensorView& in, const TensorView& out) {
  set_device(ctx);
  const std::int64_t rows = in.shape[0];
  const std::int64_t columns = in.shape[1];
  const std::int64_t tiles = tiles_of(rows) * tiles_of(columns);
  transpose_kernel<<<static_cast<unsigned>(tiles), kThreads, 0, ctx.stream()>>>(
      in.as<const std::uint8_t>(), rows, columns, out.as<std::uint8_t>(), padded_rows(rows),
      tiles_of(columns), columns % 8 == 0 && is_aligned_to_vectors(in.data, 1),
      is_aligned_to_vectors(out.data, 1));
  OCTET_CUDA_CHECK(cudaGetLastError());
}

void sum_columns(const Context& ctx, const TensorView& sums, const TensorView& out) {
  set_device(ctx);
  const std::int64_t panels = sums.shape[0], columns = sums.shape[1];
  for_wide_dtype(out.dtype, [&]<class Out>(Out) {
    sum_columns_kernel<Out>
        <<<static_cast<unsigned>((columns + kThreads - 1) / kThreads), kThreads, 0, ctx.stream()>>>(
            sums.as<const float>(), panels, columns, out.as<typename Out::Storage>());
  });
  OCTET_CUDA_CHECK(cudaGetLastError());
}

}  // namespace octet::detail::cuda
