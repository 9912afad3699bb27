// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "octet/core/tensor_view.hpp"
#include "octet/runtime/context.hpp"

namespace octet {

struct AccumulateArgs {
  /// f32, bf16 or f16.
  TensorView in = {};
  /// What `in` is added to, of the same shape: f32 or bf16 without a scale, or e4m3 with one.
  ScaledView sum = {};
  /// Optional word on the context's device, set to 1 when an e4m3 sum would hold a NaN or an
  /// infinity. Wider sums keep those themselves, for the cast that follows to find.
  std::uint32_t* nonfinite = nullptr;
};

/// sum = sum + in, each element decoded, added in FP32 and rounded once to the sum's dtype: the
/// gradients of micro-batches.
/// An e4m3 sum is cast with current scaling, as quantize() does it: amax, and with it the scale,
/// are those of the new FP32 sums, not of what is stored of them. A sum that is not finite keeps
/// the scale and raises the flag; an amax that was not finite before stays.
/// On CUDA one pass, and for e4m3 two with small kernels around them.
///
/// Stream-ordered, no synchronisation. Deterministic, equal bits on CPU and CUDA.
///
/// Throws octet::Error for dtypes, shapes or devices that do not fit, and where `in` and the sum
/// overlap.
void accumulate(const Context& ctx, const AccumulateArgs& args);

}  // namespace octet
