// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "octet/core/detail/scaling_math.hpp"
#include "octet/ops/sum_codes.hpp"

namespace octet::detail {

/// The smallest k with 2^k >= ranks.
OCTET_HD inline int headroom_bits(int ranks) {
  int bits = 0;
  while ((std::int64_t{1} << bits) < ranks) ++bits;
  return bits;
}

/// Exponent of the power of two in mu, at most the headroom.
OCTET_HD inline int mu_power(const AutoScaleState* state, int headroom) {
  if (state == nullptr) return 0;
  const int exponent = state->mu_exponent;
  const int power = (exponent >= 0 ? exponent : exponent - 999) / 1000;  // rounded down
  return power < headroom ? power : headroom;
}

/// The common scale of tensor i, and whether all amaxes are finite.
struct SumScale {
  TensorScale scale;
  bool finite = true;
};
OCTET_HD inline SumScale sum_scale(const SumArgs& args, std::int64_t i) {
  SumScale result;
  float smallest = 0.0f;
  for (int r = 0; r < args.ranks; ++r) {
    const TensorScale& own = args.gathered[r * args.tensor_count + i];
    const std::uint32_t amax = magnitude_bits(own.amax);
    if (!is_finite_bits(amax)) {
      result.finite = false;
    } else if (amax != 0 && (smallest == 0.0f || own.scale < smallest)) {
      smallest = own.scale;
    }
  }
  if (smallest == 0.0f) return result;
  const int headroom = headroom_bits(args.ranks);
  const float p = shifted_power_of_two(smallest, mu_power(args.auto_scale, headroom) - headroom);
  // The inverse of p * ranks must be normal too.
  const float largest = shifted_power_of_two(1.0f, 126 - headroom);
  const auto ranks = static_cast<float>(args.ranks);
  result.scale.scale = (p < largest ? p : largest) * ranks;
  result.scale.scale_inv = 1.0f / result.scale.scale;
  return result;
}

/// What this rank's codes of tensor i are multiplied by. p comes back exactly.
OCTET_HD inline float requantise_factor(const SumArgs& args, std::int64_t i) {
  const float p = args.scales[i].scale / static_cast<float>(args.ranks);
  return args.gathered[args.rank * args.tensor_count + i].scale_inv * p;
}

/// One hop of NCCL's ring. The exact sum of two codes fits in FP32; NCCL adds in half precision,
/// which gives the same code for every pair.
OCTET_HD inline std::uint8_t add_code(std::uint8_t a, std::uint8_t b) {
  return encode_e4m3(decode_e4m3(a) + decode_e4m3(b));
}

/// Bits of the magnitude that a code without its sign decodes to.
OCTET_HD inline std::uint32_t decoded_bits(std::uint32_t code, float scale_inv) {
  const float value = decode_e4m3(static_cast<std::uint8_t>(code)) * scale_inv;
  return code == 0x7Fu ? 0x7FC00000u : magnitude_bits(value);
}

/// Saturated values of a step that leave mu growing: 1 in so many.
constexpr std::uint64_t kValuesPerSaturated = 100000;

OCTET_HD inline void update_mu(AutoScaleState& state, int ranks) {
  if (state.values == 0) return;
  const bool halves = state.saturated * kValuesPerSaturated > state.values;
  const int limit = kMuExponentLimit;
  const int headroom = 1000 * headroom_bits(ranks);
  const int highest = headroom < limit ? headroom : limit;
  int next = state.mu_exponent + (halves ? -1000 : 1);
  next = next > highest ? highest : next < -limit ? -limit : next;
  state.mu_exponent = next;
  state.saturated = 0;
  state.values = 0;
}

}  // namespace octet::detail
