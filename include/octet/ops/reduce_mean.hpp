// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <vector>

#include "octet/runtime/context.hpp"

namespace octet {

/// What one rank contributes to the mean of a tensor, in device memory.
struct RankGradient {
  const void* data = nullptr;
  /// False: the whole tensor. True: the elements that this rank updates, one after the other.
  bool is_shard = false;
  bool is_remote = false;  ///< in a peer's memory, over a link
  bool operator==(const RankGradient&) const = default;
};

/// All ranks' contributions to the elements of a tensor whose mean this rank wants.
struct RankGradients {
  std::vector<RankGradient> ranks = {};  ///< in rank order
  DType dtype = DType::f32;              ///< e4m3, bf16 or f32
  /// In device memory: that of rank r is scales[r * scale_stride].
  const TensorScale* scales = nullptr;
  std::int64_t scale_stride = 0;
};

/// One contiguous piece of one tensor whose mean over the ranks this rank computes.
struct MeanPiece {
  std::int32_t tensor = 0;    ///< index into the scale arrays
  std::int64_t count = 0;     ///< elements
  const void* own = nullptr;  ///< this rank's contribution
  std::int64_t staged = 0;    ///< byte offset of the piece in each peer's block of the staging area
  void* out = nullptr;        ///< the mean; may be `own` where dtypes are equal
};

struct MeanArgs {
  const MeanPiece* pieces = nullptr;  ///< [piece_count], device memory
  std::int64_t piece_count = 0;
  int ranks = 1;
  int rank = 0;
  /// Contributions of the other ranks: block r begins at staging + r * stride. Block `rank` is not
  /// read.
  const void* staging = nullptr;
  std::int64_t stride = 0;
  DType dtype = DType::f32;      ///< of the contributions: e4m3, bf16 or f32
  DType out_dtype = DType::f32;  ///< f32, or `dtype`
  /// Scales of every rank and tensor, [ranks][tensor_count], and the common scales of the mean.
  const TensorScale* scales = nullptr;
  TensorScale* mean_scales = nullptr;
  std::int64_t tensor_count = 0;
  std::uint32_t* nonfinite = nullptr;  ///< device word, set to 1 if any rank's amax is not finite
};

/// Common scales of the means: A = (sum of the ranks' stored amax in rank order) / ranks bounds
/// every element of the mean, because the elements are added by the same rounding operations; so
/// the scale that follows from A needs no headroom and cannot saturate. Writes scale, scale_inv and
/// amax = A to mean_scales; scale 1 where out_dtype needs none or A is not finite. A NaN or
/// infinity on any rank, or a sum that overflows, raises the flag. Stream-ordered, deterministic,
/// equal bits on CPU and CUDA.
void mean_scales(const Context& ctx, const MeanArgs& args);

/// out = (sum over ranks of code * scale_inv, in rank order) / ranks, rounded once. FP8 and BF16
/// are summed in FP32, f32 in double, so that equal contributions give exactly themselves for any
/// number of ranks. Reads mean_scales. Stream-ordered, deterministic, equal bits on CPU and CUDA.
void reduce_mean(const Context& ctx, const MeanArgs& args);

/// out[i].amax = the largest of gathered[r * count + i].amax over the ranks, compared as unsigned
/// integers so that NaN survives; scale and scale_inv stay. Stream-ordered, deterministic.
void max_amax(const Context& ctx, const TensorScale* gathered, int ranks, std::int64_t count,
              TensorScale* out);

}  // namespace octet
