// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <array>
#include <cstring>

#include "gemm/cpu_gemm.hpp"

namespace octet::detail::cpu {
namespace {

template <DType D>
constexpr std::array<float, 256> decode_table() {
  std::array<float, 256> table{};
  for (std::size_t i = 0; i < 256; ++i) table[i] = Element<D>::decode(static_cast<std::uint8_t>(i));
  return table;
}
constexpr std::array<float, 256> kE4M3 = decode_table<DType::e4m3>();
constexpr std::array<float, 256> kE5M2 = decode_table<DType::e5m2>();

}  // namespace

void decode_run(const GemmOperand& operand, std::int64_t line, std::int64_t begin,
                std::int64_t count, float* out) {
  const std::int64_t first = line * operand.stride + begin;
  if (operand.dtype == DType::f32) {
    std::memcpy(out, static_cast<const float*>(operand.data) + first,
                static_cast<std::size_t>(count) * sizeof(float));
  } else if (is_fp8(operand.dtype)) {
    const std::uint8_t* codes = static_cast<const std::uint8_t*>(operand.data) + first;
    const float* table = operand.dtype == DType::e4m3 ? kE4M3.data() : kE5M2.data();
    for (std::int64_t i = 0; i < count; ++i) out[i] = table[codes[i]];
  } else {
    const std::uint16_t* codes = static_cast<const std::uint16_t*>(operand.data) + first;
    if (operand.dtype == DType::bf16) {
      for (std::int64_t i = 0; i < count; ++i) out[i] = decode_bf16(codes[i]);
    } else {
      for (std::int64_t i = 0; i < count; ++i) out[i] = decode_f16(codes[i]);
    }
  }
}

void operand_to_bf16(const Context&, const GemmOperand& operand, void* out) {
  constexpr std::int64_t kRun = 32;  // elements with one scale, whatever the granularity
  const std::int64_t lines = operand.transposed ? operand.k() : operand.rows();
  const std::int64_t length = operand.transposed ? operand.rows() : operand.k();
#pragma omp parallel for if (lines * length > 65536)
  for (std::int64_t line = 0; line < lines; ++line) {
    auto* const to = static_cast<std::uint16_t*>(out) + line * length;
    for (std::int64_t begin = 0; begin < length; begin += kRun) {
      const std::int64_t count = std::min(kRun, length - begin);
      const float scale =
          operand.transposed ? operand.scale_at(0, 0) : operand.scale_at(line, begin);
      float run[kRun];
      decode_run(operand, line, begin, count, run);
      for (std::int64_t i = 0; i < count; ++i) to[begin + i] = encode_bf16(run[i] * scale);
    }
  }
}

}  // namespace octet::detail::cpu
