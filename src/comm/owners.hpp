// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "octet/comm/collectives.hpp"

namespace octet {

/// Throws octet::Error, beginning with `what`, unless there is a list of pieces for every rank and
/// every element of tensors with so many elements belongs to exactly one piece.
void check_owners(const char* what, const Owners& owners, int ranks,
                  const std::vector<std::int64_t>& numels);

/// Of each of so many tensors the elements of its pieces.
inline std::vector<std::int64_t> numels_by_tensor(const std::vector<Piece>& pieces,
                                                  std::size_t tensors) {
  std::vector<std::int64_t> numels(tensors, 0);
  for (const Piece& piece : pieces) numels[static_cast<std::size_t>(piece.tensor)] += piece.count;
  return numels;
}

/// Neighbouring pieces of one owner made one, empty ones left out: a transport pays for every part.
inline Owners merged(const Owners& owners) {
  Owners runs(owners.size());
  for (std::size_t r = 0; r < owners.size(); ++r) {
    for (const Piece& piece : owners[r]) {
      if (piece.count == 0) continue;
      const bool follows = !runs[r].empty() && runs[r].back().tensor == piece.tensor &&
                           runs[r].back().begin + runs[r].back().count == piece.begin;
      if (follows) {
        runs[r].back().count += piece.count;
      } else {
        runs[r].push_back(piece);
      }
    }
  }
  return runs;
}

}  // namespace octet
