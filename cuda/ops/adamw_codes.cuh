// SPDX-License-Identifier: Apache-2.0
// A vector of eight elements through a step: loaded, updated, rounded, stored.
#pragma once

#include "cuda/ops/adamw_vector.cuh"
#include "cuda/ops/adamw_work.cuh"

namespace octet::detail::cuda {

/// Where the elements of a vector are: four from `first` on and four from first + gap on.
struct Place {
  int first, gap;
};

/// Whether the quads of a vector are taken from two places where the whole warp has vectors, so
/// that every access of a warp is to consecutive bytes: 8 FP32 values are two accesses. Of narrower
/// formats 8 consecutive elements are one.
constexpr bool takes_quads(const StateFormats& f) {
  return f.master == StateFormat::f32 || f.m == StateFormat::f32 || f.v == StateFormat::f32;
}

/// Codes of a vector from memory and to it, for a tensor with these formats.
template <StateFormats F, std::size_t Bytes>
__device__ void load_at(Packed<Bytes>& p, const char* from, Place place) {
  if constexpr (takes_quads(F)) {
    load_quad(p, 0, from, place.first);
    load_quad(p, 1, from, place.first + place.gap);
  } else {
    p = load_packed<Bytes>(from, place.first);
  }
}
template <StateFormats F, std::size_t Bytes>
__device__ void store_at(char* to, Place place, const Packed<Bytes>& p) {
  if constexpr (takes_quads(F)) {
    store_quad(to, place.first, p, 0);
    store_quad(to, place.first + place.gap, p, 1);
  } else {
    store_packed(to, place.first, p);
  }
}

/// Asks the second-level cache for a vector that will be loaded later: unlike a load it takes no
/// registers.
__device__ inline void prefetch(const char* data, int i, std::size_t bytes) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(data + std::int64_t{i} * bytes));
}

/// The codes of a vector.
template <AdamwRow R>
struct Codes {
  Packed<size_of(R.gradient)> gradient;
  Packed<size_of(R.formats.master)> master;
  Packed<size_of(R.formats.m)> m;
  Packed<size_of(R.formats.v)> v;
  Packed<size_of(dtype_of(R.formats.weight))> weight;

  __device__ void load_gradient(const Streams& from, Place place) {
    load_at<R.formats>(gradient, from.gradient, place);
  }
  __device__ void load_states(const Streams& from, Place place) {
    load_at<R.formats>(master, from.master, place);
    load_at<R.formats>(m, from.m, place);
    load_at<R.formats>(v, from.v, place);
    if constexpr (R.formats.master == StateFormat::split) {
      load_at<R.formats>(weight, from.weight, place);
    }
  }
  /// `far`: AdamwTensor::states_are_far. The weight is near.
  __device__ static void prefetch_states(const Streams& from, int i, bool far) {
    if constexpr (R.formats.master == StateFormat::split) prefetch(from.weight, i, 1);
    if (far) return;
    prefetch(from.master, i, size_of(R.formats.master));
    prefetch(from.m, i, size_of(R.formats.m));
    prefetch(from.v, i, size_of(R.formats.v));
    if constexpr (is_block(R.formats.m)) {
      const std::int64_t block = i / static_cast<int>(kStateBlock);
      asm volatile("prefetch.global.L2 [%0];" ::"l"(from.m_blocks + block));
      asm volatile("prefetch.global.L2 [%0];" ::"l"(from.v_blocks + block));
    }
  }
  __device__ void store(const Streams& to, Place place) const {
    store_at<R.formats>(to.master, place, master);
    store_at<R.formats>(to.m, place, m);
    store_at<R.formats>(to.v, place, v);
    if constexpr (has_weight_of_element(R.formats)) store_at<R.formats>(to.weight, place, weight);
  }
};

template <AdamwRow R, class Math>
__device__ void update_values(const AdamwTensorStep& s, const Codes<R>& codes, float m_inv,
                              float v_inv, AdamwValues (&values)[kVector], Math& math) {
  float gradient[kVector], master[kVector], m[kVector], v[kVector];
  decode<R.gradient>(codes.gradient, gradient);
  if constexpr (R.formats.master == StateFormat::split) {
    decode_split(codes.weight, codes.master, master);
  } else {
    decode<R.formats.master>(codes.master, master);
  }
  decode<R.formats.m>(codes.m, m);
  decode<R.formats.v>(codes.v, v);
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    values[i] = updated(s, R.formats, {gradient[i], master[i], m[i], v[i]}, m_inv, v_inv, math);
  }
}

