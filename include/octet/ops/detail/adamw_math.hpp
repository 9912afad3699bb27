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
OCTET_HD void measure_clip(AdamwScalars& s, float max_norm, bool maximize, SumSquares sum_squares) {
  s.sum_squares = 0.0;
  s.norm = 0.0f;
  s.clip = 1.0f;
  if (max_norm > 0.0f) {
    s.sum_squares = sum_squares();
    const double norm = ::sqrt(s.sum_squares);
    s.norm = static_cast<float>(norm);
    if (norm > static_cast<double>(max_norm)) {
      s.clip = static_cast<float>(static_cast<double>(max_norm) / norm);
    }
  }
  s.gradient_factor = maximize ? -s.clip : s.clip;
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
  s.l2 = config.decoupled_weight_decay ? 0 : 1;
  s.stochastic = config.stochastic_rounding ? 1 : 0;
}

/// The gradient that the moments see, from the decoded one and the decoded weight.
OCTET_HD inline float effective_gradient(const AdamwScalars& s, float gradient, float weight,
                                         float weight_decay) {
  const float g = s.gradient_factor * gradient;
  return s.l2 != 0 ? fma_of(weight_decay, weight, g) : g;
}
OCTET_HD inline float next_m(const AdamwScalars& s, float m, float g) {
  return fma_of(s.beta1, m, s.one_minus_beta1 * g);
}
OCTET_HD inline float next_v(const AdamwScalars& s, float v, float g) {
  return fma_of(s.beta2, v, s.one_minus_beta2 * (g * g));
}
OCTET_HD inline float weight_factor(const AdamwScalars& s, float weight_decay) {
  return s.l2 != 0 ? 1.0f : fma_of(-s.lr, weight_decay, 1.0f);
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
  const float w = tensor.master_scale->amax;
  // Both terms of the gradient at their largest and of one sign.
  AdamwScalars upward = s;
  upward.gradient_factor = s.clip;
  const float g = effective_gradient(
      upward, stored_amax(*tensor.gradient_scale, tensor.gradient_dtype), w, tensor.weight_decay);
  const float factor = abs_of(weight_factor(s, tensor.weight_decay));
  AdamwBounds bounds;
  bounds.m = next_m(s, tensor.m_scale->amax, g);
  bounds.v = next_v(s, tensor.v_scale->amax, g);
  bounds.w = fma_of(abs_of(s.lr), s.bound, factor * w);
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

/// Largest codes that a thread has stored, without their signs; FP32 values count by their bits.
/// Codes are ordered like the magnitudes they stand for, so one decoding at the end is enough.
struct AdamwAmax {
  std::uint32_t m = 0, v = 0, master = 0, weight = 0;
};

OCTET_HD inline std::uint32_t larger(std::uint32_t a, std::uint32_t b) { return a > b ? a : b; }

/// A code without its sign.
OCTET_HD constexpr std::uint32_t magnitude_code(DType dtype, std::uint32_t code) {
  return code & (size_of(dtype) == 4 ? 0x7FFFFFFFu : size_of(dtype) == 2 ? 0x7FFFu : 0x7Fu);
}

/// What decodes and rounds to nearest. This one is the definition; a device may bring another with
/// the same bits.
struct SoftwareCodec {
  OCTET_HD static float decode(DType dtype, std::uint32_t code) {
    switch (dtype) {
      case DType::bf16: return decode_bf16(static_cast<std::uint16_t>(code));
      case DType::f16: return decode_f16(static_cast<std::uint16_t>(code));
      case DType::e4m3: return decode_e4m3(static_cast<std::uint8_t>(code));
      case DType::e5m2: return decode_e5m2(static_cast<std::uint8_t>(code));
      case DType::f32: break;
    }
    return bits_float(code);
  }
  OCTET_HD static std::uint32_t nearest(DType dtype, float y) {
    switch (dtype) {
      case DType::bf16: return encode_bf16(y);
      case DType::f16: return encode_f16(y);
      case DType::e4m3: return encode_e4m3(y);
      case DType::e5m2: return encode_e5m2(y);
      case DType::f32: break;
    }
    return float_bits(y);
  }
};

inline constexpr float kMaxBf16 = Element<DType::bf16>::kMax;

/// Code of a state's value y, already scaled, rounded as the step says.
template <class Codec, int Bits>
OCTET_HD std::uint32_t state_code(bool stochastic, DType dtype, float y, std::uint32_t field) {
  if (!stochastic) {
    // BF16 has no scale to keep the largest FP32 values off its infinity.
    const bool overflows = dtype == DType::bf16 && magnitude_bits(y) > float_bits(kMaxBf16);
    return Codec::nearest(dtype, overflows ? (y < 0.0f ? -kMaxBf16 : kMaxBf16) : y);
  }
  switch (dtype) {
    case DType::bf16: return encode_bf16_stochastic<Bits>(y, field);
    case DType::f16: return encode_f16_stochastic<Bits>(y, field);
    case DType::e4m3: return encode_e4m3_stochastic<Bits>(y, field);
    default: return float_bits(y);
  }
}

/// The formats of one tensor; constants of a specialised kernel or read from the table.
struct AdamwFormats {
  DType gradient = DType::f32, master = DType::f32, m = DType::f32, v = DType::f32;
  DType weight = DType::f32;
  bool has_weight = false;  ///< a compute weight apart from the master is written
};

OCTET_HD inline AdamwFormats formats_of(const AdamwTensor& tensor) {
  return {tensor.gradient_dtype, tensor.master_dtype, tensor.m_dtype,
          tensor.v_dtype,        tensor.weight_dtype, tensor.weight != nullptr};
}

/// One element as it is stored, a code each. FP32 values are their bits.
struct AdamwCodes {
  std::uint32_t gradient = 0, master = 0, m = 0, v = 0, weight = 0;
};

/// The update of one element, from codes to codes: numerics section 3, the only place. A positive v
/// is never stored as zero, because m / (sqrt(0) + eps) would explode. The compute weight is the
/// nearest code to the stored master, so that it is a function of the state.
template <class Codec>
OCTET_HD inline void update_codes(const AdamwScalars& s, AdamwFormats f, bool stochastic,
                                  const AdamwScales& scales, float weight_decay, float factor,
                                  std::uint32_t word, AdamwCodes& c, AdamwAmax& amax) {
  const float old = Codec::decode(f.master, c.master) * scales.master_inv;
  const float g = effective_gradient(s, Codec::decode(f.gradient, c.gradient) * scales.gradient_inv,
                                     old, weight_decay);
  const float m = next_m(s, Codec::decode(f.m, c.m) * scales.m_inv, g);
  const float v = next_v(s, Codec::decode(f.v, c.v) * scales.v_inv, g);
  const float w = next_weight(s, factor, old, adam_ratio(s, m, v));
  c.m = state_code<Codec, kRandomBitsM>(stochastic, f.m, m * scales.m_scale, random_field_m(word));
  c.v = state_code<Codec, kRandomBitsV>(stochastic, f.v, v * scales.v_scale, random_field_v(word));
  if (f.v != DType::f32 && c.v == 0 && v > 0.0f) c.v = 1;
  c.master = state_code<Codec, kRandomBitsMaster>(stochastic, f.master, w * scales.master_scale,
                                                  random_field_master(word));
  c.weight = c.master;
  if (f.has_weight) {
    const float stored = Codec::decode(f.master, c.master) * scales.master_scale_inv;
    c.weight = Codec::nearest(f.weight, stored * scales.weight_scale);
  }
  amax.m = larger(amax.m, magnitude_code(f.m, c.m));
  amax.v = larger(amax.v, magnitude_code(f.v, c.v));
  amax.master = larger(amax.master, magnitude_code(f.master, c.master));
  amax.weight = larger(amax.weight, magnitude_code(f.has_weight ? f.weight : f.master, c.weight));
}

/// The largest codes as bits of the magnitudes they stand for.
OCTET_HD inline AdamwAmax decoded_amax(const AdamwFormats& f, const AdamwScales& scales,
                                       const AdamwAmax& codes) {
  const auto bits = [](DType dtype, std::uint32_t code, float scale_inv) {
    return magnitude_bits(SoftwareCodec::decode(dtype, code) * scale_inv);
  };
  AdamwAmax amax;
  amax.m = bits(f.m, codes.m, scales.m_scale_inv);
  amax.v = bits(f.v, codes.v, scales.v_scale_inv);
  amax.master = bits(f.master, codes.master, scales.master_scale_inv);
  amax.weight = f.has_weight ? bits(f.weight, codes.weight, scales.weight_scale_inv) : amax.master;
  return amax;
}

/// One code read from or written to untyped memory.
OCTET_HD inline std::uint32_t load_code(const void* data, DType dtype, std::int64_t i) {
  switch (size_of(dtype)) {
    case 1: return static_cast<const std::uint8_t*>(data)[i];
    case 2: return static_cast<const std::uint16_t*>(data)[i];
    default: return float_bits(static_cast<const float*>(data)[i]);
  }
}
OCTET_HD inline void store_code(void* data, DType dtype, std::int64_t i, std::uint32_t code) {
  switch (size_of(dtype)) {
    case 1: static_cast<std::uint8_t*>(data)[i] = static_cast<std::uint8_t>(code); return;
    case 2: static_cast<std::uint16_t*>(data)[i] = static_cast<std::uint16_t>(code); return;
    default: static_cast<float*>(data)[i] = bits_float(code);
  }
}

/// Decoded gradient of element i of a segment, before clipping.
OCTET_HD inline float gradient_at(const AdamwTensor& tensor, float gradient_inv,
                                  const Segment& segment, std::int64_t i) {
  const std::int64_t at = (tensor.gradient_is_shard ? segment.local : segment.begin) + i;
  return load_element(tensor.gradient, tensor.gradient_dtype, at) * gradient_inv;
}

/// First element of a segment in each of a tensor's buffers.
struct AdamwOffsets {
  std::int64_t gradient, master, state, weight;
};

OCTET_HD inline AdamwOffsets offsets_of(const AdamwTensor& tensor, const Segment& segment) {
  return {tensor.gradient_is_shard ? segment.local : segment.begin,
          tensor.master_is_shard ? segment.local : segment.begin, segment.local, segment.begin};
}

/// One element of the update, read, computed and stored; formats at run time.
OCTET_HD inline void update_element(const AdamwScalars& s, const AdamwTensor& tensor,
                                    const AdamwScales& scales, const AdamwOffsets& at,
                                    std::int64_t i, float factor, std::uint32_t word,
                                    AdamwAmax& amax) {
  const AdamwFormats f = formats_of(tensor);
  AdamwCodes c;
  c.gradient = load_code(tensor.gradient, f.gradient, at.gradient + i);
  c.master = load_code(tensor.master, f.master, at.master + i);
  c.m = load_code(tensor.m, f.m, at.state + i);
  c.v = load_code(tensor.v, f.v, at.state + i);
  update_codes<SoftwareCodec>(s, f, s.stochastic != 0, scales, tensor.weight_decay, factor, word, c,
                              amax);
  store_code(tensor.m, f.m, at.state + i, c.m);
  store_code(tensor.v, f.v, at.state + i, c.v);
  store_code(tensor.master, f.master, at.master + i, c.master);
  if (f.has_weight) store_code(tensor.weight, f.weight, at.weight + i, c.weight);
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
  if (tensor.weight == nullptr) return;
  const float master = initial_master(tensor, values, i);
  store_element(tensor.weight, tensor.weight_dtype, i, master * tensor.weight_scale->scale);
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
