// SPDX-License-Identifier: Apache-2.0
// What a block of threads does with the 128 rows by 128 columns that it holds: whole blocks of
// every granularity, along rows and along columns, and one whole tile of every layout of scales.
#pragma once

#include "cuda/ops/cast_vectors.cuh"
#include "octet/core/detail/block_scaling.hpp"

namespace octet::detail::cuda::casts {

constexpr int kTileColumns = 128;
constexpr int kTileGroups = kTileColumns / 8;
/// 16 threads for a row, kLanes rows at once, kVectors times.
constexpr int kTileThreads = kTileGroups * kLanes;
static_assert(kLanes * kVectors == kTileRows);

/// An output with its scales. A layout has the rows and columns of the data, padding included.
struct BlockSide {
  std::uint8_t* data;  // may be null
  void* scales;
  ScaleLayout layout;
  bool aligned;
};

struct BlockCast {
  const void* in;
  std::int64_t rows, columns;
  unsigned tiles_across;  // in 32 bits, because every thread divides by it
  BlockSide out, transposed;
  std::uint32_t *nonfinite, *amax;
  CastCounters* counters;
  float* column_sums;
  unsigned ahead;  // how many tiles after its own a block prefetches
  bool in_aligned;
};

/// Where the vectors of a thread are.
struct TileSpot {
  unsigned down, across;  // tiles: a grid has fewer than 2^31
  unsigned group, lane;

  __device__ explicit TileSpot(const BlockCast& cast)
      : down(blockIdx.x / cast.tiles_across),
        across(blockIdx.x % cast.tiles_across),
        group(threadIdx.x % kTileGroups),
        lane(threadIdx.x / kTileGroups) {}
  __device__ std::int64_t row0() const { return std::int64_t{down} * kTileRows; }
  __device__ std::int64_t column0() const { return std::int64_t{across} * kTileColumns; }
  /// Of the elements from the first of vector k on, those that a matrix of this size has.
  __device__ int left(int k, std::int64_t rows, std::int64_t columns) const {
    const auto inside = [](std::int64_t count) {
      return static_cast<int>(min(count, std::int64_t{kTileRows}));
    };
    const bool exists = kLanes * k + static_cast<int>(lane) < inside(rows - row0());
    return exists ? inside(columns - column0()) - 8 * static_cast<int>(group) : 0;
  }
  __device__ std::int64_t row(int k) const { return row0() + kLanes * k + lane; }
  __device__ std::int64_t column() const { return column0() + 8 * group; }
};

template <class In>
using TileVectors = Vector8<In>[kVectors];

template <class In>
__device__ void load_tile(const BlockCast& cast, const TileSpot& spot, TileVectors<In>& vectors) {
  const auto* in = static_cast<const typename In::Storage*>(cast.in);
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    vectors[k] = load8<In>(in + spot.row(k) * cast.columns + spot.column(),
                           spot.left(k, cast.rows, cast.columns), cast.in_aligned);
  }
}

/// Asks for the lines of a tile that a block which is yet to start will read: memory is busy while
/// the blocks that run compute.
template <class In>
__device__ void prefetch_tile(const BlockCast& cast, unsigned tile) {
  constexpr int kInLine = 128 / sizeof(typename In::Storage), kLines = kTileColumns / kInLine;
  for (int i = static_cast<int>(threadIdx.x); i < kTileRows * kLines; i += kTileThreads) {
    const std::int64_t row = std::int64_t{tile / cast.tiles_across} * kTileRows + i / kLines;
    const std::int64_t column =
        std::int64_t{tile % cast.tiles_across} * kTileColumns + i % kLines * kInLine;
    if (row >= cast.rows || column >= cast.columns) continue;
    const auto* line =
        static_cast<const typename In::Storage*>(cast.in) + row * cast.columns + column;
    asm volatile("prefetch.global.L2 [%0];" ::"l"(line));
  }
}

