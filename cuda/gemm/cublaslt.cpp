// SPDX-License-Identifier: Apache-2.0
#include "cuda/gemm/cublaslt.hpp"

#include <unordered_map>

#include "cuda/check.hpp"
#include "cuda/gemm/cublaslt_plan.hpp"
#include "octet/gemm/cublaslt.hpp"
#include "octet/gemm/detail/cublaslt_rules.hpp"
#include "octet/gemm/epilogue.hpp"
#include "octet/runtime/tensor.hpp"

namespace octet::detail::cuda {
namespace {

class CublasLtGemm final : public GemmBackend {
 public:
  explicit CublasLtGemm(const Context& ctx)
      : device_(gemm_device(ctx)), workspace_(ctx, kGemmWorkspaceBytes) {
    set_device(ctx);
    cublasLtHandle_t handle = nullptr;
    const cublasStatus_t status = cublasLtCreate(&handle);
    require(status == CUBLAS_STATUS_SUCCESS, "cublasLtCreate on ", ctx.device(), " failed with ",
            cublasLtGetStatusName(status));
    handle_.reset(handle);
  }

  std::string name() const override { return "cublaslt"; }
  std::string version() const override { return std::to_string(cublasLtGetVersion()); }

  GemmSupport query(const GemmProblem& problem, const GemmDevice& device) const override {
    return query_cublaslt(problem, device);
  }

  std::vector<std::string> candidates(const Context& ctx, const GemmProblem& problem) override {
    set_device(ctx);
    const Entry& entry = entry_of(problem);
    std::vector<std::string> texts;
    for (const auto& algorithm : find_algorithms(handle_.get(), entry.product, entry.plan)) {
      texts.push_back(to_text(algorithm));
    }
    return texts;
  }

  bool select(const Context& ctx, const GemmProblem& problem, const std::string& text) override {
    set_device(ctx);
    cublasLtMatmulAlgo_t algorithm{};
    Entry& entry = entry_of(problem);
    if (!from_text(text, algorithm) || !is_runnable(handle_.get(), entry.plan, algorithm)) {
      return false;
    }
    entry.plan.algorithm = algorithm;
    return true;
  }

  void run(const Context& ctx, const GemmProblem& problem, const GemmArgs& args) override {
    set_device(ctx);
    run_entry(ctx, entry_of(problem), args);
  }

  GemmPlan plan(const Context& ctx, const GemmProblem& problem) override {
    set_device(ctx);
    Entry* const entry = &entry_of(problem);  // entries of the map stay where they are
    return [this, entry](const Context& of_call, const GemmArgs& args) {
      set_device(of_call);
      run_entry(of_call, *entry, args);
    };
  }

 private:
  struct Entry {
    GemmProblem problem;
    GemmProblem product;  ///< what the library computes of it
    bool in_two_passes = false;
    LtPlan plan;
  };

  void run_entry(const Context& ctx, Entry& entry, const GemmArgs& args) {
    if (!entry.in_two_passes) return multiply(ctx, entry, args);
    const GemmProblem& problem = entry.problem;
    WorkspaceScope scope(ctx);
    void* const sums = scope.take(static_cast<std::size_t>(problem.m * problem.n) * sizeof(float));
    multiply(ctx, entry,
             {.a = args.a,
              .a_scales = args.a_scales,
              .b = args.b,
              .b_scales = args.b_scales,
              .d = sums});
    apply_epilogue(ctx, problem, static_cast<const float*>(sums), args);
  }

  /// The plan of a problem, made when it is first asked for.
  Entry& entry_of(const GemmProblem& problem) {
    const auto found = entries_.find(problem);
    if (found != entries_.end()) return found->second;
    const CublasLtPlan how = plan_cublaslt(problem, device_);
    require(how.support.verdict != GemmVerdict::no, problem,
            ": cublaslt cannot run it: ", how.support.reason);
    const GemmProblem& product = how.in_two_passes ? how.product : problem;
    return entries_
        .emplace(problem,
                 Entry{problem, product, how.in_two_passes, make_plan(handle_.get(), product)})
        .first->second;
  }

  void multiply(const Context& ctx, Entry& entry, const GemmArgs& args) {
    LtPlan& plan = entry.plan;
    set_pointers(plan, entry.product, args);
    const float one = 1.0f;
    const float beta = entry.product.accumulate ? 1.0f : 0.0f;
    const void* const c = is_fp8(entry.product.d) ? nullptr : args.d;
    OCTET_CUBLAS_CHECK(
        cublasLtMatmul(handle_.get(), plan.operation.get(), &one, args.b, plan.b.get(), args.a,
                       plan.a.get(), &beta, c, plan.c.get(), args.d, plan.d.get(), &plan.algorithm,
                       workspace_.data(), kGemmWorkspaceBytes, ctx.stream()),
        entry.product);
  }

  GemmDevice device_;
  Buffer workspace_;
  OwnedCublas<cublasLtHandle_t> handle_;
  std::unordered_map<GemmProblem, Entry, GemmProblemHash> entries_;
};

}  // namespace

std::unique_ptr<GemmBackend> make_cublaslt_gemm(const Context& ctx) {
  return std::make_unique<CublasLtGemm>(ctx);
}

}  // namespace octet::detail::cuda
