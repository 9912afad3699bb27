// SPDX-License-Identifier: Apache-2.0
#include "octet/ops/segment.hpp"

#include <algorithm>

namespace octet {

std::int64_t panel_numel(const Shape& shape) {
  return shape.rank() < 2 ? kPanelVectorElements : kPanelRows * shape.row_numel();
}

std::vector<Piece> panels_of(std::int32_t tensor, const Shape& shape) {
  std::vector<Piece> panels;
  const std::int64_t count = shape.numel();
  const std::int64_t step = panel_numel(shape);
  for (std::int64_t begin = 0; begin < count; begin += step) {
    panels.push_back({tensor, begin, std::min(step, count - begin)});
  }
  return panels;
}

namespace {

std::int64_t segments_in(std::int64_t elements) {
  return (elements + kSegmentElements - 1) / kSegmentElements;
}

// Segments in the first `elements` elements of a tensor, a whole number of panels or all of it.
std::int64_t segments_before(const Shape& shape, std::int64_t elements) {
  const std::int64_t panel = panel_numel(shape);
  if (panel == 0) return 0;
  return elements / panel * segments_in(panel) + segments_in(elements % panel);
}

}  // namespace

std::int64_t segment_count(const Shape& shape) { return segments_before(shape, shape.numel()); }

std::vector<Segment> segments_of(const std::vector<Shape>& shapes,
                                 const std::vector<Piece>& pieces) {
  std::vector<std::int64_t> first(shapes.size() + 1, 0);
  for (std::size_t i = 0; i < shapes.size(); ++i)
    first[i + 1] = first[i] + segment_count(shapes[i]);
  std::vector<std::int64_t> local(shapes.size(), 0), ends(shapes.size(), 0);
  std::vector<Segment> segments;
  for (const Piece& piece : pieces) {
    require(piece.tensor >= 0 && piece.tensor < static_cast<std::int32_t>(shapes.size()),
            "a piece names tensor ", piece.tensor, " of ", shapes.size());
    const std::size_t t = static_cast<std::size_t>(piece.tensor);
    const std::int64_t numel = shapes[t].numel();
    const std::int64_t panel = panel_numel(shapes[t]);
    const std::int64_t end = piece.begin + piece.count;
    require(piece.begin >= 0 && piece.count >= 0 && end <= numel, "a piece covers elements ",
            piece.begin, " to ", end, " of tensor ", t, ", which has ", numel);
    if (piece.count == 0) continue;
    require(piece.begin >= ends[t], "a piece of tensor ", t, " begins at element ", piece.begin,
            ", but the one before ends at ", ends[t], "; pieces must ascend and not overlap");
    ends[t] = end;
    require(piece.begin % panel == 0 && (end % panel == 0 || end == numel),
            "a piece covers elements ", piece.begin, " to ", end, " of tensor ", t,
            ", which is not a union of panels of ", panel);
    for (std::int64_t p = piece.begin; p < end; p += panel) {
      const std::int64_t panel_end = std::min(p + panel, end);
      for (std::int64_t b = p; b < panel_end; b += kSegmentElements) {
        const std::int64_t count = std::min(kSegmentElements, panel_end - b);
        segments.push_back({piece.tensor, static_cast<std::int32_t>(count), b,
                            local[t] + (b - piece.begin),
                            first[t] + segments_before(shapes[t], p) + (b - p) / kSegmentElements});
      }
    }
    local[t] += piece.count;
  }
  return segments;
}

}  // namespace octet
