// SPDX-License-Identifier: Apache-2.0
// A GEMM backend from outside the library: one for products with few rows, as a trainer's head over
// one token has them. It says what it can run and why not, is asked before the library's own, and
// leaves the rest to that.
#include <cmath>
#include <cstdio>
#include <exception>
#include <vector>

#include "octet/octet.hpp"

namespace {

/// FP32 products of at most 4 rows on a CPU, each element a dot product.
class FewRows final : public octet::GemmBackend {
 public:
  std::string name() const override { return "few_rows"; }

  octet::GemmSupport query(const octet::GemmProblem& p,
                           const octet::GemmDevice& device) const override {
    const auto no = [](const std::string& reason) {
      return octet::GemmSupport{octet::GemmVerdict::no, reason};
    };
    if (device.type != octet::DeviceType::cpu) return no("the device is not a CPU");
    if (p.m > kRows) return no("m is " + std::to_string(p.m) + "; at most 4 is allowed");
    if (p.a != octet::DType::f32 || p.b != octet::DType::f32 || p.d != octet::DType::f32) {
      return no("a, b and d must be f32");
    }
    if (p.a_transposed || p.b_transposed) return no("an operand is transposed");
    return {octet::GemmVerdict::native, "a dot product an element"};
  }

  void run(const octet::Context&, const octet::GemmProblem& p,
           const octet::GemmArgs& args) override {
    const auto* a = static_cast<const float*>(args.a);
    const auto* b = static_cast<const float*>(args.b);
    auto* d = static_cast<float*>(args.d);
    for (std::int64_t i = 0; i < p.m; ++i) {
      for (std::int64_t j = 0; j < p.n; ++j) {
        float sum = 0.0f;
        for (std::int64_t l = 0; l < p.k; ++l) sum += a[i * p.k + l] * b[j * p.k + l];
        d[i * p.n + j] = sum;
      }
    }
  }

 private:
  static constexpr std::int64_t kRows = 4;
};

/// Runs a product on whoever is chosen and on the reference; prints both and the largest
/// difference.
void compare(octet::GemmRegistry& gemms, std::int64_t rows) {
  const octet::Context& ctx = gemms.context();
  const octet::GemmProblem problem{.m = rows,
                                   .n = 96,
                                   .k = 64,
                                   .a = octet::DType::f32,
                                   .b = octet::DType::f32,
                                   .d = octet::DType::f32};
  const octet::Tensor a(ctx, octet::DType::f32, {rows, problem.k});
  const octet::Tensor b(ctx, octet::DType::f32, {problem.n, problem.k});
  const octet::Tensor d(ctx, octet::DType::f32, {rows, problem.n});
  for (const octet::Tensor* operand : {&a, &b}) {
    const octet::TensorView& view = operand->view();
    for (std::int64_t i = 0; i < view.numel(); ++i) {
      view.as<float>()[i] = static_cast<float>(i * 37 % 101 - 50) / 64.0f;
    }
  }
  std::printf("%s\n%s", to_string(problem).c_str(), gemms.choose(problem).report.c_str());
  const octet::GemmArgs args{.a = a.view().data, .b = b.view().data, .d = d.view().data};
  gemms.run(problem, args);
  const auto* result = d.view().as<const float>();
  const std::vector<float> chosen(result, result + d.view().numel());
  octet::make_reference_gemm()->run(ctx, problem, args);
  float largest = 0.0f;
  for (std::size_t i = 0; i < chosen.size(); ++i) {
    largest = std::fmax(largest, std::fabs(chosen[i] - result[i]));
  }
  std::printf("largest difference from the reference: %g\n\n", static_cast<double>(largest));
  octet::require(largest < 1e-3f, "the results differ by ", largest);
}

}  // namespace

int main() {
  try {
    octet::GemmRegistry gemms(octet::Context::cpu());
    gemms.add(std::make_unique<FewRows>());
    compare(gemms, 3);
    compare(gemms, 128);
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "custom_gemm_backend: %s\n", error.what());
    return 1;
  }
}
