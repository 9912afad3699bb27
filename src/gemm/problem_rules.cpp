// SPDX-License-Identifier: Apache-2.0
#include "gemm/problem_rules.hpp"

namespace octet::detail {
namespace {

template <class... Parts>
std::string joined(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

std::string stride_refusal(const char* name, std::int64_t stride, std::int64_t row) {
  if (stride == 0 || stride >= row) return {};
  return joined(name, " is ", stride, "; a row has ", row,
                " elements, so at least that or 0 is allowed");
}

std::string operand_refusal(const char* name, DType dtype, bool transposed,
                            Granularity granularity) {
  if (granularity == Granularity::tensor) return {};
  if (!is_fp8(dtype)) {
    return joined(name, "_scales are ", name_of(granularity), ", but ", name, " is ",
                  name_of(dtype), " and has none; tensor is allowed");
  }
  if (!transposed) return {};
  return joined(name, " is transposed with ", name_of(granularity),
                " scales; a transposed FP8 operand must have tensor scales");
}

std::string wide_refusal(const char* name, DType dtype) {
  if (!is_fp8(dtype)) return {};
  return joined(name, " is ", name_of(dtype), "; f32, bf16 and f16 are allowed");
}

/// Of a value that is none of the enumeration's, which has no name.
template <class Enum>
std::string unknown_refusal(const char* name, Enum value, Enum last, const char* allowed) {
  if (value <= last) return {};
  return joined(name, " is ", static_cast<int>(value), "; ", allowed, " are allowed");
}

/// The first reason of a few.
std::string first_of(std::initializer_list<std::string> reasons) {
  for (const std::string& reason : reasons) {
    if (!reason.empty()) return reason;
  }
  return {};
}

}  // namespace

std::string enumeration_refusal(const GemmProblem& p) {
  constexpr const char* kDtypes = "f32, bf16, f16, e4m3 and e5m2";
  constexpr const char* kScales = "tensor, row, row_block, tile and mx";
  return first_of(
      {unknown_refusal("a", p.a, DType::e5m2, kDtypes),
       unknown_refusal("b", p.b, DType::e5m2, kDtypes),
       unknown_refusal("d", p.d, DType::e5m2, kDtypes),
       unknown_refusal("bias_type", p.bias_type, DType::e5m2, kDtypes),
       unknown_refusal("aux_type", p.aux_type, DType::e5m2, kDtypes),
       unknown_refusal("a_scales", p.a_scales, Granularity::mx, kScales),
       unknown_refusal("b_scales", p.b_scales, Granularity::mx, kScales),
       unknown_refusal("accumulation", p.accumulation, Accumulation::exact,
                       "promoted, fast and exact"),
       unknown_refusal("activation", p.activation, Activation::dgelu, "none, gelu and dgelu")});
}

std::string epilogue_refusal(const GemmProblem& p) {
  if (p.accumulate && p.d != DType::f32 && p.d != DType::bf16) {
    return joined("accumulate is set and d is ", name_of(p.d),
                  "; D may be added to as f32 and bf16");
  }
  if (p.aux && p.activation == Activation::none) {
    return "aux is set and activation is none; aux goes with gelu and dgelu";
  }
  if (!p.aux && p.activation == Activation::dgelu) {
    return "activation is dgelu and aux is not set; dgelu reads aux";
  }
  return first_of({p.bias ? wide_refusal("bias_type", p.bias_type) : std::string(),
                   p.aux ? wide_refusal("aux_type", p.aux_type) : std::string(),
                   stride_refusal("ldd", p.ldd, p.n)});
}

std::string problem_refusal(const GemmProblem& p) {
  if (std::string refusal = enumeration_refusal(p); !refusal.empty()) return refusal;
  return first_of({stride_refusal("lda", p.lda, p.a_transposed ? p.m : p.k),
                   stride_refusal("ldb", p.ldb, p.b_transposed ? p.n : p.k),
                   operand_refusal("a", p.a, p.a_transposed, p.a_scales),
                   operand_refusal("b", p.b, p.b_transposed, p.b_scales), epilogue_refusal(p)});
}

}  // namespace octet::detail
