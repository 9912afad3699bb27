// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>

struct CUstream_st;

namespace octet {

/// Where a Context takes its memory from. Empty means the library's own: aligned operator new on a
/// CPU, cudaMalloc on CUDA.
struct Allocator {
  /// Memory of at least `bytes` bytes, aligned to 256, usable on `stream` from now on. Throws or
  /// returns null when there is none; the library then throws octet::Error with the byte count.
  void* (*allocate)(std::size_t bytes, CUstream_st* stream, void* user) = nullptr;
  /// Takes it back; work already enqueued on `stream` may still use it.
  void (*deallocate)(void* data, std::size_t bytes, CUstream_st* stream, void* user) = nullptr;
  void* user = nullptr;
};

/// Bytes asked of the allocator and not yet returned, and the most there have been at one time.
struct MemoryUse {
  std::size_t current = 0;
  std::size_t peak = 0;
};

}  // namespace octet
