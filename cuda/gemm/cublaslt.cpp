// SPDX-License-Identifier: Apache-2.0
#include "cuda/gemm/cublaslt.hpp"

#include <cublasLt.h>

#include <string>
#include <type_traits>
#include <unordered_map>

#include "cuda/check.hpp"
#include "octet/gemm/cublaslt.hpp"
#include "octet/runtime/tensor.hpp"

namespace octet::detail::cuda {
namespace {

/// What the vendor recommends for Hopper; its split-k kernels want no more.
constexpr std::size_t kWorkspaceBytes = std::size_t{32} << 20;
/// What GemmArgs promises. The library assumes 256 unless it is told.
constexpr std::uint32_t kPointerAlignment = 16;

void check_cublas(cublasStatus_t status, const char* statement, const std::string& what) {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  fail(what, ": ", statement, " failed with ", cublasLtGetStatusName(status), " (",
       cublasLtGetStatusString(status), ")");
}

#define OCTET_CUBLAS_CHECK(statement, what) check_cublas((statement), #statement, (what))

struct Delete {
  void operator()(cublasLtHandle_t p) const { cublasLtDestroy(p); }
  void operator()(cublasLtMatmulDesc_t p) const { cublasLtMatmulDescDestroy(p); }
  void operator()(cublasLtMatrixLayout_t p) const { cublasLtMatrixLayoutDestroy(p); }
  void operator()(cublasLtMatmulPreference_t p) const { cublasLtMatmulPreferenceDestroy(p); }
};
template <class Pointer>
using Owned = std::unique_ptr<std::remove_pointer_t<Pointer>, Delete>;

cudaDataType_t cuda_type(DType dtype) {
  switch (dtype) {
    case DType::bf16: return CUDA_R_16BF;
    case DType::f16: return CUDA_R_16F;
    case DType::e4m3: return CUDA_R_8F_E4M3;
    case DType::e5m2: return CUDA_R_8F_E5M2;
    case DType::f32: break;
  }
  return CUDA_R_32F;
}

/// A row-major matrix [rows, columns] is to cuBLASLt a column-major one [columns, rows].
Owned<cublasLtMatrixLayout_t> make_layout(const GemmProblem& problem, DType dtype,
                                          std::int64_t rows, std::int64_t columns) {
  cublasLtMatrixLayout_t layout = nullptr;
  OCTET_CUBLAS_CHECK(
      cublasLtMatrixLayoutCreate(&layout, cuda_type(dtype), static_cast<std::uint64_t>(columns),
                                 static_cast<std::uint64_t>(rows), columns),
      to_string(problem));
  return Owned<cublasLtMatrixLayout_t>(layout);
}

/// Everything about a problem but its pointers. In the library's terms D^T [n, m] = B A^T, so our B
/// is its first operand, transposed unless ours is, and our A is its second.
struct Plan {
  Owned<cublasLtMatmulDesc_t> operation;
  Owned<cublasLtMatrixLayout_t> a, b, d;
  cublasLtMatmulAlgo_t algorithm{};
};

template <class T>
void set(const Plan& plan, const GemmProblem& problem, cublasLtMatmulDescAttributes_t attribute,
         const T& value) {
  OCTET_CUBLAS_CHECK(
      cublasLtMatmulDescSetAttribute(plan.operation.get(), attribute, &value, sizeof(value)),
      to_string(problem));
}

template <class T>
void prefer(cublasLtMatmulPreference_t preference, const GemmProblem& problem,
            cublasLtMatmulPreferenceAttributes_t attribute, const T& value) {
  OCTET_CUBLAS_CHECK(
      cublasLtMatmulPreferenceSetAttribute(preference, attribute, &value, sizeof(value)),
      to_string(problem));
}

Owned<cublasLtMatmulPreference_t> make_preference(const GemmProblem& problem) {
  cublasLtMatmulPreference_t created = nullptr;
  OCTET_CUBLAS_CHECK(cublasLtMatmulPreferenceCreate(&created), to_string(problem));
  Owned<cublasLtMatmulPreference_t> preference(created);
  prefer(created, problem, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, kWorkspaceBytes);
  // A product cut along k must be added up in FP32: the other schemes round every part to D.
  prefer(created, problem, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
         static_cast<std::uint32_t>(CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE));
  for (auto attribute :
       {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES}) {
    prefer(created, problem, attribute, kPointerAlignment);
  }
  return preference;
}

void set_scales(const Plan& plan, const GemmProblem& problem, const GemmArgs& args) {
  if (!is_fp8(problem.a)) return;
  set(plan, problem, CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, args.b_scales);
  set(plan, problem, CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, args.a_scales);
}

Plan make_plan(cublasLtHandle_t handle, const GemmProblem& problem, const GemmArgs& args) {
  Plan plan;
  cublasLtMatmulDesc_t operation = nullptr;
  OCTET_CUBLAS_CHECK(cublasLtMatmulDescCreate(&operation, CUBLAS_COMPUTE_32F, CUDA_R_32F),
                     to_string(problem));
  plan.operation.reset(operation);
  set(plan, problem, CUBLASLT_MATMUL_DESC_TRANSA, problem.b_transposed ? CUBLAS_OP_N : CUBLAS_OP_T);
  set(plan, problem, CUBLASLT_MATMUL_DESC_TRANSB, problem.a_transposed ? CUBLAS_OP_T : CUBLAS_OP_N);
  if (is_fp8(problem.a)) {
    set(plan, problem, CUBLASLT_MATMUL_DESC_FAST_ACCUM,
        static_cast<std::int8_t>(problem.accumulation == Accumulation::fast ? 1 : 0));
  }
  set_scales(plan, problem, args);
  const std::int64_t m = problem.m, n = problem.n, k = problem.k;
  plan.a = problem.a_transposed ? make_layout(problem, problem.a, k, m)
                                : make_layout(problem, problem.a, m, k);
  plan.b = problem.b_transposed ? make_layout(problem, problem.b, k, n)
                                : make_layout(problem, problem.b, n, k);
  plan.d = make_layout(problem, problem.d, m, n);

  const auto preference = make_preference(problem);
  cublasLtMatmulHeuristicResult_t found{};
  int count = 0;
  OCTET_CUBLAS_CHECK(
      cublasLtMatmulAlgoGetHeuristic(handle, operation, plan.b.get(), plan.a.get(), plan.d.get(),
                                     plan.d.get(), preference.get(), 1, &found, &count),
      to_string(problem));
  require(count > 0 && found.state == CUBLAS_STATUS_SUCCESS, to_string(problem),
          ": cublasLtMatmulAlgoGetHeuristic offers no algorithm");
  plan.algorithm = found.algo;
  return plan;
}

class CublasLtGemm final : public GemmBackend {
 public:
  explicit CublasLtGemm(const Context& ctx) : workspace_(ctx, kWorkspaceBytes) {
    set_device(ctx);
    cublasLtHandle_t handle = nullptr;
    OCTET_CUBLAS_CHECK(cublasLtCreate(&handle), "cuBLASLt on " + to_string(ctx.device()));
    handle_.reset(handle);
  }

