// SPDX-License-Identifier: Apache-2.0
// The update of one element, from codes to codes (numerics section 3): the only place. The CPU loop
// and the CUDA kernels call these.
#pragma once

#include "octet/core/detail/block_scaling.hpp"
#include "octet/core/detail/random.hpp"
#include "octet/core/detail/stochastic.hpp"
#include "octet/ops/detail/adamw_math.hpp"

namespace octet::detail {

OCTET_HD inline std::uint32_t larger(std::uint32_t a, std::uint32_t b) { return a > b ? a : b; }

/// Root and quotient of the update. This one is the definition; a device may bring another with the
/// same bits.
struct IeeeMath {
  OCTET_HD float root(float x) const { return ::sqrtf(x); }
  OCTET_HD float quotient(float a, float b) const { return a / b; }
};

OCTET_HD inline float decode_state(StateFormat format, std::uint32_t code) {
  switch (format) {
    case StateFormat::f32: return bits_float(code);
    case StateFormat::bf16: return decode_bf16(static_cast<std::uint16_t>(code));
    case StateFormat::f16: return decode_f16(static_cast<std::uint16_t>(code));
    case StateFormat::split: return decode_split(static_cast<std::uint16_t>(code));
    default: return decode_e4m3(static_cast<std::uint8_t>(code));
  }
}

OCTET_HD inline float decode_gradient(DType dtype, std::uint32_t code) {
  return dtype == DType::bf16   ? decode_bf16(static_cast<std::uint16_t>(code))
         : dtype == DType::e4m3 ? decode_e4m3(static_cast<std::uint8_t>(code))
                                : bits_float(code);
}

/// Code of a state's value y, already scaled, rounded to nearest.
OCTET_HD inline std::uint32_t nearest_code(StateFormat format, float y) {
  switch (format) {
    case StateFormat::f32: return float_bits(y);
    case StateFormat::bf16:
      // BF16 has no scale to keep the largest FP32 values off its infinity.
      return encode_bf16(clamped(y, Element<DType::bf16>::kMax));
    case StateFormat::f16: return encode_f16(y);
    case StateFormat::split: return encode_split(y);
    default: return encode_e4m3(y);
  }
}

/// Code of a state's value y, already scaled, rounded with a random field of `Bits` bits.
template <int Bits>
OCTET_HD std::uint32_t stochastic_code(StateFormat format, float y, std::uint32_t field) {
  switch (format) {
    case StateFormat::f32: return float_bits(y);
    case StateFormat::bf16: return encode_bf16_stochastic<Bits>(y, field);
    case StateFormat::f16: return encode_f16_stochastic<Bits>(y, field);
    case StateFormat::split:  // masters only
      return encode_split_stochastic<kRandomBitsMaster>(y, field);
    default: return encode_e4m3_stochastic<Bits>(y, field);
  }
}

template <int Bits>
OCTET_HD std::uint32_t state_code(StateFormat format, bool stochastic, float y,
                                  std::uint32_t field) {
  return stochastic ? stochastic_code<Bits>(format, y, field) : nearest_code(format, y);
}

/// Value of the stored master with this code.
OCTET_HD inline float stored_master(const StateFormats& f, const AdamwTensorStep& s,
                                    std::uint32_t master) {
  return decode_state(f.master, master) * s.master_scale_inv;
}

/// Code of the compute weight for the stored master; `scale` is that of the tensor or of the block.
OCTET_HD inline std::uint32_t weight_code(const StateFormats& f, const AdamwTensorStep& s,
                                          std::uint32_t master, float scale) {
  if (f.master == StateFormat::split) return weight_of_split(static_cast<std::uint16_t>(master));
  const float stored = stored_master(f, s, master);
  return f.weight == WeightFormat::bf16 ? encode_bf16(stored) : encode_e4m3(stored * scale);
}

/// The scale of the weights of a block whose largest master has this code (block_quantize's).
OCTET_HD inline float weight_block_scale(const StateFormats& f, const AdamwTensorStep& s,
                                         std::uint32_t largest) {
  return block_scale(stored_master(f, s, largest), E4M3Format::kMax);
}

/// The scale of a block from the largest magnitude in it: `scale` to encode, `inv` to decode, both
/// normal for every amax.
struct BlockScale {
  float scale, inv;
};

/// The largest scale with scale * amax <= the largest code, from a quotient rounded to nearest: so
/// no code can pass the largest.
OCTET_HD inline float rounded_down(float quotient, float amax) {
  const bool is_above = fma_of(-quotient, amax, E4M3Format::kMax) < 0.0f;
  return bits_float(float_bits(quotient) - (is_above ? 1u : 0u));
}

OCTET_HD inline BlockScale block_scale(float amax) {
  constexpr float kSmallest = E4M3Format::kMax * 0x1p-126f;
  const float a = amax > kSmallest ? amax : kSmallest;
  return {rounded_down(E4M3Format::kMax / a, a), a / E4M3Format::kMax};
}

/// One element as its codes decode, before any scale.
struct AdamwInput {
  float gradient, master, m, v;
};

/// One element after the step, before it is rounded. `second` is v, or the root of v where that is
/// what is stored.
struct AdamwValues {
  float master, m, second;
};

/// The update. m_inv and v_inv are those of the tensor or of the element's block.
template <class Math>
OCTET_HD inline AdamwValues updated(const AdamwTensorStep& s, const StateFormats& f,
                                    const AdamwInput& in, float m_inv, float v_inv, Math& math) {
  const AdamwGroupScalars& group = s.group;
  const float g = effective_gradient(group, in.gradient * s.gradient_inv, in.master * s.master_inv);
  const float m = next_m(group, in.m, m_inv, g);
  const bool is_root = f.v == StateFormat::sqrt_e4m3_block;
  const float v =
      is_root ? next_v(group, in.v * in.v, v_inv * v_inv, g) : next_v(group, in.v, v_inv, g);
  const float root = math.root(v);
  const float denominator = fma_of(root, group.root_factor, group.root_eps);
  const float ratio = clamped(math.quotient(m, denominator), group.bound);
  const float w = next_weight(group, in.master, s.master_inv, ratio);
  return {w, m, is_root ? root : v};
}

/// What a state of positive value is stored as at least: m / (sqrt(0) + eps) would explode.
OCTET_HD inline std::uint32_t lifted(std::uint32_t code, float second) {
  return larger(code, second > 0.0f ? 1u : 0u);
}

/// One element as it is stored, a code each. FP32 values are their bits.
struct AdamwCodes {
  std::uint32_t master = 0, m = 0, v = 0, weight = 0;
};

OCTET_HD constexpr bool has_weight(const StateFormats& f) {
  return f.weight != WeightFormat::none && f.weight != WeightFormat::f32;
}
/// Whether an element of the weight can be written as soon as its master is known.
OCTET_HD constexpr bool has_weight_of_element(const StateFormats& f) {
  return has_weight(f) && !has_block_scales(f.weight);
}

/// The codes of a step's values. m_scale and v_scale are those of the tensor or of the block. The
/// compute weight is the nearest code to the stored master, so that it is a function of the state.
OCTET_HD inline AdamwCodes encoded(const AdamwTensorStep& s, const StateFormats& f, bool stochastic,
                                   const AdamwValues& values, float m_scale, float v_scale,
                                   std::uint32_t word) {
  AdamwCodes c;
  c.m = state_code<kRandomBitsM>(f.m, stochastic, values.m * m_scale, random_field_m(word));
  c.v = lifted(
      state_code<kRandomBitsV>(f.v, stochastic, values.second * v_scale, random_field_v(word)),
      values.second);
  c.master = state_code<kRandomBitsMaster>(f.master, stochastic, values.master * s.master_scale,
                                           random_field_master(word));
  if (has_weight_of_element(f)) c.weight = weight_code(f, s, c.master, s.weight_scale);
  return c;
}

/// A code without its sign; a split one has 16 bits.
OCTET_HD constexpr std::uint32_t magnitude_code(StateFormat format, std::uint32_t code) {
  switch (format) {
    case StateFormat::f32: return code & 0x7FFFFFFFu;
    case StateFormat::bf16:
    case StateFormat::f16:
    case StateFormat::split: return code & 0x7FFFu;
    default: return code & 0x7Fu;
  }
}

/// The largest of what was stored: codes without their signs, which are ordered like the magnitudes
/// they stand for, so one decoding at the end is enough; of block formats the largest `inv`.
struct AdamwAmax {
  std::uint32_t m = 0, v = 0, master = 0;

