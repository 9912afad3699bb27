// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "octet/gemm/gemm.hpp"

namespace octet {

/// The end of a product as a pass of its own: for a backend that cannot do all of it, and for
/// k = 0. D = activation(sums (+ D) (+ bias)), with aux, d_scale and d_amax as GemmProblem and
/// GemmArgs have them; of these only the fields that concern D, bias and aux count.
/// `sums`: f32 [m, n] in device memory, rows without a gap; null counts as zeros. They must
/// be apart from D and aux, or be D itself: f32, rows without a gap, without accumulate.
/// In FP32, in that order, every operation rounded, then rounded once to D and to aux. A NaN is
/// always stored as the same NaN. Stream-ordered, no synchronisation. Deterministic, equal bits on
/// CPU and CUDA.
/// Throws octet::Error for fields that exclude each other, for null pointers, and for d_scale or
/// d_amax where D is not FP8.
void apply_epilogue(const Context& ctx, const GemmProblem& problem, const float* sums,
                    const GemmArgs& args);

}  // namespace octet
