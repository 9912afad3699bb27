// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <memory>

#include "octet/gemm/gemm.hpp"

namespace octet {

/// A backend for what no FP8 unit takes: shapes, mixtures of scales, two E5M2 operands, devices
/// without FP8. FP8 operands become BF16 in the context's workspace, stored * scale in FP32 (exact
/// for scales that are powers of two), then rounded once; a transposed one stays so. Then `inner`
/// multiplies. Bias, activation and accumulate are its business where it takes the BF16 problem
/// with them; else it writes FP32 sums to the workspace and apply_epilogue() does the rest.
/// A BF16 product adds in FP32, so fast and promoted are the same here; exact is refused. The other
/// operand of a mixed product must be BF16. Deterministic where `inner` is; its ways to run a
/// problem are this backend's.
/// The verdict is with_conversion: workspace_bytes of the answer, the inner backend's included,
/// must be reserved before run(); converted_bytes are FP8 and scales read, BF16 written, and of
/// FP32 sums the writing and the reading.
/// `inner` may serve others beside it and must outlive it. Problems that come to the same BF16
/// product share the way that select() chose for that.
std::unique_ptr<GemmBackend> make_dequant_bf16_gemm(GemmBackend& inner);

/// What that backend answers with the reference backend inside on a CPU, cuBLASLt on CUDA. Pure.
GemmSupport query_dequant_bf16(const GemmProblem& problem, const GemmDevice& device);

}  // namespace octet
