// SPDX-License-Identifier: Apache-2.0
// The rows of formats that have a path of their own in the update; prepare says which tensor takes
// which.
#pragma once

#include <cstdint>

#include "octet/ops/adamw.hpp"

namespace octet::detail::cuda {

/// Formats known at compile time.
struct AdamwRow {
  DType gradient;
  StateFormats formats;
};

enum class AdamwPath : std::uint32_t { general, o0, o1, o2, o2_transposed, o3, blocks };

constexpr AdamwRow kRowO0{DType::bf16, {.weight = WeightFormat::bf16}};
constexpr AdamwRow kRowO1{DType::e4m3, {.weight = WeightFormat::e4m3, .master = StateFormat::f16}};
constexpr AdamwRow kRowO2{
    DType::e4m3, {WeightFormat::e4m3, StateFormat::f16, StateFormat::e4m3, StateFormat::f16}};
constexpr AdamwRow kRowO2Transposed{
    DType::e4m3,
    {WeightFormat::e4m3_and_transpose, StateFormat::f16, StateFormat::e4m3, StateFormat::f16}};
/// O2 with the FP32 gradient of a sharded optimizer.
constexpr AdamwRow kRowO3{
    DType::f32, {WeightFormat::e4m3, StateFormat::f16, StateFormat::e4m3, StateFormat::f16}};
constexpr AdamwRow kRowBlocks{DType::e4m3,
                              {WeightFormat::e4m3, StateFormat::split, StateFormat::e4m3_block,
                               StateFormat::sqrt_e4m3_block}};

/// Gradient and formats of a tensor as one number.
constexpr std::uint32_t key_of(DType gradient, const StateFormats& f) {
  return static_cast<std::uint32_t>(gradient) | static_cast<std::uint32_t>(f.weight) << 4 |
         static_cast<std::uint32_t>(f.master) << 8 | static_cast<std::uint32_t>(f.m) << 12 |
         static_cast<std::uint32_t>(f.v) << 16;
}
template <AdamwRow R>
constexpr std::uint32_t kKeyOf = key_of(R.gradient, R.formats);

/// The path of a tensor. Paths want the usual: scales far from the ends of FP32's range, decoupled
/// weight decay, buffers aligned to 16 bytes (segments start at multiples of 128 elements in every
/// buffer, so theirs is that of the buffers).
__device__ inline AdamwPath path_of(const AdamwTensor& t, const AdamwTensorStep& s) {
  const auto bits = [](const void* data) { return reinterpret_cast<std::uintptr_t>(data); };
  const std::uintptr_t any = bits(t.gradient) | bits(t.master) | bits(t.m) | bits(t.v) |
                             bits(t.weight) | bits(t.weight_transposed);
  if (s.ordinary == 0 || s.group.l2 != 0.0f || any % 16 != 0) return AdamwPath::general;
  // From an f16 master the weight comes by a product in half precision.
  const float ratio = s.master_scale_inv * s.weight_scale;
  const bool f16_fits = ratio == 0x1p-7f || ratio == 0x1p-8f;
  switch (key_of(t.gradient_dtype, t.formats)) {
    case kKeyOf<kRowO0>: return AdamwPath::o0;
    case kKeyOf<kRowO1>: return f16_fits ? AdamwPath::o1 : AdamwPath::general;
    case kKeyOf<kRowO2>: return f16_fits ? AdamwPath::o2 : AdamwPath::general;
    case kKeyOf<kRowO3>: return f16_fits ? AdamwPath::o3 : AdamwPath::general;
    case kKeyOf<kRowO2Transposed>:
      // Whole vectors of a column; 32-bit offsets within a tile.
      return f16_fits && t.rows % 8 == 0 && t.columns <= (std::int64_t{1} << 23)
                 ? AdamwPath::o2_transposed
                 : AdamwPath::general;
    case kKeyOf<kRowBlocks>:
      // The path multiplies master_inv by 2^120, and that by weight_factor.
      return s.master_inv <= 0x1p6f && fabsf(s.group.weight_factor) <= 2.0f ? AdamwPath::blocks
                                                                            : AdamwPath::general;
    default: return AdamwPath::general;
  }
}

}  // namespace octet::detail::cuda
