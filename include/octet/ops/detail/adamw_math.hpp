// SPDX-License-Identifier: Apache-2.0
// The arithmetic of numerics section 3, once: the CPU loop and the CUDA kernels call these.
#pragma once

#include "octet/core/detail/random.hpp"
#include "octet/core/detail/scaling_math.hpp"
#include "octet/core/detail/stochastic.hpp"
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
template <class SumSquares>
OCTET_HD void measure_clip(AdamwScalars& s, float max_norm, SumSquares sum_squares) {
  s.sum_squares = 0.0;
  s.norm = 0.0f;
  s.clip = 1.0f;
  if (!(max_norm > 0.0f)) return;
  s.sum_squares = sum_squares();
  const double norm = ::sqrt(s.sum_squares);
  s.norm = static_cast<float>(norm);
  if (norm > static_cast<double>(max_norm)) {
    s.clip = static_cast<float>(static_cast<double>(max_norm) / norm);
  }
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

/// The scalars of step s.step + 1, but for skip, norm and clip.
OCTET_HD inline void begin_step(AdamwScalars& s, const AdamWConfig& config, float lr) {
  const std::int64_t t = s.step + 1;
  const double beta1 = config.beta1;
  const double beta2 = config.beta2;
  s.lr = lr;
  s.beta1 = config.beta1;
  s.one_minus_beta1 = 1.0f - config.beta1;
  s.beta2 = config.beta2;
  s.one_minus_beta2 = 1.0f - config.beta2;
  s.k1 = static_cast<float>(1.0 / (1.0 - integer_power(beta1, t)));
  s.k2 = static_cast<float>(1.0 / ::sqrt(1.0 - integer_power(beta2, t)));
  s.bound = adam_ratio_bound(beta1, beta2, t);
  s.eps = config.eps;
}

OCTET_HD inline float scaled_gradient(const AdamwScalars& s, float gradient) {
  return s.clip * gradient;
}
OCTET_HD inline float next_m(const AdamwScalars& s, float m, float g) {
  return fma_of(s.beta1, m, s.one_minus_beta1 * g);
}
OCTET_HD inline float next_v(const AdamwScalars& s, float v, float g) {
  return fma_of(s.beta2, v, s.one_minus_beta2 * (g * g));
}
OCTET_HD inline float weight_factor(const AdamwScalars& s, float weight_decay) {
  return fma_of(-s.lr, weight_decay, 1.0f);
}
OCTET_HD inline float adam_ratio(const AdamwScalars& s, float m, float v) {
  const float ratio = (m * s.k1) / fma_of(::sqrtf(v), s.k2, s.eps);
  return ratio > s.bound ? s.bound : ratio < -s.bound ? -s.bound : ratio;
}
OCTET_HD inline float next_weight(const AdamwScalars& s, float factor, float w, float ratio) {
  return fma_of(-s.lr, ratio, factor * w);
}

/// Bounds on the magnitudes after the step: the update formulas run on the magnitudes before it.
/// IEEE rounding is monotone, so no element can exceed them.
struct AdamwBounds {
  float m, v, w;
};

OCTET_HD inline AdamwBounds bounds_of(const AdamwScalars& s, const AdamwTensor& tensor) {
  const float g = scaled_gradient(s, stored_amax(*tensor.gradient_scale, tensor.gradient_dtype));
  const float factor = abs_of(weight_factor(s, tensor.weight_decay));
  AdamwBounds bounds;
  bounds.m = next_m(s, tensor.m_scale->amax, g);
  bounds.v = next_v(s, tensor.v_scale->amax, g);
  bounds.w = fma_of(abs_of(s.lr), s.bound, factor * tensor.master_scale->amax);
  return bounds;
}

/// Whether the bounds allow the step. A scaled weight needs a finite bound; without one (beta1^2 >=
/// beta2, allowed for FP32 formats) it may be infinite, but a NaN learning rate still shows.
OCTET_HD inline bool bounds_are_finite(const AdamwBounds& b, const AdamwTensor& tensor) {
  const bool scaled = tensor.master_dtype == DType::f16 || is_fp8(tensor.weight_dtype);
  const std::uint32_t w = magnitude_bits(b.w);
  return is_finite_bits(magnitude_bits(b.m)) && is_finite_bits(magnitude_bits(b.v)) &&
         (scaled ? is_finite_bits(w) : w <= 0x7F800000u);
}

/// Takes over the old scale for decoding, sets the new one from the bound and clears amax, which
/// the update will measure. Unscaled dtypes keep 1.
OCTET_HD inline void renew_scale(TensorScale& scale, DType dtype, float bound, float& old_inv,
                                 float& next, float& next_inv) {
  old_inv = scale.scale_inv;
  if (is_fp8(dtype) || dtype == DType::f16) {
    scale.scale = power_of_two_scale(bound, max_of(dtype));
    scale.scale_inv = inverse_of_power_of_two(scale.scale);
  }
  next = scale.scale;
  next_inv = scale.scale_inv;
  scale.amax = 0.0f;
}

OCTET_HD inline void renew_scales(const AdamwTensor& tensor, const AdamwBounds& bounds,
                                  AdamwScales& out) {
  out.gradient_inv = tensor.gradient_scale->scale_inv;
  renew_scale(*tensor.m_scale, tensor.m_dtype, bounds.m, out.m_inv, out.m_scale, out.m_scale_inv);
  renew_scale(*tensor.v_scale, tensor.v_dtype, bounds.v, out.v_inv, out.v_scale, out.v_scale_inv);
  renew_scale(*tensor.master_scale, tensor.master_dtype, bounds.w, out.master_inv, out.master_scale,
              out.master_scale_inv);
  float unused;
  renew_scale(*tensor.weight_scale, tensor.weight_dtype, bounds.w, unused, out.weight_scale,
              out.weight_scale_inv);
}

/// Largest magnitudes stored by the elements seen so far, as bits.
struct AdamwAmax {
  std::uint32_t m = 0, v = 0, master = 0, weight = 0;
};

OCTET_HD inline std::uint32_t larger(std::uint32_t a, std::uint32_t b) { return a > b ? a : b; }

/// Stores m; returns the value that was stored.
OCTET_HD inline float store_m(const AdamwTensor& tensor, const AdamwScales& scales, std::int64_t i,
                              float m, std::uint32_t word) {
  if (tensor.m_dtype == DType::f32) return static_cast<float*>(tensor.m)[i] = m;
  const std::uint8_t code =
      encode_e4m3_stochastic<kRandomBitsM>(m * scales.m_scale, random_field_m(word));
  static_cast<std::uint8_t*>(tensor.m)[i] = code;
  return decode_e4m3(code) * scales.m_scale_inv;
}

/// Stores v; a positive v is never stored as zero, because m / (sqrt(0) + eps) would explode.
OCTET_HD inline float store_v(const AdamwTensor& tensor, const AdamwScales& scales, std::int64_t i,
                              float v, std::uint32_t word) {
  if (tensor.v_dtype == DType::f32) return static_cast<float*>(tensor.v)[i] = v;
  std::uint16_t code =
      encode_f16_stochastic<kRandomBitsV>(v * scales.v_scale, random_field_v(word));
  if (code == 0 && v > 0.0f) code = 1;
  static_cast<std::uint16_t*>(tensor.v)[i] = code;
  return decode_f16(code) * scales.v_scale_inv;
}

OCTET_HD inline float store_master(const AdamwTensor& tensor, const AdamwScales& scales,
                                   std::int64_t i, float w, std::uint32_t word) {
  if (tensor.master_dtype == DType::f32) return static_cast<float*>(tensor.master)[i] = w;
  const std::uint16_t code =
      encode_f16_stochastic<kRandomBitsMaster>(w * scales.master_scale, random_field_master(word));
  static_cast<std::uint16_t*>(tensor.master)[i] = code;
  return decode_f16(code) * scales.master_scale_inv;
}

/// Stores the compute weight: the nearest code to the stored master, so that it is a function of
/// the state. Returns the value that was stored.
OCTET_HD inline float store_weight(const AdamwTensor& tensor, float scale, float scale_inv,
                                   std::int64_t i, float master) {
  if (tensor.weight == nullptr) return master;
  if (tensor.weight_dtype == DType::bf16) {
    const std::uint16_t code = encode_bf16(master);
    static_cast<std::uint16_t*>(tensor.weight)[i] = code;
    return decode_bf16(code);
  }
  const std::uint8_t code = encode_e4m3(master * scale);
  static_cast<std::uint8_t*>(tensor.weight)[i] = code;
  return decode_e4m3(code) * scale_inv;
}

/// Decoded gradient of element i of a segment, before clipping.
OCTET_HD inline float gradient_at(const AdamwTensor& tensor, float gradient_inv,
                                  const Segment& segment, std::int64_t i) {
  const std::int64_t at = (tensor.gradient_is_shard ? segment.local : segment.begin) + i;
  return load_element(tensor.gradient, tensor.gradient_dtype, at) * gradient_inv;
}

/// One element of the update, read, computed and stored.
OCTET_HD inline void update_element(const AdamwScalars& s, const AdamwTensor& tensor,
                                    const AdamwScales& scales, const Segment& segment,
                                    std::int64_t i, float factor, std::uint32_t word,
                                    AdamwAmax& amax) {
  const std::int64_t shard = segment.local + i;
  const std::int64_t whole = segment.begin + i;
  const std::int64_t at_master = tensor.master_is_shard ? shard : whole;
  const float g = scaled_gradient(s, gradient_at(tensor, scales.gradient_inv, segment, i));
  const float m = next_m(s, load_element(tensor.m, tensor.m_dtype, shard) * scales.m_inv, g);
  const float v = next_v(s, load_element(tensor.v, tensor.v_dtype, shard) * scales.v_inv, g);
  const float old = load_element(tensor.master, tensor.master_dtype, at_master) * scales.master_inv;
  const float w = next_weight(s, factor, old, adam_ratio(s, m, v));
  const float stored = store_master(tensor, scales, at_master, w, word);
  const float weight =
      store_weight(tensor, scales.weight_scale, scales.weight_scale_inv, whole, stored);
  amax.m = larger(amax.m, magnitude_bits(store_m(tensor, scales, shard, m, word)));
  amax.v = larger(amax.v, magnitude_bits(store_v(tensor, scales, shard, v, word)));
  amax.master = larger(amax.master, magnitude_bits(stored));
  amax.weight = larger(amax.weight, magnitude_bits(weight));
}

/// Scale that holds values up to amax, with amax of what will be stored; 1 for unscaled dtypes.
OCTET_HD inline TensorScale initial_scale(DType dtype, float amax) {
  TensorScale scale;
  if (is_fp8(dtype) || dtype == DType::f16) scale = rescaled(scale, amax, dtype);
  scale.amax = stored_amax({scale.scale_inv, scale.scale, amax}, dtype);
  return scale;
}

/// Writes the scales of a tensor whose initial values have this amax.
OCTET_HD inline void initialise_scales(const AdamwTensor& tensor, float amax) {
  *tensor.master_scale = initial_scale(tensor.master_dtype, amax);
  *tensor.weight_scale = initial_scale(tensor.weight_dtype, tensor.master_scale->amax);
  *tensor.m_scale = TensorScale{};
  *tensor.v_scale = TensorScale{};
}

/// Element i of the initial master as it is stored (f32 or f16, nearest) and as it decodes.
OCTET_HD inline float initial_master(const AdamwTensor& tensor, const TensorView& values,
                                     std::int64_t i) {
  const float value = load_element(values.data, values.dtype, i);
  if (tensor.master_dtype == DType::f32) return value;
  const TensorScale& scale = *tensor.master_scale;
  return decode_f16(encode_f16(value * scale.scale)) * scale.scale_inv;
}

/// Element i of the initial compute weight, which every rank holds whole; without one of its own it
/// is the FP32 master.
OCTET_HD inline void initialise_weight(const AdamwTensor& tensor, const TensorView& values,
                                       std::int64_t i) {
  if (tensor.weight == nullptr && !tensor.master_is_shard) {
    static_cast<float*>(tensor.master)[i] = initial_master(tensor, values, i);
  }
  store_weight(tensor, tensor.weight_scale->scale, tensor.weight_scale->scale_inv, i,
               initial_master(tensor, values, i));
}

OCTET_HD inline void initialise_state(const AdamwTensor& tensor, const TensorView& values,
                                      std::int64_t whole, std::int64_t shard) {
  const float master = initial_master(tensor, values, whole);
  store_element(tensor.master, tensor.master_dtype, tensor.master_is_shard ? shard : whole,
                master * tensor.master_scale->scale);
  store_element(tensor.m, tensor.m_dtype, shard, 0.0f);
  store_element(tensor.v, tensor.v_dtype, shard, 0.0f);
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
