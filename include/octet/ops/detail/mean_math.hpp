// SPDX-License-Identifier: Apache-2.0
// The mean over ranks (numerics section 5), element by element; the amax bound takes the same path
// as the elements, so monotone rounding makes it hold exactly.
#pragma once

#include <type_traits>

#include "octet/core/detail/scaling_math.hpp"
#include "octet/ops/reduce_mean.hpp"

namespace octet::detail {

/// The type contributions are summed in. The short mantissas of FP8 and BF16 leave FP32 enough room
/// for N equal values to add up exactly; f32 values need double for that.
template <DType D>
using MeanSum = std::conditional_t<D == DType::f32, double, float>;

/// What one rank's code adds to the sum, from its decoded value.
template <DType D>
OCTET_HD inline MeanSum<D> mean_term_of(float decoded, float scale_inv) {
  if constexpr (is_fp8(D)) {
    return decoded * scale_inv;
  } else {
    return static_cast<MeanSum<D>>(decoded);
  }
}
template <DType D>
OCTET_HD inline MeanSum<D> mean_term(typename Element<D>::Storage code, float scale_inv) {
  return mean_term_of<D>(Element<D>::decode(code), scale_inv);
}

/// A sum of nothing: any first term added to it is that term, zeros with their signs.
template <class Sum>
inline constexpr Sum kEmptySum = static_cast<Sum>(-0.0);

/// One bit pattern for NaN, because processors differ in the one that arithmetic gives.
OCTET_HD inline float with_one_nan(float mean) {
  return magnitude_bits(mean) > 0x7F800000u ? bits_float(0x7FC00000u) : mean;
}
/// The sum divided by the number of ranks, IEEE.
template <class Sum>
OCTET_HD inline float mean_of(Sum sum, int ranks) {
  return with_one_nan(static_cast<float>(sum / static_cast<Sum>(ranks)));
}
/// The same for a number of ranks whose inverse is exact.
template <class Sum>
OCTET_HD inline float mean_by_product(Sum sum, Sum inverse) {
  return with_one_nan(static_cast<float>(sum * inverse));
}
/// Whether 1 / ranks is exact.
OCTET_HD inline bool has_exact_inverse(int ranks) { return (ranks & (ranks - 1)) == 0; }

template <class Sum, class ScaleOf>
OCTET_HD inline float mean_bound_in(DType dtype, int ranks, const ScaleOf& scale_of) {
  Sum sum = static_cast<Sum>(stored_amax(scale_of(0), dtype));
  for (int r = 1; r < ranks; ++r) sum += static_cast<Sum>(stored_amax(scale_of(r), dtype));
  return mean_of(sum, ranks);
}

/// A: bounds every element of the mean. scale_of(r) is the tensor's scale on rank r.
template <class ScaleOf>
OCTET_HD inline float mean_bound(DType dtype, int ranks, const ScaleOf& scale_of) {
  return dtype == DType::f32 ? mean_bound_in<MeanSum<DType::f32>>(dtype, ranks, scale_of)
                             : mean_bound_in<float>(dtype, ranks, scale_of);
}
OCTET_HD inline float mean_bound(const MeanArgs& args, std::int64_t tensor) {
  return mean_bound(args.dtype, args.ranks,
                    [&](int r) { return args.scales[r * args.tensor_count + tensor]; });
}

/// The common scale that follows from A; 1 where the output needs none or A is not finite.
OCTET_HD inline TensorScale mean_scale(DType out_dtype, float bound) {
  TensorScale scale;
  if (is_fp8(out_dtype)) return rescaled(scale, bound, out_dtype);
  scale.amax = bound;
  return scale;
}

/// A mean as it is stored.
template <DType Out>
OCTET_HD inline typename Element<Out>::Storage mean_code(float mean, float scale) {
  if constexpr (is_fp8(Out)) {
    return Element<Out>::encode(mean * scale);
  } else {
    return Element<Out>::encode(mean);
  }
}

/// Where rank r's contribution to a piece lies.
template <class Storage>
OCTET_HD inline const Storage* contribution_of(const MeanArgs& args, const MeanPiece& piece,
                                               int r) {
  if (r == args.rank) return static_cast<const Storage*>(piece.own);
  const char* block = static_cast<const char*>(args.staging) + r * args.stride;
  return reinterpret_cast<const Storage*>(block + piece.staged);
}

/// scale_inv of rank r for a piece.
OCTET_HD inline float scale_inv_of(const MeanArgs& args, const MeanPiece& piece, int r) {
  return args.scales[r * args.tensor_count + piece.tensor].scale_inv;
}

/// The largest amax that any rank has for scale i, as unsigned integers so that NaN survives.
OCTET_HD inline float largest_amax(const TensorScale* gathered, int ranks, std::int64_t count,
                                   std::int64_t i) {
  std::uint32_t largest = 0;
  for (int r = 0; r < ranks; ++r) {
    const std::uint32_t bits = magnitude_bits(gathered[r * count + i].amax);
    largest = bits > largest ? bits : largest;
  }
  return bits_float(largest);
}

/// Calls f(Element<contributions>{}, Element<output>{}) for the pairs that reduce_mean knows.
template <class F>
void for_mean_dtypes(DType dtype, DType out_dtype, F&& f) {
  using F32 = Element<DType::f32>;
  using Bf16 = Element<DType::bf16>;
  using E4m3 = Element<DType::e4m3>;
  const bool wide = out_dtype == DType::f32;
  switch (dtype) {
    case DType::e4m3: wide ? f(E4m3{}, F32{}) : f(E4m3{}, E4m3{}); return;
    case DType::bf16: wide ? f(Bf16{}, F32{}) : f(Bf16{}, Bf16{}); return;
    default: f(F32{}, F32{}); return;
  }
}

}  // namespace octet::detail