template <class In>
__device__ std::uint32_t largest_of(const TileVectors<In>& vectors) {
  std::uint32_t largest = 0;
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    float x[8];
    decode8<In>(vectors[k], x);
    largest = max(largest, largest_of(x));
  }
  return largest;
}

/// BlockQuantizeArgs::amax, from the largest magnitude of the thread, with tiles that of the block.
/// All threads must call it.
template <Granularity G>
__device__ void raise_amax(const BlockCast& cast, std::uint32_t largest) {
  if constexpr (G != Granularity::tile) {
    block_atomic_max(largest, cast.amax);
  } else if (threadIdx.x == 0 && largest != 0) {
    atomicMax(cast.amax, largest);
  }
}

template <class In>
__device__ void sum_tile_columns(const BlockCast& cast, const TileSpot& spot,
                                 const TileVectors<In>& vectors, float (*lanes)[kTileColumns]) {
  float sums[8] = {};
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    float x[8];
    decode8<In>(vectors[k], x);
#pragma unroll
    for (int i = 0; i < 8; ++i) sums[i] += x[i];
  }
  store_column_sums<kTileGroups>(lanes, sums,
                                 cast.column_sums + spot.down * cast.columns + spot.column0(),
                                 cast.columns - spot.column0());
}

/// Casts one vector, each element by a factor of its own, and counts it if that is wanted.
template <class Out>
__device__ Vector8<Out> cast_vector(const float (&x)[8], const float (&factors)[8],
                                    const CastCounters* counters, Counts& counts) {
  float scaled[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) scaled[i] = x[i] * factors[i];
  const Vector8<Out> codes = encode8<Out>(scaled);
  if (counters != nullptr) counts.add<Out>(x, scaled, codes);
  return codes;
}
template <class Out>
__device__ Vector8<Out> cast_vector(const float (&x)[8], float factor, const CastCounters* counters,
                                    Counts& counts) {
  const float factors[8] = {factor, factor, factor, factor, factor, factor, factor, factor};
  return cast_vector<Out>(x, factors, counters, counts);
}

template <class Out>
__device__ void store_row(const BlockCast& cast, const TileSpot& spot, int k,
                          const Vector8<Out>& codes) {
  store8<Out>(cast.out.data + spot.row(k) * cast.columns + spot.column(), codes,
              spot.left(k, cast.out.layout.rows, cast.columns), cast.out.aligned);
}

__device__ inline void store_turned(const BlockCast& cast, const TileSpot& spot,
                                    const ByteTile<kTileGroups>& tile) {
  const std::int64_t pitch = cast.transposed.layout.columns;
  tile.store_transposed(
      cast.transposed.data + spot.column0() * pitch + spot.row0(), pitch,
      static_cast<int>(min(cast.columns - spot.column0(), std::int64_t{kTileColumns})),
      static_cast<int>(min(pitch - spot.row0(), std::int64_t{kTileRows})), cast.transposed.aligned);
}

