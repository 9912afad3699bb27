// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

#include "octet/core/detail/host_device.hpp"

namespace octet {

/// Element types of a tensor. FP8 and 16-bit values are held as their codes.
enum class DType : std::uint8_t { f32, bf16, f16, e4m3, e5m2 };

/// Bytes of one element.
OCTET_HD constexpr std::size_t size_of(DType dtype) {
  return dtype == DType::f32 ? 4 : (dtype == DType::bf16 || dtype == DType::f16) ? 2 : 1;
}

OCTET_HD constexpr bool is_fp8(DType dtype) { return dtype == DType::e4m3 || dtype == DType::e5m2; }

constexpr std::string_view name_of(DType dtype) {
  constexpr std::string_view kNames[] = {"f32", "bf16", "f16", "e4m3", "e5m2"};
  return kNames[static_cast<int>(dtype)];
}

}  // namespace octet
