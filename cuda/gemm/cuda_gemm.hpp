// SPDX-License-Identifier: Apache-2.0
// Entries of the CUDA table of backend.hpp that belong to GEMMs.
#pragma once

#include "octet/gemm/detail/operand.hpp"

namespace octet::detail::cuda {

void epilogue(const Context& ctx, const GemmProblem& problem, const float* sums,
              const GemmArgs& args);

/// As the CPU's.
void operand_to_bf16(const Context& ctx, const GemmOperand& operand, void* out);

}  // namespace octet::detail::cuda
