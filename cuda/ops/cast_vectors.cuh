// SPDX-License-Identifier: Apache-2.0
// What a thread of a cast does with the vectors it holds: load, measure, cast, count, sum.
#pragma once

#include <cooperative_groups.h>
#include <cuda_pipeline.h>

#include "cuda/device/byte_tile.cuh"
#include "cuda/device/dependent.cuh"
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

/// Where a kernel's scale comes from.
enum class Mode : std::uint8_t {
  given,     ///< it stays, its amax is raised
  measured,  ///< from the amax that a kernel before has left
  measures   ///< from the amax that this kernel finds
};

/// A cast as the kernels see it. A tensor without columns is `rows` elements in a row.
struct Cast {
  const void* in;
  std::uint8_t *out, *transposed;  // either may be null
  std::int64_t rows, columns, pitch;
  unsigned tiles_across;  // in 32 bits, because every thread divides by it
  TensorScale *scale, *scale_copy;
  std::uint32_t* nonfinite;
  CastCounters* counters;
  float* column_sums;
  unsigned tiles;  // of the tensor, or pieces of as many elements in a row
  int staged;      // of those that a block measures it keeps so many in shared memory
  bool in_aligned, out_aligned, transposed_aligned;
};

OCTET_HD inline std::uint32_t* amax_word(TensorScale* scale) {
  return reinterpret_cast<std::uint32_t*>(&scale->amax);
}

__device__ inline std::uint32_t largest_of(const float (&x)[8]) {
  std::uint32_t largest = 0;
#pragma unroll
  for (float value : x) largest = max(largest, magnitude_bits(value));
  return largest;
}

/// The vectors of a thread: loaded, measured, cast.
template <class In, class Out>
class Vectors {
 public:
  static constexpr DType kOut = Out::kDType;
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
  /// Into slot i of the block's memory for vectors, without a wait: copies_done() is that. Each
  /// thread has words of its own there.
  template <class PlaceOf>
  __device__ static void stage(const Cast& cast, uint4* memory, int slot, const PlaceOf& place_of) {
    const auto* in = static_cast<const typename In::Storage*>(cast.in);
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      const Place place = place_of(k);
      const bool whole = cast.in_aligned && place.left >= 8;
      Vector8<In> vector;
      if (!whole) vector = load8<In>(in + place.at, place.left, cast.in_aligned);
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        uint4* const to = memory + word_of(slot, k, w);
        if (whole) {
          __pipeline_memcpy_async(to, reinterpret_cast<const uint4*>(in + place.at) + w,
                                  sizeof(uint4));
        } else {
          const std::uint32_t* word = vector.word + 4 * w;
          *to = {word[0], word[1], word[2], word[3]};
        }
      }
    }
    __pipeline_commit();
  }
  __device__ static void copies_done() { __pipeline_wait_prior(0); }
  __device__ void unstage(const uint4* memory, int slot) {
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        const uint4 words = memory[word_of(slot, k, w)];
        std::uint32_t* const word = vectors_[k].word + 4 * w;
        word[0] = words.x, word[1] = words.y, word[2] = words.z, word[3] = words.w;
      }
    }
  }
  /// Asks for the lines of vectors that are to be loaded soon.
  template <class PlaceOf>
  __device__ static void prefetch(const Cast& cast, const PlaceOf& place_of) {
    constexpr unsigned kInLine = 128 / sizeof(Vector8<In>);
    if (threadIdx.x % kInLine != 0) return;
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      const Place place = place_of(k);
      if (place.left <= 0) continue;
      const auto* line = static_cast<const typename In::Storage*>(cast.in) + place.at;
      asm volatile("prefetch.global.L2 [%0];" ::"l"(line));
    }
  }
  __device__ std::uint32_t largest() const {
    std::uint32_t largest = 0;
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      float x[8];
      decode8<In>(vectors_[k], x);
      largest = max(largest, largest_of(x));
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
  static constexpr int kWords = sizeof(Vector8<In>) / sizeof(uint4);
  __device__ static int word_of(int slot, int k, int w) {
    return ((slot * kVectors + k) * kWords + w) * kThreads + static_cast<int>(threadIdx.x);
  }

  Vector8<In> vectors_[kVectors];
};

