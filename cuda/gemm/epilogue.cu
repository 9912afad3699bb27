// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "cuda/check.hpp"
#include "cuda/device/pack.cuh"
#include "cuda/device/reduce.cuh"
#include "cuda/device/vector8.cuh"
#include "cuda/gemm/cuda_gemm.hpp"
#include "octet/gemm/detail/epilogue_math.hpp"

namespace octet::detail::cuda {
namespace {

constexpr int kThreads = 256;
/// Enough to fill any device; the rest in a loop.
constexpr std::int64_t kMaxBlocks = 4096;

/// A matrix whose rows are read and written eight elements at a time.
struct Rows {
  void* data = nullptr;
  DType dtype = DType::f32;
  std::int64_t stride = 0;
  bool aligned = false;  ///< every eighth element of every row to its vector

  __device__ void load(std::int64_t row, std::int64_t column, std::int64_t left,
                       float (&x)[8]) const {
    for_dtype(dtype, [&]<class E>(E) {
      const auto* from = static_cast<const typename E::Storage*>(data) + row * stride + column;
      decode8<E>(load8<E>(from, left, aligned), x);
    });
  }
  __device__ void store(std::int64_t row, std::int64_t column, std::int64_t left,
                        const float (&x)[8]) const {
    for_dtype(dtype, [&]<class E>(E) {
      auto* to = static_cast<typename E::Storage*>(data) + row * stride + column;
      store8<E>(to, encode8<E>(x), left, aligned);
    });
  }
};

Rows rows_of(const void* data, DType dtype, std::int64_t stride) {
  return {const_cast<void*>(data), dtype, stride, stride % 8 == 0 && is_aligned16(data)};
}

struct Epilogue {
  GemmProblem problem;
  Rows sums, d, bias, aux;
  const float* d_scale;
  float* d_amax;
};

/// Eight elements from `column` on, of which `left` exist. Returns the bits of the largest |value|.
__device__ std::uint32_t finish(const Epilogue& e, std::int64_t row, std::int64_t column,
                                std::int64_t left) {
  float sum[8] = {}, before[8] = {}, bias[8] = {}, aux[8] = {};
  if (e.sums.data != nullptr) e.sums.load(row, column, left, sum);
  if (e.problem.accumulate) e.d.load(row, column, left, before);
  if (e.problem.bias) e.bias.load(0, column, left, bias);
  const bool reads_aux = e.problem.activation == Activation::dgelu;
  if (reads_aux) e.aux.load(row, column, left, aux);
  const bool fp8 = is_fp8(e.problem.d);
  const float scale = fp8 ? *e.d_scale : 1.0f;
  std::uint32_t largest = 0;
  float value[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    sum[i] = one_nan(sum_before_activation(e.problem, sum[i], before[i], bias[i]));
    value[i] = one_nan(activated(e.problem.activation, sum[i], aux[i]));
    if (i < left) largest = max(largest, magnitude_bits(value[i]));
    if (fp8) value[i] = one_nan(value[i] * scale);
  }
  if (e.problem.aux && !reads_aux) e.aux.store(row, column, left, sum);
  e.d.store(row, column, left, value);
  return largest;
}

__global__ void __launch_bounds__(kThreads) epilogue_kernel(const Epilogue e) {
  const std::int64_t groups = (e.problem.n + 7) / 8;
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kThreads;
  std::uint32_t largest = 0;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
       i < e.problem.m * groups; i += step) {
    const std::int64_t row = i / groups;
    const std::int64_t column = (i - row * groups) * 8;
    largest = max(largest, finish(e, row, column, e.problem.n - column));
  }
  if (e.d_amax != nullptr) block_atomic_max(largest, reinterpret_cast<std::uint32_t*>(e.d_amax));
}

}  // namespace

void epilogue(const Context& ctx, const GemmProblem& problem, const float* sums,
              const GemmArgs& args) {
  set_device(ctx);
  const Epilogue e{
      problem, rows_of(sums, DType::f32, problem.n), rows_of(args.d, problem.d, d_stride(problem)),
      // One row; where it starts is all that counts.
      rows_of(args.bias, problem.bias_type, 0), rows_of(args.aux, problem.aux_type, problem.n),
      args.d_scale, is_fp8(problem.d) ? args.d_amax : nullptr};
  if (e.d_amax != nullptr) {
    OCTET_CUDA_CHECK(cudaMemsetAsync(e.d_amax, 0, sizeof(float), ctx.stream()));
  }
  const std::int64_t groups = problem.m * ((problem.n + 7) / 8);
  const std::int64_t blocks = std::min((groups + kThreads - 1) / kThreads, kMaxBlocks);
  epilogue_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, ctx.stream()>>>(e);
  OCTET_CUDA_CHECK(cudaGetLastError());
}

}  // namespace octet::detail::cuda
