// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "octet/core/detail/host_device.hpp"

namespace octet::detail {

struct RandomWords {
  std::uint32_t word[4];
};

/// Philox4x32 with 7 rounds, the fewest that pass BigCrush (Salmon et al., "Parallel Random
/// Numbers: As Easy as 1, 2, 3", SC 2011). A pure function: four words for (seed, step, group).
OCTET_HD inline RandomWords philox(std::uint64_t seed, std::uint64_t step, std::uint64_t group) {
  std::uint32_t c0 = static_cast<std::uint32_t>(group);
  std::uint32_t c1 = static_cast<std::uint32_t>(group >> 32);
  std::uint32_t c2 = static_cast<std::uint32_t>(step);
  std::uint32_t c3 = static_cast<std::uint32_t>(step >> 32);
  std::uint32_t k0 = static_cast<std::uint32_t>(seed);
  std::uint32_t k1 = static_cast<std::uint32_t>(seed >> 32);
  for (int round = 0; round < 7; ++round) {
    const std::uint64_t p0 = static_cast<std::uint64_t>(0xD2511F53u) * c0;
    const std::uint64_t p1 = static_cast<std::uint64_t>(0xCD9E8D57u) * c2;
    c0 = static_cast<std::uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<std::uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<std::uint32_t>(p1);
    c3 = static_cast<std::uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

/// The word of one element: four consecutive global indices share a Philox call. The word depends
/// on nothing but (seed, step, index), so launch shape, rank and sharding cannot change it.
OCTET_HD inline std::uint32_t random_word(std::uint64_t seed, std::uint64_t step,
                                          std::uint64_t index) {
  return philox(seed, step, index >> 2).word[index & 3];
}

}  // namespace octet::detail