/// Blocks along a row, by shuffles among the 4 or 16 threads that hold one.
template <Granularity G, class In, class Out>
class RowBlocks {
 public:
  /// Returns the largest magnitude of the thread.
  __device__ static std::uint32_t cast(const BlockCast& cast, const TileSpot& spot,
                                       const TileVectors<In>& vectors, Counts& counts) {
    std::uint32_t largest = 0;
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      float x[8];
      decode8<In>(vectors[k], x);
      std::uint32_t amax = largest_of(x);
      largest = max(largest, amax);
#pragma unroll
      for (int away = 1; away < kWidth; away *= 2) {
        amax = max(amax, __shfl_xor_sync(0xFFFFFFFFu, amax, away));
      }
      const float factor = set_scale(cast, spot, k, bits_float(amax));
      store_row<Out>(cast, spot, k, cast_vector<Out>(x, factor, cast.counters, counts));
    }
    return largest;
  }

 private:
  static constexpr int kWidth = G == Granularity::mx ? 4 : kTileGroups;

  /// Returns the factor that encodes.
  __device__ static float set_scale(const BlockCast& cast, const TileSpot& spot, int k,
                                    float amax) {
    const ScaleLayout& layout = cast.out.layout;
    const std::int64_t row = spot.row(k);
    if constexpr (G == Granularity::mx) {
      const std::uint8_t byte = e8m0_scale(amax, Out::kMax);
      auto* bytes = static_cast<std::uint8_t*>(cast.out.scales);
      if (layout.mx_layout == MxLayout::compact) {
        if (spot.group % 4 == 0 && row < layout.rows && spot.column() < cast.columns) {
          bytes[row * layout.pitch + spot.column() / 32] = byte;
        }
        return inverse_e8m0(byte);
      }
      // The four bytes of a row lie together in the tile of scales that belongs to this one.
      std::uint32_t word = static_cast<std::uint32_t>(byte) << (8 * (spot.group / 4));
#pragma unroll
      for (int away = 4; away < kTileGroups; away *= 2) {
        word |= __shfl_xor_sync(0xFFFFFFFFu, word, away);
      }
      if (spot.group == 0) {
        bytes += std::int64_t{512} * blockIdx.x + 16 * spot.lane + 4 * k;
        *reinterpret_cast<std::uint32_t*>(bytes) = word;
      }
      return inverse_e8m0(byte);
    } else {
      const float factor = block_scale(amax, Out::kMax);
      if (spot.group == 0 && row < layout.pitch) {
        static_cast<float*>(cast.out.scales)[spot.across * layout.pitch + row] =
            row < cast.rows ? inverse_of_power_of_two(factor) : 0.0f;
      }
      return factor;
    }
  }
};

/// Blocks along a column, through shared memory: first the largest magnitudes, then in their place
/// the factors that encode.
template <Granularity G, class In, class Out>
class ColumnBlocks {
 public:
  /// All threads must call all of these, in this order, with a barrier before each but the first.
  __device__ void clear() {
    for (int i = static_cast<int>(threadIdx.x); i < kDown * kPitch; i += kTileThreads)
      words_[i] = 0;
  }