  OCTET_HD void raise(const StateFormats& f, const AdamwCodes& c) {
    if (!is_block(f.m)) m = larger(m, magnitude_code(f.m, c.m));
    if (!is_block(f.v)) v = larger(v, magnitude_code(f.v, c.v));
    master = larger(master, magnitude_code(f.master, c.master));
  }
};

// A of numerics section 3 as bits, from the largest codes. Of a block format it is what the largest
// code would stand for with the largest scale.
OCTET_HD inline std::uint32_t amax_of_state(StateFormat format, std::uint32_t largest,
                                            float scale_inv) {
  if (!is_block(format)) return magnitude_bits(decode_state(format, largest) * scale_inv);
  const float top = E4M3Format::kMax * bits_float(largest);
  return magnitude_bits(format == StateFormat::sqrt_e4m3_block ? top * top : top);
}
OCTET_HD inline std::uint32_t amax_of_m(const StateFormats& f, const AdamwTensorStep& s,
                                        const AdamwAmax& largest) {
  return amax_of_state(f.m, largest.m, s.m_scale_inv);
}
OCTET_HD inline std::uint32_t amax_of_v(const StateFormats& f, const AdamwTensorStep& s,
                                        const AdamwAmax& largest) {
  return amax_of_state(f.v, largest.v, s.v_scale_inv);
}
OCTET_HD inline std::uint32_t amax_of_master(const StateFormats& f, const AdamwTensorStep& s,
                                             const AdamwAmax& largest) {
  return amax_of_state(f.master, largest.master, s.master_scale_inv);
}
/// The weight of the largest master is the largest weight, also where blocks have scales of their
/// own: powers of two change no mantissa. Without one of its own it is the master.
OCTET_HD inline std::uint32_t amax_of_weight(const StateFormats& f, const AdamwTensorStep& s,
                                             const AdamwAmax& largest) {
  if (!has_weight(f)) return amax_of_master(f, s, largest);
  const bool of_block = has_block_scales(f.weight);
  const float scale = of_block ? weight_block_scale(f, s, largest.master) : s.weight_scale;
  const float scale_inv = of_block ? inverse_of_power_of_two(scale) : s.weight_scale_inv;
  const std::uint32_t code = weight_code(f, s, largest.master, scale);
  return magnitude_bits(is_e4m3(f.weight) ? decode_e4m3(static_cast<std::uint8_t>(code)) * scale_inv
                                          : decode_bf16(static_cast<std::uint16_t>(code)));
}

/// One code read from or written to untyped memory.
OCTET_HD inline std::uint32_t load_code(const void* data, std::size_t bytes, std::int64_t i) {
  switch (bytes) {
    case 1: return static_cast<const std::uint8_t*>(data)[i];
    case 2: return static_cast<const std::uint16_t*>(data)[i];
    default: return float_bits(static_cast<const float*>(data)[i]);
  }
}
OCTET_HD inline void store_code(void* data, std::size_t bytes, std::int64_t i, std::uint32_t code) {
  switch (bytes) {
    case 1: static_cast<std::uint8_t*>(data)[i] = static_cast<std::uint8_t>(code); return;
    case 2: static_cast<std::uint16_t*>(data)[i] = static_cast<std::uint16_t>(code); return;
    default: static_cast<float*>(data)[i] = bits_float(code);
  }
}

/// First element of a segment in each of a tensor's buffers.
struct AdamwOffsets {
  std::int64_t gradient, master, state, weight;
};

OCTET_HD inline AdamwOffsets offsets_of(const AdamwTensor& tensor, const Segment& segment) {
  return {tensor.gradient_is_shard ? segment.local : segment.begin,
          tensor.master_is_shard ? segment.local : segment.begin, segment.local,
          tensor.weight_is_shard ? segment.local : segment.begin};
}

/// Decoded gradient of an element, counted from the start of the gradient.
OCTET_HD inline float gradient_at(const AdamwTensor& tensor, float gradient_inv, std::int64_t at) {
  return load_element(tensor.gradient, tensor.gradient_dtype, at) * gradient_inv;
}

/// Element i of the stored gradient, counted from the segment's first, before any scale.
OCTET_HD inline float load_gradient(const AdamwTensor& tensor, const AdamwOffsets& at,
                                    std::int64_t i) {
  const DType g = tensor.gradient_dtype;
  return decode_gradient(g, load_code(tensor.gradient, size_of(g), at.gradient + i));
}

/// The states of element i beside its gradient.
OCTET_HD inline AdamwInput load_input(const AdamwTensor& tensor, const AdamwOffsets& at,
                                      std::int64_t i, float gradient) {
  const StateFormats& f = tensor.formats;
  std::uint32_t master = load_code(tensor.master, size_of(f.master), at.master + i);
  if (f.master == StateFormat::split) {
    master = join_split(static_cast<const std::uint8_t*>(tensor.weight)[at.weight + i],
                        static_cast<std::uint8_t>(master));
  }
  return {gradient, decode_state(f.master, master),
          decode_state(f.m, load_code(tensor.m, size_of(f.m), at.state + i)),
          decode_state(f.v, load_code(tensor.v, size_of(f.v), at.state + i))};
}

/// Element i of the weight as it is stored: counted in the tensor where that is transposed too.
OCTET_HD inline void store_weight(const AdamwTensor& tensor, std::int64_t i, std::uint32_t code) {
  store_code(tensor.weight, size_of(dtype_of(tensor.formats.weight)), i, code);
  if (!is_transposed(tensor.formats.weight)) return;
  const std::int64_t row = i / tensor.columns, column = i % tensor.columns;
  store_code(tensor.weight_transposed, 1, column * tensor.rows + row, code);
}

OCTET_HD inline void store_codes(const AdamwTensor& tensor, const AdamwOffsets& at, std::int64_t i,
                                 const AdamwCodes& c) {
  const StateFormats& f = tensor.formats;
  store_code(tensor.m, size_of(f.m), at.state + i, c.m);
  store_code(tensor.v, size_of(f.v), at.state + i, c.v);
  store_code(tensor.master, size_of(f.master), at.master + i, c.master);  // of split the low byte
  if (has_weight_of_element(f)) store_weight(tensor, at.weight + i, c.weight);
}

}  // namespace octet::detail
