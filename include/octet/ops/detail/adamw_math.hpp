// SPDX-License-Identifier: Apache-2.0
// The arithmetic of a step that is not per element: scalars, bounds, scales (numerics section 3).
// The CPU loop and the CUDA kernels call these.
#pragma once

#include "octet/core/detail/scaling_math.hpp"
#include "octet/ops/adamw_rows.hpp"

namespace octet::detail {

struct AdamwPowers {
  double a, b, c;
};

/// Each to the power of t by binary exponentiation: the same bits on every machine, unlike a
/// library pow. Three at once, because a device waits for each product.
OCTET_HD inline AdamwPowers powers_of(AdamwPowers base, std::int64_t t) {
  AdamwPowers result{1.0, 1.0, 1.0};
  for (; t > 0; t >>= 1) {
    if (t & 1) result = {result.a * base.a, result.b * base.b, result.c * base.c};
    base = {base.a * base.a, base.b * base.b, base.c * base.c};
  }
  return result;
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
OCTET_HD inline AdamwGroupScalars group_scalars(const AdamwHyper& group, bool decoupled,
                                                std::int64_t applied, float lr) {
  const std::int64_t t = applied + 1;
  const double beta1 = group.beta1;
  const double beta2 = group.beta2;
  const double x = beta1 * beta1 / beta2;
  const AdamwPowers power = powers_of({beta1, beta2, x}, t);
  const double first = 1.0 - power.a;
  const double second = 1.0 - power.b;
  AdamwGroupScalars s;
  s.lr = lr * group.lr_factor;
  s.beta1 = group.beta1;
  s.one_minus_beta1 = 1.0f - group.beta1;
  s.beta2 = group.beta2;
  s.one_minus_beta2 = 1.0f - group.beta2;
  s.root_factor = static_cast<float>(first / ::sqrt(second));
  s.root_eps = static_cast<float>(group.eps * first);
  // Largest |m' k1 / (sqrt(v') k2)| that exact Adam reaches, by Cauchy-Schwarz over the gradients'
  // history: the square root of (1-b1)^2 / first^2 * second * (1-x^t) / ((1-x) (1-b2)). There is
  // none when beta1^2 >= beta2.
  s.bound = bits_float(0x7F800000u);
  if (x < 1.0) {
    const double above = (1.0 - beta1) * (1.0 - beta1) * second * (1.0 - power.c);
    const double below = first * first * (1.0 - x) * (1.0 - beta2);
    s.bound = static_cast<float>(::sqrt(above / below));
  }
  s.l2 = decoupled ? 0.0f : group.weight_decay;
  s.weight_factor = decoupled ? fma_of(-s.lr, group.weight_decay, 1.0f) : 1.0f;
  return s;
}

/// Whether the gradients or the learning rate forbid the step. (A rate that the host gives is
/// checked there; one below 0 would go up the gradient.)
OCTET_HD inline bool must_skip(const AdamwScalars& s, const std::uint32_t* nonfinite) {
  return (nonfinite != nullptr && *nonfinite != 0) || !is_finite_bits(magnitude_bits(s.norm)) ||
         !is_finite_bits(magnitude_bits(s.lr)) || s.lr < 0.0f;
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

/// The scales that a tensor has before the step.
struct AdamwOldScales {
  TensorScale gradient, master, m, v;
};

OCTET_HD inline AdamwOldScales old_scales_of(const AdamwTensor& tensor) {
  return {*tensor.gradient_scale, *tensor.master_scale, *tensor.m_scale, *tensor.v_scale};
}

OCTET_HD inline AdamwBounds bounds_of(const AdamwScalars& step, const AdamwGroupScalars& s,
                                      DType gradient_dtype, const AdamwOldScales& old) {
  // Both terms of the gradient at their largest and of one sign.
  const float g =
      effective_gradient(s, step.clip * stored_amax(old.gradient, gradient_dtype), old.master.amax);
  AdamwGroupScalars upward = s;
  upward.lr = -abs_of(s.lr);
  upward.weight_factor = abs_of(s.weight_factor);
  return {next_m(s, old.m.amax, 1.0f, g), next_v(s, old.v.amax, 1.0f, g),
          next_weight(upward, old.master.amax, 1.0f, s.bound)};
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
  return has_tensor_scale(format) ? E4M3Format::kMax : 0.0f;
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

/// The scale that follows from a bound; its amax is 0 until the update has measured it. Formats
/// without a scale for the tensor (maximum 0) keep 1.
OCTET_HD inline TensorScale next_scale(float maximum, float bound) {
  TensorScale scale;
  if (maximum != 0.0f) {
    scale.scale = power_of_two_scale(bound, maximum);
    scale.scale_inv = inverse_of_power_of_two(scale.scale);
  }
  return scale;
}

/// See AdamwTensorStep::ordinary.
OCTET_HD inline bool is_ordinary(const AdamwTensorStep& s, const AdamwBounds& bounds) {
  // Of a new scale and of the inverse of an old one.
  const auto encodes = [](float scale) { return scale >= 0x1p-28f && scale <= 0x1p100f; };
  const auto decodes = [](float inv) { return inv >= 0x1p-100f && inv <= 0x1p28f; };
  return encodes(s.m_scale) && decodes(s.m_inv) && encodes(s.v_scale) && decodes(s.v_inv) &&
         encodes(s.master_scale) && decodes(s.master_inv) && encodes(s.weight_scale) &&
         bounds.m <= 0x1p40f && bounds.v <= 0x1p40f && s.group.root_eps >= kSmallestEpsForRow;
}

/// The scales that a tensor has after the step, their amax not yet measured.
struct AdamwNewScales {
  TensorScale weight, master, m, v;
};

/// What the update needs of a tensor, and its new scales.
OCTET_HD inline AdamwNewScales begin_tensor(const AdamwScalars& step,
                                            const AdamwGroupScalars& group, const StateFormats& f,
                                            const AdamwOldScales& old, const AdamwBounds& bounds,
                                            AdamwTensorStep& out) {
  const AdamwNewScales next = {.weight = next_scale(scaled_max(f.weight), bounds.w),
                               .master = next_scale(scaled_max(f.master), bounds.w),
                               .m = next_scale(scaled_max(f.m), bounds.m),
                               .v = next_scale(scaled_max(f.v), bounds.v)};
  out.group = group;
  out.gradient_inv = step.gradient_factor * old.gradient.scale_inv;
  out.m_inv = old.m.scale_inv;
  out.m_scale = next.m.scale;
  out.m_scale_inv = next.m.scale_inv;
  out.v_inv = old.v.scale_inv;
  out.v_scale = next.v.scale;
  out.v_scale_inv = next.v.scale_inv;
  out.master_inv = old.master.scale_inv;
  out.master_scale = next.master.scale;
  out.master_scale_inv = next.master.scale_inv;
  out.weight_scale = next.weight.scale;
  out.weight_scale_inv = next.weight.scale_inv;
  out.ordinary = is_ordinary(out, bounds) ? 1 : 0;
  out.row = 0;
  return next;
}

OCTET_HD inline void store_scales(const AdamwTensor& tensor, const AdamwNewScales& next) {
  *tensor.weight_scale = next.weight;
  *tensor.master_scale = next.master;
  *tensor.m_scale = next.m;
  *tensor.v_scale = next.v;
}

/// Whether the gradient of a tensor, as it is stored, is not finite: in a skipped step it is
/// counted under the tensor's name.
OCTET_HD inline bool has_nonfinite_gradient(const TensorScale& gradient, DType dtype) {
  return !is_finite_bits(magnitude_bits(stored_amax(gradient, dtype)));
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
