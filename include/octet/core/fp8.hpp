// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "octet/core/detail/host_device.hpp"

namespace octet {

/// The two FP8 formats of "FP8 Formats for Deep Learning" (Micikevicius et al., arXiv 2209.05433).
/// E4M3 is finite-only: maximum 448, smallest normal 2^-6, smallest subnormal 2^-9, NaN 0x7F/0xFF.
/// E5M2 follows IEEE 754: maximum 57344, smallest subnormal 2^-16, infinities and NaNs.
struct E4M3Format {
  static constexpr int kMantissaBits = 3;
  static constexpr int kExponentBias = 7;
  static constexpr std::uint8_t kMaxCode = 0x7E;
  static constexpr float kMax = 448.0f;
};

struct E5M2Format {
  static constexpr int kMantissaBits = 2;
  static constexpr int kExponentBias = 15;
  static constexpr std::uint8_t kMaxCode = 0x7B;
  static constexpr float kMax = 57344.0f;
};

namespace detail {

/// Round to nearest, ties to even, saturating; every NaN becomes 0x7F, as the hardware conversion.
template <class Format>
OCTET_HD constexpr std::uint8_t encode_fp8(float x) {
  constexpr int kShift = 23 - Format::kMantissaBits;
  constexpr std::uint32_t kRebias = static_cast<std::uint32_t>(127 - Format::kExponentBias) << 23;
  constexpr std::uint32_t kMinNormal = kRebias + (1u << 23);
  // A float whose last place is the smallest subnormal: adding it rounds there, ties to even.
  constexpr float kMagic = bits_float(
      static_cast<std::uint32_t>(127 + 23 + 1 - Format::kExponentBias - Format::kMantissaBits)
      << 23);
  const std::uint32_t magnitude = magnitude_bits(x);
  const std::uint32_t sign = (float_bits(x) >> 24) & 0x80u;
  if (magnitude > 0x7F800000u) return 0x7F;
  std::uint32_t code = 0;
  if (magnitude >= float_bits(Format::kMax)) {
    code = Format::kMaxCode;
  } else if (magnitude >= kMinNormal) {
    const std::uint32_t rebased = magnitude - kRebias;
    code = (rebased + ((1u << (kShift - 1)) - 1u) + ((rebased >> kShift) & 1u)) >> kShift;
  } else {
    code = float_bits(bits_float(magnitude) + kMagic) - float_bits(kMagic);
  }
  return static_cast<std::uint8_t>(sign | code);
}

/// 2^(127 - bias): moves a small-format exponent field, read as a float's, to its true place.
template <class Format>
inline constexpr float kExponentLift =
    bits_float(static_cast<std::uint32_t>(127 + 127 - Format::kExponentBias) << 23);

}  // namespace detail

/// FP32 to E4M3. Infinities and overflow saturate to +-448; NaN becomes 0x7F.
OCTET_HD constexpr std::uint8_t encode_e4m3(float x) { return detail::encode_fp8<E4M3Format>(x); }

/// FP32 to E5M2. Infinities and overflow saturate to +-57344; NaN becomes 0x7F.
OCTET_HD constexpr std::uint8_t encode_e5m2(float x) { return detail::encode_fp8<E5M2Format>(x); }

/// E4M3 to FP32, exact.
OCTET_HD constexpr float decode_e4m3(std::uint8_t code) {
  const std::uint32_t sign = (code & 0x80u) << 24;
  const std::uint32_t magnitude = code & 0x7Fu;
  if (magnitude == 0x7Fu) return detail::bits_float(sign | 0x7FC00000u);
  const float value = detail::bits_float(magnitude << 20) * detail::kExponentLift<E4M3Format>;
  return detail::bits_float(sign | detail::float_bits(value));
}

/// E5M2 to FP32, exact; infinities and NaNs stay what they are.
OCTET_HD constexpr float decode_e5m2(std::uint8_t code) {
  const std::uint32_t sign = (code & 0x80u) << 24;
  const std::uint32_t magnitude = code & 0x7Fu;
  if (magnitude >= 0x7Cu) {
    return detail::bits_float(sign | (magnitude == 0x7Cu ? 0x7F800000u : 0x7FC00000u));
  }
  const float value = detail::bits_float(magnitude << 21) * detail::kExponentLift<E5M2Format>;
  return detail::bits_float(sign | detail::float_bits(value));
}

}  // namespace octet
