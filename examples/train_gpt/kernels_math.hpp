// SPDX-License-Identifier: Apache-2.0
// Formulas that the CPU and the CUDA kernels share.
#pragma once

#include <cmath>
#include <cstdint>

#include "octet/core/dtype.hpp"
#include "octet/core/float16.hpp"
#include "octet/core/fp8.hpp"

namespace train_gpt {

/// One element of an engine weight; multiply by the weight's scale_inv.
OCTET_HD inline float weight_at(const void* data, octet::DType dtype, std::int64_t i) {
  switch (dtype) {
    case octet::DType::e4m3: return octet::decode_e4m3(static_cast<const std::uint8_t*>(data)[i]);
    case octet::DType::bf16: return octet::decode_bf16(static_cast<const std::uint16_t*>(data)[i]);
    default: return static_cast<const float*>(data)[i];
  }
}

/// e^x to about 2 ulp. Plain arithmetic, so that a compiler can vectorise the loop around it.
OCTET_HD inline float exp_of(float x) {
  x = x < -87.0f ? -87.0f : (x > 88.0f ? 88.0f : x);
  constexpr float kToInteger = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float shifted = x * 1.44269504f + kToInteger;
  const float n = shifted - kToInteger;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
  float p = 1.9875691500e-4f;  // minimax polynomial of Cephes' expf
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const std::uint32_t exponent = (octet::detail::float_bits(shifted) + 127u) << 23;
  return p * octet::detail::bits_float(exponent);
}

constexpr float kGeluScale = 0.79788456f;  // sqrt(2 / pi)
constexpr float kGeluCubic = 0.044715f;

OCTET_HD inline float gelu_tanh(float x) {
  const float u = kGeluScale * (x + kGeluCubic * x * x * x);
  return 1.0f - 2.0f / (1.0f + exp_of(2.0f * u));
}

/// GELU in its tanh form ("Gaussian Error Linear Units", Hendrycks and Gimpel, arXiv 1606.08415).
OCTET_HD inline float gelu(float x) { return 0.5f * x * (1.0f + gelu_tanh(x)); }

OCTET_HD inline float gelu_slope(float x) {
  const float t = gelu_tanh(x);
  const float du = kGeluScale * (1.0f + 3.0f * kGeluCubic * x * x);
  return 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * du;
}

}  // namespace train_gpt
