// SPDX-License-Identifier: Apache-2.0
// A tile of one-byte codes in shared memory, on its way to a transposed copy: 128 rows of 64 or
// 128.
#pragma once

#include <cstdint>

namespace octet::detail::cuda {

constexpr int kTileRows = 128;

/// A tile with `Groups` vectors of eight codes in a row.
template <int Groups>
struct ByteTile {
  static constexpr int kColumns = 8 * Groups;
  uint2 vectors[kTileRows * Groups];

  /// Vector `group` of a row. Neither the vectors of neighbouring rows nor those of every eighth
  /// row share a bank.
  __device__ uint2& at(unsigned row, unsigned group) { return vectors[place(row, group)]; }

  /// Writes what the block of threads has left here, transposed: a thread 8 rows of 4 columns at a
  /// time, 16 threads 128 consecutive bytes of a line. `out` is the place of the tile's first code,
  /// `pitch` the bytes of a line. Of the tile are wanted the first `lines` columns and the first
  /// `rows` rows, a multiple of 8. All threads must call it.
  __device__ void store_transposed(std::uint8_t* out, std::int64_t pitch, int lines, int rows,
                                   bool aligned) const {
    __syncthreads();
    constexpr unsigned kRowGroups = kTileRows / 8;
    const unsigned group = threadIdx.x % kRowGroups;
    if (8 * static_cast<int>(group) >= rows) return;
    for (unsigned four = threadIdx.x / kRowGroups; four < 2 * Groups;
         four += blockDim.x / kRowGroups) {
      std::uint32_t in[8];
#pragma unroll
      for (unsigned r = 0; r < 8; ++r) {
        in[r] = reinterpret_cast<const std::uint32_t*>(
            &vectors[place(8 * group + r, four / 2)])[four % 2];
      }
      std::uint32_t word[4][2];  // of each column the upper four rows and the lower four
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const std::uint32_t low = __byte_perm(in[4 * k], in[4 * k + 1], 0x5140);
        const std::uint32_t high = __byte_perm(in[4 * k], in[4 * k + 1], 0x7362);
        const std::uint32_t low2 = __byte_perm(in[4 * k + 2], in[4 * k + 3], 0x5140);
        const std::uint32_t high2 = __byte_perm(in[4 * k + 2], in[4 * k + 3], 0x7362);
        word[0][k] = __byte_perm(low, low2, 0x5410);
        word[1][k] = __byte_perm(low, low2, 0x7632);
        word[2][k] = __byte_perm(high, high2, 0x5410);
        word[3][k] = __byte_perm(high, high2, 0x7632);
      }
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int line = 4 * static_cast<int>(four) + c;
        if (line >= lines) break;
        std::uint8_t* to = out + line * pitch + 8 * group;
        if (aligned) {
          *reinterpret_cast<uint2*>(to) = {word[c][0], word[c][1]};
          continue;
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          to[i] = static_cast<std::uint8_t>(word[c][i / 4] >> (8 * (i % 4)));
        }
      }
    }
  }

 private:
  __device__ static unsigned place(unsigned row, unsigned group) {
    const unsigned swapped = row ^ (row / kColumns & 1);
    return swapped * Groups + (group ^ (row / 8 % Groups));
  }
};

}  // namespace octet::detail::cuda
