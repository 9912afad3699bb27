// SPDX-License-Identifier: Apache-2.0
// Seeded test data; independent of the library's generator.
#pragma once

#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

namespace octet::test {

/// std::mt19937 with draws of exactly 32 bits.
class Draws {
 public:
  using result_type = std::uint32_t;
  explicit Draws(std::uint32_t seed) : engine_(seed) {}
  std::uint32_t operator()() { return static_cast<std::uint32_t>(engine_()); }
  static constexpr std::uint32_t min() { return 0; }
  static constexpr std::uint32_t max() { return 0xFFFFFFFFu; }

 private:
  std::mt19937 engine_;
};

/// Bell-shaped values with standard deviation `sigma`: the sum of four uniform ones, from a hash of
/// seed and index. The same on every platform, and much faster than std::normal_distribution.
inline std::vector<float> normal_values(std::size_t count, std::uint32_t seed, float sigma = 1.0f) {
  std::vector<float> values(count);
  std::uint64_t state = static_cast<std::uint64_t>(seed) << 32;
  for (float& value : values) {
    state += 0x9E3779B97F4A7C15u;
    std::uint64_t z = state;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    z ^= z >> 31;
    float sum = -131070.0f;
    for (int part = 0; part < 4; ++part) sum += static_cast<float>((z >> (16 * part)) & 0xFFFFu);
    value = sum * (sigma / 37837.2f);
  }
  return values;
}

/// Values of every magnitude between 2^low and 2^high, either sign, some zeros.
inline std::vector<float> wide_values(std::size_t count, std::uint32_t seed, int low, int high) {
  Draws engine(seed);
  std::uniform_real_distribution<float> exponent(static_cast<float>(low), static_cast<float>(high));
  std::vector<float> values(count);
  for (float& value : values) {
    const std::uint32_t draw = engine();
    value = draw % 16 == 0 ? 0.0f : std::exp2(exponent(engine)) * (draw % 2 == 0 ? 1.0f : -1.0f);
  }
  return values;
}

}  // namespace octet::test
