// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "octet/gemm/gemm.hpp"

namespace octet::detail {

/// Elements from one stored row to the next.
inline std::int64_t row_stride_a(const GemmProblem& p) {
  return p.lda != 0 ? p.lda : p.a_transposed ? p.m : p.k;
}
inline std::int64_t row_stride_b(const GemmProblem& p) {
  return p.ldb != 0 ? p.ldb : p.b_transposed ? p.n : p.k;
}
inline std::int64_t row_stride_d(const GemmProblem& p) { return p.ldd != 0 ? p.ldd : p.n; }

}  // namespace octet::detail
