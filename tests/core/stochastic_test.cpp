// SPDX-License-Identifier: Apache-2.0
#include "octet/core/detail/stochastic.hpp"

#include <random>
#include <string>
#include <vector>

#include "support/catch.hpp"
#include "support/random.hpp"
#include "support/reference.hpp"

namespace octet::test {
namespace {

/// One use of stochastic rounding: format and number of random bits.
struct Kind {
  std::string name;
  DType dtype;
  int bits;
  int dropped;  ///< mantissa bits that FP32 has more
  std::uint32_t (*encode)(float y, std::uint32_t field);
};

const std::vector<Kind>& kinds() {
  static const std::vector<Kind> list = {
      {"e4m3, 10 bits", DType::e4m3, 10, 20,
       [](float y, std::uint32_t f) -> std::uint32_t {
         return detail::encode_e4m3_stochastic<10>(y, f);
       }},
      {"f16, 12 bits", DType::f16, 12, 13,
       [](float y, std::uint32_t f) -> std::uint32_t {
         return detail::encode_f16_stochastic<12>(y, f);
       }},
      {"f16, 10 bits", DType::f16, 10, 13,
       [](float y, std::uint32_t f) -> std::uint32_t {
         return detail::encode_f16_stochastic<10>(y, f);
       }},
      {"bf16, 12 bits", DType::bf16, 12, 16,
       [](float y, std::uint32_t f) -> std::uint32_t {
         return detail::encode_bf16_stochastic<12>(y, f);
       }},
      {"bf16, 10 bits", DType::bf16, 10, 16,
       [](float y, std::uint32_t f) -> std::uint32_t {
         return detail::encode_bf16_stochastic<10>(y, f);
       }},
  };
  return list;
}

/// Ranges of codes (as values) that are looked at: subnormals, the step to normals, the middle and
/// the top.
struct Range {
  const char* name;
  double low, high;
};

std::vector<Range> ranges_of(const FormatTable& table) {
  const std::vector<double>& values = table.values();
  const double smallest = values[1];
  double normal = smallest;
  for (std::size_t i = 1; i + 1 < values.size() && values[i + 1] - values[i] == smallest; ++i) {
    normal = values[i];
  }
  return {{"below the smallest subnormal", 0.0, smallest},
          {"subnormal", 0.0, normal / 2},
          {"around the smallest normal", normal / 2, normal * 2},
          {"normal", 1.0, 2.0},
          {"near the maximum", table.max() / 2, table.max()}};
}

}  // namespace

TEST_CASE("the mean over all values of the random field is the value") {
  // Cutting the field leaves at most half of a field's unit, either way. FP32 itself adds half of
  // its last place: once as a bias (a sum that is exactly one place counts as reached), and once
  // more where a subnormal had to be rounded before.
  for (const Kind& kind : kinds()) {
    const FormatTable& table = table_of(kind.dtype);
    const std::uint32_t fields = 1u << kind.bits;
    double worst = 0;
    double sum_of_biases = 0;
    int count = 0;
    for (const Range& range : ranges_of(table)) {
      Draws engine(23);
      std::uniform_real_distribution<double> uniform(range.low, range.high);
      for (int i = 0; i < 100; ++i) {
        const float y = static_cast<float>(uniform(engine));
        double mean = 0;
        for (std::uint32_t field = 0; field < fields; ++field) {
          mean += table.decode(kind.encode(y, field)) / fields;
        }
        const double bias = (mean - static_cast<double>(y)) / table.gap_at(static_cast<double>(y));
        worst = std::max(worst, std::abs(bias));
        sum_of_biases += bias;
        ++count;
      }
    }
    INFO(kind.name);
    const double half_place = std::ldexp(0.5, -kind.dropped);
    CHECK(worst <= (0.5 / fields + half_place) * (1 + 1e-6));
    // Uniform in +-1/2 unit: a standard deviation of 0.29 units over sqrt(count).
    const double deviation = 0.29 / fields / std::sqrt(count);
    CHECK(std::abs(sum_of_biases / count - half_place) < 4 * deviation + half_place / 4);
  }
}

TEST_CASE("stochastic rounding never moves an exact code") {
  for (const Kind& kind : kinds()) {
    const FormatTable& table = table_of(kind.dtype);
    const std::uint32_t last_field = (1u << kind.bits) - 1;
    int moved = 0;
    for (std::uint32_t code = 0; code <= table.max_code(); ++code) {
      const float value = static_cast<float>(table.decode(code));
      for (std::uint32_t field : {0u, 1u, last_field / 2, last_field - 1, last_field}) {
        moved += kind.encode(value, field) != code;
        moved += kind.encode(-value, field) != (code | table.sign_bit());
      }
    }
    INFO(kind.name);
    CHECK(moved == 0);
  }
}

TEST_CASE("only the two neighbouring codes occur, and both do") {
  for (const Kind& kind : kinds()) {
    const FormatTable& table = table_of(kind.dtype);
    const std::uint32_t last_field = (1u << kind.bits) - 1;
    Draws engine(29);
    int wrong = 0;
    int checked = 0;
    for (int i = 0; i < 200000; ++i) {
      const float y = float_from_bits((engine() & 0x007FFFFFu) | ((95u + engine() % 47u) << 23));
      if (static_cast<double>(y) > table.max()) continue;
      const std::uint32_t low = table.floor_code(static_cast<double>(y));
      const std::uint32_t code = kind.encode(y, engine() & last_field);
      wrong += code != low && code != low + 1;
      const double fraction =
          (static_cast<double>(y) - table.values()[low]) / table.gap_at(static_cast<double>(y));
      // The first field rounds down and the last one up wherever the value is not next to a code.
      if (fraction > 0.01 && fraction < 0.99) {
        wrong += kind.encode(y, 0) != low;
        wrong += kind.encode(y, last_field) != low + 1;
        ++checked;
      }
      wrong += kind.encode(-y, last_field) != (kind.encode(y, last_field) | table.sign_bit());
    }
    INFO(kind.name);
    CHECK(wrong == 0);
    CHECK(checked > 10000);
  }
}

TEST_CASE("stochastic rounding clamps at the largest finite code") {
  for (const Kind& kind : kinds()) {
    const FormatTable& table = table_of(kind.dtype);
    const float maximum = static_cast<float>(table.max());
    const std::uint32_t last_field = (1u << kind.bits) - 1;
    INFO(kind.name);
    for (float y : {maximum, next_up(maximum), maximum * 1.5f, 1e30f, 3.4028235e38f}) {
      if (y < maximum || std::isinf(y)) continue;  // bf16 reaches almost as far as FP32
      for (std::uint32_t field : {0u, last_field}) {
        CHECK(kind.encode(y, field) == table.max_code());
        CHECK(kind.encode(-y, field) == (table.max_code() | table.sign_bit()));
      }
    }
  }
}

TEST_CASE("stochastic rounding of zeros and of values far below the format") {
  for (const Kind& kind : kinds()) {
    const FormatTable& table = table_of(kind.dtype);
    const std::uint32_t last_field = (1u << kind.bits) - 1;
    INFO(kind.name);
    for (std::uint32_t field : {0u, last_field}) {
      CHECK(kind.encode(0.0f, field) == 0);
      CHECK(kind.encode(-0.0f, field) == table.sign_bit());
      if (kind.dtype == DType::bf16) continue;  // nothing in FP32 is that far below it
      CHECK(kind.encode(1e-45f, field) == 0);
      CHECK(kind.encode(1e-38f, field) == 0);
    }
  }
}

}  // namespace octet::test
