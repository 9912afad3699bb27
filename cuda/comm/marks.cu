// SPDX-License-Identifier: Apache-2.0
#include "cuda/check.hpp"
#include "cuda/comm/marks.cuh"

namespace octet::detail::cuda {
namespace {

__global__ void begin_mark_kernel(DeviceMarks marks, std::uint64_t tag) { mark_begin(marks, tag); }

__global__ void end_mark_kernel(DeviceMarks marks) { mark_end(marks); }

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