  std::string name() const override { return "cublaslt"; }

  GemmSupport query(const GemmProblem& problem, const GemmDevice& device) const override {
    return query_cublaslt(problem, device);
  }

  void run(const Context& ctx, const GemmProblem& problem, const GemmArgs& args) override {
    set_device(ctx);
    auto found = plans_.find(problem);
    if (found == plans_.end()) {
      found = plans_.emplace(problem, make_plan(handle_.get(), problem, args)).first;
    }
    const Plan& plan = found->second;
    set_scales(plan, problem, args);
    const float one = 1.0f;
    const float zero = 0.0f;
    OCTET_CUBLAS_CHECK(
        cublasLtMatmul(handle_.get(), plan.operation.get(), &one, args.b, plan.b.get(), args.a,
                       plan.a.get(), &zero, args.d, plan.d.get(), args.d, plan.d.get(),
                       &plan.algorithm, workspace_.data(), kWorkspaceBytes, ctx.stream()),
        to_string(problem));
  }

 private:
  Buffer workspace_;
  Owned<cublasLtHandle_t> handle_;
  std::unordered_map<GemmProblem, Plan, GemmProblemHash> plans_;
};

}  // namespace

std::unique_ptr<GemmBackend> make_cublaslt_gemm(const Context& ctx) {
  return std::make_unique<CublasLtGemm>(ctx);
}

}  // namespace octet::detail::cuda
