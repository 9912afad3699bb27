// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <limits>

#include "octet/gemm/cublaslt.hpp"

namespace octet {
namespace {

template <class... Parts>
GemmSupport no(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return {GemmVerdict::no, text.str()};
}

GemmSupport query_fp8(const GemmProblem& p, const GemmDevice& device) {
  if (!is_fp8(p.a) || !is_fp8(p.b)) {
    return no("a is ", name_of(p.a), " and b is ", name_of(p.b),
              "; an FP8 operand goes only with another FP8 operand");
  }
  if (device.compute_capability < 89) {
    return no("the device has compute capability ", device.compute_capability,
              "; FP8 needs 89 or more");
  }
  if (p.a == DType::e5m2 && p.b == DType::e5m2) {
    return no("a and b are both e5m2; at least one must be e4m3");
  }
  if (p.a_transposed || p.b_transposed) {
    return no(p.a_transposed ? "a" : "b",
              " is transposed; FP8 operands must be contiguous along k");
  }
  if (p.d != DType::f32 && p.d != DType::bf16) {
    return no("d is ", name_of(p.d), "; f32 and bf16 are allowed for FP8 operands");
  }
  if (p.k % 16 != 0) return no("k is ", p.k, "; FP8 needs a multiple of 16");
  const std::int64_t row = p.n * static_cast<std::int64_t>(size_of(p.d));
  if (row % 16 != 0) {
    return no("n is ", p.n, ", so a row of d (", name_of(p.d), ") has ", row,
              " bytes; FP8 needs a multiple of 16");
  }
  return {GemmVerdict::native, p.accumulation == Accumulation::fast
                                   ? "FP8 tensor cores, fast accumulation"
                                   : "FP8 tensor cores, promoted accumulation"};
}

GemmSupport query_bf16(const GemmProblem& p, const GemmDevice& device) {
  if (device.compute_capability < 80) {
    return no("the device has compute capability ", device.compute_capability,
              "; bf16 needs 80 or more");
  }
  if (p.d != DType::f32 && p.d != DType::bf16) {
    return no("d is ", name_of(p.d), "; f32 and bf16 are allowed for bf16 operands");
  }
  return {GemmVerdict::native, "BF16 tensor cores, FP32 accumulation"};
}

}  // namespace

GemmSupport query_cublaslt(const GemmProblem& p, const GemmDevice& device) {
  if (device.type != DeviceType::cuda) return no("the device is not a CUDA device");
  const std::int64_t largest = std::max({p.m, p.n, p.k});
  constexpr std::int64_t kMaxDimension = std::numeric_limits<std::int32_t>::max();
  if (largest > kMaxDimension) {
    return no(largest == p.m   ? "m"
              : largest == p.n ? "n"
                               : "k",
              " is ", largest, "; at most ", kMaxDimension, " is allowed");
  }
  if (is_fp8(p.a) || is_fp8(p.b)) return query_fp8(p, device);
  if (p.a != p.b || (p.a != DType::f32 && p.a != DType::bf16)) {
    return no("a is ", name_of(p.a), " and b is ", name_of(p.b),
              "; both f32, both bf16 or both FP8 are allowed");
  }
  if (p.a == DType::bf16) return query_bf16(p, device);
  if (p.d != DType::f32) {
    return no("d is ", name_of(p.d), "; f32 operands give f32");
  }
  return {GemmVerdict::native, "FP32"};
}

}  // namespace octet
