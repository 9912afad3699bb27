// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "octet/core/detail/element.hpp"

namespace octet::detail {

/// Which bits of an element's random word round which state.
inline constexpr int kRandomBitsM = 10;
inline constexpr int kRandomBitsV = 12;
inline constexpr int kRandomBitsMaster = 10;

// m bits 14 to 23, v bits 2 to 13, master bits 24 to 31 and then 0 and 1.
OCTET_HD constexpr std::uint32_t random_field_m(std::uint32_t word) {
  return (word >> 14) & 0x3FFu;
}
OCTET_HD constexpr std::uint32_t random_field_v(std::uint32_t word) { return (word >> 2) & 0xFFFu; }
OCTET_HD constexpr std::uint32_t random_field_master(std::uint32_t word) {
  return (word >> 24) | ((word & 3u) << 8);
}

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

/// A split master is a sign and 15 bits M: E4M3 with 8 more bits of mantissa. As a 16-bit code the
/// sign stands above M. 2^-120 lines FP32's subnormals up with E4M3's.
inline constexpr std::uint32_t kMaxSplit = E4M3Format::kMaxCode << 8;

OCTET_HD constexpr std::uint16_t split_code(float y, std::uint32_t magnitude) {
  return static_cast<std::uint16_t>(((float_bits(y) >> 16) & 0x8000u) | magnitude);
}

/// Split code of y, rounded with a field of Bits random bits. y must be finite.
template <int Bits>
OCTET_HD constexpr std::uint16_t encode_split_stochastic(float y, std::uint32_t field) {
  constexpr float kLower = bits_float(7u << 23);  // 2^-120
  return split_code(y, round_stochastic<12, Bits>(abs_of(y), kLower, field, kMaxSplit));
}

/// Split code of y, rounded to nearest, ties to even. y must be finite.
OCTET_HD constexpr std::uint16_t encode_split(float y) {
  const std::uint32_t bits = float_bits(abs_of(y) * bits_float(7u << 23));
  const std::uint32_t magnitude = (bits + 0x7FFu + ((bits >> 12) & 1u)) >> 12;
  return split_code(y, magnitude < kMaxSplit ? magnitude : kMaxSplit);
}

OCTET_HD constexpr float decode_split(std::uint16_t code) {
  const std::uint32_t bits =
      ((code & 0x8000u) << 16) | (static_cast<std::uint32_t>(code & 0x7FFFu) << 12);
  return bits_float(bits) * bits_float(247u << 23);  // 2^120
}

/// The E4M3 code in a split code: the nearest, ties away from zero.
OCTET_HD constexpr std::uint8_t weight_of_split(std::uint16_t code) {
  return static_cast<std::uint8_t>(((code >> 8) & 0x80u) | (((code & 0x7FFFu) + 128u) >> 8));
}
/// What the E4M3 code leaves, relative to the magnitude: -128 to 127, as a byte.
OCTET_HD constexpr std::uint8_t remainder_of_split(std::uint16_t code) {
  return static_cast<std::uint8_t>(code & 0xFFu);
}
/// The split code of which these two are the halves.
OCTET_HD constexpr std::uint16_t join_split(std::uint8_t weight, std::uint8_t remainder) {
  const std::uint32_t magnitude = ((weight & 0x7Fu) << 8) + remainder - ((remainder & 0x80u) << 1);
  return static_cast<std::uint16_t>(((weight & 0x80u) << 8) | magnitude);
}

}  // namespace octet::detail
