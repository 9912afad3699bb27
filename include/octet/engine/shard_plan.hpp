// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <vector>

#include "octet/comm/collectives.hpp"

namespace octet {

/// Which rank owns which panels. Within a bucket the panels are cut into contiguous runs of equal
/// length, one per rank; panels that a cut would split go to the ranks that hold least so far.
class ShardPlan {
 public:
  explicit ShardPlan(int ranks) : held_(static_cast<std::size_t>(ranks), 0) {}

  /// Cuts one bucket. `tensors` are indices into `shapes`, in the bucket's order; the pieces carry
  /// these indices.
  Owners cut(const std::vector<Shape>& shapes, const std::vector<int>& tensors);

  /// Elements that each rank owns so far.
  const std::vector<std::int64_t>& held() const { return held_; }

 private:
  std::vector<std::int64_t> held_;
};

}  // namespace octet
