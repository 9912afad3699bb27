// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "octet/core/detail/host_device.hpp"

namespace octet {

/// FP32 to BF16 bits: round to nearest, ties to even; NaN becomes 0x7FFF as on the hardware.
OCTET_HD constexpr std::uint16_t encode_bf16(float x) {
  const std::uint32_t bits = detail::float_bits(x);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return 0x7FFF;
  return static_cast<std::uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

/// BF16 bits to FP32, exact.
OCTET_HD constexpr float decode_bf16(std::uint16_t code) {
  return detail::bits_float(static_cast<std::uint32_t>(code) << 16);
}

/// FP32 to IEEE binary16 bits: round to nearest, ties to even; overflow becomes infinity.
OCTET_HD constexpr std::uint16_t encode_f16(float x) {
  const std::uint32_t magnitude = detail::magnitude_bits(x);
  const std::uint32_t sign = (detail::float_bits(x) >> 16) & 0x8000u;
  if (magnitude > 0x7F800000u) return 0x7FFF;
  std::uint32_t code = 0;
  if (magnitude >= 0x477FF000u) {  // 65520 and above round to infinity
    code = 0x7C00;
  } else if (magnitude >= 0x38800000u) {  // normal from 2^-14 on
    const std::uint32_t rebased = magnitude - 0x38000000u;
    code = (rebased + 0xFFFu + ((rebased >> 13) & 1u)) >> 13;
  } else {  // adding 0.5 leaves 2^-24, the smallest subnormal, in the last place
    code = detail::float_bits(detail::bits_float(magnitude) + 0.5f) - detail::float_bits(0.5f);
  }
  return static_cast<std::uint16_t>(sign | code);
}

/// IEEE binary16 bits to FP32, exact.
OCTET_HD constexpr float decode_f16(std::uint16_t code) {
  const std::uint32_t sign = static_cast<std::uint32_t>(code & 0x8000u) << 16;
  const std::uint32_t magnitude = code & 0x7FFFu;
  if (magnitude >= 0x7C00u) {
    return detail::bits_float(sign | (magnitude == 0x7C00u ? 0x7F800000u : 0x7FC00000u));
  }
  const float value = detail::bits_float(magnitude << 13) * detail::bits_float(0x77800000u);
  return detail::bits_float(sign | detail::float_bits(value));
}

}  // namespace octet
