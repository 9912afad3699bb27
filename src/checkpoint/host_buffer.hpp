// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>

#include "octet/runtime/tensor.hpp"

namespace octet {

/// Pieces in which state goes between a device and a file.
inline constexpr std::size_t kCopyBytes = std::size_t{16} << 20;

/// Host memory that the context's device copies to and from at full speed: pinned on CUDA.
inline Buffer host_buffer(const Context& ctx, std::size_t bytes) {
  return {ctx.with_allocator(pinned_host_allocator(ctx.device())), bytes};
}

}  // namespace octet
