// SPDX-License-Identifier: Apache-2.0
// Compute weights whose blocks have scales, read back.
#pragma once

#include "support/adamw_stored.hpp"
#include "support/block_cast_run.hpp"

namespace octet::test {

inline Blocks read_blocks(const Context& ctx, const BlockScaledView& view) {
  const Shape& shape = view.data.shape;
  const ScalePlaces places{{view.granularity}, shape[0], shape[1]};
  return {download_bytes(ctx, view.data), download<std::uint8_t>(ctx, view.scales, places.bytes())};
}

/// The scales of the blocks of a weight and of its transposed copy, whatever of them there is.
inline std::vector<std::uint8_t> block_scale_bytes(const Context& ctx, const AdamW& optimizer,
                                                   int i, WeightFormat format) {
  if (!has_block_scales(format)) return {};
  std::vector<std::uint8_t> bytes = read_blocks(ctx, optimizer.block_weight(i)).scales;
  if (!is_transposed(format)) return bytes;
  const auto more = read_blocks(ctx, optimizer.block_weight_transposed(i)).scales;
  bytes.insert(bytes.end(), more.begin(), more.end());
  return bytes;
}

/// Sets the values of a weight to what codes and scales stand for.
inline void decode_blocks(Stored& stored, const Shape& shape, Granularity granularity,
                          const Blocks& blocks) {
  const BlockKind kind{granularity};
  const ScalePlaces places{kind, shape[0], shape[1]};
  for (std::size_t i = 0; i < stored.values.size(); ++i) {
    const auto at = static_cast<std::int64_t>(i);
    const std::size_t place = places.of(at / shape[1], at % shape[1]);
    stored.values[i] =
        table_of(DType::e4m3).decode(blocks.codes[i]) * scale_value(kind, &blocks.scales[place]);
  }
}

}  // namespace octet::test
