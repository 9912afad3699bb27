// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

#include "octet/core/tensor_view.hpp"

namespace octet::detail {

/// Whether two runs of bytes share one.
inline bool overlap(const void* a, std::size_t a_bytes, const void* b, std::size_t b_bytes) {
  const auto begin_a = reinterpret_cast<std::uintptr_t>(a);
  const auto begin_b = reinterpret_cast<std::uintptr_t>(b);
  return begin_a < begin_b + b_bytes && begin_b < begin_a + a_bytes;
}
inline bool overlap(const TensorView& a, const TensorView& b) {
  return overlap(a.data, a.bytes(), b.data, b.bytes());
}

}  // namespace octet::detail
