// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include "octet/runtime/context.hpp"

namespace octet::detail::cuda {

/// Throws octet::Error naming the statement, the status and the place unless it is cudaSuccess.
inline void check_cuda(cudaError_t status, const char* statement, const char* file, int line) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // the next call starts clean unless the error is sticky
  fail(statement, " failed with ", cudaGetErrorName(status), " (", cudaGetErrorString(status),
       ") at ", file, ":", line);
}

#define OCTET_CUDA_CHECK(statement) \
  ::octet::detail::cuda::check_cuda((statement), #statement, __FILE_NAME__, __LINE__)

/// Makes the context's device the calling thread's current one. Nearly always it is already, and
/// asking costs the host less than saying so again.
inline void set_device(const Context& ctx) {
  int current = -1;
  OCTET_CUDA_CHECK(cudaGetDevice(&current));
  if (current != ctx.device().index) OCTET_CUDA_CHECK(cudaSetDevice(ctx.device().index));
}

}  // namespace octet::detail::cuda
