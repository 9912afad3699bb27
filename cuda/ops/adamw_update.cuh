// SPDX-License-Identifier: Apache-2.0
// The second half of a step, as a block of threads does it for a segment. The rows of kAdamwRows
// have code with formats known at compile time; every other combination reads its formats from the
// table, with the same bits. The kernels are in adamw_update.cu and adamw_exchange.cu.
#pragma once

#include "cuda/ops/adamw_codes.cuh"
#include "cuda/ops/adamw_exchange.cuh"
#include "cuda/ops/adamw_rows.cuh"
#include "cuda/ops/adamw_weight.cuh"

namespace octet::detail::cuda {

// 80 registers a thread. With 10 blocks O2 is 1 % faster and a step over small tensors 4 % slower.
constexpr int kUpdateBlocksPerSm = 12;

struct UpdateArgs {
  AdamwArgs adamw;
  PhiloxKeys keys;
};

/// The update of tensors that exchange with other ranks.
void adamw_exchange(const Context& ctx, const AdamwArgs& args);

using TransposedTile = ByteTile<kBlockThreads>;
/// One for all rows: one of each would leave room for fewer blocks of threads.
__device__ inline TransposedTile& transposed_tile() {
  __shared__ TransposedTile tile;
  return tile;
}

/// The same by IeeeMath, for the rare vector that FastMath cannot do. Reads it once more, so that
/// the usual path need not keep it.
template <AdamwRow R, Exchange X, DType D>
__device__ __noinline__ void update_values_again(const WorkOf<X>& work, int i, float m_inv,
                                                 float v_inv, AdamwValues* values) {
  Codes<R> codes;
  load_vector<R, X, D>(work, {i, 4}, -1, codes);
  IeeeMath math;
  AdamwTensorStep s = work.step;
  if (R.formats.master == StateFormat::split) s.master_inv *= 0x1p120f;
  AdamwValues result[kVector];
  update_values<R>(s, codes, m_inv, v_inv, result, math);
  for (int k = 0; k < kVector; ++k) {
    values[k] = result[k];
    // Far below the smallest code, and the caller tells it from zero by its exponent.
    if (result[k].second > 0.0f) values[k].second = fmaxf(result[k].second, 0x1p-126f);
  }
}

/// All whole vectors of a segment (of block formats all whole blocks, of a weight in tiles only a
/// tile); returns the number of elements done. D is the dtype of contributions, where those are
/// summed; the gradient of R is then f32, as the mean is. All threads must call it.
template <AdamwRow R, Exchange X, DType D>
__device__ int update_vectors(const UpdateArgs& args, WorkOf<X>& work, AdamwAmax& of_thread) {
  constexpr StateFormats F = R.formats;
  constexpr bool kHasBlocks = is_block(F.m);
  static_assert(is_block(F.m) == is_block(F.v));  // renew_blocks sees to both
  // Rows of FP32 states are faster without (measured).
  constexpr bool kPrefetches = takes_fast_math(F);
  constexpr bool kQuads = takes_quads(F);
  constexpr bool kTiles = needs_matrix(F.weight);
  constexpr bool kTransposes = is_transposed(F.weight);
  // These count on eight elements in a row.
  static_assert(!kQuads || !(kHasBlocks || kTiles || takes_fast_math(F)));
  const AdamwTensor& t = work.tensor;
  const Walk walk =
      kTiles ? walk_of(t, work.segment) : Walk{work.segment.begin, kStateBlock, false};
  if (kTiles && !walk.is_tile) return 0;
  if (threadIdx.x == 0) work.streams = streams_of<R>(work, walk.first);
  __syncthreads();
  AdamwTensorStep s = work.step;
  s.group.l2 = 0.0f;
  if (F.master == StateFormat::split) s.master_inv *= 0x1p120f;  // what decode_split left out
  // Groups of four elements share a call of the generator.
  const std::uint64_t first = (t.random_base + static_cast<std::uint64_t>(walk.first)) / 4;
  const __half2 ratio = __float2half2_rn(s.master_scale_inv * s.weight_scale);
  const int count = work.segment.count;
  const int vectors = kHasBlocks ? count / kStateBlock * kBlockThreads : count / kVector;
  const int stride = static_cast<int>(walk.stride);
  const int in_block = threadIdx.x % kBlockThreads;
  TransposedTile& tile = transposed_tile();
  LargestOnTop largest;
  const int lane = threadIdx.x % 32;
  int i = threadIdx.x / kBlockThreads * stride + in_block * kVector;
  constexpr bool kAhead = X == Exchange::means && kFetchesAhead<D> && !kQuads;
  const int step = kUpdateThreads / kBlockThreads * stride;
  int stage = kAhead ? 0 : -1;
  if constexpr (kAhead) {
    for (int n = 0; n < kAheadStages - 1; ++n) {
      const int vector = static_cast<int>(threadIdx.x) + n * kUpdateThreads;
      fetch_ahead(work.peers, vector < vectors, n, i + n * step);
    }
  }
  // A warp stays together for the exchanges within blocks.
  for (int vector = threadIdx.x; vector - lane < vectors; vector += kUpdateThreads, i += step) {
    const bool active = vector < vectors;
    if (!kHasBlocks && !active) break;
    // Of a whole warp lane l takes quads l and l + 32 of its 256 elements.
    const bool spreads = kQuads && vector - lane + 32 <= vectors;
    const Place place = spreads ? Place{i - 4 * lane, 4 * 32} : Place{i, 4};
    Codes<R> codes{};
    if constexpr (kAhead) {
      constexpr int kLast = kAheadStages - 1;
      fetch_ahead(work.peers, vector + kLast * kUpdateThreads < vectors,
                  (stage + kLast) % kAheadStages, i + kLast * step);
      wait_for_ahead();
    }
    if (active) load_vector<R, X, D>(work, place, stage, codes);
    if constexpr (kAhead) stage = (stage + 1) % kAheadStages;
    if (kPrefetches && vector + kUpdateThreads < vectors) {
      prefetch_vector<R, X, D>(work, i + step);
    }
    float m_inv = s.m_inv, v_inv = s.v_inv, m_scale = s.m_scale, v_scale = s.v_scale;
    const int block = i / static_cast<int>(kStateBlock);
    if (kHasBlocks && active) {
      m_inv = work.streams.m_blocks[block];
      v_inv = work.streams.v_blocks[block];
    }
    AdamwValues values[kVector];
    // In a function of its own this costs rows of FP32 states 5 % (measured).
    if constexpr (takes_fast_math(F)) {
      FastMath math;
      update_values<R>(s, codes, m_inv, v_inv, values, math);
      if (active && !math.is_exact()) {
        AdamwValues again[kVector];
        update_values_again<R, X, D>(work, i, m_inv, v_inv, again);
#pragma unroll
        for (int k = 0; k < kVector; ++k) values[k] = again[k];
      }
    } else {
      IeeeMath math;
      update_values<R>(s, codes, m_inv, v_inv, values, math);
    }
    RandomWords words[kVector / 4];
#pragma unroll
    for (int quad = 0; quad < kVector / 4; ++quad) {
      words[quad] = philox(args.keys, work.step_number,
                           first + static_cast<unsigned>(place.first + quad * place.gap) / 4);
    }
    if constexpr (kHasBlocks) {
      const BlockScales scales = renew_blocks(values);
      m_scale = scales.m;
      v_scale = scales.v;
      largest.inv = larger(largest.inv, float_bits(scales.inv));
      if (active && in_block == 0) work.streams.m_blocks[block] = scales.inv;
      if (active && in_block == kBlockThreads / 2) work.streams.v_blocks[block] = scales.inv;
    }
    encode<R>(s, values, words, m_scale, v_scale, ratio, codes, largest);
    if (!active) continue;
    codes.store(work.streams, place);
    if constexpr (X != Exchange::nothing && F.weight == WeightFormat::f32) {
      store_copies_at<F>(work, place, codes.master);
    } else if constexpr (X != Exchange::nothing && has_weight_of_element(F)) {
      store_copies_at<F>(work, place, codes.weight);
    }
    if constexpr (kTransposes && !has_block_scales(F.weight)) {
      const unsigned row = vector / kBlockThreads;
      tile.at(row, in_block) = {codes.weight.word[0], codes.weight.word[1]};
    }
  }
  if constexpr (has_block_scales(F.weight)) {
    cast_whole_tile<R, X>(work, walk, largest.master >> top_of(F.master), tile);
  }
  if constexpr (kTransposes) {
    const std::int64_t row = walk.first / t.columns, column = walk.first % t.columns;
    tile.store_transposed(static_cast<std::uint8_t*>(t.weight_transposed) + column * t.rows + row,
                          t.rows, tile.kColumns, kTileRows, true);
  }
  if (kHasBlocks) {
    (in_block < kBlockThreads / 2 ? of_thread.m : of_thread.v) = largest.inv;
  } else {
    of_thread.m = largest.m >> top_of(F.m);
    of_thread.v = largest.v >> top_of(F.v);
  }
  of_thread.master = largest.master >> top_of(F.master);
  return vectors * kVector;
}

/// The random words of four consecutive elements from this index on.
__device__ inline RandomWords words_from(const UpdateArgs& args, const Work& work,
                                         std::uint64_t index) {
  RandomWords words = philox(args.keys, work.step_number, index >> 2);
  if (index % 4 == 0) return words;
  RandomWords next = philox(args.keys, work.step_number, (index >> 2) + 1);
  for (unsigned left = index % 4; left > 0; --left) {
    words = {words.word[1], words.word[2], words.word[3], next.word[0]};
    next = {next.word[1], next.word[2], next.word[3], 0};
  }
  return words;
}

/// `count` elements, at most 128, from `first` on, counted in the tensor; of block formats one
/// block or the short rest of the tensor. Any formats, any alignment. For a warp, four elements a
/// lane.
template <Exchange X>
__device__ void update_block(const UpdateArgs& args, const WorkOf<X>& work, std::int64_t first,
                             int count, AdamwAmax& largest) {
  const AdamwTensor& t = work.tensor;
  const AdamwTensorStep& s = work.step;
  const StateFormats& f = t.formats;
  const AdamwOffsets at = offsets_at(t, work.segment, first);
  const int lane = threadIdx.x % 32, mine = 4 * lane;
  const auto warp_max = [](float x) {
    return bits_float(__reduce_max_sync(0xFFFFFFFFu, float_bits(x)));
  };
  const std::int64_t block = at.state / kStateBlock;
  const float m_inv = is_block(f.m) ? t.m_blocks[block] : s.m_inv;
  const float v_inv = is_block(f.v) ? t.v_blocks[block] : s.v_inv;
  AdamwValues values[4];
  float m_amax = 0.0f, v_amax = 0.0f;
  IeeeMath math;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    if (mine + k >= count) continue;
    const float gradient = X == Exchange::means
                               ? mean_at(*exchange_in(work), first + mine + k, at.state + mine + k)
                               : load_gradient(t, at, mine + k);
    values[k] = updated(s, f, load_input(t, at, mine + k, gradient), m_inv, v_inv, math);
    m_amax = fmaxf(m_amax, abs_of(values[k].m));
    v_amax = fmaxf(v_amax, values[k].second);
  }
  float m_scale = s.m_scale, v_scale = s.v_scale;
  const auto renew = [&](float amax, float* blocks, float& scale, std::uint32_t& largest_inv) {
    const BlockScale next = block_scale(warp_max(amax));
    scale = next.scale;
    if (lane == 0) blocks[block] = next.inv;
    largest_inv = larger(largest_inv, float_bits(next.inv));
  };
  __syncwarp();  // all have read the old scales
  if (is_block(f.m)) renew(m_amax, t.m_blocks, m_scale, largest.m);
  if (is_block(f.v)) renew(v_amax, t.v_blocks, v_scale, largest.v);
  const RandomWords words =
      words_from(args, work, t.random_base + static_cast<std::uint64_t>(first + mine));
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    if (mine + k >= count) continue;
    const AdamwCodes codes = encoded(s, f, args.adamw.config.stochastic_rounding, values[k],
                                     m_scale, v_scale, words.word[k]);
    largest.raise(f, codes);
    store_codes(t, at, mine + k, codes);
    store_copies(exchange_in(work), f, first + mine + k, codes);
  }
}