  __device__ void raise(const TileSpot& spot, const TileVectors<In>& vectors) {
    std::uint32_t amax[8] = {};
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      float x[8];
      decode8<In>(vectors[k], x);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const std::uint32_t magnitude = magnitude_bits(x[i]);
        amax[i] = kDown == 1 ? max(amax[i], magnitude) : magnitude;
      }
      if (kDown == 1 && k != kVectors - 1) continue;
      raise_columns(kDown == 1 ? 0 : k, spot, amax);
    }
  }

  /// Replaces the magnitudes by factors and writes the scales. With mx thread t makes byte t of the
  /// tile of scales.
  __device__ void finish(const BlockCast& cast, const TileSpot& spot) {
    const ScaleLayout& layout = cast.transposed.layout;
    const unsigned t = threadIdx.x;
    if constexpr (G == Granularity::mx) {
      const unsigned down = t % 4, within = t / 16 + t / 4 % 4 * 32;
      std::uint32_t& word = words_[down * kPitch + slot(within)];
      const std::uint8_t byte = e8m0_scale(bits_float(word), Out::kMax);
      word = float_bits(inverse_e8m0(byte));
      auto* bytes = static_cast<std::uint8_t*>(cast.transposed.scales);
      if (layout.mx_layout == MxLayout::gemm_ready) {
        const std::int64_t tile = spot.across * layout.pitch + spot.down;
        bytes[512 * tile + t] = byte;
        return;
      }
      const std::int64_t column = spot.column0() + within, block = spot.row0() / 32 + down;
      if (column < layout.rows && block < layout.pitch) bytes[column * layout.pitch + block] = byte;
    } else {
      if (t >= kTileColumns) return;
      std::uint32_t& word = words_[slot(t)];
      const float factor = block_scale(bits_float(word), Out::kMax);
      word = float_bits(factor);
      const std::int64_t column = spot.column0() + t;
      if (column >= layout.pitch) return;
      static_cast<float*>(cast.transposed.scales)[spot.down * layout.pitch + column] =
          column < cast.columns ? inverse_of_power_of_two(factor) : 0.0f;
    }
  }

  __device__ void cast(const BlockCast& cast, const TileSpot& spot, const TileVectors<In>& vectors,
                       ByteTile<kTileGroups>& tile, Counts& counts) const {
    const CastCounters* counters = cast.out.data == nullptr ? cast.counters : nullptr;
    float factors[8];
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      if (k == 0 || kDown != 1) load_factors(k, spot, factors);
      float x[8];
      decode8<In>(vectors[k], x);
      const auto codes = cast_vector<Out>(x, factors, counters, counts);
      // Padding is zero even where the factor is NaN.
      const bool exists = spot.row(k) < cast.rows;
      tile.at(kLanes * k + spot.lane, spot.group) =
          exists ? uint2{codes.word[0], codes.word[1]} : uint2{0, 0};
    }
  }

 private:
  /// Blocks of a column.
  static constexpr int kDown = G == Granularity::mx ? kVectors : 1;
  /// Four more than the columns, so that the blocks of a column do not share a bank.
  static constexpr int kPitch = kTileColumns + 4;

  /// Place of a column: the 32 columns that a warp raises at once, every fourth, lie together.
  __device__ static unsigned slot(unsigned column) { return column % 4 * 32 + column / 4; }

  /// Of the two rows that a warp holds each half takes over four of a thread's eight columns.
  __device__ void raise_columns(int down, const TileSpot& spot, const std::uint32_t (&amax)[8]) {
    const unsigned half = spot.lane % 2;
#pragma unroll
    for (unsigned j = 0; j < 4; ++j) {
      const std::uint32_t mine = half == 0 ? amax[j] : amax[4 + j];
      const std::uint32_t other = half == 0 ? amax[4 + j] : amax[j];
      const std::uint32_t both = max(mine, __shfl_xor_sync(0xFFFFFFFFu, other, 16));
      atomicMax(&words_[down * kPitch + slot(8 * spot.group + 4 * half + j)], both);
    }
  }

  __device__ void load_factors(int down, const TileSpot& spot, float (&factors)[8]) const {
#pragma unroll
    for (unsigned j = 0; j < 4; ++j) {
      const uint2 pair =
          *reinterpret_cast<const uint2*>(&words_[down * kPitch + slot(8 * spot.group + j)]);
      factors[j] = bits_float(pair.x);
      factors[4 + j] = bits_float(pair.y);
    }
  }

  alignas(8) std::uint32_t words_[kDown * kPitch];
};

/// One scale for all that a block of threads holds.
template <class In, class Out>
__device__ std::uint32_t cast_one_tile(const BlockCast& cast, const TileSpot& spot,
                                       const TileVectors<In>& vectors, ByteTile<kTileGroups>& tile,
                                       Counts& counts) {
  const std::uint32_t largest = block_max(largest_of<In>(vectors));
  const float factor = block_scale(bits_float(largest), Out::kMax);
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    float x[8];
    decode8<In>(vectors[k], x);
    const auto codes = cast_vector<Out>(x, factor, cast.counters, counts);
    if (cast.out.data != nullptr) store_row<Out>(cast, spot, k, codes);
    tile.at(kLanes * k + spot.lane, spot.group) = {codes.word[0], codes.word[1]};
  }
  if (threadIdx.x == 0) {
    const auto store_scale = [&](const BlockSide& side, std::int64_t row, std::int64_t column) {
      if (side.data == nullptr) return;
      store_block_scale(static_cast<float*>(side.scales), side.layout, row, column,
                        inverse_of_power_of_two(factor));
    };
    store_scale(cast.out, spot.row0(), spot.column0());
    store_scale(cast.transposed, spot.column0(), spot.row0());
  }
  return largest;
}

}  // namespace octet::detail::cuda::casts
