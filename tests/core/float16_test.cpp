// SPDX-License-Identifier: Apache-2.0
#include "octet/core/float16.hpp"

#include <random>
#include <sstream>
#include <string>

#include "support/catch.hpp"
#include "support/random.hpp"
#include "support/reference.hpp"

namespace octet::test {
namespace {

std::uint16_t encode(DType dtype, float x) {
  return dtype == DType::f16 ? encode_f16(x) : encode_bf16(x);
}
float decode(DType dtype, std::uint16_t code) {
  return dtype == DType::f16 ? decode_f16(code) : decode_bf16(code);
}

/// Empty, or what the conversion did wrong.
std::string encode_error(DType dtype, float x) {
  const std::uint32_t expected = table_of(dtype).encode(static_cast<double>(x));
  const std::uint32_t actual = encode(dtype, x);
  if (actual == expected) return {};
  std::ostringstream text;
  text << "encode(" << std::hexfloat << x << ") = 0x" << std::hex << actual << " instead of 0x"
       << expected;
  return text.str();
}

}  // namespace

TEST_CASE("every 16-bit code decodes to its definition and encodes to itself") {
  for (DType dtype : {DType::f16, DType::bf16}) {
    const FormatTable& table = table_of(dtype);
    std::string error;
    for (std::uint32_t code = 0; code < 65536 && error.empty(); ++code) {
      const float value = decode(dtype, static_cast<std::uint16_t>(code));
      const double expected = table.decode(code);
      const bool is_nan = std::isnan(expected);
      const bool decoded =
          is_nan ? std::isnan(value)
                 : static_cast<double>(value) == expected && std::signbit(value) == (code >= 32768);
      const std::uint32_t back = is_nan ? 0x7FFF : code;
      if (!decoded) error = "decode of code " + std::to_string(code);
      if (encode(dtype, value) != back) error = "round trip of code " + std::to_string(code);
    }
    INFO(name_of(dtype));
    REQUIRE(error == "");
  }
}

TEST_CASE("every 16-bit rounding tie and its neighbours") {
  for (DType dtype : {DType::f16, DType::bf16}) {
    const std::vector<double>& values = table_of(dtype).values();
    std::string error;
    for (std::size_t i = 0; i + 1 < values.size() && error.empty(); ++i) {
      const float middle = static_cast<float>((values[i] + values[i + 1]) / 2);
      for (float x : {middle, next_down(middle), next_up(middle), -middle}) {
        if (error.empty()) error = encode_error(dtype, x);
      }
    }
    INFO(name_of(dtype));
    REQUIRE(error == "");
  }
}

TEST_CASE("16-bit conversion of any FP32 bit pattern") {
  for (DType dtype : {DType::f16, DType::bf16}) {
    Draws engine(11);
    std::string error;
    for (int i = 0; i < 300000 && error.empty(); ++i) {
      const std::uint32_t bits = engine();
      error = encode_error(dtype, float_from_bits(bits));
      const std::uint32_t exponent = 127u - 30u + engine() % 50u;
      if (error.empty()) {
        error = encode_error(dtype, float_from_bits((bits & 0x807FFFFFu) | (exponent << 23)));
      }
    }
    INFO(name_of(dtype));
    REQUIRE(error == "");
  }
}

TEST_CASE("16-bit special values") {
  CHECK(encode_f16(65504.0f) == 0x7BFF);
  CHECK(encode_f16(next_down(65520.0f)) == 0x7BFF);
  CHECK(encode_f16(65520.0f) == 0x7C00);
  CHECK(encode_f16(-1e30f) == 0xFC00);
  CHECK(encode_f16(INFINITY) == 0x7C00);
  CHECK(encode_f16(-NAN) == 0x7FFF);
  CHECK(encode_f16(-0.0f) == 0x8000);
  CHECK(encode_f16(std::ldexp(1.0f, -25)) == 0x0000);
  CHECK(encode_f16(next_up(std::ldexp(1.0f, -25))) == 0x0001);
  CHECK(encode_f16(std::ldexp(3.0f, -25)) == 0x0002);
  CHECK(encode_bf16(3.4028235e38f) == 0x7F80);
  CHECK(encode_bf16(-INFINITY) == 0xFF80);
  CHECK(encode_bf16(NAN) == 0x7FFF);
  CHECK(encode_bf16(-0.0f) == 0x8000);
  CHECK(encode_bf16(std::ldexp(1.0f, -149)) == 0x0000);
}

}  // namespace octet::test
