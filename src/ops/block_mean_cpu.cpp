// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <array>

#include "octet/ops/detail/block_mean_math.hpp"
#include "ops/cpu_ops.hpp"

namespace octet::detail::cpu {
namespace {

using Means = std::array<float, static_cast<std::size_t>(kMeanBlock)>;

/// The means of one block of at most 128; returns the bits of their largest magnitude.
std::uint32_t sum_block(const BlockMeanArgs& args, const BlockMeanPiece& piece, std::int64_t block,
                        std::int64_t begin, std::size_t count, Means& means) {
  for (int r = 0; r < args.ranks; ++r) {
    const std::uint8_t* codes = codes_of(args, piece, r) + begin;
    const float inv = block_scale_inv_of(args, piece, r, block);
    for (std::size_t i = 0; i < count; ++i) {
      const float term = mean_term<DType::e4m3>(codes[i], inv);
      means[i] = r == 0 ? term : means[i] + term;
    }
  }
  std::uint32_t amax = 0;
  for (std::size_t i = 0; i < count; ++i) {
    means[i] = mean_of(means[i], args.ranks);
    amax = std::max(amax, magnitude_bits(means[i]));
  }
  return amax;
}

/// One block from codes to output; returns the bits of the largest magnitude as it is stored.
std::uint32_t reduce_block(const BlockMeanArgs& args, const BlockMeanPiece& piece,
                           std::int64_t block) {
  const std::int64_t across = blocks_of(piece);
  const std::int64_t column = block % across * kMeanBlock;
  const std::int64_t begin = block / across * piece.columns + column;
  const auto count = static_cast<std::size_t>(std::min(kMeanBlock, piece.columns - column));
  Means means;
  const std::uint32_t amax = sum_block(args, piece, block, begin, count, means);
  if (args.out_dtype == DType::f32) {
    std::copy_n(means.begin(), count, static_cast<float*>(piece.out) + begin);
    return amax;
  }
  const TensorScale scale = block_mean_scale(amax);
  auto* out = static_cast<std::uint8_t*>(piece.out) + begin;
  for (std::size_t i = 0; i < count; ++i) out[i] = mean_code<DType::e4m3>(means[i], scale.scale);
  args.own_scales[piece.packed + block] = scale.scale_inv;
  return magnitude_bits(stored_amax(scale, DType::e4m3));
}

template <class Copy>
void for_scales(const BlockScalePiece* pieces, std::int64_t count, const Copy& copy) {
  for (std::int64_t p = 0; p < count; ++p) {
    const BlockScalePiece& piece = pieces[p];
    for (std::int64_t r = 0; r < piece.rows; ++r) {
      for (std::int64_t b = 0; b < piece.blocks; ++b) {
        copy(piece.scales[b * piece.pitch + r], piece.packed + r * piece.blocks + b);
      }
    }
  }
}

}  // namespace

void pack_block_scales(const Context&, const BlockScalePiece* pieces, std::int64_t count,
                       float* packed) {
  for_scales(pieces, count, [&](const float& scale, std::int64_t i) { packed[i] = scale; });
}

void unpack_block_scales(const Context&, const BlockScalePiece* pieces, std::int64_t count,
                         const float* packed) {
  for_scales(pieces, count, [&](float& scale, std::int64_t i) { scale = packed[i]; });
}

void block_mean(const Context&, const BlockMeanArgs& args) {
  for (std::int64_t p = 0; p < args.piece_count; ++p) {
    const BlockMeanPiece& piece = args.pieces[p];
    const std::int64_t blocks = piece.rows * blocks_of(piece);
    std::uint32_t amax = 0;
#pragma omp parallel for reduction(max : amax) if (blocks > 256)
    for (std::int64_t b = 0; b < blocks; ++b) amax = std::max(amax, reduce_block(args, piece, b));
    args.amaxes[piece.tensor] = std::max(args.amaxes[piece.tensor], amax);
  }
}

void merge_amaxes(const Context&, const std::uint32_t* gathered, int ranks, std::int64_t count,
                  TensorScale* scales, std::uint32_t* nonfinite) {
  for (std::int64_t i = 0; i <= count; ++i) {
    if (merge_amax(gathered, ranks, count, i, scales)) *nonfinite = 1;
  }
}

}  // namespace octet::detail::cpu
