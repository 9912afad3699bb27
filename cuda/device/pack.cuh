// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace octet::detail::cuda {

/// 16 bytes of a type: the unit of all vector access.
template <class T>
struct alignas(16) Pack16 {
  static constexpr int kCount = 16 / static_cast<int>(sizeof(T));
  T values[kCount];
};

inline bool is_aligned16(const void* data) {
  return reinterpret_cast<std::uintptr_t>(data) % 16 == 0;
}

}  // namespace octet::detail::cuda
