// SPDX-License-Identifier: Apache-2.0
#include "cuda/check.hpp"
#include "cuda/comm/marks.hpp"

namespace octet::detail::cuda {
namespace {

__device__ void store_system(std::uint64_t* word, std::uint64_t value) {
  asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(word), "l"(value) : "memory");
}

__global__ void begin_mark_kernel(DeviceMarks marks, std::uint64_t tag) {
  store_system(&marks.words->begun, tag | ++marks.counts->begun);
}

__global__ void end_mark_kernel(DeviceMarks marks) {
  store_system(&marks.words->ended, ++marks.counts->ended);
}

}  // namespace

void launch_begin_mark(const Context& ctx, const DeviceMarks& marks, std::uint64_t tag) {
  set_device(ctx);
  begin_mark_kernel<<<1, 1, 0, ctx.stream()>>>(marks, tag);
  OCTET_CUDA_CHECK(cudaGetLastError());
}

void launch_end_mark(const Context& ctx, const DeviceMarks& marks) {
  set_device(ctx);
  end_mark_kernel<<<1, 1, 0, ctx.stream()>>>(marks);
  OCTET_CUDA_CHECK(cudaGetLastError());
}

}  // namespace octet::detail::cuda
