// SPDX-License-Identifier: Apache-2.0
// In which order the update goes through a segment: tile by tile where the weight is also written
// transposed or has scales of blocks.
#pragma once

#include "cuda/device/byte_tile.cuh"
#include "octet/ops/detail/adamw_element.hpp"

namespace octet::detail::cuda {

/// Side of a tile: what a block of threads handles of such a weight.
constexpr std::int64_t kTile = kTileRows;

/// The elements of a segment as blocks of 128: where the first starts and how far the next is.
/// Usually they follow one another; else they are the rows of a 128 x 128 tile of the panel, as
/// many tiles as the panel has segments.
struct Walk {
  std::int64_t first;  ///< counted in the tensor
  std::int64_t stride;
  bool is_tile;
};

__device__ inline Walk walk_of(const AdamwTensor& t, const Segment& segment) {
  const std::int64_t panel = kTile * t.columns;
  if (goes_by_tiles(t) && t.columns % kTile == 0) {
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

}  // namespace octet::detail::cuda
