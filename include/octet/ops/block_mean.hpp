// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "octet/runtime/context.hpp"

namespace octet {

/// Whole rows of an e4m3 matrix with row_block scales, whose scales travel apart from the codes.
/// `packed` order: the scale of row r and block b of a row is packed + r * blocks + b.
struct BlockScalePiece {
  /// The scale of the first row's first block, in the matrix: of row r and block b it is
  /// scales[b * pitch + r].
  float* scales = nullptr;
  std::int64_t pitch = 0;
  std::int64_t rows = 0;
  std::int64_t blocks = 0;  ///< in a row
  std::int64_t packed = 0;  ///< index of the first
};

/// Copies the scales of `count` pieces (a table in device memory) between their matrices and
/// `packed`; padding is left alone. Stream-ordered. Exact.
void pack_block_scales(const Context& ctx, const BlockScalePiece* pieces, std::int64_t count,
                       float* packed);
void unpack_block_scales(const Context& ctx, const BlockScalePiece* pieces, std::int64_t count,
                         const float* packed);

/// Whole rows whose mean over the ranks this rank computes.
struct BlockMeanPiece {
  std::int32_t tensor = 0;  ///< index into `amaxes`
  std::int64_t rows = 0;    ///< fewer than 2^31 blocks
  std::int64_t columns = 0;
  const void* own = nullptr;  ///< this rank's codes
  std::int64_t staged = 0;    ///< byte offset of the piece in each peer's block of `staging`
  std::int64_t packed = 0;    ///< index of its first scale in each rank's packed scales
  void* out = nullptr;        ///< the mean; may be `own` where it is e4m3
};

struct BlockMeanArgs {
  const BlockMeanPiece* pieces = nullptr;  ///< [piece_count], device memory
  std::int64_t piece_count = 0;
  int ranks = 1;
  int rank = 0;
  /// Codes of the other ranks: block r begins at staging + r * stride bytes. Block `rank` is not
  /// read.
  const void* staging = nullptr;
  std::int64_t stride = 0;
  /// This rank's packed scales; where the output is e4m3 they become those of the means.
  float* own_scales = nullptr;
  /// Packed scales of the other ranks, as `staging`; the stride counts scales.
  const float* staged_scales = nullptr;
  std::int64_t scale_stride = 0;
  DType out_dtype = DType::f32;  ///< f32 or e4m3
  /// [tensors] device words, raised to the bits of the largest magnitude of the means as they are
  /// stored; NaN above infinity above all else.
  std::uint32_t* amaxes = nullptr;
};

/// mean = (sum over ranks of code * scale_inv, in FP32, in rank order) / ranks. e4m3: rounded once,
/// with a scale for every block of 128 from the exact amax of its means, as block_quantize() has
/// it. Stream-ordered, deterministic, equal bits on CPU and CUDA.
void block_mean(const Context& ctx, const BlockMeanArgs& args);

/// After an all-gather of [count] amax words and one flag word of every rank (in that order):
/// scales[i] = {1, 1, the largest amax of tensor i}; *nonfinite becomes 1 where any rank's flag is
/// raised or any amax is not finite. Stream-ordered, deterministic, equal bits on CPU and CUDA.
void merge_amaxes(const Context& ctx, const std::uint32_t* gathered, int ranks, std::int64_t count,
                  TensorScale* scales, std::uint32_t* nonfinite);

}  // namespace octet
