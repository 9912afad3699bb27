// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "octet/gemm/gemm.hpp"

namespace octet::detail {

/// Throws octet::Error for a problem that nobody could run: sizes, strides and fields that
/// contradict one another.
void check_problem(const GemmProblem& problem);
/// Throws octet::Error for pointers that are missing, given for nothing, not aligned, or written
/// where something else is read.
void check_args(const GemmProblem& problem, const GemmArgs& args);

}  // namespace octet::detail