/// `count` elements from `first` on, counted in the tensor, the first of a block.
template <Exchange X>
__device__ void update_run(const UpdateArgs& args, const WorkOf<X>& work, std::int64_t first,
                           std::int64_t count, AdamwAmax& largest) {
  for (std::int64_t block = threadIdx.x / 32 * kStateBlock; block < count;
       block += kUpdateThreads / 32 * kStateBlock) {
    update_block<X>(args, work, first + block, static_cast<int>(min(count - block, kStateBlock)),
                    largest);
  }
}

/// The tiles that a segment sees to: their elements, then their weights. All threads must call it.
/// Apart from the kernel, whose other paths would run out of registers.
template <Exchange X>
__device__ __noinline__ void update_tiles(const UpdateArgs& args, const WorkOf<X>& work,
                                          AdamwAmax& largest) {
  const AdamwTensor& t = work.tensor;
  const Segment& segment = work.segment;
  const AdamwPanel panel = panel_of(t, segment);
  const AdamwOffsets at = offsets_of(t, segment);
  const bool by_tiles = has_states_in_tiles(t);
  if (!by_tiles && panel.first < panel.end) {
    update_run<X>(args, work, segment.begin, panel.rows * t.columns, largest);
  }
  for (std::int64_t number = panel.first; number < panel.end; number += panel.stride) {
    const AdamwTile tile = tile_of(t, panel, number);
    for (int row = threadIdx.x / 32; by_tiles && row < tile.rows; row += kUpdateThreads / 32) {
      update_block<X>(args, work, (tile.row + row) * t.columns + tile.column, tile.columns,
                      largest);
    }
    __syncthreads();  // the masters are there
    cast_tile(
        t, work.step, exchange_in(work), tile, at.weight - segment.begin, [&](std::int64_t i) {
          return load_code(t.master, size_of(t.formats.master), at.master + i - segment.begin);
        });
  }
}

