// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <vector>

#include "octet/core/tensor_view.hpp"

namespace octet {

/// A contiguous run of elements of one tensor.
struct Piece {
  std::int32_t tensor = 0;
  std::int64_t begin = 0;
  std::int64_t count = 0;
  bool operator==(const Piece&) const = default;
};

/// The unit of sharding: 128 rows of a matrix or 16,384 elements of a vector (numerics section 6).
constexpr std::int64_t kPanelRows = 128;
constexpr std::int64_t kPanelVectorElements = 16384;
/// The unit of summation and of work: at most 16,384 elements from the start of a panel.
constexpr std::int64_t kSegmentElements = 16384;

/// Elements of all pieces.
inline std::int64_t numel_of(const std::vector<Piece>& pieces) {
  std::int64_t count = 0;
  for (const Piece& piece : pieces) count += piece.count;
  return count;
}

/// Elements of one whole panel of this shape.
std::int64_t panel_numel(const Shape& shape);
/// The panels of a tensor, in order; the last may be short. Empty for an empty tensor.
std::vector<Piece> panels_of(std::int32_t tensor, const Shape& shape);
/// Number of segments of a tensor of this shape.
std::int64_t segment_count(const Shape& shape);

/// One segment that this rank works on.
struct alignas(16) Segment {
  std::int32_t tensor = 0;
  std::int32_t count = 0;
  std::int64_t begin = 0;  ///< first element, counted in the tensor
  std::int64_t local = 0;  ///< first element, counted in this rank's shard of the tensor
  std::int64_t index = 0;  ///< number of the segment in the whole list of tensors
};

/// The segments inside the given pieces of a list of tensors, in the order of the pieces. Pieces
/// must be unions of whole panels; those of a tensor must ascend and not overlap. `local` counts
/// along the pieces of each tensor.
std::vector<Segment> segments_of(const std::vector<Shape>& shapes,
                                 const std::vector<Piece>& pieces);

}  // namespace octet
