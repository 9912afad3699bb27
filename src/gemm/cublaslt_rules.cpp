// SPDX-License-Identifier: Apache-2.0
// In the library's terms D^T [n, m] = B A^T: what it calls m is our n, and the other way round.
// What is not in its manual was tried on an H100 (sm_90) with cuBLASLt 13.1; some pairs of scale
// modes abort the process when they are asked about, so nothing is asked that is not known:
// - FP8: k a multiple of 16 and a row of D one of 16 bytes; m, the tokens, is free.
// - Block scales: the outer dimension of an operand with 1x128 scales a multiple of 4, the other's
//   of 8, k of 16 as ever (not of 128). D not FP8.
// - FP8 D runs only with a null C, whose layout must have the type of the bias.
// - A bias with FP8 operands is BF16, whether D is FP32 or BF16; with BF16 operands it is D's type.
// - aux has the type of D, BF16 where D is FP8.

#include <algorithm>
#include <limits>
#include <sstream>

#include "octet/gemm/cublaslt.hpp"
#include "octet/gemm/detail/cublaslt_rules.hpp"
#include "octet/gemm/detail/strides.hpp"

namespace octet {
namespace {

using detail::CublasLtPlan;
using enum Granularity;

template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

/// Why not, or empty. The first of the list that is not empty counts.
using Reason = std::string;

Reason check_multiple(const char* name, std::int64_t value, std::int64_t factor, const char* why) {
  if (value % factor == 0) return {};
  return text(name, " is ", value, "; ", why, " needs a multiple of ", factor);
}

Reason check_row_bytes(const char* name, std::int64_t elements, DType dtype) {
  const std::int64_t bytes = elements * static_cast<std::int64_t>(size_of(dtype));
  if (bytes % 16 == 0) return {};
  return text(name, " is ", elements, ", so a row of d (", name_of(dtype), ") has ", bytes,
              " bytes; FP8 needs a multiple of 16");
}

bool is_block(Granularity granularity) { return granularity == row_block || granularity == tile; }

bool is_pair(const GemmProblem& p, Granularity a, Granularity b) {
  return p.a_scales == a && p.b_scales == b;
}

Reason check_block_sizes(const GemmProblem& p) {
  // The library takes the scales of a row_block operand as many apart as it has rows; octet's lie
  // padded_rows() apart.
  if (p.a_scales == row_block && p.m % 16 != 0) {
    return check_multiple("m", p.m, 16, "a row_block operand");
  }
  if (p.b_scales == row_block && p.n % 16 != 0) {
    return check_multiple("n", p.n, 16, "a row_block operand");
  }
  if (p.m % 8 != 0) return check_multiple("m", p.m, 8, "a product with block scales");
  return check_multiple("n", p.n, 8, "a product with block scales");
}

Reason check_scale_modes(const GemmProblem& p, const GemmDevice& device) {
  const int capability = device.compute_capability;
  if (is_pair(p, tensor, tensor)) return {};
  const bool vectors = is_pair(p, row, row);
  const bool blocks =
      is_block(p.a_scales) && is_block(p.b_scales) && !(p.a_scales == tile && p.b_scales == tile);
  const bool mx_pair = is_pair(p, mx, mx);
  if (!vectors && !blocks && !mx_pair) {
    return text("a_scales are ", name_of(p.a_scales), " and b_scales ", name_of(p.b_scales),
                "; allowed are tensor or row or mx for both, and row_block with row_block or tile");
  }
  if ((vectors || blocks) && (capability < 90 || capability >= 100)) {
    return text("a_scales are ", name_of(p.a_scales),
                "; row, row_block and tile need compute capability 90, the device has ",
                capability);
  }
  if (mx_pair && (capability < 100 || capability >= 120)) {
    return text("a_scales are mx; that needs compute capability 100 to 119, the device has ",
                capability);
  }
  if (mx_pair) return check_multiple("k", p.k, 32, "mx");
  return blocks ? check_block_sizes(p) : Reason();
}

Reason check_fp8(const GemmProblem& p, const GemmDevice& device) {
  if (!is_fp8(p.a) || !is_fp8(p.b)) {
    return text("a is ", name_of(p.a), " and b is ", name_of(p.b),
                "; an FP8 operand goes only with another FP8 operand");
  }
  if (device.compute_capability < 89) {
    return text("the device has compute capability ", device.compute_capability,
                "; FP8 needs 89 or more");
  }
  if (p.accumulation == Accumulation::exact) {
    return "accumulation is exact; promoted and fast are allowed";
  }
  if (p.a == DType::e5m2 && p.b == DType::e5m2) {
    return "a and b are both e5m2; at least one must be e4m3";
  }
  if (p.a_transposed || p.b_transposed) {
    return text(p.a_transposed ? "a" : "b",
                " is transposed; FP8 operands must be contiguous along k");
  }
  if (Reason no = check_multiple("k", p.k, 16, "FP8"); !no.empty()) return no;
  if (Reason no = check_multiple("lda", detail::row_stride_a(p), 16, "FP8"); !no.empty()) return no;
  if (Reason no = check_multiple("ldb", detail::row_stride_b(p), 16, "FP8"); !no.empty()) return no;
  return check_scale_modes(p, device);
}

Reason check_wide(const GemmProblem& p, const GemmDevice& device) {
  if (p.a != p.b || (p.a != DType::f32 && p.a != DType::bf16)) {
    return text("a is ", name_of(p.a), " and b is ", name_of(p.b),
                "; both f32, both bf16 or both FP8 are allowed");
  }
  if (p.accumulation == Accumulation::exact) {
    return "accumulation is exact; promoted and fast are allowed";
  }
  if (p.a == DType::bf16 && device.compute_capability < 80) {
    return text("the device has compute capability ", device.compute_capability,
                "; bf16 needs 80 or more");
  }
  return {};
}

Reason check_fp8_d(const GemmProblem& p) {
  if (p.a_scales != tensor) {
    return text("d is ", name_of(p.d), "; that goes with tensor scales, a_scales are ",
                name_of(p.a_scales));
  }
  if (p.a == DType::e5m2 || p.b == DType::e5m2) {
    // The vendor's amax of D would leave infinity out.
    return text("d is ", name_of(p.d), " and an operand e5m2, which may hold infinity");
  }
  if (p.d == DType::e5m2) return "d is e5m2; of FP8 only e4m3 is written directly";
  return {};
}

/// Whether the vendor's kernels write this D themselves, and if not why.
Reason check_d(const GemmProblem& p) {
  const bool fp8 = is_fp8(p.a);
  if (is_fp8(p.d) && !fp8) return text("d is ", name_of(p.d), "; that needs FP8 operands");
  if (p.d == DType::f16) return "d is f16; f32 and bf16 are allowed";
  if (p.a == DType::f32 && p.d != DType::f32)
    return text("d is ", name_of(p.d), "; f32 operands give f32");
  if (!fp8) return {};
  if (is_fp8(p.d)) {
    if (Reason no = check_fp8_d(p); !no.empty()) return no;
  }
  if (Reason no = check_row_bytes("n", p.n, p.d); !no.empty()) return no;
  return check_row_bytes("ldd", detail::row_stride_d(p), p.d);
}

/// Whether they also do everything that comes after the sum.
Reason check_epilogue(const GemmProblem& p) {
  const bool fp8 = is_fp8(p.a);
  const DType d = is_fp8(p.d) ? DType::bf16 : p.d;
  if (p.bias) {
    const DType wanted = fp8 ? DType::bf16 : d;
    if (p.bias_type != wanted) {
      return text("bias is ", name_of(p.bias_type), ", fused it is ", name_of(wanted));
    }
  }
  if (p.activation == Activation::none) return {};
  if (p.accumulate) return "accumulate is not fused with an activation";
  if (p.activation == Activation::dgelu && p.bias) return "bias is not fused with dgelu";
  if (p.activation == Activation::dgelu && is_fp8(p.d)) {
    return text("d is ", name_of(p.d), "; dgelu is fused with f32 and bf16");
  }
  if (!p.aux) return {};
  if (p.aux_type != d) return text("aux is ", name_of(p.aux_type), ", fused it is ", name_of(d));
  if (p.a_scales != tensor) return text("aux is not fused with ", name_of(p.a_scales), " scales");
  const std::int64_t bytes = p.n * static_cast<std::int64_t>(size_of(p.aux_type));
  if (bytes % 16 != 0) return text("a row of aux has ", bytes, " bytes, not a multiple of 16");
  return {};
}

Reason check_sizes(const GemmProblem& p) {
  constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max();
  const struct {
    const char* name;
    std::int64_t value;
  } all[] = {{"m", p.m}, {"n", p.n}, {"k", p.k}};
  for (const auto& [name, value] : all) {
    if (value > kMost) return text(name, " is ", value, "; at most ", kMost, " is allowed");
  }
  return {};
}

std::string describe(const GemmProblem& p) {
  if (p.a == DType::f32) return "FP32";
  if (p.a == DType::bf16) return "BF16 tensor cores, FP32 accumulation";
  if (p.a_scales == tensor || p.a_scales == row) {
    return p.accumulation == Accumulation::fast ? "FP8 tensor cores, fast accumulation"
                                                : "FP8 tensor cores, promoted accumulation";
  }
  return text("FP8 tensor cores, promoted accumulation, ", name_of(p.a_scales), " and ",
              name_of(p.b_scales), " scales");
}

}  // namespace

namespace detail {

CublasLtPlan plan_cublaslt(const GemmProblem& p, const GemmDevice& device) {
  CublasLtPlan plan;
  GemmSupport& support = plan.support;
  const auto refuse = [&](Reason why) {
    support = {GemmVerdict::no, std::move(why), 0, 0};
    return plan;
  };
  if (device.type != DeviceType::cuda) return refuse("the device is not a CUDA device");
  if (Reason no = check_sizes(p); !no.empty()) return refuse(no);
  Reason no = is_fp8(p.a) || is_fp8(p.b) ? check_fp8(p, device) : check_wide(p, device);
  if (!no.empty()) return refuse(no);
  support = {GemmVerdict::native, describe(p), 0, 0};
  Reason apart = check_d(p);
  if (apart.empty()) apart = check_epilogue(p);
  if (apart.empty()) return plan;

  plan.product = {.m = p.m, .n = p.n, .k = p.k, .a = p.a, .b = p.b};
  plan.product.a_transposed = p.a_transposed;
  plan.product.b_transposed = p.b_transposed;
  plan.product.lda = p.lda;
  plan.product.ldb = p.ldb;
  plan.product.a_scales = p.a_scales;
  plan.product.b_scales = p.b_scales;
  plan.product.accumulation = p.accumulation;
  plan.product.deterministic = p.deterministic;
  if (Reason still = check_d(plan.product); !still.empty()) {
    return refuse(apart == still ? still : text(apart, "; with sums in f32: ", still));
  }
  plan.in_two_passes = true;
  const auto sums = static_cast<std::size_t>(p.m * p.n) * sizeof(float);
  support.verdict = GemmVerdict::with_conversion;
  support.reason += "; " + apart + ": sums in f32, then a second pass";
  support.workspace_bytes = WorkspaceScope::padded(sums);
  support.converted_bytes = 2 * sums;
  return plan;
}

}  // namespace detail

GemmSupport query_cublaslt(const GemmProblem& problem, const GemmDevice& device) {
  return detail::plan_cublaslt(problem, device).support;
}

}  // namespace octet
