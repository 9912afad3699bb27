// SPDX-License-Identifier: Apache-2.0
#include "octet/core/detail/scaling_math.hpp"

#include <limits>
#include <random>
#include <vector>

#include "support/catch.hpp"
#include "support/random.hpp"
#include "support/reference.hpp"

namespace octet::test {
namespace {

constexpr DType kScaled[] = {DType::e4m3, DType::e5m2, DType::f16};

void check_scale(float amax, DType dtype) {
  const float maximum = detail::max_of(dtype);
  const float scale = detail::power_of_two_scale(amax, maximum);
  INFO(name_of(dtype) << ", amax = " << std::hexfloat << amax << ", scale = " << scale);
  REQUIRE(static_cast<double>(scale) ==
          reference_scale(static_cast<double>(amax), static_cast<double>(maximum)));
  const float inverse = detail::inverse_of_power_of_two(scale);
  REQUIRE(std::isnormal(scale));
  REQUIRE(std::isnormal(inverse));
  REQUIRE(scale * inverse == 1.0f);
  if (amax == 0) return;
  const double stored = static_cast<double>(amax) * static_cast<double>(scale);
  REQUIRE(stored <= static_cast<double>(maximum));
  const bool inside = scale < std::ldexp(1.0f, 126);
  if (inside) REQUIRE(stored > static_cast<double>(maximum) / 2);
}

}  // namespace

TEST_CASE("power-of-two scales around every power of two and every maximum") {
  for (DType dtype : kScaled) {
    for (int exponent = -149; exponent <= 127; ++exponent) {
      const float power = std::ldexp(1.0f, exponent);
      for (float amax : {next_down(power), power, next_up(power)}) check_scale(amax, dtype);
      // The place where the exponent changes is the mantissa of the maximum.
      const int top = std::ilogb(detail::max_of(dtype));
      const float edge = std::ldexp(detail::max_of(dtype), exponent - top);
      for (float amax : {next_down(edge), edge, next_up(edge)}) {
        if (std::isfinite(amax)) check_scale(amax, dtype);
      }
    }
  }
}

TEST_CASE("power-of-two scales of zero, the extremes and random magnitudes") {
  for (DType dtype : kScaled) {
    check_scale(0.0f, dtype);
    check_scale(std::numeric_limits<float>::max(), dtype);
    check_scale(std::numeric_limits<float>::denorm_min(), dtype);
    Draws engine(3);
    for (int i = 0; i < 20000; ++i) {
      const float amax = float_from_bits(engine() & 0x7FFFFFFFu);
      if (std::isfinite(amax)) check_scale(amax, dtype);
    }
  }
}

TEST_CASE("a non-finite amax keeps the scale") {
  const TensorScale old{0.25f, 4.0f, 100.0f};
  for (float amax : {INFINITY, NAN}) {
    const TensorScale next = detail::rescaled(old, amax, DType::e4m3);
    CHECK(next.scale == 4.0f);
    CHECK(next.scale_inv == 0.25f);
    CHECK(bits_of(next.amax) == bits_of(amax));
  }
  const TensorScale zero = detail::rescaled(old, 0.0f, DType::e4m3);
  CHECK(zero.scale == 1.0f);
  CHECK(zero.scale_inv == 1.0f);
  CHECK(zero.amax == 0.0f);
}

TEST_CASE("stored amax is the magnitude of the largest stored value") {
  Draws engine(5);
  for (DType dtype : {DType::e4m3, DType::e5m2, DType::bf16, DType::f32}) {
    for (int i = 0; i < 20000; ++i) {
      const float amax = float_from_bits(engine() % 0x7F000000u);
      TensorScale scale = {};
      if (is_fp8(dtype)) scale = detail::rescaled(scale, amax, dtype);
      scale.amax = amax;
      double expected = static_cast<double>(amax);
      if (dtype != DType::f32) {
        const FormatTable& table = table_of(dtype);
        expected = table.round(expected * static_cast<double>(scale.scale)) /
                   static_cast<double>(scale.scale);
      }
      if (expected > static_cast<double>(std::numeric_limits<float>::max())) continue;
      INFO(name_of(dtype) << ", amax " << amax);
      REQUIRE(static_cast<double>(detail::stored_amax(scale, dtype)) == expected);
    }
  }
  const TensorScale infinite{1.0f, 1.0f, INFINITY};
  const TensorScale nan{1.0f, 1.0f, NAN};
  CHECK(std::isinf(detail::stored_amax(infinite, DType::e4m3)));
  CHECK(std::isnan(detail::stored_amax(nan, DType::bf16)));
}

TEST_CASE("a maximum over magnitude bits keeps NaN") {
  using detail::magnitude_bits;
  CHECK(magnitude_bits(NAN) > magnitude_bits(INFINITY));
  CHECK(magnitude_bits(-INFINITY) > magnitude_bits(std::numeric_limits<float>::max()));
  CHECK(magnitude_bits(-2.0f) > magnitude_bits(1.5f));
  CHECK(magnitude_bits(-0.0f) == 0);
  CHECK_FALSE(detail::is_finite_bits(magnitude_bits(INFINITY)));
  CHECK(detail::is_finite_bits(magnitude_bits(std::numeric_limits<float>::max())));
}

}  // namespace octet::test
