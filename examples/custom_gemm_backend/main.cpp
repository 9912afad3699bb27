// SPDX-License-Identifier: Apache-2.0
// A GEMM backend from outside the library, for products with few rows on a CPU, as a trainer's head
// over one token has them. The library's own CPU backend rearranges B for its tiles, which pays
// when many rows read it; with few rows it is most of the work.
//
// How to write a backend:
// 1. Derive from octet::GemmBackend and give it a name(). Users force it with OCTET_GEMM=name, and
//    rankings are kept by name() and version(): raise the version when its speed changes.
// 2. query() says whether it would run a problem on a device: native, with_conversion (and then how
//    many bytes of workspace and of conversions), or no, with a reason that names the field and
//    what is allowed. It must look at every field of GemmProblem that it does not serve; it reads
//    no memory and touches no device.
// 3. run() enqueues one product on ctx.stream() (on a CPU it computes it). Problem and pointers
//    have been checked, m, n and k are above 0. It neither allocates device memory nor waits;
//    scratch comes from octet::WorkspaceScope, as much as query() named.
// 4. Only if there is something to look up or to build for a problem: override plan() too, which
//    the registry asks once and whose function it calls instead of run(). Only if there are several
//    ways to run it: candidates() and select().
// 5. gemms.add() it, and gemms.prepare() every problem that will come: among the backends that run
//    a problem natively the fastest by the clock wins. Without prepare() the one added last does.
// 6. Test it against octet::make_reference_gemm(), as main() below does.
#include <cmath>
#include <cstdio>
#include <exception>
#include <vector>

#include "octet/octet.hpp"

namespace {

using octet::DType;

constexpr std::int64_t kMostRows = 4;

/// Sixteen sums that do not wait for one another, which a compiler turns into vectors.
float dot(const float* x, const float* y, std::int64_t count) {
  constexpr int kSums = 16;
  float sums[kSums] = {};
  std::int64_t i = 0;
  for (; i + kSums <= count; i += kSums) {
    for (int s = 0; s < kSums; ++s) sums[s] += x[i + s] * y[i + s];
  }
  float sum = 0.0f;
  for (float part : sums) sum += part;
  for (; i < count; ++i) sum += x[i] * y[i];
  return sum;
}

/// FP32 products of at most kMostRows rows on a CPU, each element a dot product.
class FewRows final : public octet::GemmBackend {
 public:
  std::string name() const override { return "few_rows"; }

  octet::GemmSupport query(const octet::GemmProblem& p,
                           const octet::GemmDevice& device) const override {
    const std::string reason = refusal(p, device);
    if (!reason.empty()) return {octet::GemmVerdict::no, reason};
    return {octet::GemmVerdict::native, "a dot product an element"};
  }

  void run(const octet::Context&, const octet::GemmProblem& p,
           const octet::GemmArgs& args) override {
    const auto* a = static_cast<const float*>(args.a);
    const auto* b = static_cast<const float*>(args.b);
    auto* d = static_cast<float*>(args.d);
    // A row of B stays in the cache for all rows of A.
#pragma omp parallel for schedule(static)
    for (std::int64_t j = 0; j < p.n; ++j) {
      for (std::int64_t i = 0; i < p.m; ++i) d[i * p.n + j] = dot(a + i * p.k, b + j * p.k, p.k);
    }
  }

 private:
  static std::string refusal(const octet::GemmProblem& p, const octet::GemmDevice& device) {
    if (device.type != octet::DeviceType::cpu) return "the device is not a CPU";
    if (p.m > kMostRows) {
      return "m is " + std::to_string(p.m) + "; at most " + std::to_string(kMostRows) +
             " is allowed";
    }
    if (p.a != DType::f32 || p.b != DType::f32 || p.d != DType::f32) {
      return "a, b and d must be f32";
    }
    if (p.a_transposed || p.b_transposed) return "an operand is transposed";
    if (p.lda != 0 || p.ldb != 0 || p.ldd != 0) return "rows have gaps";
    if (p.bias || p.accumulate || p.activation != octet::Activation::none) {
      return "bias, accumulate and activations are not served";
    }
    if (p.accumulation == octet::Accumulation::exact) return "sums are in FP32, not exact";
    return {};
  }
};

octet::Tensor made_up(const octet::Context& ctx, std::int64_t rows, std::int64_t columns) {
  octet::Tensor tensor(ctx, DType::f32, {rows, columns});
  for (std::int64_t i = 0; i < rows * columns; ++i) {
    tensor.as<float>()[i] = static_cast<float>(i * 37 % 101 - 50) / 60.0f;
  }
  return tensor;
}

/// Prepares and runs a product, prints who was measured how and the largest difference from exact
/// sums. Throws unless `winner` was the fastest and the difference is one of FP32 sums.
void compare(octet::GemmRegistry& gemms, std::int64_t rows, const std::string& winner) {
  const octet::Context& ctx = gemms.context();
  octet::GemmProblem problem{
      .m = rows, .n = 2048, .k = 1000, .a = DType::f32, .b = DType::f32, .d = DType::f32};
  const octet::Tensor a = made_up(ctx, problem.m, problem.k),
                      b = made_up(ctx, problem.n, problem.k);
  const octet::Tensor d(ctx, DType::f32, {problem.m, problem.n});
  const octet::Tensor exact(ctx, DType::f32, {problem.m, problem.n});

  gemms.prepare(problem);
  const octet::GemmRegistry::Choice choice = gemms.choose(problem);
  gemms.run(problem, {.a = a.view().data, .b = b.view().data, .d = d.view().data});
  std::printf("%s\n%schosen: %s\n", to_string(problem).c_str(), choice.report.c_str(),
              choice.backend->name().c_str());

  problem.accumulation = octet::Accumulation::exact;
  octet::make_reference_gemm()->run(
      ctx, problem, {.a = a.view().data, .b = b.view().data, .d = exact.view().data});
  float largest = 0.0f;
  for (std::int64_t i = 0; i < d.view().numel(); ++i) {
    largest = std::fmax(largest, std::fabs(d.as<float>()[i] - exact.as<float>()[i]));
  }
  std::printf("largest difference from exact sums: %g\n\n", static_cast<double>(largest));
  // 1000 products of at most 0.7 and as many roundings, each of half a place.
  octet::require(largest < 700.0f * 1000 * 0x1p-24f, "the results differ by ", largest);
  octet::require(choice.backend->name() == winner, winner, " should have been the fastest for ",
                 problem.m, " rows; is the machine busy, or a backend forced by OCTET_GEMM?");
}

}  // namespace

int main() {
  try {
    octet::GemmRegistry gemms(octet::Context::cpu());
    gemms.add(std::make_unique<FewRows>());
    compare(gemms, 1, "few_rows");
    compare(gemms, 3, "few_rows");
    compare(gemms, 128, "reference");
    std::puts("few_rows was the fastest where it runs, the rest went to the reference");
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "custom_gemm_backend: %s\n", error.what());
    return 1;
  }
}