/// Whether both moments are quantised, so that no small number is left over from long ago.
constexpr bool takes_fast_math(const StateFormats& f) {
  return f.m != StateFormat::f32 && f.v != StateFormat::f32;
}

/// Largest codes that a thread has stored, on top; of block formats the largest `inv`.
struct LargestOnTop {
  std::uint32_t m = 0, v = 0, master = 0, inv = 0;
};

/// Rounds the values of a step into codes; m_scale and v_scale are those of the tensor or the
/// block. `ratio` is what e4m3_weight wants.
template <AdamwRow R>
__device__ void encode(const AdamwTensorStep& s, const AdamwValues (&values)[kVector],
                       const RandomWords (&words)[kVector / 4], float m_scale, float v_scale,
                       __half2 ratio, Codes<R>& codes, LargestOnTop& largest) {
  constexpr StateFormats F = R.formats;
  std::uint32_t m[kVector], v[kVector], master[kVector];
#pragma unroll
  for (int k = 0; k < kVector; ++k) {
    const AdamwValues& x = values[k];
    const std::uint32_t word = words[k / 4].word[k % 4];
    m[k] = rounded<F.m>(fabsf(x.m), m_scale, noise_m<F.m>(word));
    v[k] = rounded<F.v>(x.second, v_scale, noise_v<F.v>(word));
    master[k] = rounded<F.master>(fabsf(x.master), s.master_scale, noise_master(word));
    if constexpr (F.v != StateFormat::f32) {
      // A positive v, which is no subnormal here, is at least the smallest code.
      v[k] = max(v[k], min(float_bits(x.second), 1u << top_of(F.v)));
    }
    largest.m = max(largest.m, m[k]);
    largest.v = max(largest.v, v[k]);
    largest.master = max(largest.master, master[k]);
    m[k] = with_sign<F.m>(m[k], x.m);
    master[k] = with_sign<F.master>(master[k], x.master);
  }
  codes.m = pack<top_of(F.m)>(m);
  codes.v = pack<top_of(F.v)>(v);
  if constexpr (F.master == StateFormat::split) {
    halve_split(pack<16>(master), codes.weight, codes.master);
  } else {
    codes.master = pack<top_of(F.master)>(master);
    if constexpr (F.weight == WeightFormat::bf16) codes.weight = bf16_weight(codes.master);
    if constexpr (has_tensor_scale(F.weight)) codes.weight = e4m3_weight(codes.master, ratio);
  }
}

/// Bits of the amaxes that follow from the largest codes of a thread or a warp.
struct AmaxBits {
  std::uint32_t weight, master, m, v;
};

__device__ inline AmaxBits amax_bits(const StateFormats& f, const AdamwTensorStep& s,
                                     const AdamwAmax& largest) {
  return {amax_of_weight(f, s, largest), amax_of_master(f, s, largest), amax_of_m(f, s, largest),
          amax_of_v(f, s, largest)};
}

/// The same with the conversions of vectors, which are shorter.
template <AdamwRow R>
__device__ AmaxBits amax_bits(const AdamwTensorStep& s, const AdamwAmax& largest) {
  constexpr StateFormats F = R.formats;
  const auto amax = [&]<StateFormat Format>(std::uint32_t code, float scale_inv) {
    if constexpr (is_block(Format) || Format == StateFormat::split) {
      return amax_of_state(Format, code, scale_inv);
    } else {
      float x[kVector];
      decode<Format>(Packed<size_of(Format)>{{code}}, x);
      return float_bits(x[0] * scale_inv);
    }
  };
  AmaxBits bits;
  bits.master = amax.template operator()<F.master>(largest.master, s.master_scale_inv);
  bits.m = amax.template operator()<F.m>(largest.m, s.m_scale_inv);
  bits.v = amax.template operator()<F.v>(largest.v, s.v_scale_inv);
  if constexpr (F.master == StateFormat::f16 && has_tensor_scale(F.weight)) {
    float x[kVector];
    decode_e4m3(e4m3_weight(Packed<2>{{largest.master}},
                            __float2half2_rn(s.master_scale_inv * s.weight_scale)),
                x);
    bits.weight = float_bits(x[0] * s.weight_scale_inv);
  } else {
    bits.weight = amax_of_weight(F, s, largest);
  }
  return bits;
}

}  // namespace octet::detail::cuda
