// SPDX-License-Identifier: Apache-2.0
#include "octet/ops/segment.hpp"

#include <algorithm>
#include <map>
#include <set>

#include "support/catch.hpp"
#include "support/errors.hpp"

namespace octet::test {
namespace {

const std::vector<Shape> kShapes = {
    {1},        {127},       {16383},    {16384},    {16385},       {40000},
    {0},        {0, 5},      {5, 0},     {1, 1},     {127, 3},      {128, 3},
    {129, 3},   {256, 128},  {257, 129}, {1000, 1},  {3, 5, 7},     {130, 4, 64},
    {2, 20000}, {300, 1000}, {128, 128}, {1, 50000}, {2, 3, 5, 70}, {129, 128},
};

std::int64_t expected_panel(const Shape& shape) {
  if (shape.rank() < 2) return 16384;
  std::int64_t row = 1;
  for (int i = 1; i < shape.rank(); ++i) row *= shape[i];
  return 128 * row;
}

std::vector<Piece> all_panels(const std::vector<Shape>& shapes) {
  std::vector<Piece> pieces;
  for (std::size_t t = 0; t < shapes.size(); ++t) {
    const auto panels = panels_of(static_cast<std::int32_t>(t), shapes[t]);
    pieces.insert(pieces.end(), panels.begin(), panels.end());
  }
  return pieces;
}

}  // namespace

TEST_CASE("panels are 128 rows of a matrix or 16,384 elements of a vector") {
  CHECK(kPanelRows == 128);
  CHECK(kPanelVectorElements == 16384);
  CHECK(kSegmentElements == 16384);
  for (const Shape& shape : kShapes) {
    INFO(to_string(shape));
    const std::vector<Piece> panels = panels_of(3, shape);
    if (shape.numel() == 0) {
      CHECK(panels.empty());
      continue;
    }
    const std::int64_t whole = expected_panel(shape);
    CHECK(panel_numel(shape) == whole);
    std::int64_t position = 0;
    for (const Piece& panel : panels) {
      CHECK(panel.tensor == 3);
      CHECK(panel.begin == position);
      CHECK(panel.count == std::min(whole, shape.numel() - position));
      position += panel.count;
    }
    CHECK(position == shape.numel());
  }
}

TEST_CASE("segments cut each panel from its start") {
  for (const Shape& shape : kShapes) {
    INFO(to_string(shape));
    std::int64_t expected = 0;
    for (const Piece& panel : panels_of(0, shape)) {
      expected += (panel.count + 16383) / 16384;
    }
    CHECK(segment_count(shape) == expected);
    const std::vector<Segment> segments = segments_of({shape}, panels_of(0, shape));
    REQUIRE(static_cast<std::int64_t>(segments.size()) == expected);
    std::int64_t position = 0;
    for (std::size_t i = 0; i < segments.size(); ++i) {
      const Segment& segment = segments[i];
      CHECK(segment.tensor == 0);
      CHECK(segment.begin == position);
      CHECK(segment.local == position);
      CHECK(segment.index == static_cast<std::int64_t>(i));
      CHECK(segment.count >= 1);
      CHECK(segment.count <= 16384);
      // A segment ends at the end of its panel or after 16,384 elements from the panel's start.
      const std::int64_t panel_end =
          std::min((position / expected_panel(shape) + 1) * expected_panel(shape), shape.numel());
      const std::int64_t end = position + segment.count;
      CHECK((end == panel_end || segment.count == 16384));
      CHECK(end <= panel_end);
      position = end;
    }
    CHECK(position == shape.numel());
  }
}

TEST_CASE("a list of tensors numbers its segments through") {
  const std::vector<Segment> segments = segments_of(kShapes, all_panels(kShapes));
  std::int64_t expected = 0;
  for (const Shape& shape : kShapes) expected += segment_count(shape);
  REQUIRE(static_cast<std::int64_t>(segments.size()) == expected);
  for (std::size_t i = 0; i < segments.size(); ++i) {
    REQUIRE(segments[i].index == static_cast<std::int64_t>(i));
  }
}

TEST_CASE("segments of scattered pieces keep their numbers and count along the shard") {
  const std::vector<Segment> whole = segments_of(kShapes, all_panels(kShapes));
  std::map<std::pair<std::int32_t, std::int64_t>, Segment> by_place;
  for (const Segment& segment : whole) by_place[{segment.tensor, segment.begin}] = segment;
  for (std::size_t owners : {2u, 3u, 5u}) {
    std::set<std::int64_t> seen;
    for (std::size_t owner = 0; owner < owners; ++owner) {
      std::vector<Piece> pieces;
      const std::vector<Piece> panels = all_panels(kShapes);
      for (std::size_t i = owner; i < panels.size(); i += owners) pieces.push_back(panels[i]);
      std::map<std::int32_t, std::int64_t> held;
      for (const Segment& segment : segments_of(kShapes, pieces)) {
        const auto same = by_place.find({segment.tensor, segment.begin});
        REQUIRE(same != by_place.end());
        REQUIRE(same->second.count == segment.count);
        REQUIRE(same->second.index == segment.index);
        REQUIRE(segment.local == held[segment.tensor]);
        held[segment.tensor] += segment.count;
        REQUIRE(seen.insert(segment.index).second);
      }
    }
    REQUIRE(seen.size() == whole.size());
  }
}

TEST_CASE("a piece of several panels gives the same segments as its panels") {
  const std::vector<Shape> shapes = {{300, 1000}};
  const std::vector<Piece> joined = {{0, 0, 256000}, {0, 256000, 44000}};
  const auto from_pieces = segments_of(shapes, joined);
  const auto from_panels = segments_of(shapes, all_panels(shapes));
  REQUIRE(from_pieces.size() == from_panels.size());
  for (std::size_t i = 0; i < from_pieces.size(); ++i) {
    CHECK(from_pieces[i].begin == from_panels[i].begin);
    CHECK(from_pieces[i].count == from_panels[i].count);
    CHECK(from_pieces[i].local == from_panels[i].local);
    CHECK(from_pieces[i].index == from_panels[i].index);
  }
}

TEST_CASE("pieces of a tensor that overlap or go back are refused by name") {
  const std::vector<Shape> shapes = {{16385}, {40000}};
  const auto error_with = [&](const std::vector<Piece>& pieces) {
    return error_of([&] { segments_of(shapes, pieces); });
  };
  CHECK(missing(error_with({{0, 16384, 1}, {0, 0, 16384}}), {"tensor 0", "16385", "overlap"}) ==
        "");
  CHECK(missing(error_with({{1, 0, 16384}, {1, 0, 16384}}), {"tensor 1", "16384", "overlap"}) ==
        "");
  CHECK(error_with({{1, 0, 16384}, {0, 0, 16384}, {1, 16384, 23616}, {0, 16384, 1}}) == "no error");
}

TEST_CASE("nothing owned is nothing to do") {
  CHECK(segments_of(kShapes, {}).empty());
  CHECK(segments_of({}, {}).empty());
  CHECK(segment_count({0, 5}) == 0);
}

}  // namespace octet::test
