// SPDX-License-Identifier: Apache-2.0
// Operands of products as training has them: normally distributed, because the power that
// multipliers draw, and with it the clock, depends on the values.
#pragma once

#include <cstring>
#include <random>
#include <vector>

#include "octet/runtime/tensor.hpp"

namespace bench {

/// Standard normal values in a BF16 tensor, the same for the same seed. Waits for the stream.
inline void fill_normal(const octet::Context& ctx, const octet::TensorView& out, unsigned seed) {
  // A prime, so that no row repeats another.
  std::vector<std::uint16_t> block(262147);
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  for (std::uint16_t& x : block) {
    const float value = normal(random);
    std::uint32_t bits = 0;
    std::memcpy(&bits, &value, sizeof bits);
    x = static_cast<std::uint16_t>(bits >> 16);
  }
  const auto count = static_cast<std::size_t>(out.numel());
  for (std::size_t at = 0; at < count; at += block.size()) {
    octet::copy_bytes(ctx, out.as<std::uint16_t>() + at, block.data(),
                      2 * std::min(block.size(), count - at));
  }
  ctx.synchronize();
}

}  // namespace bench
