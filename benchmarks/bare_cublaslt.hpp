// SPDX-License-Identifier: Apache-2.0
// cuBLASLt alone, as the rival of gemm_bench and linear_bench: descriptors made once, every
// algorithm that an enumeration finds timed, nothing but cublasLtMatmul() in a call. Shares no code
// with the library.
#pragma once

#include <cublasLt.h>

#include <cstdint>

#include "cuda_timing.hpp"
#include "octet/runtime/tensor.hpp"

namespace bench {

/// Row-major D[m, n] = A[m, k] B[n, k]^T; a transposed operand is stored as [k, m] or [k, n]. FP8
/// operands have a scale each.
struct BareProblem {
  std::int64_t m = 0, n = 0, k = 0;
  cudaDataType_t a = CUDA_R_8F_E4M3, b = CUDA_R_8F_E4M3, d = CUDA_R_16BF;
  bool fast = false;
  bool accumulate = false;
  bool a_transposed = false, b_transposed = false;
};

struct BarePointers {
  const void* a;
  const void* b;
  const float* a_scale;  ///< null where operands are not FP8
  const float* b_scale;
  void* d;
};

class BareGemm {
 public:
  BareGemm(const octet::Context& ctx, const BareProblem& problem, const BarePointers& pointers);
  ~BareGemm();
  BareGemm(const BareGemm&) = delete;
  BareGemm& operator=(const BareGemm&) = delete;

  /// Times all algorithms, some seconds long, and keeps the fastest. Returns how many there were.
  int search();
  void run() const;
  /// As one must who has other operands in every call: sets the scales' pointers first.
  void run_anew() const;

 private:
  void set_scales() const;
  bool try_run(const cublasLtMatmulAlgo_t& algorithm) const;
  double time_of(const cublasLtMatmulAlgo_t& algorithm, int runs) const;
  std::vector<cublasLtMatmulAlgo_t> enumerate() const;
  void add_variants(const cublasLtMatmulAlgo_t& base, std::uint32_t tile,
                    std::vector<cublasLtMatmulAlgo_t>& list) const;

  octet::Context ctx_;
  BareProblem problem_;
  BarePointers pointers_;
  octet::Buffer workspace_;
  cublasLtHandle_t handle_ = nullptr;
  cublasLtMatmulDesc_t operation_ = nullptr;
  cublasLtMatrixLayout_t a_ = nullptr, b_ = nullptr, d_ = nullptr;
  cublasLtMatmulAlgo_t best_{};
};

}  // namespace bench
