// SPDX-License-Identifier: Apache-2.0
// Sums over micro-batches, eight elements at a time.
#include "cuda/ops/cast_launch.cuh"
#include "cuda/ops/cuda_ops.hpp"
#include "octet/ops/detail/accumulate_math.hpp"

namespace octet::detail::cuda {
namespace {

using namespace casts;
using E4m3 = Element<DType::e4m3>;

struct Addends {
  const void* in;
  void* sum;
  std::int64_t count;
  TensorScale* scale;
  bool in_aligned, sum_aligned;
};

/// Eight elements of both, decoded and added.
template <class In, class Sum>
__device__ void add8(const Addends& a, std::int64_t at, float scale_inv, float (&x)[8]) {
  const std::int64_t left = a.count - at;
  float stored[8];
  decode8<In>(load8<In>(static_cast<const typename In::Storage*>(a.in) + at, left, a.in_aligned),
              x);
  decode8<Sum>(
      load8<Sum>(static_cast<const typename Sum::Storage*>(a.sum) + at, left, a.sum_aligned),
      stored);
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = accumulated(stored[i], scale_inv, x[i]);
}

/// Calls f(first of eight elements) for all that fall to this thread.
template <class F>
__device__ void for_vectors(std::int64_t count, const F& f) {
  const std::int64_t threads = std::int64_t{gridDim.x} * kThreads;
  for (std::int64_t at = (std::int64_t{blockIdx.x} * kThreads + threadIdx.x) * 8; at < count;
       at += threads * 8) {
    f(at);
  }
}

template <class In, class Sum>
__global__ void __launch_bounds__(kThreads) accumulate_kernel(Addends a) {
  for_vectors(a.count, [&](std::int64_t at) {
    float x[8];
    add8<In, Sum>(a, at, 1.0f, x);
    store8<Sum>(static_cast<typename Sum::Storage*>(a.sum) + at, encode8<Sum>(x), a.count - at,
                a.sum_aligned);
  });
}

__global__ void begin_amax_kernel(TensorScale* scale) { scale->amax = kept_amax(scale->amax); }

/// The amax of the sums, beside the scale that the stored ones still have.
template <class In>
__global__ void __launch_bounds__(kThreads) accumulated_amax_kernel(Addends a) {
  const float scale_inv = a.scale->scale_inv;
  std::uint32_t largest = 0;
  for_vectors(a.count, [&](std::int64_t at) {
    float x[8];
    add8<In, E4m3>(a, at, scale_inv, x);
    largest = max(largest, largest_of(x));
  });
  block_atomic_max(largest, amax_word(a.scale));
}

/// The sums with the scale that follows from that amax. It stays unwritten as long as a block may
/// need the old one.
template <class In>
__global__ void __launch_bounds__(kThreads) accumulate_e4m3_kernel(Addends a) {
  const TensorScale old = *a.scale;
  const float scale = rescaled(old, old.amax, DType::e4m3).scale;
  for_vectors(a.count, [&](std::int64_t at) {
    float x[8];
    add8<In, E4m3>(a, at, old.scale_inv, x);
#pragma unroll
    for (float& value : x) value *= scale;
    store8<E4m3>(static_cast<std::uint8_t*>(a.sum) + at, encode8<E4m3>(x), a.count - at,
                 a.sum_aligned);
  });
}

__global__ void rescale_kernel(TensorScale* scale, std::uint32_t* nonfinite) {
  const TensorScale old = *scale;
  if (nonfinite != nullptr && !is_finite_bits(magnitude_bits(old.amax))) atomicOr(nonfinite, 1u);
  *scale = rescaled(old, old.amax, DType::e4m3);
}

template <class In>
void launch_e4m3(const Context& ctx, const Addends& a, std::uint32_t* nonfinite) {
  const unsigned blocks = blocks_for(a.count);
  begin_amax_kernel<<<1, 1, 0, ctx.stream()>>>(a.scale);
  accumulated_amax_kernel<In><<<blocks, kThreads, 0, ctx.stream()>>>(a);
  accumulate_e4m3_kernel<In><<<blocks, kThreads, 0, ctx.stream()>>>(a);
  rescale_kernel<<<1, 1, 0, ctx.stream()>>>(a.scale, nonfinite);
}

}  // namespace

void accumulate(const Context& ctx, const AccumulateArgs& args) {
  set_device(ctx);
  const TensorView& sum = args.sum.data;
  const Addends a{args.in.data,
                  sum.data,
                  sum.numel(),
                  args.sum.scale,
                  is_aligned_to_vectors(args.in.data, size_of(args.in.dtype)),
                  is_aligned_to_vectors(sum.data, size_of(sum.dtype))};
  for_wide_dtype(args.in.dtype, [&]<class In>(In) {
    if (sum.dtype == DType::e4m3) return launch_e4m3<In>(ctx, a, args.nonfinite);
    for_wide_sum(sum.dtype, [&]<class Sum>(Sum) {
      accumulate_kernel<In, Sum><<<blocks_for(a.count), kThreads, 0, ctx.stream()>>>(a);
    });
  });
  OCTET_CUDA_CHECK(cudaGetLastError());
}

}  // namespace octet::detail::cuda
