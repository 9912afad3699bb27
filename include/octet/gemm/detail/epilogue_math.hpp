// SPDX-License-Identifier: Apache-2.0
// What becomes of one sum of a GEMM before it is stored: one text for the CPU's products, for the
// CPU's and for CUDA's pass over D. In FP32 with equal bits on both; in double for exact products.
#pragma once

#include <cmath>

#include "octet/core/detail/host_device.hpp"
#include "octet/gemm/gemm.hpp"

namespace octet::detail {

/// exp(-y) for y >= 0, within 2 units in the last place. The libraries of CPUs and GPUs differ in
/// the last bits, this does not: n = round(y / ln 2), a polynomial of the rest, times 2^-n.
OCTET_HD inline float exp_minus(float y) {
  if (!(y <= 104.0f)) return y > 104.0f ? 0.0f : y;  // beyond the subnormals; NaN
  constexpr float kMagic = 12582912.0f;              // adding it rounds to whole numbers
  const float shifted = fma_of(y, 1.44269504f, kMagic);
  const float n = shifted - kMagic;
  // ln 2 in two parts, of which the first alone would leave an error of n * 2^-26.
  const float x = -fma_of(n, 1.90465432e-9f, fma_of(n, -0.693147182f, y));
  float power = 1.0f / 5040.0f;
  power = fma_of(power, x, 1.0f / 720.0f);
  power = fma_of(power, x, 1.0f / 120.0f);
  power = fma_of(power, x, 1.0f / 24.0f);
  power = fma_of(power, x, 1.0f / 6.0f);
  power = fma_of(power, x, 0.5f);
  power = fma_of(power, x, 1.0f);
  power = fma_of(power, x, 1.0f);
  // In two steps, because 2^-n alone may be too small for a float.
  const std::uint32_t whole = float_bits(shifted) - float_bits(kMagic);
  const std::uint32_t half = whole / 2;
  return power * bits_float((127u - half) << 23) * bits_float((127u - (whole - half)) << 23);
}
OCTET_HD inline double exp_minus(double y) { return ::exp(-y); }

/// s = 1 / (1 + exp(-v)) and its derivative s (1 - s), neither of which loses digits at the ends.
template <class T>
struct Sigmoid {
  T value, slope;
};
template <class T>
OCTET_HD Sigmoid<T> sigmoid(T v) {
  const T power = exp_minus(v < T(0) ? -v : v);
  const T inverse = T(1) / (T(1) + power);
  return {v < T(0) ? power * inverse : inverse, power * inverse * inverse};
}

/// 0.5 x (1 + tanh(u)), u = sqrt(2 / pi) (x + 0.044715 x^3), is x * sigmoid(2 u), 2 u = x (A + B
/// x^2).
inline constexpr double kGeluA = 1.5957691216057307;
inline constexpr double kGeluB = kGeluA * 0.044715;

template <class T>
OCTET_HD T gelu(T x) {
  constexpr T kA = static_cast<T>(kGeluA), kB = static_cast<T>(kGeluB);
  return x * sigmoid(x * (kA + kB * (x * x))).value;
}

template <class T>
OCTET_HD T gelu_derivative(T x) {
  constexpr T kA = static_cast<T>(kGeluA), kB = static_cast<T>(kGeluB);
  const T square = x * x;
  const Sigmoid<T> s = sigmoid(x * (kA + kB * square));
  if (s.slope == T(0)) return s.value;  // far out, where x^2 may be infinite
  return s.value + x * s.slope * (kA + T(3) * kB * square);
}

/// The sum with D and bias, which count only where the problem has them.
template <class T>
OCTET_HD T sum_before_activation(const GemmProblem& problem, T sum, T d, T bias) {
  if (problem.accumulate) sum = sum + d;
  if (problem.bias) sum = sum + bias;
  return sum;
}

/// `aux` counts only for dgelu.
template <class T>
OCTET_HD T activated(Activation activation, T sum, T aux) {
  if (activation == Activation::gelu) return gelu(sum);
  if (activation == Activation::dgelu) return sum * gelu_derivative(aux);
  return sum;
}

/// One bit pattern for NaN: which one an operation gives depends on the processor and on the order
/// of its operands.
OCTET_HD inline float one_nan(float x) { return x == x ? x : bits_float(0x7FFFFFFFu); }

/// Elements from one row of D to the next.
OCTET_HD constexpr std::int64_t d_stride(const GemmProblem& problem) {
  return problem.ldd == 0 ? problem.n : problem.ldd;
}

}  // namespace octet::detail
