// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string_view>

#include "octet/core/block_scales.hpp"

namespace octet {

/// How a state of the optimizer (master weight, first or second moment) is stored.
enum class StateFormat : std::uint8_t {
  f32,
  bf16,
  f16,              ///< one scale for the tensor
  e4m3,             ///< one scale for the tensor
  e4m3_block,       ///< an FP32 scale for every 128 consecutive elements
  sqrt_e4m3_block,  ///< of the square root, an FP32 scale for every 128 consecutive elements
  split,            ///< a master weight as the E4M3 compute weight and an 8-bit remainder
};

/// What the update writes for the forward and backward pass.
enum class WeightFormat : std::uint8_t {
  none,                ///< nothing: whoever needs the weight casts the master
  f32,                 ///< the FP32 master itself is the weight
  bf16,                ///< rounded from the master
  e4m3,                ///< rounded from the master, one scale for the tensor
  e4m3_and_transpose,  ///< the same, and once more with rows and columns exchanged
  // Of matrices, with the scales that block_quantize makes of the stored master (block_scales.hpp):
  e4m3_row_block,           ///< a scale for every 128 of a row
  e4m3_tile,                ///< a scale for every 128 rows by 128 columns
  e4m3_tile_and_transpose,  ///< the same, codes and scales once more transposed
};

/// The formats that exist, in any combination: checks, messages, documentation and tests go by
/// these lists. Two rules bind them: a weight in f32 is its own master, so the master is f32; a
/// split master is half an E4M3 weight of one scale, so the weight is e4m3 or e4m3_and_transpose.
inline constexpr DType kGradientFormats[] = {DType::f32, DType::bf16, DType::e4m3};
inline constexpr WeightFormat kWeightFormats[] = {WeightFormat::none,
                                                  WeightFormat::f32,
                                                  WeightFormat::bf16,
                                                  WeightFormat::e4m3,
                                                  WeightFormat::e4m3_and_transpose,
                                                  WeightFormat::e4m3_row_block,
                                                  WeightFormat::e4m3_tile,
                                                  WeightFormat::e4m3_tile_and_transpose};
inline constexpr StateFormat kMasterFormats[] = {StateFormat::f32, StateFormat::f16,
                                                 StateFormat::split};
inline constexpr StateFormat kMFormats[] = {StateFormat::f32, StateFormat::bf16, StateFormat::e4m3,
                                            StateFormat::e4m3_block};
inline constexpr StateFormat kVFormats[] = {StateFormat::f32, StateFormat::bf16, StateFormat::f16,
                                            StateFormat::sqrt_e4m3_block};

/// Elements that share a scale of a block format, counted from the start of the tensor.
inline constexpr std::int64_t kStateBlock = 128;

/// Storage formats of one parameter's weight and optimizer.
struct StateFormats {
  WeightFormat weight = WeightFormat::f32;
  StateFormat master = StateFormat::f32;
  StateFormat m = StateFormat::f32;
  StateFormat v = StateFormat::f32;
  bool operator==(const StateFormats&) const = default;
};

/// Bytes of one element, block scales not counted. Of a split master the remainder alone.
OCTET_HD constexpr std::size_t size_of(StateFormat format) {
  switch (format) {
    case StateFormat::f32: return 4;
    case StateFormat::bf16:
    case StateFormat::f16: return 2;
    default: return 1;
  }
}

OCTET_HD constexpr bool is_block(StateFormat format) {
  return format == StateFormat::e4m3_block || format == StateFormat::sqrt_e4m3_block;
}

/// FP32 scales that a state of this many elements has beside its codes.
OCTET_HD constexpr std::int64_t block_count(StateFormat format, std::int64_t elements) {
  return is_block(format) ? (elements + kStateBlock - 1) / kStateBlock : 0;
}

/// Bytes of a state of this many elements, block scales included.
constexpr std::size_t state_bytes(StateFormat format, std::int64_t elements) {
  return static_cast<std::size_t>(elements) * size_of(format) +
         static_cast<std::size_t>(block_count(format, elements)) * sizeof(float);
}

/// Whether the weight is an E4M3 matrix with a scale for every block.
OCTET_HD constexpr bool has_block_scales(WeightFormat format) {
  return format == WeightFormat::e4m3_row_block || format == WeightFormat::e4m3_tile ||
         format == WeightFormat::e4m3_tile_and_transpose;
}

/// What of such a weight shares a scale.
OCTET_HD constexpr Granularity granularity_of(WeightFormat format) {
  return format == WeightFormat::e4m3_row_block ? Granularity::row_block
         : has_block_scales(format)             ? Granularity::tile
                                                : Granularity::tensor;
}

/// Whether the weight is E4M3 with one scale.
OCTET_HD constexpr bool has_tensor_scale(WeightFormat format) {
  return format == WeightFormat::e4m3 || format == WeightFormat::e4m3_and_transpose;
}

/// Whether the update also writes the transposed weight.
OCTET_HD constexpr bool is_transposed(WeightFormat format) {
  return format == WeightFormat::e4m3_and_transpose ||
         format == WeightFormat::e4m3_tile_and_transpose;
}

/// The format that has the weight alone.
OCTET_HD constexpr WeightFormat without_transpose(WeightFormat format) {
  return format == WeightFormat::e4m3_and_transpose        ? WeightFormat::e4m3
         : format == WeightFormat::e4m3_tile_and_transpose ? WeightFormat::e4m3_tile
                                                           : format;
}

/// Whether the weight must be that of a matrix.
OCTET_HD constexpr bool needs_matrix(WeightFormat format) {
  return has_block_scales(format) || is_transposed(format);
}

OCTET_HD constexpr bool is_e4m3(WeightFormat format) {
  return has_tensor_scale(format) || has_block_scales(format);
}

/// Element type of a weight; of `none`, which has no elements, f32.
OCTET_HD constexpr DType dtype_of(WeightFormat format) {
  return is_e4m3(format) ? DType::e4m3 : format == WeightFormat::bf16 ? DType::bf16 : DType::f32;
}

constexpr std::string_view name_of(StateFormat format) {
  constexpr std::string_view kNames[] = {
      "f32", "bf16", "f16", "e4m3", "e4m3_block", "sqrt_e4m3_block", "split"};
  return kNames[static_cast<int>(format)];
}

constexpr std::string_view name_of(WeightFormat format) {
  constexpr std::string_view kNames[] = {"none",
                                         "f32",
                                         "bf16",
                                         "e4m3",
                                         "e4m3_and_transpose",
                                         "e4m3_row_block",
                                         "e4m3_tile",
                                         "e4m3_tile_and_transpose"};
  return kNames[static_cast<int>(format)];
}

}  // namespace octet
