// SPDX-License-Identifier: Apache-2.0
// Entries of the CPU table of backend.hpp that belong to GEMMs, and what they share with the
// reference backend.
#pragma once

#include <cstdint>

#include "octet/gemm/detail/operand.hpp"

namespace octet::detail::cpu {

void epilogue(const Context& ctx, const GemmProblem& problem, const float* sums,
              const GemmArgs& args);

/// An FP8 operand as BF16 in the order it is stored in, rows without a gap: stored * scale in FP32,
/// then rounded.
void operand_to_bf16(const Context& ctx, const GemmOperand& operand, void* out);

/// The epilogue of `count` elements of a row of D from `column` on; `sums` are theirs, null counts
/// as zeros. Returns the bits of the largest |value| before d_scale; 0 unless D is FP8.
/// For float and for double, which is rounded once, to D and to aux.
template <class T>
std::uint32_t finish_row(const GemmProblem& problem, const GemmArgs& args, const T* sums,
                         std::int64_t row, std::int64_t column, std::int64_t count);

/// Elements (row, begin), (row, begin + 1), ... of an operand that is not transposed, or
/// (begin, p), (begin + 1, p), ... of one that is, without their scales.
void decode_run(const GemmOperand& operand, std::int64_t line, std::int64_t begin,
                std::int64_t count, float* out);

/// The product in double, rounded once.
void exact_product(const GemmProblem& problem, const GemmArgs& args, int threads);

}  // namespace octet::detail::cpu
