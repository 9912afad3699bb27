// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "octet/core/detail/host_device.hpp"

namespace octet::detail {

struct RandomWords {
  std::uint32_t word[4];
};

inline constexpr int kPhiloxRounds = 7;

/// The key of every round, from the seed.
struct PhiloxKeys {
  std::uint32_t first[kPhiloxRounds], second[kPhiloxRounds];
};

OCTET_HD constexpr PhiloxKeys philox_keys(std::uint64_t seed) {
  PhiloxKeys keys{};
  std::uint32_t first = static_cast<std::uint32_t>(seed);
  std::uint32_t second = static_cast<std::uint32_t>(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    keys.first[round] = first;
    keys.second[round] = second;
    first += 0x9E3779B9u;
    second += 0xBB67AE85u;
  }
  return keys;
}

/// Philox4x32 with 7 rounds, the fewest that pass BigCrush (Salmon et al., "Parallel Random
/// Numbers: As Easy as 1, 2, 3", SC 2011). A pure function: four words for (seed, step, group).
OCTET_HD inline RandomWords philox(const PhiloxKeys& keys, std::uint64_t step,
                                   std::uint64_t group) {
  std::uint32_t c0 = static_cast<std::uint32_t>(group);
  std::uint32_t c1 = static_cast<std::uint32_t>(group >> 32);
  std::uint32_t c2 = static_cast<std::uint32_t>(step);
  std::uint32_t c3 = static_cast<std::uint32_t>(step >> 32);
  OCTET_UNROLL
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const WideProduct p0 = wide_product(0xD2511F53u, c0);
    const WideProduct p1 = wide_product(0xCD9E8D57u, c2);
    c0 = p1.high ^ c1 ^ keys.first[round];
    c2 = p0.high ^ c3 ^ keys.second[round];
    c1 = p1.low;
    c3 = p0.low;
  }
  return {{c0, c1, c2, c3}};
}

/// The word of one element: four consecutive global indices share a Philox call. The word depends
/// on nothing but (seed, step, index), so launch shape, rank and sharding cannot change it.
OCTET_HD inline std::uint32_t random_word(std::uint64_t seed, std::uint64_t step,
                                          std::uint64_t index) {
  return philox(philox_keys(seed), step, index >> 2).word[index & 3];
}

}  // namespace octet::detail
