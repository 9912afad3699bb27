// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "octet/core/detail/scaling_math.hpp"
#include "octet/ops/delayed_scaling.hpp"

namespace octet::detail {

/// Whether an amax goes into the history and makes a new scale.
OCTET_HD inline bool is_recorded(float amax) {
  return magnitude_bits(amax) != 0 && is_finite_bits(magnitude_bits(amax));
}

/// Records the amax in the place of the oldest; `others` is the largest of the history without
/// that.
OCTET_HD inline void record_amax(const DelayedTensor& t, const DelayedScalingConfig& config,
                                 float others) {
  const float amax = t.scale->amax;
  const bool newest_alone = config.amax_compute_algo == AmaxComputeAlgo::most_recent;
  const float a = newest_alone || amax > others ? amax : others;
  const float scale = shifted_power_of_two(power_of_two_scale(a, max_of(t.dtype)), -config.margin);
  t.scale->scale = scale;
  t.scale->scale_inv = inverse_of_power_of_two(scale);
  t.history[*t.next] = amax;
  *t.next = (*t.next + 1) % static_cast<std::uint32_t>(config.amax_history_len);
}

}  // namespace octet::detail
