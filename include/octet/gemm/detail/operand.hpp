// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "octet/core/detail/block_scaling.hpp"
#include "octet/gemm/gemm.hpp"

namespace octet::detail {

/// One of the two matrices [rows, k] of a product, stored as [k, rows] if transposed, and where its
/// scales lie. Element (row, p) is at row * stride + p, or at p * stride + row.
struct GemmOperand {
  const void* data = nullptr;
  const void* scales = nullptr;
  DType dtype = DType::f32;
  bool transposed = false;
  std::int64_t stride = 0;
  ScaleLayout layout = {};

  OCTET_HD std::int64_t rows() const { return layout.rows; }
  OCTET_HD std::int64_t k() const { return layout.columns; }
  OCTET_HD bool has_mx() const { return is_fp8(dtype) && layout.granularity == Granularity::mx; }

  /// Factor of element (row, p), 1 without scales. The same for 32 of a row from a multiple of 32
  /// on, and for 128 unless the scales are mx.
  OCTET_HD float scale_at(std::int64_t row, std::int64_t p) const {
    if (!is_fp8(dtype)) return 1.0f;
    if (has_mx()) return decode_e8m0(static_cast<const std::uint8_t*>(scales)[layout.at(row, p)]);
    const float* factors = static_cast<const float*>(scales);
    if (layout.granularity == Granularity::tensor) return factors[0];
    if (layout.granularity == Granularity::row) return factors[row];
    return factors[layout.at(row, p)];
  }
};

inline GemmOperand operand_a(const GemmProblem& p, const GemmArgs& args) {
  const std::int64_t dense = p.a_transposed ? p.m : p.k;
  return {args.a,
          args.a_scales,
          p.a,
          p.a_transposed,
          p.lda == 0 ? dense : p.lda,
          scale_layout(p.a_scales, MxLayout::gemm_ready, p.m, p.k)};
}
inline GemmOperand operand_b(const GemmProblem& p, const GemmArgs& args) {
  const std::int64_t dense = p.b_transposed ? p.n : p.k;
  return {args.b,
          args.b_scales,
          p.b,
          p.b_transposed,
          p.ldb == 0 ? dense : p.ldb,
          scale_layout(p.b_scales, MxLayout::gemm_ready, p.n, p.k)};
}

}  // namespace octet::detail
