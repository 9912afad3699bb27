// SPDX-License-Identifier: Apache-2.0
#include "comm/owners.hpp"

#include <algorithm>

namespace octet {
namespace {

std::size_t index(std::int32_t i) { return static_cast<std::size_t>(i); }

struct OwnedPiece {
  Piece piece;
  int rank = 0;
};

// The pieces of one tensor, sorted by their begin, must follow one another without gap or overlap.
void check_cover(const char* what, std::size_t tensor, std::int64_t numel,
                 std::vector<OwnedPiece>& pieces) {
  std::sort(pieces.begin(), pieces.end(),
            [](const OwnedPiece& a, const OwnedPiece& b) { return a.piece.begin < b.piece.begin; });
  std::int64_t covered = 0;
  for (const OwnedPiece& owned : pieces) {
    require(owned.piece.begin >= covered, what, ": element ", owned.piece.begin, " of tensor ",
            tensor, " belongs to a piece of rank ", owned.rank,
            " and to another one; every element belongs to exactly one piece");
    require(owned.piece.begin == covered, what, ": element ", covered, " of tensor ", tensor,
            " belongs to no piece; every element belongs to exactly one piece");
    covered += owned.piece.count;
  }
  require(covered == numel, what, ": element ", covered, " of tensor ", tensor,
          " belongs to no piece; every element belongs to exactly one piece");
}

}  // namespace

void check_owners(const char* what, const Owners& owners, int ranks,
                  const std::vector<std::int64_t>& numels) {
  require(owners.size() == static_cast<std::size_t>(ranks), what, ": owners has ", owners.size(),
          " lists of pieces for ", ranks, " ranks");
  std::vector<std::vector<OwnedPiece>> by_tensor(numels.size());
  for (std::size_t r = 0; r < owners.size(); ++r) {
    for (const Piece& piece : owners[r]) {
      require(piece.tensor >= 0 && index(piece.tensor) < numels.size(), what, ": a piece of rank ",
              r, " names tensor ", piece.tensor, " of ", numels.size());
      const std::int64_t numel = numels[index(piece.tensor)];
      require(piece.begin >= 0 && piece.count >= 0 && piece.begin <= numel &&
                  piece.count <= numel - piece.begin,
              what, ": a piece of rank ", r, " begins at ", piece.begin, " and has ", piece.count,
              " elements; tensor ", piece.tensor, " has ", numel);
      if (piece.count == 0) continue;
      by_tensor[index(piece.tensor)].push_back({piece, static_cast<int>(r)});
    }
  }
  for (std::size_t t = 0; t < numels.size(); ++t) check_cover(what, t, numels[t], by_tensor[t]);
}

}  // namespace octet
