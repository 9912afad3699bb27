// SPDX-License-Identifier: Apache-2.0
#include "octet/ops/detail/accumulate_math.hpp"
#include "ops/cpu_ops.hpp"

namespace octet::detail::cpu {
namespace {

template <class In, class Sum>
void add_wide(const AccumulateArgs& args) {
  const auto* in = args.in.as<const typename In::Storage>();
  auto* sum = args.sum.data.as<typename Sum::Storage>();
  const std::int64_t count = args.in.numel();
#pragma omp parallel for if (count > 65536)
  for (std::int64_t i = 0; i < count; ++i) {
    sum[i] = Sum::encode(accumulated(Sum::decode(sum[i]), 1.0f, In::decode(in[i])));
  }
}

template <class In>
void add_e4m3(const AccumulateArgs& args) {
  using Sum = Element<DType::e4m3>;
  const auto* in = args.in.as<const typename In::Storage>();
  auto* sum = args.sum.data.as<std::uint8_t>();
  const std::int64_t count = args.in.numel();
  const float scale_inv = args.sum.scale->scale_inv;
  std::uint32_t largest = magnitude_bits(kept_amax(args.sum.scale->amax));
#pragma omp parallel for reduction(max : largest) if (count > 65536)
  for (std::int64_t i = 0; i < count; ++i) {
    const std::uint32_t bits =
        magnitude_bits(accumulated(Sum::decode(sum[i]), scale_inv, In::decode(in[i])));
    largest = bits > largest ? bits : largest;
  }
  if (args.nonfinite != nullptr && !is_finite_bits(largest)) *args.nonfinite = 1;
  const TensorScale next = rescaled(*args.sum.scale, bits_float(largest), DType::e4m3);
#pragma omp parallel for if (count > 65536)
  for (std::int64_t i = 0; i < count; ++i) {
    const float value = accumulated(Sum::decode(sum[i]), scale_inv, In::decode(in[i]));
    sum[i] = Sum::encode(value * next.scale);
  }
  *args.sum.scale = next;
}

}  // namespace

void accumulate(const Context&, const AccumulateArgs& args) {
  for_dtype(args.in.dtype, [&]<class In>(In) {
    if (args.sum.data.dtype == DType::e4m3) return add_e4m3<In>(args);
    for_wide_sum(args.sum.data.dtype, [&]<class Sum>(Sum) { add_wide<In, Sum>(args); });
  });
}

}  // namespace octet::detail::cpu
