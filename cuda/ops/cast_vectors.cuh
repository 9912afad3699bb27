// SPDX-License-Identifier: Apache-2.0
// What a thread of a cast does with the vectors it holds: load, measure, cast, count, sum.
#pragma once

#include <cooperative_groups.h>

#include "cuda/device/byte_tile.cuh"
#include "cuda/device/reduce.cuh"
#include "cuda/device/vector8.cuh"
#include "octet/core/detail/scaling_math.hpp"
#include "octet/ops/quantize.hpp"

namespace octet::detail::cuda::casts {

constexpr int kThreads = 256;
/// Vectors of eight that a thread holds at once.
constexpr int kVectors = 4;
/// What a block of threads takes: a tile, or as many elements in a row.
constexpr std::int64_t kBlockElements = std::int64_t{kThreads} * kVectors * 8;
constexpr int kGroups = 8;
using Tile = ByteTile<kGroups>;
static_assert(kBlockElements == kTileRows * Tile::kColumns);
/// Rows of a tile that are read at once, and with that the lanes of a column's sum.
constexpr int kLanes = kThreads / kGroups;

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

OCTET_HD inline std::uint32_t* amax_word(TensorScale* scale) {
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
__device__ inline float scale_of(const Cast& cast, DType dtype) {
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
__device__ inline void record_amax(const Cast& cast, std::uint32_t largest) {
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

/// The sum of every column of a tile with `Groups` vectors in a row and kLanes threads for each:
/// lane l of a column has added rows l, l + 32, ...; then a binary tree over the lanes.
template <int Groups>
__device__ void store_column_sums(float (*lanes)[8 * Groups], const float (&mine)[8], float* out,
                                  std::int64_t columns) {
  constexpr int kColumns = 8 * Groups, kBlock = Groups * kLanes;
  const int group = static_cast<int>(threadIdx.x) % Groups;
  const int lane = static_cast<int>(threadIdx.x) / Groups;
  __syncthreads();  // the tile that was there is no longer needed
#pragma unroll
  for (int i = 0; i < 8; ++i) lanes[lane][8 * group + i] = mine[i];
  for (int width = kLanes / 2; width > 0; width /= 2) {
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < width * kColumns; i += kBlock) {
      lanes[i / kColumns][i % kColumns] += lanes[i / kColumns + width][i % kColumns];
    }
  }
  __syncthreads();
  const int column = static_cast<int>(threadIdx.x);
  if (column < kColumns && column < columns) out[column] = unscaled(lanes[0][column], 1.0f);
}

/// Measures while the vectors are in registers, so that the input is read once; all blocks must run
/// at once. amax must hold 0.
template <class V>
__device__ void measure(const Cast& cast, const V& vectors) {
  block_atomic_max(vectors.largest(), amax_word(cast.scale));
  cooperative_groups::this_grid().sync();
}

}  // namespace octet::detail::cuda::casts
