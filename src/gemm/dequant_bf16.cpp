// SPDX-License-Identifier: Apache-2.0
#include "octet/gemm/dequant_bf16.hpp"

#include <unordered_map>
#include <utility>

#include "backend.hpp"
#include "gemm/problem_rules.hpp"
#include "octet/gemm/cublaslt.hpp"
#include "octet/gemm/detail/operand.hpp"
#include "octet/gemm/epilogue.hpp"

namespace octet {
namespace {

/// How a problem is run: the answer of query() and what run() needs besides.
struct Plan {
  GemmSupport support;
  GemmProblem product;      ///< the BF16 problem
  bool fused = true;        ///< whether the product comes with its epilogue
  std::size_t a_bytes = 0;  ///< of the operands in BF16; 0 for one that is
  std::size_t b_bytes = 0;
  std::size_t sums_bytes = 0;
  GemmPlan multiply;  ///< the product on the inner backend
};

GemmSupport no(std::string reason) { return {GemmVerdict::no, std::move(reason)}; }

std::string refusal(const GemmProblem& p) {
  if (std::string reason = detail::problem_refusal(p); !reason.empty()) return reason;
  if (!is_fp8(p.a) && !is_fp8(p.b)) {
    return "a is " + std::string(name_of(p.a)) + " and b is " + std::string(name_of(p.b)) +
           "; one of them must be FP8";
  }
  for (const auto& [name, dtype] : {std::pair("a", p.a), std::pair("b", p.b)}) {
    if (is_fp8(dtype) || dtype == DType::bf16) continue;
    return std::string(name) + " is " + std::string(name_of(dtype)) +
           "; FP8 and bf16 are allowed, which lose nothing as BF16";
  }
  if (p.accumulation == Accumulation::exact) {
    return "accumulation is exact; operands rounded to BF16 are not";
  }
  return {};
}

/// The BF16 problem with everything that happens to the sum.
GemmProblem fused_product(const GemmProblem& p) {
  GemmProblem product = p;
  product.a = product.b = DType::bf16;
  product.a_scales = product.b_scales = Granularity::tensor;
  if (is_fp8(p.a)) product.lda = 0;
  if (is_fp8(p.b)) product.ldb = 0;
  product.accumulation = Accumulation::promoted;
  return product;
}

/// The BF16 problem that gives the sums alone.
GemmProblem plain_product(const GemmProblem& p) {
  GemmProblem product = fused_product(p);
  product.d = DType::f32;
  product.ldd = 0;
  product.accumulate = product.bias = product.aux = false;
  product.activation = Activation::none;
  return product;
}

/// Bytes of an operand in BF16, 0 if it is that already; adds to what conversions move.
std::size_t bf16_bytes(DType dtype, Granularity granularity, std::int64_t rows, std::int64_t k,
                       std::size_t& moved) {
  if (!is_fp8(dtype)) return 0;
  const auto count = static_cast<std::size_t>(rows * k);
  moved += 3 * count + static_cast<std::size_t>(scale_bytes(granularity, rows, k));
  return 2 * count;
}

/// `ask` says what the inner backend answers.
template <class Ask>
Plan make_plan(const GemmProblem& p, const std::string& inner_name, Ask&& ask) {
  Plan plan;
  if (std::string reason = refusal(p); !reason.empty()) {
    plan.support = no(std::move(reason));
    return plan;
  }
  plan.product = fused_product(p);
  GemmSupport inner = ask(plan.product);
  if (inner.verdict == GemmVerdict::no) {
    plan.fused = false;
    plan.product = plain_product(p);
    inner = ask(plan.product);
  }
  if (inner.verdict == GemmVerdict::no) {
    plan.support = no("as BF16 by " + inner_name + ": " + inner.reason);
    return plan;
  }
  std::size_t moved = inner.converted_bytes;
  plan.a_bytes = bf16_bytes(p.a, p.a_scales, p.m, p.k, moved);
  plan.b_bytes = bf16_bytes(p.b, p.b_scales, p.n, p.k, moved);
  if (!plan.fused) plan.sums_bytes = static_cast<std::size_t>(p.m * p.n) * sizeof(float);
  moved += 2 * plan.sums_bytes;
  plan.support = {GemmVerdict::with_conversion,
                  "FP8 to BF16, product by " + inner_name +
                      (plan.fused ? "" : ", then the epilogue") + ": " + inner.reason,
                  WorkspaceScope::padded(plan.a_bytes) + WorkspaceScope::padded(plan.b_bytes) +
                      WorkspaceScope::padded(plan.sums_bytes) +
                      WorkspaceScope::padded(inner.workspace_bytes),
                  moved};
  return plan;
}

/// The operands in BF16 in the workspace, the product, the epilogue if it is still to be done.
void run_plan(const Context& ctx, const GemmProblem& problem, const Plan& plan,
              const GemmArgs& args) {
  WorkspaceScope scope(ctx);
  const auto& backend = detail::backend_of(ctx);
  GemmArgs product = args;
  if (plan.a_bytes != 0) {
    void* const a = scope.take(plan.a_bytes);
    backend.operand_to_bf16(ctx, detail::operand_a(problem, args), a);
    product.a = a;
  }
  if (plan.b_bytes != 0) {
    void* const b = scope.take(plan.b_bytes);
    backend.operand_to_bf16(ctx, detail::operand_b(problem, args), b);
    product.b = b;
  }
  product.a_scales = product.b_scales = nullptr;
  if (plan.fused) return plan.multiply(ctx, product);
  float* const sums = static_cast<float*>(scope.take(plan.sums_bytes));
  plan.multiply(ctx, {.a = product.a, .b = product.b, .d = sums});
  apply_epilogue(ctx, problem, sums, args);
}

class DequantBf16Gemm final : public GemmBackend {
 public:
  explicit DequantBf16Gemm(GemmBackend& inner) : inner_(inner) {}

