// SPDX-License-Identifier: Apache-2.0
// The formats for which the update has fast code on CUDA, and what else a tensor needs for it. The
// kernels, Engine::plan() and the tests go by this list; every other combination takes general
// code with the same bits.
#pragma once

#include <cstdint>
#include <iterator>
#include <string>

#include "octet/ops/adamw.hpp"

namespace octet {

/// Gradient and stored formats of a tensor.
struct AdamwRow {
  DType gradient = DType::f32;
  StateFormats formats = {};
  bool operator==(const AdamwRow&) const = default;
};

/// The levels' formats with the gradients of a whole and of a sharded optimizer, O2 with a
/// transposed weight or one in tiles, and FP32 for what no level manages.
inline constexpr AdamwRow kAdamwRows[] = {
    // O2 and O3
    {DType::e4m3, {WeightFormat::e4m3, StateFormat::f16, StateFormat::e4m3, StateFormat::f16}},
    {DType::f32, {WeightFormat::e4m3, StateFormat::f16, StateFormat::e4m3, StateFormat::f16}},
    {DType::e4m3,
     {WeightFormat::e4m3_and_transpose, StateFormat::f16, StateFormat::e4m3, StateFormat::f16}},
    {DType::e4m3, {WeightFormat::e4m3_tile, StateFormat::f16, StateFormat::e4m3, StateFormat::f16}},
    {DType::e4m3,
     {WeightFormat::e4m3_tile_and_transpose, StateFormat::f16, StateFormat::e4m3,
      StateFormat::f16}},
    // small_formats()
    {DType::e4m3,
     {WeightFormat::e4m3, StateFormat::split, StateFormat::e4m3_block,
      StateFormat::sqrt_e4m3_block}},
    {DType::f32,
     {WeightFormat::e4m3, StateFormat::split, StateFormat::e4m3_block,
      StateFormat::sqrt_e4m3_block}},
    // O1
    {DType::e4m3, {.weight = WeightFormat::e4m3, .master = StateFormat::f16}},
    {DType::f32, {.weight = WeightFormat::e4m3, .master = StateFormat::f16}},
    // O0
    {DType::bf16, {.weight = WeightFormat::bf16}},
    {DType::f32, {.weight = WeightFormat::bf16}},
    // everything else
    {DType::f32, {}}};

/// Position in kAdamwRows counted from 1; 0 where there is no row.
constexpr std::uint32_t adamw_row_of(DType gradient, const StateFormats& formats) {
  std::uint32_t found = 0;
  for (std::uint32_t i = 0; i < std::size(kAdamwRows); ++i) {
    if (kAdamwRows[i] == AdamwRow{gradient, formats}) found = i + 1;
  }
  return found;
}

/// Buffers aligned to 16 bytes. (Segments start at multiples of 128 elements in every buffer.)
OCTET_HD inline bool is_aligned_for_row(const AdamwTensor& t) {
  const auto bits = [](const void* data) { return reinterpret_cast<std::uintptr_t>(data); };
  return (bits(t.gradient) | bits(t.master) | bits(t.m) | bits(t.v) | bits(t.weight) |
          bits(t.weight_transposed)) %
             16 ==
         0;
}
/// Whether the update goes through a matrix in tiles of 128 x 128.
OCTET_HD constexpr bool goes_by_tiles(const AdamwTensor& t) {
  return needs_matrix(t.formats.weight);
}
/// Whole tiles with 32-bit offsets and, of a transpose, whole vectors of a column. (The last rows %
/// 128 rows go by the general code.)
OCTET_HD constexpr bool is_shaped_for_row(const AdamwTensor& t) {
  return !goes_by_tiles(t) ||
         (t.rows >= 128 && t.columns % 128 == 0 && t.columns <= (std::int64_t{1} << 23) &&
          (t.rows % 8 == 0 || !is_transposed(t.formats.weight)));
}
/// Ranks, and copies of a weight, that a row takes.
inline constexpr std::int32_t kMaxRowRanks = 64;
/// Whether an update that exchanges has fast code for a row with these formats: for weights that a
/// sharded optimizer may have.
OCTET_HD constexpr bool is_exchanged(const StateFormats& formats) {
  return !is_transposed(formats.weight);
}
OCTET_HD inline bool is_fit_for_row(const AdamwExchange& x) {
  return x.is_aligned && x.ranks <= kMaxRowRanks && x.copy_count <= kMaxRowRanks;
}
/// Smaller ones make operands of the update subnormal.
inline constexpr float kSmallestEpsForRow = 0x1p-44f;

/// Why the update of this tensor takes the general code on CUDA; empty where it does not. (What
/// only a step knows sends single steps there too: scales near the ends of FP32's range, an eps
/// near 2^-44 in the first ones.) `exchange` is what the tensor exchanges, or null; with
/// contributions the reason is that of a step that sums them. Host code; looks at the addresses of
/// the buffers, not into them.
std::string reason_for_general_code(const AdamwTensor& tensor, const AdamWConfig& config,
                                    const AdamwHyper& hyper,
                                    const AdamwExchange* exchange = nullptr);

}  // namespace octet
