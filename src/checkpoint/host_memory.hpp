// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>

#include "backend.hpp"

namespace octet {

/// Host memory that the device copies to and from at full speed: pinned on CUDA.
class HostMemory {
 public:
  HostMemory(const Context& ctx, std::size_t bytes) : ctx_(ctx), bytes_(bytes) {
    void* on_device = nullptr;
    if (bytes > 0) data_ = detail::backend_of(ctx).allocate_mapped(ctx, bytes, &on_device);
  }
  ~HostMemory() {
    if (data_ != nullptr) detail::backend_of(ctx_).deallocate_mapped(ctx_, data_);
  }
  HostMemory(const HostMemory&) = delete;
  HostMemory& operator=(const HostMemory&) = delete;

  std::byte* data() const { return static_cast<std::byte*>(data_); }
  std::size_t bytes() const { return bytes_; }

 private:
  Context ctx_;
  std::size_t bytes_;
  void* data_ = nullptr;
};

/// Pieces in which state goes between a device and a file.
inline constexpr std::size_t kCopyBytes = std::size_t{16} << 20;

}  // namespace octet
