// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "octet/gemm/gemm.hpp"

namespace octet {

/// What the cuBLASLt backend answers when it is asked about a problem: the limits of the library,
/// known beforehand, each named with the value that breaks it. A pure function that needs no CUDA,
/// so a trainer can check its shapes on a machine without a GPU.
/// Sources: the cuBLAS manual's tables for FP8; what an H100 accepted.
GemmSupport query_cublaslt(const GemmProblem& problem, const GemmDevice& device);

}  // namespace octet
