// SPDX-License-Identifier: Apache-2.0
// Casts to and from FP8. Rows of a tensor go eight elements at a time; what is also wanted
// transposed, or summed by columns, goes in tiles of 128 rows and 64 columns.
#include <algorithm>

#include "cuda/ops/cast_launch.cuh"
#include "cuda/ops/cuda_ops.hpp"

namespace octet::detail::cuda {
namespace {

using namespace casts;

/// Blocks of a multiprocessor that `Vectors` leave room for.
constexpr int kBlocksPerSm = 4;

template <class In, class Out, Mode M>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    cast_rows_kernel(const __grid_constant__ Cast cast) {
  using V = Vectors<In, Out>;
  Counts counts;
  std::uint32_t largest = 0;
  const auto place_of = [&](unsigned tile) {
    const std::int64_t first = tile * kBlockElements + std::int64_t{threadIdx.x} * 8;
    return [&cast, first](int k) -> typename V::Place {
      const std::int64_t at = first + k * kThreads * 8;
      return {at, cast.rows - at};
    };
  };
  const auto cast_tile = [&](const V& vectors, unsigned tile, float scale) {
    const auto place_of_vector = place_of(tile);
    vectors.cast(
        scale, [&](int k, const float(&x)[8], const float(&scaled)[8], const Vector8<Out>& codes) {
          const auto place = place_of_vector(k);
          if (place.left > 0) store8<Out>(cast.out + place.at, codes, place.left, cast.out_aligned);
          if (cast.counters != nullptr) counts.add<Out>(x, scaled, codes);
          if constexpr (M == Mode::given) largest = max(largest, largest_of(x));
        });
  };
  __shared__ std::uint32_t word;
  cast_all<M, V>(cast, word, place_of, cast_tile);
  if constexpr (M == Mode::given) record_amax(cast, largest);
  if (cast.counters != nullptr) counts.publish(cast.counters);
}

template <class In, class Out, Mode M>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    cast_tiles_kernel(const __grid_constant__ Cast cast) {
  using V = Vectors<In, Out>;
  __shared__ union {
    Tile tile;
    float lanes[kLanes][Tile::kColumns];
    std::uint32_t word;
  } shared;
  Counts counts;
  std::uint32_t largest = 0;
  const unsigned group = threadIdx.x % kGroups, lane = threadIdx.x / kGroups;
  const auto row_of = [&](unsigned tile) {
    return std::int64_t{tile / cast.tiles_across} * kTileRows;
  };
  const auto column_of = [&](unsigned tile) {
    return std::int64_t{tile % cast.tiles_across} * Tile::kColumns;
  };
  const auto place_of = [&](unsigned tile) {
    const std::int64_t row0 = row_of(tile) + lane, column = column_of(tile) + 8 * group;
    return [&cast, row0, column](int k) -> typename V::Place {
      const std::int64_t row = row0 + kLanes * k;
      return {row * cast.columns + column, row < cast.rows ? cast.columns - column : 0};
    };
  };
  const auto cast_tile = [&](const V& vectors, unsigned tile, float scale) {
    const std::int64_t row0 = row_of(tile), column0 = column_of(tile);
    const auto place_of_vector = place_of(tile);
    float sums[8] = {};
    vectors.cast(
        scale, [&](int k, const float(&x)[8], const float(&scaled)[8], const Vector8<Out>& codes) {
          const auto place = place_of_vector(k);
          if (cast.out != nullptr && place.left > 0) {
            store8<Out>(cast.out + place.at, codes, place.left, cast.out_aligned);
          }
          shared.tile.at(kLanes * k + lane, group) = {codes.word[0], codes.word[1]};
          if (cast.counters != nullptr) counts.add<Out>(x, scaled, codes);
          if (cast.column_sums != nullptr) {
#pragma unroll
            for (int i = 0; i < 8; ++i) sums[i] += x[i];
          }
          if constexpr (M == Mode::given) largest = max(largest, largest_of(x));
        });
    if (cast.transposed != nullptr) {
      shared.tile.store_transposed(
          cast.transposed + column0 * cast.pitch + row0, cast.pitch,
          static_cast<int>(min(cast.columns - column0, std::int64_t{Tile::kColumns})),
          static_cast<int>(min(cast.pitch - row0, std::int64_t{kTileRows})),
          cast.transposed_aligned);
    }
    if (cast.column_sums != nullptr) {
      store_column_sums<kGroups>(shared.lanes, sums,
                                 cast.column_sums + row0 / kTileRows * cast.columns + column0,
                                 cast.columns - column0);
    }
    if constexpr (M == Mode::measures)
      __syncthreads();  // before the next tile takes the place of this one
  };
  cast_all<M, V>(cast, shared.word, place_of, cast_tile);
  if constexpr (M == Mode::given) record_amax(cast, largest);
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
  cast.tiles_across = static_cast<unsigned>(tiles_across(cast.columns));
  const std::int64_t tiles = in_tiles ? tiles_down(cast.rows) * tiles_across(cast.columns)
                                      : (cast.rows + kBlockElements - 1) / kBlockElements;
  cast.tiles = static_cast<unsigned>(std::max<std::int64_t>(tiles, 1));
  cast.scale = args.out.scale;
  cast.scale_copy = args.scale_copy;
  cast.nonfinite = args.nonfinite;
  cast.counters = args.counters;
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

std::size_t device_attribute(const Context& ctx, cudaDeviceAttr attribute) {
  int value = 0;
  OCTET_CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, ctx.device().index));
  return static_cast<std::size_t>(value);
}

/// Tiles that a block of a kernel can keep in shared memory beside its own, kBlocksPerSm blocks at
/// once.
int staged_tiles(const Context& ctx, void (*kernel)(Cast), std::size_t tile_bytes) {
  cudaFuncAttributes attributes{};
  OCTET_CUDA_CHECK(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)));
  const std::size_t all =
      device_attribute(ctx, cudaDevAttrMaxSharedMemoryPerMultiprocessor) / kBlocksPerSm;
  const std::size_t taken =
      attributes.sharedSizeBytes + device_attribute(ctx, cudaDevAttrReservedSharedMemoryPerBlock);
  return static_cast<int>((all - taken) / tile_bytes);
}

