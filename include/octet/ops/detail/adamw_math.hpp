// SPDX-License-Identifier: Apache-2.0
// The arithmetic of a step that is not per element: scalars, bounds, scales (numerics section 3).
// The CPU loop and the CUDA kernels call these.
#pragma once

#include "octet/core/detail/scaling_math.hpp"
#include "octet/ops/adamw.hpp"

namespace octet::detail {

/// b^t by binary exponentiation: the same bits on every machine, unlike a library pow.
OCTET_HD inline double integer_power(double base, std::int64_t exponent) {
  double result = 1.0;
  for (; exponent > 0; exponent >>= 1) {
    if (exponent & 1) result *= base;
    base *= base;
  }
  return result;
}

/// Largest |m' k1 / (sqrt(v') k2)| that exact Adam reaches at step t, by Cauchy-Schwarz over the
/// gradients' history; infinite when beta1^2 >= beta2.
OCTET_HD inline float adam_ratio_bound(double beta1, double beta2, std::int64_t t) {
  const double x = beta1 * beta1 / beta2;
  if (!(x < 1.0)) return bits_float(0x7F800000u);
  const double first = (1.0 - beta1) / (1.0 - integer_power(beta1, t));
  const double second = ::sqrt((1.0 - integer_power(beta2, t)) / (1.0 - beta2));
  const double third = ::sqrt((1.0 - integer_power(x, t)) / (1.0 - x));
  return static_cast<float>(first * second * third);
}

/// Norm and clip factor from the sum of squares; max_norm 0 asks for neither.
OCTET_HD inline void measure_clip(AdamwScalars& s, float max_norm, bool maximize,
                                  double sum_squares) {
  s.sum_squares = 0.0;
  s.norm = 0.0f;
  s.clip = 1.0f;
  if (max_norm > 0.0f) {
    s.sum_squares = sum_squares;
    const double norm = ::sqrt(s.sum_squares);
    s.norm = static_cast<float>(norm);
    if (norm > static_cast<double>(max_norm)) {
      s.clip = static_cast<float>(static_cast<double>(max_norm) / norm);
    }
  }
  s.gradient_factor = maximize ? -s.clip : s.clip;
}

/// The scalars of a group at the step after `applied` others.
OCTET_HD inline AdamwGroupScalars group_scalars(const AdamWGroup& group, bool decoupled,
                                                std::int64_t applied, float lr) {
  const std::int64_t t = applied + 1;
  const double beta1 = group.beta1;
  const double beta2 = group.beta2;
  AdamwGroupScalars s;
  s.lr = lr * group.lr_factor;
  s.beta1 = group.beta1;
  s.one_minus_beta1 = 1.0f - group.beta1;
  s.beta2 = group.beta2;
  s.one_minus_beta2 = 1.0f - group.beta2;
  const double first = 1.0 - integer_power(beta1, t);
  const double second = 1.0 / ::sqrt(1.0 - integer_power(beta2, t));
  s.k1 = static_cast<float>(1.0 / first);
  s.k2 = static_cast<float>(second);
  s.root_factor = static_cast<float>(second * first);
  s.root_eps = static_cast<float>(group.eps * first);
  s.bound = adam_ratio_bound(beta1, beta2, t);
  s.l2 = decoupled ? 0.0f : group.weight_decay;
  s.weight_factor = decoupled ? fma_of(-s.lr, group.weight_decay, 1.0f) : 1.0f;
  return s;
}

/// Whether the gradients or the learning rate forbid the step.
OCTET_HD inline bool must_skip(const AdamwScalars& s, const std::uint32_t* nonfinite) {
  return (nonfinite != nullptr && *nonfinite != 0) || !is_finite_bits(magnitude_bits(s.norm)) ||
         !is_finite_bits(magnitude_bits(s.lr));
}

/// Records the decision and gets the flag ready for the next step.
OCTET_HD inline void end_decision(AdamwScalars& s, bool skip, std::uint32_t* nonfinite) {
  s.skip = skip ? 1u : 0u;
  if (skip) {
    ++s.skipped;
  } else {
    ++s.step;
  }
  if (nonfinite != nullptr) *nonfinite = 0;
}

// The formulas. Decoding is folded into the factors: `m_inv` and its like stand for scale_inv.

/// The gradient that the moments see: clipped and, in L2 mode, with the decayed weight.
OCTET_HD inline float effective_gradient(const AdamwGroupScalars& s, float gradient, float weight) {
  return s.l2 != 0.0f ? fma_of(s.l2, weight, gradient) : gradient;
}
OCTET_HD inline float next_m(const AdamwGroupScalars& s, float m, float m_inv, float g) {
  return fma_of(s.beta1 * m_inv, m, s.one_minus_beta1 * g);
}
OCTET_HD inline float next_v(const AdamwGroupScalars& s, float v, float v_inv, float g) {
  return fma_of(s.beta2 * v_inv, v, s.one_minus_beta2 * (g * g));
}
OCTET_HD inline float next_weight(const AdamwGroupScalars& s, float w, float w_inv, float ratio) {
  return fma_of(-s.lr, ratio, (s.weight_factor * w_inv) * w);
}
/// Bounds on the magnitudes after the step: the update formulas run on the magnitudes before it.
/// IEEE rounding is monotone, so no element can exceed them.
struct AdamwBounds {
  float m, v, w;
};

OCTET_HD inline AdamwBounds bounds_of(const AdamwScalars& step, const AdamwGroupScalars& s,
                                      const AdamwTensor& tensor) {
  const float w = tensor.master_scale->amax;
  // Both terms of the gradient at their largest and of one sign.
  const float g = effective_gradient(
      s, step.clip * stored_amax(*tensor.gradient_scale, tensor.gradient_dtype), w);
  AdamwGroupScalars upward = s;
  upward.lr = -abs_of(s.lr);
  upward.weight_factor = abs_of(s.weight_factor);
  return {next_m(s, tensor.m_scale->amax, 1.0f, g), next_v(s, tensor.v_scale->amax, 1.0f, g),
          next_weight(upward, w, 1.0f, s.bound)};
}

/// Largest value of a format that has one scale for the tensor; 0 for the others.
OCTET_HD inline float scaled_max(StateFormat format) {
  switch (format) {
    case StateFormat::f16: return Element<DType::f16>::kMax;
    case StateFormat::e4m3:
    case StateFormat::split: return E4M3Format::kMax;
    default: return 0.0f;
  }
}
OCTET_HD inline float scaled_max(WeightFormat format) {
  return is_e4m3(format) ? E4M3Format::kMax : 0.0f;
}

/// Whether the bounds allow the step. A scaled weight needs a finite bound; without one (beta1^2 >=
/// beta2, allowed for FP32 formats) it may be infinite, but a NaN learning rate still shows.
OCTET_HD inline bool bounds_are_finite(const AdamwBounds& b, const AdamwGroupScalars& s,
                                       const StateFormats& f) {
  const bool scaled = scaled_max(f.master) != 0.0f || scaled_max(f.weight) != 0.0f;
  const std::uint32_t w = magnitude_bits(b.w);
  return is_finite_bits(magnitude_bits(b.m)) && is_finite_bits(magnitude_bits(b.v)) &&
         is_finite_bits(magnitude_bits(s.lr)) && (scaled ? is_finite_bits(w) : w <= 0x7F800000u);
}

/// Takes over the old scale for decoding, sets the new one from the bound (formats without a scale
/// for the tensor keep 1) and clears amax, which the update will measure.
OCTET_HD inline void renew_scale(TensorScale& scale, float maximum, float bound, float& old_inv,
                                 float& next, float& next_inv) {
  old_inv = scale.scale_inv;
  if (maximum != 0.0f) {
    scale.scale = power_of_two_scale(bound, maximum);
    scale.scale_inv = inverse_of_power_of_two(scale.scale);
  }
  next = scale.scale;
  next_inv = scale.scale_inv;
  scale.amax = 0.0f;
}

/// See AdamwTensorStep::ordinary.
OCTET_HD inline bool is_ordinary(const AdamwTensorStep& s, const AdamwBounds& bounds) {
  const auto is_within = [](float scale) { return scale >= 0x1p-28f && scale <= 0x1p100f; };
  return is_within(s.m_scale) && is_within(s.m_inv) && is_within(s.v_scale) && is_within(s.v_inv) &&
         is_within(s.master_scale) && is_within(s.master_inv) && is_within(s.weight_scale) &&
         bounds.m <= 0x1p40f && bounds.v <= 0x1p40f && s.group.root_eps >= 0x1p-44f;
}

OCTET_HD inline void begin_tensor(const AdamwScalars& step, const AdamwGroupScalars& group,
                                  const AdamwTensor& tensor, const AdamwBounds& bounds,
                                  AdamwTensorStep& out) {
  out.group = group;
  out.gradient_inv = step.gradient_factor * tensor.gradient_scale->scale_inv;
  renew_scale(*tensor.m_scale, scaled_max(tensor.formats.m), bounds.m, out.m_inv, out.m_scale,
              out.m_scale_inv);
  renew_scale(*tensor.v_scale, scaled_max(tensor.formats.v), bounds.v, out.v_inv, out.v_scale,
              out.v_scale_inv);
  renew_scale(*tensor.master_scale, scaled_max(tensor.formats.master), bounds.w, out.master_inv,
              out.master_scale, out.master_scale_inv);
  float unused;
  renew_scale(*tensor.weight_scale, scaled_max(tensor.formats.weight), bounds.w, unused,
              out.weight_scale, out.weight_scale_inv);
  out.ordinary = is_ordinary(out, bounds) ? 1 : 0;
}

/// Gets a measured amax ready for the next gradient.
OCTET_HD inline void end_gradient(const AdamwTensor& tensor) {
  if (tensor.measure_amax) tensor.gradient_scale->amax = 0.0f;
}

/// Sum of the values get(0) .. get(count - 1) by a binary tree over aligned pairs: fixed by the
/// index alone, so a run cut at a power of two and summed apart gives the same bits.
template <class Get>
OCTET_HD double pairwise_sum(std::int64_t count, Get get) {
  double partial[64];
  int depth = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    double value = get(i);
    for (std::int64_t carry = i; (carry & 1) != 0; carry >>= 1) value = partial[--depth] + value;
    partial[depth++] = value;
  }
  double sum = 0.0;
  while (depth > 0) sum = partial[--depth] + sum;
  return sum;
}

}  // namespace octet::detail
