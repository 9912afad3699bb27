// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>

#include "gemm/cpu_gemm.hpp"
#include "octet/gemm/detail/epilogue_math.hpp"

namespace octet::detail::cpu {
namespace {

/// A float that rounds to a narrower dtype as the value itself does.
float before_rounding(float value, DType) { return one_nan(value); }

/// Towards zero, with the last bit set if that lost anything: what is rounded again afterwards, to
/// two bits less or more, comes out as if it had been rounded once.
float before_rounding(double value, DType dtype) {
  const float nearest = static_cast<float>(value);
  if (dtype == DType::f32 || value != value || static_cast<double>(nearest) == value) {
    return one_nan(nearest);
  }
  std::uint32_t bits = float_bits(nearest);
  if (std::abs(static_cast<double>(nearest)) > std::abs(value)) --bits;
  return bits_float(bits | 1u);
}

template <class T, class D>
std::uint32_t finish(const GemmProblem& p, const GemmArgs& args, const T* sums, std::int64_t row,
                     std::int64_t column, std::int64_t count) {
  auto* d = static_cast<typename D::Storage*>(args.d) + row * d_stride(p) + column;
  const bool plain = !p.accumulate && !p.bias && p.activation == Activation::none;
  if (plain && !is_fp8(D::kDType) && sums != nullptr) {  // a loop that compilers make vectors of
    for (std::int64_t c = 0; c < count; ++c) d[c] = D::encode(before_rounding(sums[c], D::kDType));
    return 0;
  }
  const std::int64_t aux = row * p.n + column;
  const T scale = is_fp8(D::kDType) ? static_cast<T>(*args.d_scale) : T(1);
  std::uint32_t largest = 0;
  for (std::int64_t c = 0; c < count; ++c) {
    T before = T(0), after = T(0), bias = T(0);
    if (p.accumulate) before = static_cast<T>(D::decode(d[c]));
    if (p.bias) bias = static_cast<T>(load_element(args.bias, p.bias_type, column + c));
    const T sum = sum_before_activation(p, sums == nullptr ? T(0) : sums[c], before, bias);
    if (p.activation == Activation::dgelu) {
      after = static_cast<T>(load_element(args.aux, p.aux_type, aux + c));
    } else if (p.aux) {
      store_element(args.aux, p.aux_type, aux + c, before_rounding(sum, p.aux_type));
    }
    T value = activated(p.activation, sum, after);
    if constexpr (is_fp8(D::kDType)) {
      largest = std::max(largest, magnitude_bits(before_rounding(value, DType::f32)));
      value = value * scale;
    }
    d[c] = D::encode(before_rounding(value, D::kDType));
  }
  return largest;
}

}  // namespace

template <class T>
std::uint32_t finish_row(const GemmProblem& problem, const GemmArgs& args, const T* sums,
                         std::int64_t row, std::int64_t column, std::int64_t count) {
  return for_dtype(
      problem.d, [&]<class D>(D) { return finish<T, D>(problem, args, sums, row, column, count); });
}
template std::uint32_t finish_row(const GemmProblem&, const GemmArgs&, const float*, std::int64_t,
                                  std::int64_t, std::int64_t);
template std::uint32_t finish_row(const GemmProblem&, const GemmArgs&, const double*, std::int64_t,
                                  std::int64_t, std::int64_t);

void epilogue(const Context&, const GemmProblem& problem, const float* sums, const GemmArgs& args) {
  std::uint32_t largest = 0;
#pragma omp parallel for reduction(max : largest) if (problem.m * problem.n > 65536)
  for (std::int64_t row = 0; row < problem.m; ++row) {
    const float* of_row = sums == nullptr ? nullptr : sums + row * problem.n;
    largest = std::max(largest, finish_row(problem, args, of_row, row, 0, problem.n));
  }
  if (is_fp8(problem.d) && args.d_amax != nullptr) *args.d_amax = bits_float(largest);
}

}  // namespace octet::detail::cpu
