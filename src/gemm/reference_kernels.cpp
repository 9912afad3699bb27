// SPDX-License-Identifier: Apache-2.0
#include "gemm/reference_kernels.hpp"

#include <vector>

#include "octet/core/detail/host_device.hpp"

#if defined(__x86_64__) && defined(__GNUC__)
#define OCTET_X86_KERNELS 1
#include <immintrin.h>
#else
#define OCTET_X86_KERNELS 0
#endif

namespace octet::detail {
namespace {

constexpr std::int64_t row_step(PackedA layout) {
  return layout == PackedA::along_k ? kGemmDepth : 1;
}
constexpr std::int64_t depth_step(PackedA layout) {
  return layout == PackedA::along_k ? 1 : kGemmRows;
}

void portable_tile(const GemmTile& tile) {
  for (int r = 0; r < tile.rows; ++r) {
    const float* a = tile.a + r * row_step(tile.layout);
    float partial[kGemmColumns] = {};
    for (std::int64_t p = 0; p < tile.depth; ++p) {
      const float factor = a[p * depth_step(tile.layout)];
      const float* b = tile.b + p * kGemmColumns;
      for (std::int64_t c = 0; c < kGemmColumns; ++c) {
        partial[c] = fma_of(factor, b[c], partial[c]);
      }
    }
    float* acc = tile.acc + r * kGemmColumns;
    for (std::int64_t c = 0; c < kGemmColumns; ++c) {
      const float scale = tile.row_scales[r] * tile.column_scales[c];
      acc[c] = fma_of(scale, partial[c], tile.first ? 0.0f : acc[c]);
    }
  }
}

#if OCTET_X86_KERNELS

template <int Rows, PackedA Layout>
[[gnu::target("avx512f")]] void tile_avx512(const GemmTile& tile) {
  __m512 left[Rows];
  __m512 right[Rows];
#pragma GCC unroll 12
  for (int r = 0; r < Rows; ++r) left[r] = right[r] = _mm512_setzero_ps();
  const float* a = tile.a;
  const float* b = tile.b;
  for (std::int64_t p = 0; p < tile.depth; ++p) {
    const __m512 b_left = _mm512_loadu_ps(b);
    const __m512 b_right = _mm512_loadu_ps(b + 16);
#pragma GCC unroll 12
    for (int r = 0; r < Rows; ++r) {
      const __m512 factor = _mm512_set1_ps(a[r * row_step(Layout)]);
      left[r] = _mm512_fmadd_ps(factor, b_left, left[r]);
      right[r] = _mm512_fmadd_ps(factor, b_right, right[r]);
    }
    a += depth_step(Layout);
    b += kGemmColumns;
  }
  const __m512 scale_left = _mm512_loadu_ps(tile.column_scales);
  const __m512 scale_right = _mm512_loadu_ps(tile.column_scales + 16);
#pragma GCC unroll 12
  for (int r = 0; r < Rows; ++r) {
    const __m512 scale = _mm512_set1_ps(tile.row_scales[r]);
    float* acc = tile.acc + r * kGemmColumns;
    const __m512 old_left = tile.first ? _mm512_setzero_ps() : _mm512_loadu_ps(acc);
    const __m512 old_right = tile.first ? _mm512_setzero_ps() : _mm512_loadu_ps(acc + 16);
    _mm512_storeu_ps(acc, _mm512_fmadd_ps(_mm512_mul_ps(scale, scale_left), left[r], old_left));
    _mm512_storeu_ps(acc + 16,
                     _mm512_fmadd_ps(_mm512_mul_ps(scale, scale_right), right[r], old_right));
  }
}

template <PackedA Layout>
void tile_avx512(const GemmTile& tile) {
  if (tile.rows == 12) return tile_avx512<12, Layout>(tile);
  if (tile.rows == 8) return tile_avx512<8, Layout>(tile);
  tile_avx512<4, Layout>(tile);
}

void avx512_tile(const GemmTile& tile) {
  if (tile.layout == PackedA::along_k) return tile_avx512<PackedA::along_k>(tile);
  tile_avx512<PackedA::along_rows>(tile);
}

/// Rows x 16 columns at (row, column) of the tile: what 16 registers can hold.
template <int Rows, PackedA Layout>
[[gnu::target("avx2,fma")]] void part_avx2(const GemmTile& tile, int row, int column) {
  __m256 left[Rows];
  __m256 right[Rows];
#pragma GCC unroll 6
  for (int r = 0; r < Rows; ++r) left[r] = right[r] = _mm256_setzero_ps();
  const float* a = tile.a + row * row_step(Layout);
  const float* b = tile.b + column;
  for (std::int64_t p = 0; p < tile.depth; ++p) {
    const __m256 b_left = _mm256_loadu_ps(b);
    const __m256 b_right = _mm256_loadu_ps(b + 8);
#pragma GCC unroll 6
    for (int r = 0; r < Rows; ++r) {
      const __m256 factor = _mm256_broadcast_ss(a + r * row_step(Layout));
      left[r] = _mm256_fmadd_ps(factor, b_left, left[r]);
      right[r] = _mm256_fmadd_ps(factor, b_right, right[r]);
    }
    a += depth_step(Layout);
    b += kGemmColumns;
  }
  const __m256 scale_left = _mm256_loadu_ps(tile.column_scales + column);
  const __m256 scale_right = _mm256_loadu_ps(tile.column_scales + column + 8);
#pragma GCC unroll 6
  for (int r = 0; r < Rows; ++r) {
    const __m256 scale = _mm256_set1_ps(tile.row_scales[row + r]);
    float* acc = tile.acc + (row + r) * kGemmColumns + column;
    const __m256 old_left = tile.first ? _mm256_setzero_ps() : _mm256_loadu_ps(acc);
    const __m256 old_right = tile.first ? _mm256_setzero_ps() : _mm256_loadu_ps(acc + 8);
    _mm256_storeu_ps(acc, _mm256_fmadd_ps(_mm256_mul_ps(scale, scale_left), left[r], old_left));
    _mm256_storeu_ps(acc + 8,
                     _mm256_fmadd_ps(_mm256_mul_ps(scale, scale_right), right[r], old_right));
  }
}

template <PackedA Layout>
void tile_avx2(const GemmTile& tile) {
  for (int column = 0; column < kGemmColumns; column += 16) {
    if (tile.rows == 12) {
      part_avx2<6, Layout>(tile, 0, column);
      part_avx2<6, Layout>(tile, 6, column);
    } else {
      for (int row = 0; row < tile.rows; row += 4) part_avx2<4, Layout>(tile, row, column);
    }
  }
}

void avx2_tile(const GemmTile& tile) {
  if (tile.layout == PackedA::along_k) return tile_avx2<PackedA::along_k>(tile);
  tile_avx2<PackedA::along_rows>(tile);
}

#endif

std::vector<GemmKernel> available_kernels() {
  std::vector<GemmKernel> kernels;
#if OCTET_X86_KERNELS
  if (__builtin_cpu_supports("avx512f")) kernels.push_back({"avx512", avx512_tile});
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    kernels.push_back({"avx2", avx2_tile});
  }
#endif
  kernels.push_back({"portable", portable_tile});
  return kernels;
}

}  // namespace

std::span<const GemmKernel> gemm_kernels() {
  static const std::vector<GemmKernel> kKernels = available_kernels();
  return kKernels;
}

}  // namespace octet::detail
