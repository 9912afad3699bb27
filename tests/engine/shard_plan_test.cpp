// SPDX-License-Identifier: Apache-2.0
#include "octet/engine/shard_plan.hpp"

#include <algorithm>
#include <numeric>

#include "support/catch.hpp"
#include "support/errors.hpp"

namespace octet::test {
namespace {

const std::vector<Shape> kShapes = {{1000, 256}, {515, 320}, {128, 64}, {2000},    {1},
                                    {40000},     {129, 131}, {0, 7},    {384, 128}};

std::int64_t elements_of(const std::vector<int>& tensors) {
  std::int64_t sum = 0;
  for (int t : tensors) sum += kShapes[static_cast<std::size_t>(t)].numel();
  return sum;
}

/// Empty, or what is wrong with a cut: every element owned once, cuts only between panels.
std::string cut_error(const Owners& owners, const std::vector<int>& tensors) {
  std::vector<std::vector<int>> times(kShapes.size());
  for (std::size_t t = 0; t < kShapes.size(); ++t) {
    times[t].resize(static_cast<std::size_t>(kShapes[t].numel()));
  }
  for (const std::vector<Piece>& pieces : owners) {
    for (const Piece& piece : pieces) {
      const auto t = static_cast<std::size_t>(piece.tensor);
      if (std::find(tensors.begin(), tensors.end(), piece.tensor) == tensors.end()) {
        return "tensor " + std::to_string(t) + " is not in the bucket";
      }
      const std::int64_t panel = panel_numel(kShapes[t]);
      const std::int64_t end = piece.begin + piece.count;
      if (piece.begin % panel != 0 || (end % panel != 0 && end != kShapes[t].numel())) {
        return "a cut inside a panel of tensor " + std::to_string(t);
      }
      for (std::int64_t i = piece.begin; i < end; ++i) ++times[t].at(static_cast<std::size_t>(i));
    }
  }
  for (int t : tensors) {
    for (int count : times[static_cast<std::size_t>(t)]) {
      if (count != 1)
        return "an element of tensor " + std::to_string(t) + " has " + std::to_string(count) +
               " owners";
    }
  }
  return {};
}

}  // namespace

TEST_CASE("a bucket's elements have one owner each and panels stay whole") {
  const std::vector<std::vector<int>> buckets = {
      {0, 1, 2, 3, 4, 5, 6, 7, 8}, {4}, {8, 0}, {7}, {2, 2 + 1}, {5, 6}};
  for (int ranks : {1, 2, 3, 4, 7, 64}) {
    for (const std::vector<int>& tensors : buckets) {
      ShardPlan plan(ranks);
      const Owners owners = plan.cut(kShapes, tensors);
      INFO(ranks << " ranks");
      CHECK(owners.size() == static_cast<std::size_t>(ranks));
      CHECK(cut_error(owners, tensors) == "");
      std::int64_t held = 0;
      for (std::size_t rank = 0; rank < owners.size(); ++rank) {
        std::int64_t sum = 0;
        for (const Piece& piece : owners[rank]) sum += piece.count;
        // In the order of the bucket and ascending: a short panel is the last of its tensor.
        CHECK_NOTHROW(segments_of(kShapes, owners[rank]));
        CHECK(sum == plan.held()[rank]);
        held += sum;
      }
      CHECK(held == elements_of(tensors));
    }
  }
}

TEST_CASE("no rank holds more than its share by more than one panel per bucket") {
  const std::vector<std::vector<int>> buckets = {{8}, {6}, {5}, {2}, {1}, {0}};
  for (int ranks : {2, 3, 4, 7}) {
    ShardPlan plan(ranks);
    std::int64_t total = 0;
    std::int64_t allowed = 0;
    for (const std::vector<int>& tensors : buckets) {
      const Owners owners = plan.cut(kShapes, tensors);
      total += elements_of(tensors);
      allowed += panel_numel(kShapes[static_cast<std::size_t>(tensors[0])]);
      for (std::int64_t held : plan.held()) {
        INFO(ranks << " ranks");
        CHECK(held <= total / ranks + allowed + 1);
      }
    }
    CHECK(std::accumulate(plan.held().begin(), plan.held().end(), std::int64_t{0}) == total);
  }
}

TEST_CASE("panels that divide evenly are dealt in equal contiguous runs") {
  const std::vector<Shape> shapes = {{1024, 64}};
  for (int ranks : {1, 2, 4, 8}) {
    ShardPlan plan(ranks);
    const Owners owners = plan.cut(shapes, {0});
    for (int rank = 0; rank < ranks; ++rank) {
      const std::int64_t share = 1024 * 64 / ranks;
      const std::vector<Piece> expected = {{0, rank * share, share}};
      CHECK(owners[static_cast<std::size_t>(rank)] == expected);
    }
  }
}

TEST_CASE("cuts repeat and leftovers go to who holds least") {
  ShardPlan a(3), b(3);
  const std::vector<int> tensors = {0, 1, 6};
  CHECK(a.cut(kShapes, tensors) == b.cut(kShapes, tensors));
  ShardPlan two(2);
  two.cut({{128, 10}}, {0});  // one panel: rank 0 or 1 has it
  const auto held = two.held();
  const Owners next = two.cut({{128, 10}}, {0});
  const std::size_t least = held[0] < held[1] ? 0 : 1;
  CHECK(next[least].size() == 1);
  CHECK(two.held()[0] == two.held()[1]);
}

TEST_CASE("a tensor that is not there is refused") {
  ShardPlan plan(2);
  CHECK(missing(error_of([&] { plan.cut(kShapes, {99}); }), {"99"}) == "");
  CHECK(plan.held()[0] + plan.held()[1] == 0);
}

}  // namespace octet::test
