// SPDX-License-Identifier: Apache-2.0
// A tile of 128 x 128 one-byte codes in shared memory, on its way to a transposed copy.
#pragma once

#include <cstdint>

namespace octet::detail::cuda {

/// Side of a tile.
constexpr int kTile = 128;
/// Vectors of eight codes in a row of a tile.
constexpr int kTileGroups = kTile / 8;
constexpr int kTileVectors = kTile * kTileGroups;

/// Where vector `group` of a row is in a tile: so that neither rows nor columns of vectors share a
/// bank.
__device__ inline unsigned place_in_tile(unsigned row, unsigned group) {
  return row * kTileGroups + (group ^ (row / 8));
}

/// Eight rows of eight codes as eight columns of eight: column c is out[c], rows in the order of
/// memory.
__device__ inline void transpose_8x8(const uint2 (&in)[8], uint2 (&out)[8]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const auto row = [&](int r) { return half == 0 ? in[4 * k + r].x : in[4 * k + r].y; };
      const std::uint32_t low = __byte_perm(row(0), row(1), 0x5140);
      const std::uint32_t high = __byte_perm(row(0), row(1), 0x7362);
      const std::uint32_t low2 = __byte_perm(row(2), row(3), 0x5140);
      const std::uint32_t high2 = __byte_perm(row(2), row(3), 0x7362);
      const std::uint32_t word[4] = {__byte_perm(low, low2, 0x5410), __byte_perm(low, low2, 0x7632),
                                     __byte_perm(high, high2, 0x5410),
                                     __byte_perm(high, high2, 0x7632)};
#pragma unroll
      for (int c = 0; c < 4; ++c) (k == 0 ? out[4 * half + c].x : out[4 * half + c].y) = word[c];
    }
  }
}

/// Writes a tile that the block of threads has left in shared memory, transposed: every thread 8 x
/// 8 of it at a time, 16 threads 128 consecutive bytes of a line. `out` is the place of the tile's
/// first code, `pitch` the bytes of a line. Of the tile are wanted the first `lines` columns and
/// the first `rows` rows, a multiple of 8. All threads must call it.
__device__ inline void store_transposed(const uint2* tile, std::uint8_t* out, std::int64_t pitch,
                                        int lines, int rows, bool aligned) {
  __syncthreads();
  const unsigned group = threadIdx.x % kTileGroups;  // of rows
  if (8 * static_cast<int>(group) >= rows) return;
  for (unsigned columns = threadIdx.x / kTileGroups; columns < kTileGroups;
       columns += blockDim.x / kTileGroups) {
    uint2 in[8], turned[8];
#pragma unroll
    for (unsigned r = 0; r < 8; ++r) in[r] = tile[place_in_tile(8 * group + r, columns)];
    transpose_8x8(in, turned);
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      const int line = 8 * static_cast<int>(columns) + c;
      if (line >= lines) break;
      std::uint8_t* to = out + line * pitch + 8 * group;
      if (aligned) {
        *reinterpret_cast<uint2*>(to) = turned[c];
        continue;
      }
      const std::uint64_t codes = turned[c].x | std::uint64_t{turned[c].y} << 32;
#pragma unroll
      for (int i = 0; i < 8; ++i) to[i] = static_cast<std::uint8_t>(codes >> (8 * i));
    }
  }
}

}  // namespace octet::detail::cuda
