// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>

#include "octet/gemm/gemm.hpp"

namespace octet::detail {

/// A field that is none of its enumeration's values: such a problem must not be printed. Empty if
/// there is none.
std::string enumeration_refusal(const GemmProblem& problem);

/// Why no backend can serve a problem: that, fields that exclude each other, and leading dimensions
/// shorter than a row. Empty if there is no such reason. Names the field and the limit.
std::string problem_refusal(const GemmProblem& problem);

/// The part of it that concerns what happens to a sum: accumulate, bias, activation, aux, ldd.
std::string epilogue_refusal(const GemmProblem& problem);

}  // namespace octet::detail