/// Current scaling in one kernel; false, and nothing happens, for what is too large. Twice what the
/// device keeps is still faster so (measured), although the other half is read twice.
template <class In, class Out>
bool launch_measuring_cast(const Context& ctx, Cast cast) {
  const auto kernel = cast.columns != 0 ? cast_tiles_kernel<In, Out, Mode::measures>
                                        : cast_rows_kernel<In, Out, Mode::measures>;
  const auto blocks =
      static_cast<unsigned>(kBlocksPerSm * device_attribute(ctx, cudaDevAttrMultiProcessorCount));
  // A tile for each of the blocks that run at once, which needs no further question to the driver.
  if (cast.tiles <= blocks) {
    launch_cooperative(ctx, kernel, cast.tiles, kThreads, 0, cast);
    return true;
  }
  constexpr std::size_t kTileBytes = kBlockElements * sizeof(typename In::Storage);
  cast.staged = staged_tiles(ctx, kernel, kTileBytes);
  if (cast.tiles > 2 * (1 + static_cast<unsigned>(cast.staged)) * blocks) return false;
  const std::size_t bytes = static_cast<std::size_t>(cast.staged) * kTileBytes;
  OCTET_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(bytes)));
  OCTET_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                        cudaSharedmemCarveoutMaxShared));
  launch_cooperative(ctx, kernel, blocks, kThreads, bytes, cast);
  return true;
}

template <class In, class Out, Mode M>
void launch_one_pass(const Context& ctx, const Cast& cast) {
  const auto kernel =
      cast.columns != 0 ? cast_tiles_kernel<In, Out, M> : cast_rows_kernel<In, Out, M>;
  launch_dependent(ctx, kernel, cast.tiles, kThreads, cast);
}

template <class In, class Out>
void launch_cast(const Context& ctx, const QuantizeArgs& args) {
  const Cast cast = cast_of(args);
  if (args.scaling == Scaling::given) return launch_one_pass<In, Out, Mode::given>(ctx, cast);
  if (launch_measuring_cast<In, Out>(ctx, cast)) return;
  const std::int64_t count = args.in.numel();
  amax_kernel<In><<<blocks_for(count), kThreads, 0, ctx.stream()>>>(
      args.in.as<const typename In::Storage>(), count,
      is_aligned_to_vectors(args.in.data, size_of(args.in.dtype)), amax_word(cast.scale));
  launch_one_pass<In, Out, Mode::measured>(ctx, cast);
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
