// SPDX-License-Identifier: Apache-2.0
// Scales of blocks: how they follow from an amax, and where they lie.
#pragma once

#include "octet/core/block_scales.hpp"
#include "octet/core/detail/scaling_math.hpp"

namespace octet::detail {

/// E8M0 byte of the smallest power of two that is not below x, which must not be negative: byte b
/// is 2^(b - 127). What is at most 2^-127 gets byte 0, infinity 254, NaN 255.
OCTET_HD constexpr std::uint8_t encode_e8m0(float x) {
  const std::uint32_t bits = magnitude_bits(x);
  if (bits > 0x7F800000u) return 255;
  if (bits <= 0x00400000u) return 0;  // 2^-127, a subnormal with the highest bit of its mantissa
  const std::uint32_t exponent = (bits + 0x7FFFFFu) >> 23;
  return static_cast<std::uint8_t>(exponent < 254 ? exponent : 254);
}

OCTET_HD constexpr float decode_e8m0(std::uint8_t byte) {
  if (byte == 255) return bits_float(0x7FC00000u);
  return bits_float(byte == 0 ? 0x00400000u : static_cast<std::uint32_t>(byte) << 23);
}

/// 1 / decode_e8m0(byte), exact.
OCTET_HD constexpr float inverse_e8m0(std::uint8_t byte) {
  if (byte == 255) return bits_float(0x7FC00000u);
  return bits_float(byte == 254 ? 0x00400000u : (254u - byte) << 23);
}

/// The byte for a block of mx with this amax; `maximum` is that of the FP8 format.
OCTET_HD constexpr std::uint8_t e8m0_scale(float amax, float maximum) {
  return encode_e8m0(amax * (1.0f / maximum));
}

/// The factor that encodes a block of row_block or tile; its inverse decodes.
OCTET_HD inline float block_scale(float amax, float maximum) {
  return is_finite_bits(magnitude_bits(amax)) ? power_of_two_scale(amax, maximum) : 1.0f;
}

/// Where the scales of a matrix [rows, columns] lie, see Granularity. Indices count scales, which
/// are f32 or, with mx, bytes.
struct ScaleLayout {
  Granularity granularity;
  MxLayout mx_layout;
  std::int64_t rows, columns;
  /// Scales of a line: row_block and tile as in Granularity, compact mx the blocks of a row,
  /// gemm_ready mx the tiles of 512 side by side.
  std::int64_t pitch;

  /// Rows and columns of a block.
  OCTET_HD std::int64_t block_rows() const { return granularity == Granularity::tile ? 128 : 1; }
  OCTET_HD std::int64_t block_columns() const { return granularity == Granularity::mx ? 32 : 128; }

  /// Index of the scale of an element.
  OCTET_HD std::int64_t at(std::int64_t row, std::int64_t column) const {
    if (granularity == Granularity::row_block) return column / 128 * pitch + row;
    if (granularity == Granularity::tile) return row / 128 * pitch + column / 128;
    if (mx_layout == MxLayout::compact) return row * pitch + column / 32;
    return (row / 128 * pitch + column / 128) * 512 + row % 32 * 16 + row % 128 / 32 * 4 +
           column % 128 / 32;
  }

  /// The other way: the first element that a scale belongs to. Outside of the matrix for padding.
  struct Element {
    std::int64_t row, column;
  };
  OCTET_HD Element element_of(std::int64_t index) const {
    if (granularity == Granularity::row_block) return {index % pitch, index / pitch * 128};
    if (granularity == Granularity::tile) return {index / pitch * 128, index % pitch * 128};
    if (mx_layout == MxLayout::compact) return {index / pitch, index % pitch * 32};
    const std::int64_t tile = index / 512, byte = index % 512;
    return {tile / pitch * 128 + byte / 4 % 4 * 32 + byte / 16, tile % pitch * 128 + byte % 4 * 32};
  }
  OCTET_HD bool is_inside(const Element& element) const {
    return element.row < rows && element.column < columns;
  }
};

/// The layout of row_block, tile or mx scales.
constexpr ScaleLayout scale_layout(Granularity granularity, MxLayout mx_layout, std::int64_t rows,
                                   std::int64_t columns) {
  const std::int64_t tiles = (columns + 127) / 128;
  std::int64_t pitch = tiles;
  if (granularity == Granularity::row_block) pitch = padded_rows(rows);
  if (granularity == Granularity::tile) pitch = (tiles + 3) / 4 * 4;
  if (granularity == Granularity::mx && mx_layout == MxLayout::compact) pitch = (columns + 31) / 32;
  return {granularity, mx_layout, rows, columns, pitch};
}

/// The scale of the block of row_block or tile that begins at this element; after the last of a
/// line the padding too.
OCTET_HD inline void store_block_scale(float* scales, const ScaleLayout& layout, std::int64_t row,
                                       std::int64_t column, float scale_inv) {
  std::int64_t at = layout.at(row, column);
  scales[at] = scale_inv;
  const bool is_last = layout.granularity == Granularity::row_block
                           ? row == layout.rows - 1
                           : column + layout.block_columns() >= layout.columns;
  for (++at; is_last && at % layout.pitch != 0; ++at) scales[at] = 0.0f;
}

/// Scale `index` of the transpose, laid out as `to`, of a matrix with scales of tiles.
OCTET_HD inline float transposed_tile_scale(const float* scales, const ScaleLayout& from,
                                            const ScaleLayout& to, std::int64_t index) {
  const ScaleLayout::Element element = to.element_of(index);
  return to.is_inside(element) ? scales[from.at(element.column, element.row)] : 0.0f;
}

}  // namespace octet::detail