  std::string name() const override { return "dequant_bf16"; }
  std::string version() const override { return inner_.name() + " " + inner_.version(); }

  GemmSupport query(const GemmProblem& problem, const GemmDevice& device) const override {
    return answer(problem, device).support;
  }
  void run(const Context& ctx, const GemmProblem& problem, const GemmArgs& args) override {
    run_plan(ctx, problem, plan_of(ctx, problem).second, args);
  }
  GemmPlan plan(const Context& ctx, const GemmProblem& problem) override {
    // Entries of the map stay where they are.
    const Plans::value_type* const entry = &plan_of(ctx, problem);
    return [entry](const Context& of_call, const GemmArgs& args) {
      run_plan(of_call, entry->first, entry->second, args);
    };
  }

  std::vector<std::string> candidates(const Context& ctx, const GemmProblem& problem) override {
    return inner_.candidates(ctx, plan_of(ctx, problem).second.product);
  }
  bool select(const Context& ctx, const GemmProblem& problem,
              const std::string& candidate) override {
    return inner_.select(ctx, plan_of(ctx, problem).second.product, candidate);
  }

 private:
  using Plans = std::unordered_map<GemmProblem, Plan, GemmProblemHash>;

  Plan answer(const GemmProblem& problem, const GemmDevice& device) const {
    return make_plan(problem, inner_.name(),
                     [&](const GemmProblem& product) { return inner_.query(product, device); });
  }
  const Plans::value_type& plan_of(const Context& ctx, const GemmProblem& problem) {
    const auto found = plans_.find(problem);
    if (found != plans_.end()) return *found;
    Plan plan = answer(problem, gemm_device(ctx));
    require(plan.support.verdict != GemmVerdict::no, problem, ": ", plan.support.reason);
    plan.multiply = inner_.plan(ctx, plan.product);
    return *plans_.emplace(problem, std::move(plan)).first;
  }

  GemmBackend& inner_;
  Plans plans_;
};

}  // namespace

std::unique_ptr<GemmBackend> make_dequant_bf16_gemm(GemmBackend& inner) {
  return std::make_unique<DequantBf16Gemm>(inner);
}

GemmSupport query_dequant_bf16(const GemmProblem& problem, const GemmDevice& device) {
  if (device.type == DeviceType::cuda) {
    return make_plan(problem, "cublaslt",
                     [&](const GemmProblem& product) { return query_cublaslt(product, device); })
        .support;
  }
  const auto reference = make_reference_gemm();
  return make_plan(problem, reference->name(),
                   [&](const GemmProblem& product) { return reference->query(product, device); })
      .support;
}

}  // namespace octet
