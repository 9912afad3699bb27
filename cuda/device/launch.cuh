// SPDX-License-Identifier: Apache-2.0
// Launches on a context's stream that need an attribute.
#pragma once

#include <cstdint>

#include "backend.hpp"
#include "cuda/check.hpp"

namespace octet::detail::cuda {

template <class Args>
void launch_with(const cudaLaunchAttribute* attribute, const Context& ctx, void (*kernel)(Args),
                 std::int64_t blocks, unsigned threads, std::size_t shared_bytes,
                 const Args& args) {
  cudaLaunchConfig_t launch{};
  launch.gridDim = static_cast<unsigned>(blocks);
  launch.blockDim = threads;
  launch.dynamicSmemBytes = shared_bytes;
  launch.stream = ctx.stream();
  launch.attrs = const_cast<cudaLaunchAttribute*>(attribute);
  launch.numAttrs = attribute != nullptr ? 1 : 0;
  OCTET_CUDA_CHECK(cudaLaunchKernelEx(&launch, kernel, args));
}

/// What a kernel was compiled for (90 for sm_90), whatever the device is: what it may use of the
/// hardware was decided then. All kernels of the library are compiled for the same architectures,
/// so the driver is asked once for a context.
template <class Kernel>
int architecture_of(const Context& ctx, Kernel* kernel) {
  int& known = ctx.state()->kernel_architecture;
  if (known == 0) {
    cudaFuncAttributes attributes{};
    OCTET_CUDA_CHECK(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)));
    known = attributes.ptxVersion;
  }
  return known;
}

/// A kernel that calls wait_for_previous_kernel(): it may start while the one before still runs.
template <class Args>
void launch_dependent(const Context& ctx, void (*kernel)(Args), std::int64_t blocks,
                      unsigned threads, const Args& args) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  launch_with(architecture_of(ctx, kernel) >= 90 ? &attribute : nullptr, ctx, kernel, blocks,
              threads, 0, args);
}

/// A kernel whose blocks wait for one another: all run at once, or the launch fails.
template <class Args>
void launch_cooperative(const Context& ctx, void (*kernel)(Args), std::int64_t blocks,
                        unsigned threads, std::size_t shared_bytes, const Args& args) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  launch_with(&attribute, ctx, kernel, blocks, threads, shared_bytes, args);
}

}  // namespace octet::detail::cuda
