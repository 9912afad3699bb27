// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <array>

#include "octet/ops/detail/sum_math.hpp"
#include "ops/cpu_ops.hpp"

namespace octet::detail::cpu {

void sum_scales(const Context&, const SumArgs& args) {
  for (std::int64_t i = 0; i < args.tensor_count; ++i) {
    const SumScale common = sum_scale(args, i);
    args.scales[i] = common.scale;
    if (!common.finite) *args.nonfinite = 1;
  }
}

void requantise_codes(const Context&, const SumArgs& args) {
  for (std::int64_t t = 0; t < args.tensor_count; ++t) {
    const SumTensor& tensor = args.tensors[t];
    const float factor = requantise_factor(args, t);
    std::array<std::uint8_t, 256> table{};
    for (std::size_t code = 0; code < table.size(); ++code) {
      table[code] = encode_e4m3(decode_e4m3(static_cast<std::uint8_t>(code)) * factor);
    }
    const auto* from = static_cast<const std::uint8_t*>(tensor.codes);
    std::uint8_t* to = args.packed + tensor.packed;
    for (std::int64_t i = 0; i < tensor.count; ++i) to[i] = table[from[i]];
  }
}

void add_codes(const Context&, std::uint8_t* own, std::int64_t count, const std::uint8_t* staging,
               std::int64_t stride, int ranks, int rank) {
#pragma omp parallel for if (count > 1 << 14)
  for (std::int64_t i = 0; i < count; ++i) {
    const auto code_of = [&](int r) { return r == rank ? own[i] : staging[r * stride + i]; };
    std::uint8_t sum = code_of(0);
    for (int r = 1; r < ranks; ++r) sum = add_code(sum, code_of(r));
    own[i] = sum;
  }
}

void take_sums(const Context&, const SumArgs& args) {
  std::uint64_t saturated = 0, values = 0;
  for (std::int64_t t = 0; t < args.tensor_count; ++t) {
    const SumTensor& tensor = args.tensors[t];
    const std::uint8_t* from = args.packed + tensor.packed;
    auto* to = static_cast<std::uint8_t*>(tensor.codes);
    std::uint64_t at_maximum = 0;
    std::uint32_t largest = 0;
    for (std::int64_t i = 0; i < tensor.count; ++i) {
      const std::uint32_t magnitude = from[i] & 0x7Fu;
      at_maximum += magnitude == E4M3Format::kMaxCode;
      largest = std::max(largest, magnitude);
      to[i] = from[i];
    }
    args.scales[t].amax = bits_float(decoded_bits(largest, args.scales[t].scale_inv));
    if (largest > E4M3Format::kMaxCode) *args.nonfinite = 1;
    args.saturated[t] += at_maximum;
    saturated += at_maximum;
    values += static_cast<std::uint64_t>(tensor.count);
  }
  if (args.auto_scale == nullptr) return;
  args.auto_scale->saturated += saturated;
  args.auto_scale->values += values;
}

void update_auto_scale(const Context&, AutoScaleState* state, int ranks) {
  update_mu(*state, ranks);
}

}  // namespace octet::detail::cpu
