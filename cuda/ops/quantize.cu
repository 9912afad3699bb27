// SPDX-License-Identifier: Apache-2.0
// Casts to and from FP8. Rows of a tensor go eight elements at a time; what is also wanted
// transposed, or summed by columns, goes in tiles of 128 rows and 64 columns.
#include <algorithm>

#include "cuda/device/dependent.cuh"
#include "cuda/ops/cast_launch.cuh"
#include "cuda/ops/cuda_ops.hpp"

namespace octet::detail::cuda {
namespace {

using namespace casts;

/// After a pass over the input from its end on, because that is in the cache.
__device__ std::int64_t block_of(const Cast& cast) {
  return cast.given ? blockIdx.x : gridDim.x - 1 - blockIdx.x;
}

/// Blocks of a multiprocessor that `Vectors` leave room for.
constexpr int kBlocksPerSm = 4;

template <class In, class Out, bool Measures>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    cast_rows_kernel(const __grid_constant__ Cast cast) {
  using V = Vectors<In, Out>;
  if constexpr (!Measures) begin_dependent();
  const std::int64_t block = block_of(cast);
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
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    cast_tiles_kernel(const __grid_constant__ Cast cast) {
  using V = Vectors<In, Out>;
  __shared__ union {
    Tile tile;
    float lanes[kLanes][Tile::kColumns];
  } shared;
  if constexpr (!Measures) begin_dependent();
  const std::int64_t block = block_of(cast);
  const std::int64_t row0 = block / cast.tiles_across * kTileRows;
  const std::int64_t column0 = block % cast.tiles_across * Tile::kColumns;
  const unsigned group = threadIdx.x % kGroups, lane = threadIdx.x / kGroups;
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
  vectors.cast(scale,
               [&](int k, const float(&x)[8], const float(&scaled)[8], const Vector8<Out>& codes) {
                 const auto place = place_of(k);
                 if (cast.out != nullptr && place.left > 0) {
                   store8<Out>(cast.out + place.at, codes, place.left, cast.out_aligned);
                 }
                 shared.tile.at(kLanes * k + lane, group) = {codes.word[0], codes.word[1]};
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
    shared.tile.store_transposed(
        cast.transposed + column0 * cast.pitch + row0, cast.pitch,
        static_cast<int>(min(cast.columns - column0, std::int64_t{Tile::kColumns})),
        static_cast<int>(min(cast.pitch - row0, std::int64_t{kTileRows})), cast.transposed_aligned);
  }
  if (cast.column_sums != nullptr) {
    store_column_sums<kGroups>(shared.lanes, sums,
                               cast.column_sums + row0 / kTileRows * cast.columns + column0,
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
  __shared__ Tile tile;
  const std::int64_t row0 = blockIdx.x / tiles_across * kTileRows;
  const std::int64_t column0 = blockIdx.x % tiles_across * Tile::kColumns;
  const unsigned group = threadIdx.x % kGroups, lane = threadIdx.x / kGroups;
  const std::int64_t column = column0 + 8 * group;
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    const std::int64_t row = row0 + kLanes * k + lane;
    const auto codes = load8<Element<DType::e4m3>>(in + row * columns + column,
                                                   row < rows ? columns - column : 0, in_aligned);
    tile.at(kLanes * k + lane, group) = {codes.word[0], codes.word[1]};
  }
  tile.store_transposed(out + column0 * pitch + row0, pitch,
                        static_cast<int>(min(columns - column0, std::int64_t{Tile::kColumns})),
                        static_cast<int>(min(pitch - row0, std::int64_t{kTileRows})), out_aligned);
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

std::int64_t tiles_down(std::int64_t rows) { return (rows + kTileRows - 1) / kTileRows; }
std::int64_t tiles_across(std::int64_t columns) {
  return (columns + Tile::kColumns - 1) / Tile::kColumns;
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
  cast.tiles_across = tiles_across(cast.columns);
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
  const std::int64_t blocks = in_tiles ? tiles_down(cast.rows) * cast.tiles_across
                                       : (cast.rows + kBlockElements - 1) / kBlockElements;
  int multiprocessors = 0;
  OCTET_CUDA_CHECK(
      cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, ctx.device().index));
  // What fits in registers is read once. The launch bounds see to it that all blocks run at once.
  const bool measures = !cast.given && blocks <= std::int64_t{kBlocksPerSm} * multiprocessors;
  if (!cast.given && !measures) {
    const std::int64_t count = args.in.numel();
    amax_kernel<In><<<blocks_for(count), kThreads, 0, ctx.stream()>>>(
        args.in.as<const typename In::Storage>(), count,
        is_aligned_to_vectors(args.in.data, size_of(args.in.dtype)), amax_word(cast.scale));
  }
  cudaLaunchAttribute attribute{};
  if (measures) {
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  } else {
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  cudaLaunchConfig_t launch{};
  launch.gridDim = static_cast<unsigned>(std::max<std::int64_t>(blocks, 1));
  launch.blockDim = kThreads;
  launch.stream = ctx.stream();
  launch.attrs = &attribute;
  const auto kernel =
      in_tiles ? (measures ? cast_tiles_kernel<In, Out, true> : cast_tiles_kernel<In, Out, false>)
               : (measures ? cast_rows_kernel<In, Out, true> : cast_rows_kernel<In, Out, false>);
  launch.numAttrs = measures || is_built_for(kernel, 90) ? 1 : 0;
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
  const std::int64_t tiles = tiles_down(rows) * tiles_across(columns);
  transpose_kernel<<<static_cast<unsigned>(tiles), kThreads, 0, ctx.stream()>>>(
      in.as<const std::uint8_t>(), rows, columns, out.as<std::uint8_t>(), padded_rows(rows),
      tiles_across(columns), columns % 8 == 0 && is_aligned_to_vectors(in.data, 1),
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
