// SPDX-License-Identifier: Apache-2.0
#include "octet/core/detail/random.hpp"

#include <algorithm>
#include <cmath>
#include <set>
#include <vector>

#include "octet/core/detail/stochastic.hpp"
#include "support/catch.hpp"

namespace octet::test {
namespace {

using Words = std::vector<std::uint32_t>;

Words words_of(std::uint64_t seed, std::uint64_t step, std::uint64_t first, std::size_t count) {
  Words words(count);
  for (std::size_t i = 0; i < count; ++i) words[i] = detail::random_word(seed, step, first + i);
  return words;
}

/// Philox4x32 with 7 rounds as the paper defines it, in 64-bit arithmetic.
std::vector<std::uint32_t> paper_philox(std::uint64_t seed, std::uint64_t step,
                                        std::uint64_t group) {
  constexpr std::uint64_t kLow = 0xFFFFFFFFu;
  std::uint64_t c[4] = {group & kLow, group >> 32, step & kLow, step >> 32};
  for (std::uint64_t round = 0; round < 7; ++round) {
    const std::uint64_t k0 = ((seed & kLow) + round * 0x9E3779B9u) & kLow;
    const std::uint64_t k1 = ((seed >> 32) + round * 0xBB67AE85u) & kLow;
    const std::uint64_t p0 = 0xD2511F53u * c[0], p1 = 0xCD9E8D57u * c[2];
    const std::uint64_t next[4] = {(p1 >> 32) ^ c[1] ^ k0, p1 & kLow, (p0 >> 32) ^ c[3] ^ k1,
                                   p0 & kLow};
    std::copy(next, next + 4, c);
  }
  return {c, c + 4};
}

/// Deviation of a histogram from flat, in standard deviations of the chi-square statistic.
double chi_square_sigmas(const std::vector<int>& histogram, std::size_t draws) {
  const double expected = static_cast<double>(draws) / static_cast<double>(histogram.size());
  double statistic = 0;
  for (int count : histogram) statistic += (count - expected) * (count - expected) / expected;
  const double freedom = static_cast<double>(histogram.size()) - 1;
  return (statistic - freedom) / std::sqrt(2 * freedom);
}

}  // namespace

TEST_CASE("an element's word depends on seed, step and index alone") {
  const Words whole = words_of(1, 2, 0, 1000);
  for (std::uint64_t first : {0u, 1u, 2u, 3u, 5u, 127u, 512u}) {
    const Words part = words_of(1, 2, first, 100);
    CHECK(std::equal(part.begin(), part.end(), whole.begin() + static_cast<std::ptrdiff_t>(first)));
  }
  for (std::uint64_t index : {0u, 4u, 996u}) {
    const detail::RandomWords group = detail::philox(detail::philox_keys(1), 2, index / 4);
    for (std::uint64_t j = 0; j < 4; ++j) CHECK(group.word[j] == whole[index + j]);
  }
}

TEST_CASE("the words are Philox4x32-7's") {
  const std::uint64_t numbers[] = {0, 1, 77, 0xFFFFFFFFu, 0x123456789ABCDEFu, ~std::uint64_t{0}};
  for (std::uint64_t seed : numbers) {
    for (std::uint64_t step : numbers) {
      for (std::uint64_t group : numbers) {
        const auto expected = paper_philox(seed, step, group);
        const detail::RandomWords words = detail::philox(detail::philox_keys(seed), step, group);
        for (std::size_t j = 0; j < 4; ++j) REQUIRE(words.word[j] == expected[j]);
      }
    }
  }
}

TEST_CASE("all 64 bits of seed, step and index count") {
  const std::uint32_t base = detail::random_word(1, 2, 4096);
  std::set<std::uint32_t> seen = {base};
  for (int bit = 0; bit < 64; ++bit) {
    const std::uint64_t flip = std::uint64_t{1} << bit;
    seen.insert(detail::random_word(1 ^ flip, 2, 4096));
    seen.insert(detail::random_word(1, 2 ^ flip, 4096));
    seen.insert(detail::random_word(1, 2, 4096 ^ flip));
  }
  REQUIRE(seen.size() == 193);
}

TEST_CASE("a bit flipped anywhere in the key changes half of the word's bits") {
  double flipped = 0;
  int samples = 0;
  for (std::uint64_t index = 0; index < 4000; index += 4) {
    const std::uint32_t base = detail::random_word(9, 9, index);
    for (std::uint32_t other :
         {detail::random_word(8, 9, index), detail::random_word(9, 8, index),
          detail::random_word(9, 9, index + 4), detail::random_word(9, 9, index + 1)}) {
      flipped += __builtin_popcount(base ^ other);
      ++samples;
    }
  }
  // The mean of 4000 binomials of 32: a standard deviation of 0.045.
  CHECK(std::abs(flipped / samples - 16.0) < 0.25);
}

TEST_CASE("words do not repeat over steps, seeds or elements") {
  Words all;
  for (std::uint64_t step = 0; step < 16; ++step) {
    const Words words = words_of(42, step, 0, 4096);
    all.insert(all.end(), words.begin(), words.end());
  }
  std::sort(all.begin(), all.end());
  const auto unique = std::unique(all.begin(), all.end()) - all.begin();
  // 65,536 draws of 32 bits have 0.5 equal pairs on average.
  CHECK(static_cast<std::ptrdiff_t>(all.size()) - unique <= 6);
}

TEST_CASE("every bit and every field of the word is uniform") {
  constexpr std::size_t kDraws = 1000000;
  const Words words = words_of(7, 1, 0, kDraws);
  std::vector<int> m(1024, 0), v(4096, 0), master(1024, 0);
  std::vector<int> ones(32, 0);
  for (std::uint32_t word : words) {
    ++m[detail::random_field_m(word)];
    ++v[detail::random_field_v(word)];
    ++master[detail::random_field_master(word)];
    for (std::size_t bit = 0; bit < 32; ++bit) ones[bit] += static_cast<int>((word >> bit) & 1u);
  }
  CHECK(std::abs(chi_square_sigmas(m, kDraws)) < 5);
  CHECK(std::abs(chi_square_sigmas(v, kDraws)) < 5);
  CHECK(std::abs(chi_square_sigmas(master, kDraws)) < 5);
  for (std::size_t bit = 0; bit < 32; ++bit) {
    INFO("bit " << bit);
    CHECK(std::abs(ones[bit] - 500000) < 5 * 500);
  }
}

TEST_CASE("the fields of one word use disjoint bits and all of them") {
  std::uint32_t used = 0;
  for (int bit = 0; bit < 32; ++bit) {
    const std::uint32_t word = 1u << bit;
    const int fields = (detail::random_field_m(word) != 0) + (detail::random_field_v(word) != 0) +
                       (detail::random_field_master(word) != 0);
    CHECK(fields == 1);
    used |= word;
  }
  CHECK(used == 0xFFFFFFFFu);
  CHECK(detail::random_field_m(0xFFFFFFFFu) == (1u << detail::kRandomBitsM) - 1);
  CHECK(detail::random_field_v(0xFFFFFFFFu) == (1u << detail::kRandomBitsV) - 1);
  CHECK(detail::random_field_master(0xFFFFFFFFu) == (1u << detail::kRandomBitsMaster) - 1);
}

TEST_CASE("neighbouring elements and steps are uncorrelated") {
  constexpr std::size_t kDraws = 200000;
  const Words now = words_of(5, 10, 0, kDraws + 4);
  const Words next = words_of(5, 11, 0, kDraws);
  const auto centred = [](std::uint32_t word) { return word / 4294967296.0 - 0.5; };
  for (std::size_t lag : {1u, 2u, 3u, 4u, 0u}) {
    double sum = 0;
    for (std::size_t i = 0; i < kDraws; ++i) {
      sum += centred(now[i]) * centred(lag == 0 ? next[i] : now[i + lag]);
    }
    const double correlation = sum / static_cast<double>(kDraws) * 12;
    INFO("lag " << lag << " (0: the next step)");
    CHECK(std::abs(correlation) < 5 / std::sqrt(static_cast<double>(kDraws)));
  }
}

}  // namespace octet::test
