// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "octet/ops/block_quantize.hpp"
#include "octet/ops/quantize.hpp"

namespace octet {

/// Makes the transposed copy of an FP8 weight from its codes, as the optimizer would write it:
/// `copy` is [C, R rounded up to a multiple of 16], with scales of its own where `weight` has those
/// of tiles. Stream-ordered; allocates nothing. Exact.
inline void make_transposed(const Context& ctx, const BlockScaledView& weight,
                            const BlockScaledView& copy) {
  if (weight.granularity == Granularity::tile) return transpose_tiles(ctx, weight, copy);
  transpose(ctx, weight.data, copy.data);
}

}  // namespace octet
