// SPDX-License-Identifier: Apache-2.0
// A cuBLASLt problem without its pointers: descriptors, and the algorithms that can run it.
#pragma once

#include <cublasLt.h>

#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include "octet/gemm/gemm.hpp"

namespace octet::detail::cuda {

/// What the vendor recommends for Hopper; kernels that cut k want no more.
constexpr std::size_t kGemmWorkspaceBytes = std::size_t{32} << 20;

/// Throws octet::Error naming problem, statement and status unless it succeeded.
void check_cublas(cublasStatus_t status, const char* statement, const GemmProblem& problem);
#define OCTET_CUBLAS_CHECK(statement, problem) \
  ::octet::detail::cuda::check_cublas((statement), #statement, (problem))

struct DestroyCublas {
  void operator()(cublasLtHandle_t p) const { cublasLtDestroy(p); }
  void operator()(cublasLtMatmulDesc_t p) const { cublasLtMatmulDescDestroy(p); }
  void operator()(cublasLtMatrixLayout_t p) const { cublasLtMatrixLayoutDestroy(p); }
  void operator()(cublasLtMatmulPreference_t p) const { cublasLtMatmulPreferenceDestroy(p); }
};
template <class Pointer>
using OwnedCublas = std::unique_ptr<std::remove_pointer_t<Pointer>, DestroyCublas>;

/// In the library's terms D^T [n, m] = B A^T, so our B is its first operand, transposed unless ours
/// is, and our A is its second.
struct LtPlan {
  OwnedCublas<cublasLtMatmulDesc_t> operation;
  OwnedCublas<cublasLtMatrixLayout_t> a, b, c, d;
  cublasLtMatmulAlgo_t algorithm{};
  /// What the operation points at.
  struct {
    const void *a_scales = nullptr, *b_scales = nullptr, *bias = nullptr, *aux = nullptr,
               *d_scale = nullptr, *d_amax = nullptr;
  } pointers;
};

/// With the algorithm that the library takes for the fastest.
LtPlan make_plan(cublasLtHandle_t handle, const GemmProblem& problem);
/// Points the plan's operation at the scales, bias and aux of a call, where they are others than
/// those of the last one.
void set_pointers(LtPlan& plan, const GemmProblem& problem, const GemmArgs& args);

/// All algorithms worth timing, the one that the library takes for the fastest first: what the
/// heuristic offers for two sizes of workspace and two alignments, and of the first few families
/// (id, stages, inner shape) among that, other tiles, clusters and variants, of which it misses the
/// best now and then.
std::vector<cublasLtMatmulAlgo_t> find_algorithms(cublasLtHandle_t handle,
                                                  const GemmProblem& problem, const LtPlan& plan);
/// Whether the library takes the algorithm for the problem with the workspace there is.
bool is_runnable(cublasLtHandle_t handle, const LtPlan& plan,
                 const cublasLtMatmulAlgo_t& algorithm);

/// An algorithm as hexadecimal text, and back; false for what is no such text.
std::string to_text(const cublasLtMatmulAlgo_t& algorithm);
bool from_text(const std::string& text, cublasLtMatmulAlgo_t& algorithm);

}  // namespace octet::detail::cuda
