// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "octet/core/block_scales.hpp"
#include "octet/runtime/context.hpp"

namespace octet {

/// Where the scale of a cast comes from.
enum class Scaling : std::uint8_t {
  current,  ///< the input's own amax, measured first
  given     ///< the scale as it stands, as delayed scaling has it
};

/// Elements that a cast could not keep, in device memory. Casts add to them; nobody takes them
/// down.
struct CastCounters {
  std::uint64_t saturated = 0;  ///< magnitudes, infinity included, above the largest code
  std::uint64_t flushed = 0;    ///< values other than zero that became zero
};

struct QuantizeArgs {
  /// f32, bf16 or f16; rank 2 [R, C] where `transposed` is asked for, else any shape.
  TensorView in = {};
  /// e4m3 or e5m2 with the shape of `in`, and its scale. `out.data.data` may be null when only the
  /// transposed copy is wanted; dtype and scale are used all the same.
  ScaledView out = {};
  /// Optional copy [C, R rounded up to a multiple of 16] of the same dtype and scale; the padding
  /// is zero, so a GEMM may contract over it.
  TensorView transposed = {};
  /// Optional word on the context's device, set to 1 when `in` holds a NaN or an infinity.
  std::uint32_t* nonfinite = nullptr;
  Scaling scaling = Scaling::current;
  /// Optional, on the context's device.
  CastCounters* counters = nullptr;
  /// Optional, on the context's device: becomes the scale that this cast took and its inverse, with
  /// amax 0, for who decodes the result when others may have changed the scale.
  TensorScale* scale_copy = nullptr;
  /// Optional sums of the columns of a matrix `in` [R, C], beside an output, for the gradient of a
  /// bias: f32 [R / 128 rounded up, C], each of 128 rows, which sum_columns() adds up. Of 128 rows
  /// lane l of 32 adds rows l, l + 32, ... one after the other, then a binary tree over the lanes,
  /// in FP32.
  TensorView column_sums = {};
};

/// Casts a tensor to FP8: stored = saturate(value * scale), round to nearest even. NaN stays NaN,
/// infinity saturates; either raises the flag.
/// With current scaling, amax first, then scale = 2^(exponent of maximum / amax). Writes scale,
/// scale_inv and amax (of the input). amax 0 gives scale 1; one that is not finite keeps the scale.
/// With a given scale that is used as it is, and its amax raised to the input's, so that several
/// casts with one scale record the largest; whoever sets the scale takes amax down.
/// On CUDA one pass over the input with a given scale, and with current scaling where it fits in
/// the registers and the shared memory of the device (33 MB on an H100). Up to twice as much, only
/// what does not fit is read twice; beyond that all of it. That one pass is a cooperative launch:
/// it starts when all multiprocessors are free, so beside another stream's long kernels (a
/// collective of NCCL's, say) it would wait for their end; with Context::set_shares_device() the
/// input is read twice instead.
///
/// Stream-ordered, no synchronisation. Deterministic, equal bits on CPU and CUDA.
///
/// Throws octet::Error for dtypes, shapes or devices that do not fit, and where outputs overlap the
/// input or one another.
///
/// Source: "FP8 Formats for Deep Learning" (arXiv 2209.05433); power-of-two scales as in MS-AMP.
void quantize(const Context& ctx, const QuantizeArgs& args);

/// out = in * scale_inv, rounded to out's dtype (f32, bf16 or f16). `in` may be any dtype; a null
/// scale counts as 1, so this also converts between the unscaled types. In place where both have
/// elements of one size; else an output that overlaps the input is refused.
/// Stream-ordered. Deterministic, equal bits on CPU and CUDA.
void convert(const Context& ctx, const ScaledView& in, const TensorView& out);

/// Transposes an FP8 matrix [R, C] into [C, R rounded up to a multiple of 16] with zero padding:
/// the copy of a weight that an input-gradient GEMM needs where both operands must be contiguous
/// along the contraction (Hopper). Stream-ordered. Exact.
void transpose(const Context& ctx, const TensorView& in, const TensorView& out);

/// Adds up the rows of QuantizeArgs::column_sums [P, C] into out [C] (f32, bf16 or f16): one after
/// the other in double, then rounded. Stream-ordered. Deterministic, equal bits on CPU and CUDA.
void sum_columns(const Context& ctx, const TensorView& sums, const TensorView& out);

/// amax of a tensor (f32, bf16, f16) into scale->amax as measured before the cast, leaving scale
/// and scale_inv alone. NaN and infinity stay visible in it. Stream-ordered, deterministic.
void measure_amax(const Context& ctx, const TensorView& in, TensorScale* scale);

/// Rows of QuantizeArgs::column_sums for an input of `rows` rows.
constexpr std::int64_t column_sum_rows(std::int64_t rows) { return (rows + 127) / 128; }

}  // namespace octet
