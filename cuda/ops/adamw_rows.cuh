// SPDX-License-Identifier: Apache-2.0
// Which tensor takes which row of kAdamwRows: prepare decides, the update goes by it.
#pragma once

#include <cstdint>
#include <utility>

#include "octet/ops/adamw_rows.hpp"

namespace octet::detail::cuda {

/// Gradient and formats of a tensor as one number.
constexpr std::uint32_t key_of(DType gradient, const StateFormats& f) {
  return static_cast<std::uint32_t>(gradient) | static_cast<std::uint32_t>(f.weight) << 4 |
         static_cast<std::uint32_t>(f.master) << 8 | static_cast<std::uint32_t>(f.m) << 12 |
         static_cast<std::uint32_t>(f.v) << 16;
}

/// Calls of<I>() for every row until one returns true.
template <class Of>
__device__ void find_row(const Of& of) {
  [&]<std::size_t... I>(std::index_sequence<I...>) { (void)(of.template operator()<I>() || ...); }
  (std::make_index_sequence<std::size(kAdamwRows)>{});
}

/// Whether the scales of a step are what the code of a row with these formats counts on.
__device__ inline bool are_scales_fit_for_row(const StateFormats& f, const AdamwTensorStep& s) {
  if (s.ordinary == 0) return false;
  if (f.master == StateFormat::f16 && has_tensor_scale(f.weight)) {
    // The weight comes from the master by a product in half precision.
    const float ratio = s.master_scale_inv * s.weight_scale;
    return ratio == 0x1p-7f || ratio == 0x1p-8f;
  }
  // decode_split wants master_inv times 2^120, and that times weight_factor.
  return f.master != StateFormat::split ||
         (s.master_inv <= 0x1p6f && fabsf(s.group.weight_factor) <= 2.0f);
}

/// The row of a tensor with this gradient in this step, counted from 1; 0 for the general code.
__device__ inline std::uint32_t row_of(const AdamwTensor& t, DType gradient,
                                       const AdamwTensorStep& s) {
  std::uint32_t row = 0;
  const std::uint32_t key = key_of(gradient, t.formats);
  find_row([&]<std::size_t I>() {
    constexpr std::uint32_t kKey = key_of(kAdamwRows[I].gradient, kAdamwRows[I].formats);
    if (key == kKey) row = I + 1;
    return key == kKey;
  });
  const bool fits = s.group.l2 == 0.0f && is_aligned_for_row(t) && is_shaped_for_row(t) &&
                    are_scales_fit_for_row(t.formats, s);
  return fits ? row : 0;
}

/// The same for a tensor that exchanges.
__device__ inline std::uint32_t row_of(const AdamwTensor& t, const AdamwExchange& x, bool sums,
                                       const AdamwTensorStep& s) {
  const DType gradient = sums ? x.dtype : t.gradient_dtype;
  const bool fits = is_fit_for_row(x) && is_exchanged(t.formats);
  return fits ? row_of(t, gradient, s) : 0;
}

}  // namespace octet::detail::cuda