/// QuantizeArgs::scale_copy, by one thread of all.
__device__ inline void copy_scale(const Cast& cast, float scale, float scale_inv) {
  if (cast.scale_copy == nullptr || blockIdx.x != 0 || threadIdx.x != 0) return;
  *cast.scale_copy = {.scale_inv = scale_inv, .scale = scale};
}

/// The scale that is given.
__device__ inline float given_scale(const Cast& cast) {
  const float scale = cast.scale->scale;
  copy_scale(cast, scale, cast.scale->scale_inv);
  return scale;
}

/// The scale that follows from the measured amax. Every block works it out for itself; where amax
/// is not finite nobody writes the old scale, so it can be read.
__device__ inline float new_scale(const Cast& cast, DType dtype) {
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
  copy_scale(cast, next.scale, next.scale_inv);
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

/// For kernels that may start while the one before still writes. Where the scale is given, the
/// input of the first blocks is on its way into the cache, which sees those writes too, while they
/// wait; where it was measured, the kernel before has just read what they need.
template <Mode M, class V, class PlaceOf>
__device__ void begin(const Cast& cast, const PlaceOf& place_of) {
  constexpr unsigned kFirst = 1024;  // more than any device runs at once
  allow_next_kernel();
  if (M == Mode::given && blockIdx.x < kFirst) V::prefetch(cast, place_of(blockIdx.x));
  wait_for_previous_kernel();
}

/// What a block does with its tiles: place_of(tile) says where the vectors of a thread are,
/// cast_tile(vectors, tile, scale) does the rest. One whose scale is given, or measured by a kernel
/// before this one, has one tile. One that measures has every gridDim.x-th: it measures them all,
/// waits for the other blocks (all must run at once) and casts them. It reads a second time what
/// neither its registers nor its shared memory have kept. amax must hold 0 then. `word` is in
/// shared memory.
template <Mode M, class V, class PlaceOf, class CastTile>
__device__ void cast_all(const Cast& cast, std::uint32_t& word, const PlaceOf& place_of,
                         const CastTile& cast_tile) {
  V vectors;
  if constexpr (M != Mode::measures) {
    begin<M, V>(cast, place_of);
    // After a pass over the input from its end on, because that is in the cache.
    const unsigned tile = M == Mode::given ? blockIdx.x : gridDim.x - 1 - blockIdx.x;
    vectors.load(cast, place_of(tile));
    cast_tile(vectors, tile, M == Mode::given ? given_scale(cast) : new_scale(cast, V::kOut));
    return;
  }
  extern __shared__ uint4 memory[];
  const auto tile_of = [](int i) { return blockIdx.x + static_cast<unsigned>(i) * gridDim.x; };
  const int last = static_cast<int>((cast.tiles - 1 - blockIdx.x) / gridDim.x);
  const int staged = min(cast.staged, last);
  for (int i = 0; i < staged; ++i) V::stage(cast, memory, i, place_of(tile_of(i)));
  std::uint32_t largest = 0;
  for (int i = staged; i <= last; ++i) {
    vectors.load(cast, place_of(tile_of(i)));
    if (i < last) V::prefetch(cast, place_of(tile_of(i + 1)));
    largest = max(largest, vectors.largest());
  }
  V::copies_done();
  for (int i = 0; i < staged; ++i) {
    V kept;
    kept.unstage(memory, i);
    largest = max(largest, kept.largest());
  }
  block_atomic_max(largest, amax_word(cast.scale), word);
  cooperative_groups::this_grid().sync();
  const float scale = new_scale(cast, V::kOut);
  cast_tile(vectors, tile_of(last), scale);
  for (int i = last - 1; i >= 0; --i) {
    if (i < staged) {
      vectors.unstage(memory, i);
    } else {
      vectors.load(cast, place_of(tile_of(i)));
      if (i > staged) V::prefetch(cast, place_of(tile_of(i - 1)));
    }
    cast_tile(vectors, tile_of(i), scale);
  }
}

}  // namespace octet::detail::cuda::casts
