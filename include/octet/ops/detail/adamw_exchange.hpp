// SPDX-License-Identifier: Apache-2.0
// What an update reads and writes of other ranks, element by element: the mean of the
// contributions, and the copies of the compute weight. The CPU loop and the CUDA kernels call
// these.
#pragma once

#include "octet/ops/detail/adamw_tiles.hpp"
#include "octet/ops/detail/mean_math.hpp"

namespace octet::detail {

/// Element `whole` of the tensor, which is element `shard` of this rank's: the mean of its
/// contributions.
template <DType D>
OCTET_HD inline float mean_at(const AdamwExchange& x, std::int64_t whole, std::int64_t shard) {
  using Storage = typename Element<D>::Storage;
  MeanSum<D> sum = kEmptySum<MeanSum<D>>;
  for (std::int32_t r = 0; r < x.ranks; ++r) {
    const RankGradient& from = x.gradients[r];
    const Storage code = static_cast<const Storage*>(from.data)[from.is_shard ? shard : whole];
    sum += mean_term<D>(code, x.scales[r * x.scale_stride].scale_inv);
  }
  return mean_of(sum, x.ranks);
}
OCTET_HD inline float mean_at(const AdamwExchange& x, std::int64_t whole, std::int64_t shard) {
  switch (x.dtype) {
    case DType::e4m3: return mean_at<DType::e4m3>(x, whole, shard);
    case DType::bf16: return mean_at<DType::bf16>(x, whole, shard);
    default: return mean_at<DType::f32>(x, whole, shard);
  }
}

/// What a tensor exchanges; null for nothing.
OCTET_HD inline const AdamwExchange* exchange_of(const AdamwArgs& args, std::int64_t tensor) {
  return args.exchanges != nullptr ? args.exchanges + tensor : nullptr;
}

/// Whether the copies of a weight follow from the codes of its elements alone.
OCTET_HD constexpr bool copies_elements(const StateFormats& f) {
  return f.weight == WeightFormat::f32 || has_weight_of_element(f);
}

/// Element i of the compute weight, counted in the tensor, into its copies. `x` may be null.
OCTET_HD inline void store_copies(const AdamwExchange* x, const StateFormats& f, std::int64_t i,
                                  std::uint32_t code) {
  if (x == nullptr) return;
  for (std::int32_t c = 0; c < x->copy_count; ++c) {
    store_code(x->copies[c].data, size_of(dtype_of(f.weight)), i, code);
  }
}
/// The same from the codes of a step.
OCTET_HD inline void store_copies(const AdamwExchange* x, const StateFormats& f, std::int64_t i,
                                  const AdamwCodes& codes) {
  if (!copies_elements(f)) return;
  store_copies(x, f, i, f.weight == WeightFormat::f32 ? codes.master : codes.weight);
}

/// The scale of a tile, to encode, for the copies of a weight in tiles. `x` may be null.
OCTET_HD inline void store_copied_scale(const AdamwExchange* x, const AdamwTensor& t,
                                        std::int64_t row, std::int64_t column, float scale) {
  if (x == nullptr) return;
  const ScaleLayout layout =
      scale_layout(granularity_of(t.formats.weight), MxLayout::compact, t.rows, t.columns);
  for (std::int32_t c = 0; c < x->copy_count; ++c) {
    store_block_scale(x->copies[c].blocks, layout, row, column, inverse_of_power_of_two(scale));
  }
}

}  // namespace octet::detail
