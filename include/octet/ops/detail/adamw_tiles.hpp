// SPDX-License-Identifier: Apache-2.0
// The compute weight where its blocks have scales: which part of it a segment writes, and where the
// scales go. The codes follow from the stored master (weight_block_scale, weight_code).
#pragma once

#include "octet/ops/detail/adamw_element.hpp"

namespace octet::detail {

/// Side of a tile. A panel of a matrix has as many rows.
constexpr std::int64_t kTileSide = 128;
static_assert(kTileSide == kPanelRows && kTileSide == kStateBlock);

/// The tiles that a segment of a matrix sees to. A panel has at least as many tiles as segments, so
/// each segment takes every stride-th.
struct AdamwPanel {
  std::int64_t row = 0;  ///< the first
  int rows = 0;
  std::int64_t first = 0, stride = 1, end = 0;  ///< tiles, counted from the left
};

/// A tile, or what the matrix has of it.
struct AdamwTile {
  std::int64_t row, column;
  int rows, columns;
};

/// Whether the rows of tiles are whole blocks of the states. If not the panel must be updated
/// before its tiles are cast.
OCTET_HD inline bool has_states_in_tiles(const AdamwTensor& t) {
  return t.columns % kStateBlock == 0 || !(is_block(t.formats.m) || is_block(t.formats.v));
}

/// Without states in tiles all of a panel is for its first segment.
OCTET_HD inline AdamwPanel panel_of(const AdamwTensor& t, const Segment& segment) {
  const std::int64_t panel = kTileSide * t.columns;
  const std::int64_t number = segment.begin % panel / kSegmentElements;
  AdamwPanel result;
  result.row = segment.begin / panel * kTileSide;
  const std::int64_t left = t.rows - result.row;
  result.rows = static_cast<int>(left < kTileSide ? left : kTileSide);
  result.end = (t.columns + kTileSide - 1) / kTileSide;
  if (has_states_in_tiles(t)) {
    result.first = number;
    result.stride = (result.rows * t.columns + kSegmentElements - 1) / kSegmentElements;
  } else if (number != 0) {
    result.first = result.end;
  }
  return result;
}

OCTET_HD inline AdamwTile tile_of(const AdamwTensor& t, const AdamwPanel& panel,
                                  std::int64_t number) {
  const std::int64_t column = number * kTileSide, left = t.columns - column;
  return {panel.row, column, panel.rows, static_cast<int>(left < kTileSide ? left : kTileSide)};
}

OCTET_HD inline bool has_scale_per_row(const AdamwTensor& t) {
  return t.formats.weight == WeightFormat::e4m3_row_block;
}

/// `scale` encodes.
OCTET_HD inline void store_weight_scale(const AdamwTensor& t, std::int64_t row, std::int64_t column,
                                        float scale) {
  const float scale_inv = inverse_of_power_of_two(scale);
  const auto layout = [&t](std::int64_t rows, std::int64_t columns) {
    return scale_layout(granularity_of(t.formats.weight), MxLayout::compact, rows, columns);
  };
  store_block_scale(t.weight_blocks, layout(t.rows, t.columns), row, column, scale_inv);
  if (!is_transposed(t.formats.weight)) return;
  store_block_scale(t.weight_transposed_blocks, layout(t.columns, t.rows), column, row, scale_inv);
}

}  // namespace octet::detail
