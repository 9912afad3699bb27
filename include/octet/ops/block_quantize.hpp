// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "octet/core/block_scales.hpp"
#include "octet/ops/quantize.hpp"

namespace octet {

struct BlockQuantizeArgs {
  /// f32, bf16 or f16, [R, C].
  TensorView in = {};
  /// e4m3 or e5m2, row_block, tile or mx. Its data are [R, C], or [padded_rows(R), C], of which the
  /// further rows become zero, as do their scales. May be empty where only the transposed copy is
  /// wanted.
  BlockScaledView out = {};
  /// Optional copy [C, padded_rows(R)] of the same dtype and granularity, with scales of its own:
  /// its blocks run along R, so except for tiles its numbers are others than those of `out`. The
  /// padding is zero and moves no scale.
  BlockScaledView transposed = {};
  /// Optional word on the context's device, set to 1 when `in` holds a NaN or an infinity.
  std::uint32_t* nonfinite = nullptr;
  /// Optional, on the context's device: raised to the largest magnitude of `in`, so that several
  /// casts record the largest; the caller takes it down. A maximum over bits: NaN and infinity stay
  /// in it.
  float* amax = nullptr;
  /// Optional, on the context's device; counts the casts into `out`, into `transposed` where that
  /// is all.
  CastCounters* counters = nullptr;
  /// As QuantizeArgs::column_sums.
  TensorView column_sums = {};
};

/// Casts a matrix to FP8 with a scale for every block that follows from the block's own amax: one
/// pass over the input. stored = saturate(value / scale), round to nearest even.
/// row_block, tile: scale = 1 / 2^(exponent of maximum / amax), a power of two as in quantize(); 1
/// where amax is 0 or not finite. NaN stays NaN, infinity saturates, either raises the flag.
/// mx: E8M0 byte = exponent of amax * fp32(1 / maximum), rounded up when any bit of the mantissa is
/// set; a product of at most 2^-127, which byte 0 stands for, gives byte 0; amax 0 gives byte 0,
/// infinity 254, NaN 255, with which every element of the block is stored as NaN.
/// Stream-ordered, no synchronisation. Deterministic, equal bits on CPU and CUDA.
/// Throws octet::Error for dtypes, shapes, granularities or devices that do not fit, scales that
/// are not aligned, and outputs that overlap the input or one another.
/// Sources: DeepSeek-V3 (arXiv 2412.19437) for 1x128 and 128x128; OCP Microscaling Formats v1.0
/// with the rounding of "Recipes for Pre-training LLMs with MXFP8" (arXiv 2506.08027).
void block_quantize(const Context& ctx, const BlockQuantizeArgs& args);

/// out (f32, bf16 or f16, of the shape of the data) = stored * scale, rounded once. row_block, tile
/// or mx. Stream-ordered. Deterministic, equal bits on CPU and CUDA.
void block_dequantize(const Context& ctx, const BlockScaledView& in, const TensorView& out);

/// Scales of an FP8 matrix that has one for the whole tensor, as scales of blocks that all are that
/// one: lets a tensor-scaled weight into a product with blocks, exactly. Reads scale_inv alone,
/// which for mx must be a power of two, as all scales of the library are. Of `out` the shape of the
/// data counts, their pointer may be null; its granularity is row_block, tile or mx.
/// Stream-ordered. Deterministic, equal bits on CPU and CUDA.
void broadcast_scale(const Context& ctx, const TensorScale* scale, const BlockScaledView& out);

/// Transposes an FP8 matrix [R, C] with scales of tiles into `out`, [C, R rounded up to a multiple
/// of 16] and of tiles too: codes and scales, with zeros as padding. Stream-ordered. Exact.
void transpose_tiles(const Context& ctx, const BlockScaledView& in, const BlockScaledView& out);

/// mx scales from compact to gemm_ready; the padding becomes zero. rows and columns are those of
/// the matrix. Stream-ordered. Exact.
void make_gemm_ready(const Context& ctx, const void* compact, std::int64_t rows,
                     std::int64_t columns, void* gemm_ready);

}  // namespace octet
