// SPDX-License-Identifier: Apache-2.0
// In which order the update goes through a segment, and the transposed weight.
#pragma once

#include "octet/ops/detail/adamw_element.hpp"

namespace octet::detail::cuda {

/// Side of a tile: what a block of threads handles of a weight that is also written transposed.
constexpr std::int64_t kTile = 128;

/// The elements of a segment as blocks of 128: where the first starts and how far the next is.
/// Usually they follow one another; for a transposed weight they are the rows of a 128 x 128 tile
/// of the panel, as many tiles as the panel has segments.
struct Walk {
  std::int64_t first;  ///< counted in the tensor
  std::int64_t stride;
  bool is_tile;
};

__device__ inline Walk walk_of(const AdamwTensor& t, const Segment& segment) {
  const std::int64_t panel = kTile * t.columns;
  if (t.formats.weight == WeightFormat::e4m3_and_transpose && t.columns % kTile == 0) {
    const std::int64_t start = segment.begin / panel * panel;
    if (start + panel <= t.rows * t.columns) {
      return {start + (segment.begin - start) / kSegmentElements * kTile, t.columns, true};
    }
  }
  return {segment.begin, kStateBlock, false};
}

__device__ inline AdamwOffsets offsets_at(const AdamwTensor& t, const Segment& segment,
                                          std::int64_t first) {
  const AdamwOffsets at = offsets_of(t, segment);
  const std::int64_t shift = first - segment.begin;
  return {at.gradient + shift, at.master + shift, at.state + shift, at.weight + shift};
}

/// Writes the tile of weights that the block of threads has left in shared memory, transposed:
/// every thread 8 x 8 of it at a time, 16 threads 128 consecutive bytes.
__device__ inline void store_transposed(const uint2* tile, std::uint8_t* out, std::int64_t rows) {
  __syncthreads();
  const unsigned group = threadIdx.x % 16;  // of rows
  for (unsigned columns = threadIdx.x / 16; columns < 16; columns += blockDim.x / 16) {
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

}  // namespace octet::detail::cuda
