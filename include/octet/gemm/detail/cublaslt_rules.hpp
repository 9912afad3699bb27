// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "octet/gemm/gemm.hpp"

namespace octet::detail {

/// How cuBLASLt is to run a problem.
struct CublasLtPlan {
  GemmSupport support;
  /// The library computes `product`, with D in f32, and apply_epilogue() does the rest.
  bool in_two_passes = false;
  GemmProblem product;
};

CublasLtPlan plan_cublaslt(const GemmProblem& problem, const GemmDevice& device);

}  // namespace octet::detail
