// SPDX-License-Identifier: Apache-2.0
// The compute weight where its blocks have scales: cast from the stored master once the masters of
// a tile are there. They come back from a cache, because the block of threads has just written
// them.
#pragma once

#include "cuda/device/reduce.cuh"
#include "cuda/ops/adamw_exchange.cuh"
#include "octet/ops/detail/adamw_tiles.hpp"

namespace octet::detail::cuda {

/// Casts a tile of any shape from the codes of the stored master, which master_at(i) tells for
/// element i of the tensor; it is element i + shift of the weight. Also into the copies of an
/// exchange, which may be null. All threads of the block must call it.
template <class MasterAt>
__device__ void cast_tile(const AdamwTensor& t, const AdamwTensorStep& s, const AdamwExchange* x,
                          const AdamwTile& tile, std::int64_t shift, const MasterAt& master_at) {
  const StateFormats& f = t.formats;
  const int lane = threadIdx.x % 32;
  const auto for_columns = [&](int row, const auto& visit) {
    const std::int64_t first = (tile.row + row) * t.columns + tile.column;
    for (int column = lane; column < tile.columns; column += 32) {
      visit(first + column, static_cast<std::uint32_t>(master_at(first + column)));
    }
  };
  const auto cast_row = [&](int row, float scale) {
    for_columns(row, [&](std::int64_t i, std::uint32_t master) {
      const std::uint32_t code = weight_code(f, s, master, scale);
      store_weight(t, i + shift, code);
      store_copies(x, f, i, code);
    });
  };
  const auto for_rows = [&](const auto& visit) {
    for (int row = threadIdx.x / 32; row < tile.rows; row += blockDim.x / 32) visit(row);
  };
  std::uint32_t largest = 0;
  for_rows([&](int row) {
    for_columns(row, [&](std::int64_t, std::uint32_t master) {
      largest = larger(largest, magnitude_code(f.master, master));
    });
    if (!has_scale_per_row(t)) return;
    const float scale = weight_block_scale(f, s, __reduce_max_sync(0xFFFFFFFFu, largest));
    if (lane == 0) store_weight_scale(t, tile.row + row, tile.column, scale);
    cast_row(row, scale);
    largest = 0;
  });
  if (has_scale_per_row(t)) return;
  const float scale = weight_block_scale(f, s, block_max(largest));
  if (threadIdx.x == 0) {
    store_weight_scale(t, tile.row, tile.column, scale);
    store_copied_scale(x, t, tile.row, tile.column, scale);
  }
  for_rows([&](int row) { cast_row(row, scale); });
}

/// The same for a whole tile of formats known at compile time, in vectors; `largest` is the code of
/// a thread's largest master. Leaves the codes in `tile` where they are also wanted transposed.
template <AdamwRow R, Exchange X, class Tile>
__device__ void cast_whole_tile(const WorkOf<X>& work, const Walk& walk, std::uint32_t largest,
                                Tile& tile) {
  constexpr StateFormats F = R.formats;
  static_assert(granularity_of(F.weight) == Granularity::tile);
  const AdamwTensor& t = work.tensor;
  // Its barriers also make the masters visible.
  const float scale = weight_block_scale(F, work.step, block_max(largest));
  if (threadIdx.x == 0) {
    const std::int64_t row = walk.first / t.columns, column = walk.first % t.columns;
    store_weight_scale(t, row, column, scale);
    store_copied_scale(exchange_in(work), t, row, column, scale);
  }
  const float factor = work.step.master_scale_inv * scale;
  const int group = threadIdx.x % kBlockThreads;
  const int stride = static_cast<int>(walk.stride);
  for (int row = threadIdx.x / kBlockThreads; row < kTile; row += blockDim.x / kBlockThreads) {
    const int i = row * stride + group * kVector;
    const auto master = load_packed<size_of(F.master)>(work.streams.master, i);
    float x[kVector];
    decode<F.master>(master, x);
    const Packed<1> weight = e4m3_of(x, factor);
    store_packed(work.streams.weight, i, weight);
    if constexpr (X != Exchange::nothing) store_copies_at<F>(work, {i, 4}, weight);
    if constexpr (is_transposed(F.weight)) {
      tile.at(row, group) = {weight.word[0], weight.word[1]};
    }
  }
}

}  // namespace octet::detail::cuda
