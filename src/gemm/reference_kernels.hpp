// SPDX-License-Identifier: Apache-2.0
// The inner loop of the reference GEMM. Every kernel gives the same bits: each element of the
// output has its own chain of fused multiply-adds along k, so the width of a vector, which spans
// columns, cannot be seen in the result.
#pragma once

#include <cstdint>
#include <span>

namespace octet::detail {

/// Depth of one partial sum. Part of the numerics contract, and the depth of a packed block.
constexpr std::int64_t kGemmDepth = 128;
/// Output columns of a tile: two vectors of 16 floats.
constexpr std::int64_t kGemmColumns = 32;
/// Most output rows of a tile. 12 rows of two vectors are 24 of the 32 AVX-512 registers; the rest
/// hold one row of B and the broadcast of A.
constexpr std::int64_t kGemmRows = 12;

/// How a packed block of A lies in memory: the order it was stored in, so that packing never has
/// to transpose A.
enum class PackedA : std::uint8_t {
  along_k,    ///< [kGemmRows][kGemmDepth]
  along_rows  ///< [kGemmDepth][kGemmRows]
};

/// One step of one tile: acc = fma(row scale * column scale, sum of a * b over the depth by fma
/// from zero, acc).
struct GemmTile {
  const float* a = nullptr;              ///< packed block of A
  const float* b = nullptr;              ///< [depth][kGemmColumns]
  float* acc = nullptr;                  ///< [rows][kGemmColumns]
  const float* row_scales = nullptr;     ///< [rows]
  const float* column_scales = nullptr;  ///< [kGemmColumns]
  std::int64_t depth = 0;                ///< 1 to kGemmDepth
  int rows = 0;                          ///< 4, 8 or 12
  PackedA layout = PackedA::along_k;
  bool first = false;  ///< take acc as zero, whatever it holds
};

struct GemmKernel {
  const char* name;
  void (*run)(const GemmTile& tile);
};

/// The kernels that this processor can run, the fastest first; the last is portable C++.
std::span<const GemmKernel> gemm_kernels();

}  // namespace octet::detail
