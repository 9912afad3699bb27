// SPDX-License-Identifier: Apache-2.0
// Programmatic dependent launch: a kernel starts while the one before it in the stream still runs
// and waits, when it needs to, until that one has ended.
#pragma once

namespace octet::detail::cuda {

/// Lets the next kernel of the stream start, if it was launched as a dependent one.
__device__ inline void allow_next_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

/// Waits until the kernel before has ended and its memory is visible. Before this a dependent
/// kernel may touch only what no kernel writes.
__device__ inline void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace octet::detail::cuda
