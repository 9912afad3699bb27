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
  constexpr std::size_t kNobody = static_cast<std::size_t>(-1);
  std::vector<std::size_t> owner;
  const auto give = [&](const Piece& panel, std::size_t rank) {
    held_[rank] += panel.count;
    return rank;
  };
  std::int64_t begin = 0;
  for (const Piece& panel : panels) {
    const std::int64_t end = begin + panel.count;
    // Rank r's run is [r, r + 1) * total / ranks; a panel inside one run belongs to it.
    const std::int64_t rank = std::min(begin * ranks / total, ranks - 1);
    const bool is_inside = end * ranks <= (rank + 1) * total;
    owner.push_back(is_inside ? give(panel, static_cast<std::size_t>(rank)) : kNobody);
    begin = end;
  }
  for (std::size_t i = 0; i < panels.size(); ++i) {
    if (owner[i] != kNobody) continue;
    const auto least = std::min_element(held_.begin(), held_.end()) - held_.begin();
    owner[i] = give(panels[i], static_cast<std::size_t>(least));
  }
  // In order, so that a short panel is the last of its tensor in every shard.
  Owners owners(held_.size());
  for (std::size_t i = 0; i < panels.size(); ++i) append(owners[owner[i]], panels[i]);
  return owners;
}

}  // namespace octet
