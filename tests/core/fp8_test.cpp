// SPDX-License-Identifier: Apache-2.0
#include "octet/core/fp8.hpp"

#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "octet/core/detail/element.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"
#include "support/reference.hpp"

namespace octet::test {
namespace {

std::uint8_t encode(DType dtype, float x) {
  return dtype == DType::e4m3 ? encode_e4m3(x) : encode_e5m2(x);
}
float decode(DType dtype, std::uint8_t code) {
  return dtype == DType::e4m3 ? decode_e4m3(code) : decode_e5m2(code);
}

/// Compares conversions with the table and keeps the first that differs.
class Checker {
 public:
  explicit Checker(DType dtype) : dtype_(dtype), table_(table_of(dtype)) {}
  void check(float x) {
    const std::uint32_t expected = table_.encode(static_cast<double>(x));
    const std::uint32_t actual = encode(dtype_, x);
    ++count_;
    if (actual == expected || !first_.empty()) return;
    std::ostringstream text;
    text << "encode(" << std::hexfloat << x << ") = 0x" << std::hex << actual << " instead of 0x"
         << expected;
    first_ = text.str();
  }
  void check_around(float x) {
    for (float value : {next_down(x), x, next_up(x)}) {
      check(value);
      check(-value);
    }
  }
  const std::string& first_error() const { return first_; }
  int count() const { return count_; }

 private:
  DType dtype_;
  const FormatTable& table_;
  std::string first_;
  int count_ = 0;
};

}  // namespace

TEST_CASE("every FP8 code decodes to its definition and encodes to itself") {
  for (DType dtype : {DType::e4m3, DType::e5m2}) {
    const FormatTable& table = table_of(dtype);
    for (std::uint32_t code = 0; code < 256; ++code) {
      INFO(name_of(dtype) << " code " << code);
      const float value = decode(dtype, static_cast<std::uint8_t>(code));
      const double expected = table.decode(code);
      if (std::isnan(expected)) {
        REQUIRE(std::isnan(value));
        REQUIRE(encode(dtype, value) == 0x7F);
        continue;
      }
      REQUIRE(static_cast<double>(value) == expected);
      REQUIRE(std::signbit(value) == (code >= 128));
      const std::uint32_t sign = code & 0x80u;
      const std::uint32_t back = std::isinf(value) ? sign | table.max_code() : code;
      REQUIRE(encode(dtype, value) == back);
    }
  }
}

TEST_CASE("every FP8 rounding tie and its neighbours") {
  for (DType dtype : {DType::e4m3, DType::e5m2}) {
    Checker checker(dtype);
    const std::vector<double>& values = table_of(dtype).values();
    for (std::size_t i = 0; i + 1 < values.size(); ++i) {
      checker.check_around(static_cast<float>(values[i]));
      checker.check_around(static_cast<float>((values[i] + values[i + 1]) / 2));
    }
    checker.check_around(static_cast<float>(values.back()));
    INFO(name_of(dtype));
    REQUIRE(checker.first_error() == "");
    REQUIRE(checker.count() > 1400);
  }
}

TEST_CASE("FP8 conversion of any FP32 bit pattern") {
  for (DType dtype : {DType::e4m3, DType::e5m2}) {
    Checker checker(dtype);
    Draws engine(7);
    for (int i = 0; i < 300000; ++i) checker.check(float_from_bits(engine()));
    // Random exponents rarely hit the range of the format: dense in its binades too.
    for (int i = 0; i < 300000; ++i) {
      const std::uint32_t exponent = 127u - 20u + engine() % 40u;
      checker.check(float_from_bits((engine() & 0x807FFFFFu) | (exponent << 23)));
    }
    INFO(name_of(dtype));
    REQUIRE(checker.first_error() == "");
  }
}

TEST_CASE("FP8 saturation, special values and listed codes") {
  struct Row {
    float x;
    int e4m3, e5m2;
  };
  const float two_pow_m10 = std::ldexp(1.0f, -10);
  const Row rows[] = {
      {464.0f, 0x7E, 0x5F},
      {next_up(464.0f), 0x7E, 0x5F},
      {61440.0f, 0x7E, 0x7B},
      {next_up(61440.0f), 0x7E, 0x7B},
      {3.4028235e38f, 0x7E, 0x7B},
      {INFINITY, 0x7E, 0x7B},
      {-INFINITY, 0xFE, 0xFB},
      {NAN, 0x7F, 0x7F},
      {-NAN, 0x7F, 0x7F},
      {0.0f, 0x00, 0x00},
      {-0.0f, 0x80, 0x80},
      {std::ldexp(1.0f, -9), 0x01, 0x18},
      {two_pow_m10, 0x00, 0x14},
      {next_up(two_pow_m10), 0x01, 0x14},
      {3 * two_pow_m10, 0x02, 0x1A},
      {17.0f, 0x58, 0x4C},
      {19.0f, 0x5A, 0x4D},
      {21.0f, 0x5A, 0x4D},
      {std::ldexp(1.0f, -16), 0, 1},
      {std::ldexp(1.0f, -17), 0, 0},
      {next_up(std::ldexp(1.0f, -17)), 0, 1},
      {std::ldexp(1.0f, -149), 0, 0},
      {-std::ldexp(1.0f, -149), 0x80, 0x80},
      {448.0f, 0x7E, 0x5F},
      {57344.0f, 0x7E, 0x7B},
  };
  for (const Row& row : rows) {
    INFO("x = " << row.x);
    CHECK(encode_e4m3(row.x) == row.e4m3);
    CHECK(encode_e5m2(row.x) == row.e5m2);
  }
}

TEST_CASE("conversions are usable at compile time") {
  STATIC_REQUIRE(encode_e4m3(1.0f) == 0x38);
  STATIC_REQUIRE(encode_e5m2(1.0f) == 0x3C);
  STATIC_REQUIRE(decode_e4m3(0x7E) == 448.0f);
  STATIC_REQUIRE(decode_e5m2(0x7B) == 57344.0f);
}

TEST_CASE("largest values and sizes of the dtypes") {
  const struct {
    DType dtype;
    std::size_t bytes;
    const char* name;
  } rows[] = {{DType::f32, 4, "f32"},
              {DType::bf16, 2, "bf16"},
              {DType::f16, 2, "f16"},
              {DType::e4m3, 1, "e4m3"},
              {DType::e5m2, 1, "e5m2"}};
  for (const auto& row : rows) {
    CHECK(size_of(row.dtype) == row.bytes);
    CHECK(name_of(row.dtype) == row.name);
    CHECK(is_fp8(row.dtype) == (row.bytes == 1));
    if (row.dtype == DType::f32) continue;
    CHECK(static_cast<double>(detail::max_of(row.dtype)) == table_of(row.dtype).max());
  }
  CHECK(detail::max_of(DType::f32) == std::numeric_limits<float>::max());
}

}  // namespace octet::test
