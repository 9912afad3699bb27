// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "octet/core/detail/block_scaling.hpp"
#include "octet/ops/block_mean.hpp"
#include "octet/ops/detail/mean_math.hpp"

namespace octet::detail {

constexpr std::int64_t kMeanBlock = 128;

OCTET_HD inline std::int64_t blocks_of(const BlockMeanPiece& piece) {
  return (piece.columns + kMeanBlock - 1) / kMeanBlock;
}

/// The codes of rank r from the first of a piece on.
OCTET_HD inline const std::uint8_t* codes_of(const BlockMeanArgs& args, const BlockMeanPiece& piece,
                                             int r) {
  if (r == args.rank) return static_cast<const std::uint8_t*>(piece.own);
  return static_cast<const std::uint8_t*>(args.staging) + r * args.stride + piece.staged;
}

/// Rank r's scale_inv of a block of a piece, counted row by row.
OCTET_HD inline float block_scale_inv_of(const BlockMeanArgs& args, const BlockMeanPiece& piece,
                                         int r, std::int64_t block) {
  const float* scales =
      r == args.rank ? args.own_scales : args.staged_scales + r * args.scale_stride;
  return scales[piece.packed + block];
}

/// The scale of a block of means with this amax.
OCTET_HD inline TensorScale block_mean_scale(std::uint32_t amax_bits) {
  TensorScale scale;
  scale.amax = bits_float(amax_bits);
  scale.scale = block_scale(scale.amax, max_of(DType::e4m3));
  scale.scale_inv = inverse_of_power_of_two(scale.scale);
  return scale;
}

/// What tensor i of [count] becomes, or with i = count the flag alone, from all ranks' words.
/// Returns whether they ask for the flag.
OCTET_HD inline bool merge_amax(const std::uint32_t* gathered, int ranks, std::int64_t count,
                                std::int64_t i, TensorScale* scales) {
  std::uint32_t largest = 0;
  for (int r = 0; r < ranks; ++r) {
    const std::uint32_t word = gathered[r * (count + 1) + i];
    largest = word > largest ? word : largest;
  }
  if (i == count) return largest != 0;
  scales[i] = TensorScale{1.0f, 1.0f, bits_float(largest), 0.0f};
  return !is_finite_bits(largest);
}

}  // namespace octet::detail
