// SPDX-License-Identifier: Apache-2.0
#include "octet/engine/shard_plan.hpp"

#include <algorithm>

namespace octet {
namespace {

// Adds a panel, joining it to the piece before where they touch.
void append(std::vector<Piece>& pieces, const Piece& panel) {
  if (!pieces.empty() && pieces.back().tensor == panel.tensor &&
      pieces.back().begin + pieces.back().count == panel.begin) {
    pieces.back().count += panel.count;
  } else {
    pieces.push_back(panel);
  }
}

}  // namespace

Owners ShardPlan::cut(const std::vector<Shape>& shapes, const std::vector<int>& tensors) {
  std::vector<Piece> panels;
  std::int64_t total = 0;
  for (int t : tensors) {
    require(t >= 0 && static_cast<std::size_t>(t) < shapes.size(), "a bucket names tensor ", t,
            " of ", shapes.size());
    for (const Piece& panel : panels_of(t, shapes[static_cast<std::size_t>(t)])) {
      panels.push_back(panel);
      total += panel.count;
    }
  }
  const std::int64_t ranks = static_cast<std::int64_t>(held_.size());
  Owners owners(held_.size());
  std::vector<Piece> split;
  std::int64_t begin = 0;
  for (const Piece& panel : panels) {
    const std::int64_t end = begin + panel.count;
    // Rank r's run is [r, r + 1) * total / ranks; a panel inside one run belongs to it.
    const std::int64_t rank = std::min(begin * ranks / total, ranks - 1);
    if (end * ranks <= (rank + 1) * total) {
      append(owners[static_cast<std::size_t>(rank)], panel);
      held_[static_cast<std::size_t>(rank)] += panel.count;
    } else {
      split.push_back(panel);
    }
    begin = end;
  }
  for (const Piece& panel : split) {
    const auto least = std::min_element(held_.begin(), held_.end()) - held_.begin();
    append(owners[static_cast<std::size_t>(least)], panel);
    held_[static_cast<std::size_t>(least)] += panel.count;
  }
  return owners;
}

}  // namespace octet
