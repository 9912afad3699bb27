// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "octet/core/detail/element.hpp"

namespace octet::detail {

/// Which bits of an element's random word round which state.
inline constexpr int kRandomBitsM = 10;
inline constexpr int kRandomBitsV = 12;
inline constexpr int kRandomBitsMaster = 10;

OCTET_HD constexpr std::uint32_t random_field_m(std::uint32_t word) { return word & 0x3FFu; }
OCTET_HD constexpr std::uint32_t random_field_v(std::uint32_t word) {
  return (word >> 10) & 0xFFFu;
}
OCTET_HD constexpr std::uint32_t random_field_master(std::uint32_t word) { return word >> 22; }

/// Stochastic rounding by integer addition. The exponent of |y| is moved so that FP32's subnormals
/// line up with the target's; then adding a random number below one last place and cutting the
/// lower bits rounds up with the probability of the part cut off, normals and subnormals alike.
/// The random number is a field of Bits bits, then a 1 bit, then zeros: that half makes cutting the
/// field unbiased, and a value that is exact never moves because the sum stays below one place.
template <int Dropped, int Bits>
OCTET_HD constexpr std::uint32_t round_stochastic(float magnitude, float lower, std::uint32_t field,
                                                  std::uint32_t max_code) {
  static_assert(Bits < Dropped);
  const std::uint32_t noise = (field << (Dropped - Bits)) | (1u << (Dropped - Bits - 1));
  const std::uint32_t code = (float_bits(magnitude * lower) + noise) >> Dropped;
  return code < max_code ? code : max_code;
}

/// E4M3 code of y, rounded with a field of Bits random bits. y must be finite.
template <int Bits>
OCTET_HD constexpr std::uint8_t encode_e4m3_stochastic(float y, std::uint32_t field) {
  const std::uint32_t sign = (float_bits(y) >> 24) & 0x80u;
  constexpr float kLower = bits_float(7u << 23);  // 2^-120
  return static_cast<std::uint8_t>(
      sign | round_stochastic<20, Bits>(abs_of(y), kLower, field, E4M3Format::kMaxCode));
}

/// Binary16 code of y, rounded with a field of Bits random bits. y must be finite.
template <int Bits>
OCTET_HD constexpr std::uint16_t encode_f16_stochastic(float y, std::uint32_t field) {
  const std::uint32_t sign = (float_bits(y) >> 16) & 0x8000u;
  constexpr float kLower = bits_float(15u << 23);  // 2^-112
  return static_cast<std::uint16_t>(sign |
                                    round_stochastic<13, Bits>(abs_of(y), kLower, field, 0x7BFFu));
}

/// BF16 code of y, rounded with a field of Bits random bits. y must be finite. BF16 has FP32's
/// exponents, so nothing needs lining up.
template <int Bits>
OCTET_HD constexpr std::uint16_t encode_bf16_stochastic(float y, std::uint32_t field) {
  const std::uint32_t sign = (float_bits(y) >> 16) & 0x8000u;
  return static_cast<std::uint16_t>(sign |
                                    round_stochastic<16, Bits>(abs_of(y), 1.0f, field, 0x7F7Fu));
}

}  // namespace octet::detail
