// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "cuda/check.hpp"
#include "cuda/device/reduce.cuh"
#include "cuda/device/vector8.cuh"
#include "cuda/ops/cuda_ops.hpp"
#include "octet/ops/detail/sum_math.hpp"

namespace octet::detail::cuda {
namespace {

using Code = Element<DType::e4m3>;

constexpr unsigned kThreads = 256;
// Blocks in flight over all tensors, and for one; where a tensor is small the others idle.
constexpr std::int64_t kTargetBlocks = 2048;
constexpr std::int64_t kMinBlocksPerTensor = 8;
constexpr std::int64_t kMaxGridY = 65535;

dim3 grid_for(std::int64_t tensors) {
  const std::int64_t y = std::min(tensors, kMaxGridY);
  const std::int64_t x = std::max(kMinBlocksPerTensor, (kTargetBlocks + y - 1) / y);
  return {static_cast<unsigned>(x), static_cast<unsigned>(y)};
}

unsigned blocks_for(std::int64_t threads) {
  return static_cast<unsigned>((threads + kThreads - 1) / kThreads);
}

__device__ std::int64_t grid_thread() { return std::int64_t{blockIdx.x} * kThreads + threadIdx.x; }
__device__ std::int64_t grid_threads() { return std::int64_t{gridDim.x} * kThreads; }

__device__ bool are_aligned8(const void* a, const void* b) {
  return (reinterpret_cast<std::uintptr_t>(a) | reinterpret_cast<std::uintptr_t>(b)) % 8 == 0;
}

__global__ void __launch_bounds__(kThreads) sum_scales_kernel(SumArgs args) {
  const std::int64_t i = grid_thread();
  if (i >= args.tensor_count) return;
  const SumScale common = sum_scale(args, i);
  args.scales[i] = common.scale;
  if (!common.finite) atomicOr(args.nonfinite, 1u);
}

__global__ void __launch_bounds__(kThreads) requantise_kernel(SumArgs args) {
  for (std::int64_t t = blockIdx.y; t < args.tensor_count; t += gridDim.y) {
    const SumTensor tensor = args.tensors[t];
    const float factor = requantise_factor(args, t);
    const auto* from = static_cast<const std::uint8_t*>(tensor.codes);
    std::uint8_t* to = args.packed + tensor.packed;
    const bool aligned = are_aligned8(from, to);
    for (std::int64_t i = 8 * grid_thread(); i < tensor.count; i += 8 * grid_threads()) {
      float x[8];
      decode8(load8<Code>(from + i, tensor.count - i, aligned), x);
#pragma unroll
      for (float& value : x) value *= factor;
      store8(to + i, encode8<Code>(x), tensor.count - i, aligned);
    }
  }
}

struct AddArgs {
  std::uint8_t* own;
  std::int64_t count;
  const std::uint8_t* staging;
  std::int64_t stride;
  int ranks, rank;
  bool aligned;
};

__global__ void __launch_bounds__(kThreads) add_codes_kernel(AddArgs args) {
  for (std::int64_t i = 8 * grid_thread(); i < args.count; i += 8 * grid_threads()) {
    const std::int64_t left = args.count - i;
    Vector8<Code> sum{};
    for (int r = 0; r < args.ranks; ++r) {
      const std::uint8_t* from = (r == args.rank ? args.own : args.staging + r * args.stride) + i;
      const Vector8<Code> term = load8<Code>(from, left, args.aligned);
      if (r == 0) {
        sum = term;
        continue;
      }
      float a[8], b[8];
      decode8(sum, a);
      decode8(term, b);
#pragma unroll
      for (int k = 0; k < 8; ++k) a[k] += b[k];  // and rounded: add_code() eight times
      sum = encode8<Code>(a);
    }
    store8(args.own + i, sum, left, args.aligned);
  }
}

/// The sum over a block, in thread 0. Every thread must call it.
__device__ std::uint64_t block_sum(std::uint64_t value) {
  __shared__ unsigned long long total;
  if (threadIdx.x == 0) total = 0;
  __syncthreads();
  if (value != 0) atomicAdd(&total, value);
  __syncthreads();
  const std::uint64_t sum = total;
  __syncthreads();
  return sum;
}

__device__ void add_to(std::uint64_t* counter, std::uint64_t value) {
  if (value != 0) atomicAdd(reinterpret_cast<unsigned long long*>(counter), value);
}

__device__ void take_tensor(const SumArgs& args, const SumTensor& tensor, std::int64_t t) {
  constexpr std::uint32_t kMaxima = 0x01010101u * E4M3Format::kMaxCode;
  const std::uint8_t* from = args.packed + tensor.packed;
  auto* to = static_cast<std::uint8_t*>(tensor.codes);
  const bool aligned = are_aligned8(from, to);
  std::uint64_t at_maximum = 0;
  std::uint32_t largest4 = 0;
  for (std::int64_t i = 8 * grid_thread(); i < tensor.count; i += 8 * grid_threads()) {
    const Vector8<Code> codes = load8<Code>(from + i, tensor.count - i, aligned);
#pragma unroll
    for (std::uint32_t word : codes.word) {
      const std::uint32_t magnitudes = word & 0x7F7F7F7Fu;
      at_maximum += static_cast<unsigned>(__popc(__vcmpeq4(magnitudes, kMaxima)) / 8);
      largest4 = __vmaxu4(largest4, magnitudes);
    }
    store8(to + i, codes, tensor.count - i, aligned);
  }
  std::uint32_t largest = 0;
#pragma unroll
  for (int byte = 0; byte < 4; ++byte) largest = max(largest, largest4 >> (8 * byte) & 0xFFu);
  largest = block_max(largest);
  at_maximum = block_sum(at_maximum);
  if (threadIdx.x != 0) return;
  TensorScale& scale = args.scales[t];
  const std::uint32_t bits = decoded_bits(largest, scale.scale_inv);
  if (bits != 0) atomicMax(reinterpret_cast<std::uint32_t*>(&scale.amax), bits);
  if (largest > E4M3Format::kMaxCode) atomicOr(args.nonfinite, 1u);
  add_to(args.saturated + t, at_maximum);
  if (args.auto_scale == nullptr) return;
  add_to(&args.auto_scale->saturated, at_maximum);
  if (blockIdx.x == 0) {
    add_to(&args.auto_scale->values, static_cast<std::uint64_t>(tensor.count));
  }
}

__global__ void __launch_bounds__(kThreads) take_sums_kernel(SumArgs args) {
  for (std::int64_t t = blockIdx.y; t < args.tensor_count; t += gridDim.y) {
    take_tensor(args, args.tensors[t], t);
  }
}

__global__ void update_kernel(AutoScaleState* state, int ranks) { update_mu(*state, ranks); }

}  // namespace

void sum_scales(const Context& ctx, const SumArgs& args) {
  set_device(ctx);
  sum_scales_kernel<<<blocks_for(args.tensor_count), kThreads, 0, ctx.stream()>>>(args);
  OCTET_CUDA_CHECK(cudaGetLastError());
}

void requantise_codes(const Context& ctx, const SumArgs& args) {
  set_device(ctx);
  requantise_kernel<<<grid_for(args.tensor_count), kThreads, 0, ctx.stream()>>>(args);
  OCTET_CUDA_CHECK(cudaGetLastError());
}

void add_codes(const Context& ctx, std::uint8_t* own, std::int64_t count,
               const std::uint8_t* staging, std::int64_t stride, int ranks, int rank) {
  set_device(ctx);
  const auto bits = reinterpret_cast<std::uintptr_t>(own) |
                    reinterpret_cast<std::uintptr_t>(staging) | static_cast<std::uintptr_t>(stride);
  const AddArgs args = {own, count, staging, stride, ranks, rank, bits % 8 == 0};
  const std::int64_t blocks = std::min<std::int64_t>(blocks_for((count + 7) / 8), kTargetBlocks);
  add_codes_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, ctx.stream()>>>(args);
  OCTET_CUDA_CHECK(cudaGetLastError());
}

void take_sums(const Context& ctx, const SumArgs& args) {
  set_device(ctx);
  take_sums_kernel<<<grid_for(args.tensor_count), kThreads, 0, ctx.stream()>>>(args);
  OCTET_CUDA_CHECK(cudaGetLastError());
}

void update_auto_scale(const Context& ctx, AutoScaleState* state, int ranks) {
  set_device(ctx);
  update_kernel<<<1, 1, 0, ctx.stream()>>>(state, ranks);
  OCTET_CUDA_CHECK(cudaGetLastError());
}

}  // namespace octet::detail::cuda
