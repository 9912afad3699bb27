// SPDX-License-Identifier: Apache-2.0
// The sum of gradients of micro-batches, element by element.
#pragma once

#include "octet/core/detail/scaling_math.hpp"

namespace octet::detail {

/// A stored value decoded, plus what comes, in FP32; scale_inv is 1 where nothing is scaled. One
/// bit pattern for NaN, because processors differ in the one that arithmetic gives.
OCTET_HD inline float accumulated(float stored, float scale_inv, float in) {
  return unscaled(stored * scale_inv + in, 1.0f);
}

/// What the amax of the sums starts from in E4M3: infinities saturate there, so an amax that was
/// not finite stays, and with it the tensor that it names.
OCTET_HD inline float kept_amax(float old) {
  return is_finite_bits(magnitude_bits(old)) ? 0.0f : old;
}

/// Calls f(Element<sum>{}) for the sums that are not FP8.
template <class F>
void for_wide_sum(DType dtype, F&& f) {
  if (dtype == DType::bf16) return f(Element<DType::bf16>{});
  f(Element<DType::f32>{});
}

}  // namespace octet::detail
