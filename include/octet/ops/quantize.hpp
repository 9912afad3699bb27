// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "octet/runtime/context.hpp"

namespace octet {

struct QuantizeArgs {
  /// f32, bf16 or f16; rank 2 [R, C] where `transposed` is asked for, else any shape.
  TensorView in = {};
  /// e4m3 or e5m2 with the shape of `in`, and its scale. `out.data.data` may be null when only the
  /// transposed copy is wanted; dtype and scale are used all the same.
  ScaledView out = {};
  /// Optional copy [C, R rounded up to a multiple of 16] of the same dtype and scale; the padding
  /// is zero, so a GEMM may contract over it.
  TensorView transposed = {};
  /// Optional device word, set to 1 when `in` holds a NaN or an infinity.
  std::uint32_t* nonfinite = nullptr;
};

/// Casts a tensor to FP8 with current scaling: amax, then scale = 2^(exponent of maximum / amax),
/// then stored = saturate(value * scale), round to nearest even. Writes scale, scale_inv and amax
/// (of the input). amax 0 gives scale 1. A non-finite amax keeps the scale and raises the flag;
/// NaN stays NaN in the output, infinity saturates.
/// Stream-ordered, no synchronisation. Deterministic, equal bits on CPU and CUDA.
/// Throws octet::Error for dtypes, shapes or devices that do not fit.
/// Source: "FP8 Formats for Deep Learning" (arXiv 2209.05433); power-of-two scales as in MS-AMP.
void quantize(const Context& ctx, const QuantizeArgs& args);

/// out = in * scale_inv, rounded to out's dtype (f32, bf16 or f16). `in` may be any dtype; a null
/// scale counts as 1, so this also converts between the unscaled types.
/// Stream-ordered. Deterministic, equal bits on CPU and CUDA.
void convert(const Context& ctx, const ScaledView& in, const TensorView& out);

/// Transposes an FP8 matrix [R, C] into [C, R rounded up to a multiple of 16] with zero padding:
/// the copy of a weight that an input-gradient GEMM needs where both operands must be contiguous
/// along the contraction (Hopper). Stream-ordered. Exact.
void transpose(const Context& ctx, const TensorView& in, const TensorView& out);

/// amax of a tensor (f32, bf16, f16) into scale->amax as measured before the cast, leaving scale
/// and scale_inv alone. NaN and infinity stay visible in it. Stream-ordered, deterministic.
void measure_amax(const Context& ctx, const TensorView& in, TensorScale* scale);

/// Rows of a transposed copy: `rows` rounded up to the multiple of 16 that FP8 GEMMs contract over.
constexpr std::int64_t padded_rows(std::int64_t rows) { return (rows + 15) / 16 * 16; }

}  // namespace octet