__device__ inline AdamwAmax largest_of_warp(const AdamwAmax& mine) {
  const auto largest = [](std::uint32_t code) { return __reduce_max_sync(0xFFFFFFFFu, code); };
  return {largest(mine.m), largest(mine.v), largest(mine.master)};
}

/// Raises the amax of the tensor's scales to that of a warp: one atomic each, exact in any order.
__device__ inline void publish(const AdamwTensor& t, const AmaxBits& of_warp) {
  // A lane each.
  const unsigned lane = threadIdx.x % 32;
  TensorScale* scale = t.weight_scale;
  std::uint32_t bits = of_warp.weight;
  if (lane == 1) scale = t.master_scale, bits = of_warp.master;
  if (lane == 2) scale = t.m_scale, bits = of_warp.m;
  if (lane == 3) scale = t.v_scale, bits = of_warp.v;
  // A reduction, which does not wait for the old value as atomicMax on a generic pointer does.
  if (lane < 4 && bits != 0) {
    asm volatile("red.global.max.u32 [%0], %1;" ::"l"(&scale->amax), "r"(bits));
  }
}

/// The whole vectors of a segment; returns the number of elements done.
template <AdamwRow R, Exchange X, DType D = R.gradient>
__device__ int update_row(const UpdateArgs& args, WorkOf<X>& work) {
  AdamwAmax largest;
  const int done = update_vectors<R, X, D>(args, work, largest);
  publish(work.tensor, amax_bits<R>(work.step, largest_of_warp(largest)));
  return done;
}

/// What no row has done of a segment, by general code. All threads must call it.
template <Exchange X>
__device__ void update_rest(const UpdateArgs& args, const WorkOf<X>& work, int done) {
  if (done >= work.segment.count) return;
  AdamwAmax largest;
  if (has_block_scales(work.tensor.formats.weight)) {
    update_tiles<X>(args, work, largest);
  } else {
    update_run<X>(args, work, work.segment.begin + done, work.segment.count - done, largest);
  }
  publish(work.tensor, amax_bits(work.tensor.formats, work.step, largest_of_warp(largest)));
}

}  // namespace octet::detail::cuda
