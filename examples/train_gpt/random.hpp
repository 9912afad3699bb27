// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace train_gpt {

/// A counter-based generator: 64 bits that depend on nothing but the three numbers, so weights and
/// batches are the same for every level, rank and device. The mixing function is that of SplitMix64
/// (Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014).
inline std::uint64_t random_bits(std::uint64_t seed, std::uint64_t stream, std::uint64_t index) {
  const auto mix = [](std::uint64_t z) {
    z += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
  };
  return mix(mix(mix(seed) ^ stream) ^ index);
}

}  // namespace train_gpt
