// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "cuda/check.hpp"
#include "cuda/device/pack.cuh"
#include "cuda/device/vector8.cuh"
#include "cuda/gemm/cuda_gemm.hpp"

namespace octet::detail::cuda {
namespace {

constexpr int kThreads = 256;
/// Enough to fill any device; the rest in a loop.
constexpr std::int64_t kMaxBlocks = 4096;

/// Eight elements of a stored row at a time: they share a scale, whatever the granularity.
template <class In>
__global__ void __launch_bounds__(kThreads)
    operand_to_bf16_kernel(const GemmOperand operand, std::int64_t lines, std::int64_t length,
                           std::uint16_t* out, bool in_aligned, bool out_aligned) {
  const auto* in = static_cast<const std::uint8_t*>(operand.data);
  const std::int64_t groups = (length + 7) / 8;
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kThreads;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
       i < lines * groups; i += step) {
    const std::int64_t line = i / groups;
    const std::int64_t begin = (i - line * groups) * 8;
    const float scale = operand.transposed ? operand.scale_at(0, 0) : operand.scale_at(line, begin);
    float x[8];
    decode8<In>(load8<In>(in + line * operand.stride + begin, length - begin, in_aligned), x);
#pragma unroll
    for (float& value : x) value *= scale;
    store8<Element<DType::bf16>>(out + line * length + begin, encode8<Element<DType::bf16>>(x),
                                 length - begin, out_aligned);
  }
}

}  // namespace

void operand_to_bf16(const Context& ctx, const GemmOperand& operand, void* out) {
  set_device(ctx);
  const std::int64_t lines = operand.transposed ? operand.k() : operand.rows();
  const std::int64_t length = operand.transposed ? operand.rows() : operand.k();
  const std::int64_t groups = lines * ((length + 7) / 8);
  const std::int64_t blocks = std::min((groups + kThreads - 1) / kThreads, kMaxBlocks);
  const bool in_aligned = operand.stride % 8 == 0 && is_aligned16(operand.data);
  const bool out_aligned = length % 8 == 0 && is_aligned16(out);
  const auto launch = [&]<class In>(In) {
    operand_to_bf16_kernel<In><<<static_cast<unsigned>(blocks), kThreads, 0, ctx.stream()>>>(
        operand, lines, length, static_cast<std::uint16_t*>(out), in_aligned, out_aligned);
  };
  operand.dtype == DType::e4m3 ? launch(Element<DType::e4m3>{}) : launch(Element<DType::e5m2>{});
  OCTET_CUDA_CHECK(cudaGetLastError());
}

}  // namespace octet::detail::cuda
