// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <iosfwd>
#include <string_view>

#include "octet/core/tensor_view.hpp"

namespace octet {

/// Which elements of an FP8 matrix [R, C] share a scale, and how the scales lie in memory. All are
/// the factors that decode: value = stored * scale. The order is the one that GEMMs on Hopper and
/// Blackwell read, so nothing is laid out anew before a product.
enum class Granularity : std::uint8_t {
  tensor,  ///< all elements; one f32 (TensorScale::scale_inv)
  row,     ///< a row; f32 [R]
  /// 128 consecutive elements of a row; f32 [C / 128 rounded up, padded_rows(R)], so that the
  /// scales of neighbouring rows lie together.
  row_block,
  /// 128 rows by 128 columns; f32 [R / 128 rounded up, C / 128 rounded up to a multiple of 4].
  tile,
  /// 32 consecutive elements of a row, as in the OCP microscaling (MX) formats; one E8M0 byte, see
  /// MxLayout.
  mx
};

/// Order of the bytes of mx scales.
enum class MxLayout : std::uint8_t {
  /// [R, C / 32 rounded up]: what is stored and sent.
  compact,
  /// Tiles of 512 bytes, each for 128 rows and 4 blocks: the byte of row r and block b of a tile is
  /// at (r % 32) * 16 + (r / 32) * 4 + b. [R / 128 rounded up, C / 128 rounded up, 512].
  gemm_ready
};

constexpr std::string_view name_of(Granularity granularity) {
  constexpr std::string_view kNames[] = {"tensor", "row", "row_block", "tile", "mx"};
  return kNames[static_cast<int>(granularity)];
}

/// Rows of a transposed copy: `rows` rounded up to the multiple of 16 that FP8 GEMMs contract over.
constexpr std::int64_t padded_rows(std::int64_t rows) { return (rows + 15) / 16 * 16; }

/// Bytes of the scales of a matrix [rows, columns]. What lies between the last scale and the end of
/// a padded line is zero.
constexpr std::int64_t scale_bytes(Granularity granularity, std::int64_t rows, std::int64_t columns,
                                   MxLayout layout = MxLayout::gemm_ready) {
  const auto blocks = [](std::int64_t count, std::int64_t size) {
    return (count + size - 1) / size;
  };
  switch (granularity) {
    case Granularity::tensor: return 4;
    case Granularity::row: return 4 * rows;
    case Granularity::row_block: return 4 * blocks(columns, 128) * padded_rows(rows);
    case Granularity::tile: return 4 * blocks(rows, 128) * (blocks(columns, 512) * 4);
    case Granularity::mx: break;
  }
  if (layout == MxLayout::compact) return rows * blocks(columns, 32);
  return blocks(rows, 128) * blocks(columns, 128) * 512;
}

/// An FP8 matrix with scales of its blocks; owns nothing. Empty where data.data is null.
struct BlockScaledView {
  TensorView data = {};  ///< e4m3 or e5m2, [R, C]
  Granularity granularity = Granularity::row_block;
  MxLayout mx_layout = MxLayout::gemm_ready;
  void* scales = nullptr;  ///< scale_bytes() of them, aligned to 16 bytes
};

}  // namespace octet
