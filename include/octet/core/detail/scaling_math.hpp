// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "octet/core/detail/element.hpp"
#include "octet/core/tensor_view.hpp"

namespace octet::detail {

/// 2^(exponent of maximum / amax), from the bits: the largest power of two that keeps
/// amax * scale <= maximum. The exponent is clamped to +-126 so that scale and inverse are normal.
/// Zero gives 1. amax must be finite.
OCTET_HD inline float power_of_two_scale(float amax, float maximum) {
  const std::uint32_t a = magnitude_bits(amax);
  const std::uint32_t m = float_bits(maximum);
  if (a == 0) return 1.0f;
  int exponent = static_cast<int>(m >> 23) - static_cast<int>(a >> 23);
  if ((a & 0x7FFFFFu) > (m & 0x7FFFFFu)) --exponent;
  exponent = exponent > 126 ? 126 : exponent < -126 ? -126 : exponent;
  return bits_float(static_cast<std::uint32_t>(exponent + 127) << 23);
}

/// A power of two with an exponent within +-126 times 2^shift, its exponent clamped likewise.
OCTET_HD inline float shifted_power_of_two(float scale, int shift) {
  int exponent = static_cast<int>(float_bits(scale) >> 23) - 127 + shift;
  exponent = exponent > 126 ? 126 : exponent < -126 ? -126 : exponent;
  return bits_float(static_cast<std::uint32_t>(exponent + 127) << 23);
}

/// Exact inverse of a power of two with an exponent within +-126.
OCTET_HD inline float inverse_of_power_of_two(float scale) {
  return bits_float((254u << 23) - float_bits(scale));
}

/// value * scale_inv with one bit pattern for NaN, in which processors differ.
OCTET_HD inline float unscaled(float value, float scale_inv) {
  const float result = value * scale_inv;
  return magnitude_bits(result) > 0x7F800000u ? bits_float(0x7FFFFFFFu) : result;
}

/// Largest decoded value that a cast with this scale can have stored: decode(encode(amax)).
/// Monotone rounding makes it the magnitude of the largest code. NaN and infinity pass through, so
/// that a non-finite tensor stays visible to whoever reads its amax.
OCTET_HD inline float stored_amax(const TensorScale& s, DType dtype) {
  if (!is_finite_bits(magnitude_bits(s.amax))) return s.amax;
  switch (dtype) {
    case DType::e4m3: return decode_e4m3(encode_e4m3(s.amax * s.scale)) * s.scale_inv;
    case DType::e5m2: return decode_e5m2(encode_e5m2(s.amax * s.scale)) * s.scale_inv;
    case DType::f16: return decode_f16(encode_f16(s.amax * s.scale)) * s.scale_inv;
    case DType::bf16: return decode_bf16(encode_bf16(s.amax));
    default: return s.amax;
  }
}

/// Whether a cast cannot keep a scaled value because it is too large. NaN is not.
OCTET_HD inline bool is_saturated(float scaled, float maximum) {
  const std::uint32_t magnitude = magnitude_bits(scaled);
  return magnitude > float_bits(maximum) && magnitude <= 0x7F800000u;
}
/// Whether a value other than zero has become zero; `code` without its sign.
OCTET_HD inline bool is_flushed(float value, std::uint32_t code) {
  return code == 0 && magnitude_bits(value) != 0;
}

/// Current scaling: the scale that follows from an amax. A non-finite amax keeps the scale.
OCTET_HD inline TensorScale rescaled(TensorScale old, float amax, DType dtype) {
  TensorScale next = old;
  next.amax = amax;
  if (!is_finite_bits(magnitude_bits(amax))) return next;
  next.scale = power_of_two_scale(amax, max_of(dtype));
  next.scale_inv = inverse_of_power_of_two(next.scale);
  return next;
}

}  // namespace octet::detail
