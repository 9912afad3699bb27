// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <vector>

#include "octet/core/block_scales.hpp"
#include "octet/ops/segment.hpp"

namespace octet {

/// Tiles of a matrix, each of which has a scale in f32.
inline std::int64_t tile_count(std::int64_t rows, std::int64_t columns) {
  return scale_bytes(Granularity::tile, rows, columns) / std::int64_t{sizeof(float)};
}

/// Scales of tiles travel beside the codes: adds to `to` the scales of the pieces of matrices that
/// have some. A panel is a row of tiles, so those of a piece lie together. tensor_of: by matrix the
/// tensor of its scales, or -1; columns_of(matrix).
template <class ColumnsOf>
void append_tiles(std::vector<Piece>& to, const std::vector<Piece>& pieces,
                  const std::vector<std::int32_t>& tensor_of, const ColumnsOf& columns_of) {
  for (const Piece& piece : pieces) {
    const std::int32_t tensor = tensor_of[static_cast<std::size_t>(piece.tensor)];
    if (tensor < 0 || piece.count == 0) continue;
    const std::int64_t columns = columns_of(piece.tensor);
    to.push_back({tensor, tile_count(piece.begin / columns, columns),
                  tile_count(piece.count / columns, columns)});
  }
}

}  // namespace octet
