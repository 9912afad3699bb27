// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <array>

#include "octet/ops/detail/adamw_exchange.hpp"
#include "octet/ops/detail/adamw_initial.hpp"
#include "ops/cpu_ops.hpp"

namespace octet::detail::cpu {
namespace {

constexpr std::int64_t kLanes = 256;
constexpr std::int64_t kRun = 16;  // consecutive elements that a lane of the norm takes at a time

void raise_amax(TensorScale& scale, std::uint32_t bits) {
  scale.amax = bits_float(larger(float_bits(scale.amax), bits));
}

float measure_segment(const AdamwTensor& tensor, const Segment& segment, std::uint32_t* nonfinite) {
  std::array<float, kLanes> lanes{};
  std::uint32_t largest = 0;
  const float inv = tensor.gradient_scale->scale_inv;
  const std::int64_t first = offsets_of(tensor, segment).gradient;
  for (std::int64_t i = 0; i < segment.count; ++i) {
    const float g = gradient_at(tensor, inv, first + i);
    float& lane = lanes[static_cast<std::size_t>(i / kRun % kLanes)];
    lane = fma_of(g, g, lane);
    largest = larger(largest, magnitude_bits(g));
  }
  for (std::size_t width = kLanes / 2; width > 0; width /= 2) {
    for (std::size_t i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  const bool finite = is_finite_bits(largest);
#pragma omp critical(octet_adamw_amax)
  {
    if (tensor.measure_amax) raise_amax(*tensor.gradient_scale, largest);
    if (!finite && nonfinite != nullptr) *nonfinite = 1;
  }
  return lanes[0];
}

using BlockGradients = std::array<float, kStateBlock>;

/// The gradients of the elements [begin, end) of a segment, before any scale of the tensor.
void load_gradients(const AdamwArgs& args, const Segment& segment, std::int64_t begin,
                    std::int64_t end, BlockGradients& gradients) {
  const AdamwTensor& tensor = args.tensors[segment.tensor];
  const AdamwOffsets at = offsets_of(tensor, segment);
  for (std::int64_t i = begin; i < end; ++i) {
    gradients[static_cast<std::size_t>(i - begin)] =
        args.sums_contributions
            ? mean_at(args.exchanges[segment.tensor], segment.begin + i, segment.local + i)
            : load_gradient(tensor, at, i);
  }
}

/// The elements [begin, end) counted from those of a segment, at most 128; of block formats one
/// block or the short rest of the tensor.
void update_block(const AdamwArgs& args, const AdamwTensor& tensor, const AdamwTensorStep& step,
                  const Segment& segment, std::int64_t begin, std::int64_t end,
                  AdamwAmax& largest) {
  const StateFormats& f = tensor.formats;
  const AdamwOffsets at = offsets_of(tensor, segment);
  const std::int64_t block = (segment.local + begin) / kStateBlock;
  const float m_inv = is_block(f.m) ? tensor.m_blocks[block] : step.m_inv;
  const float v_inv = is_block(f.v) ? tensor.v_blocks[block] : step.v_inv;
  BlockGradients gradients;
  load_gradients(args, segment, begin, end, gradients);
  std::array<AdamwValues, kStateBlock> values;
  const IeeeMath math;
  float m_amax = 0.0f, v_amax = 0.0f;
  for (std::int64_t i = begin; i < end; ++i) {
    const float gradient = gradients[static_cast<std::size_t>(i - begin)];
    const AdamwValues x = updated(step, f, load_input(tensor, at, i, gradient), m_inv, v_inv, math);
    values[static_cast<std::size_t>(i - begin)] = x;
    m_amax = std::max(m_amax, abs_of(x.m));
    v_amax = std::max(v_amax, x.second);
  }
  float m_scale = step.m_scale, v_scale = step.v_scale;
  const auto renew = [block](StateFormat format, float* blocks, float amax, float& scale,
                             std::uint32_t& largest_inv) {
    if (!is_block(format)) return;
    const BlockScale next = block_scale(amax);
    scale = next.scale;
    blocks[block] = next.inv;
    largest_inv = larger(largest_inv, float_bits(next.inv));
  };
  renew(f.m, tensor.m_blocks, m_amax, m_scale, largest.m);
  renew(f.v, tensor.v_blocks, v_amax, v_scale, largest.v);
  const std::uint64_t first = tensor.random_base + static_cast<std::uint64_t>(segment.begin);
  const PhiloxKeys keys = philox_keys(args.config.seed);
  RandomWords words;
  for (std::int64_t i = begin; i < end; ++i) {
    const std::uint64_t index = first + static_cast<std::uint64_t>(i);
    if (i == begin || index % 4 == 0) {
      words = philox(keys, static_cast<std::uint64_t>(args.scalars->step), index >> 2);
    }
    const AdamwCodes codes = encoded(step, f, args.config.stochastic_rounding,
                                     values[static_cast<std::size_t>(i - begin)], m_scale, v_scale,
                                     words.word[index % 4]);
    largest.raise(f, codes);
    store_codes(tensor, at, i, codes);
    store_copies(exchange_of(args, segment.tensor), f, segment.begin + i, codes);
  }
}

/// `count` elements from `begin` on, counted in the segment.
void update_run(const AdamwArgs& args, const AdamwTensor& tensor, const AdamwTensorStep& step,
                const Segment& segment, std::int64_t begin, std::int64_t count,
                AdamwAmax& largest) {
  for (std::int64_t end = begin + count; begin < end; begin += kStateBlock) {
    update_block(args, tensor, step, segment, begin, std::min(begin + kStateBlock, end), largest);
  }
}

/// Casts a tile of the weight from the codes of the stored master, which master_at(i) tells for
/// element i of the tensor; it is element i + shift of the weight. Also into the copies of an
/// exchange, which may be null.
template <class MasterAt>
void cast_tile(const AdamwTensor& tensor, const AdamwTensorStep& step,
               const AdamwExchange* exchange, const AdamwTile& tile, std::int64_t shift,
               const MasterAt& master_at) {
  const StateFormats& f = tensor.formats;
  const std::int64_t height = has_scale_per_row(tensor) ? 1 : kTileSide;
  const std::int64_t end_row = tile.row + tile.rows, end_column = tile.column + tile.columns;
  for (std::int64_t first = tile.row; first < end_row; first += height) {
    const auto for_block = [&](const auto& visit) {
      for (std::int64_t row = first; row < std::min(first + height, end_row); ++row) {
        for (std::int64_t column = tile.column; column < end_column; ++column) {
          const std::int64_t i = row * tensor.columns + column;
          visit(i, static_cast<std::uint32_t>(master_at(i)));
        }
      }
    };
    std::uint32_t largest = 0;
    for_block([&](std::int64_t, std::uint32_t master) {
      largest = larger(largest, magnitude_code(f.master, master));
    });
    const float scale = weight_block_scale(f, step, largest);
    store_weight_scale(tensor, first, tile.column, scale);
    store_copied_scale(exchange, tensor, first, tile.column, scale);
    for_block([&](std::int64_t i, std::uint32_t master) {
      const std::uint32_t code = weight_code(f, step, master, scale);
      store_weight(tensor, i + shift, code);
      store_copies(exchange, f, i, code);
    });
  }
}

/// The tiles that a segment sees to: their elements, then their weights.
void update_tiles(const AdamwArgs& args, const AdamwTensor& tensor, const AdamwTensorStep& step,
                  const Segment& segment, AdamwAmax& largest) {
  const AdamwPanel panel = panel_of(tensor, segment);
  const AdamwOffsets at = offsets_of(tensor, segment);
  const bool by_tiles = has_states_in_tiles(tensor);
  if (!by_tiles && panel.first < panel.end) {
    update_run(args, tensor, step, segment, 0, panel.rows * tensor.columns, largest);
  }
  for (std::int64_t number = panel.first; number < panel.end; number += panel.stride) {
    const AdamwTile tile = tile_of(tensor, panel, number);
    for (int row = 0; by_tiles && row < tile.rows; ++row) {
      const std::int64_t first = (tile.row + row) * tensor.columns + tile.column;
      update_run(args, tensor, step, segment, first - segment.begin, tile.columns, largest);
    }
    cast_tile(tensor, step, exchange_of(args, segment.tensor), tile, at.weight - segment.begin,
              [&](std::int64_t i) {
                return load_code(tensor.master, size_of(tensor.formats.master),
                                 at.master + i - segment.begin);
              });
  }
}

void update_segment(const AdamwArgs& args, const Segment& segment) {
  const AdamwTensor& tensor = args.tensors[segment.tensor];
  const AdamwTensorStep& step = args.steps[segment.tensor];
  const StateFormats& f = tensor.formats;
  AdamwAmax largest;
  if (has_block_scales(f.weight)) {
    update_tiles(args, tensor, step, segment, largest);
  } else {
    update_run(args, tensor, step, segment, 0, segment.count, largest);
  }
#pragma omp critical(octet_adamw_amax)
  {
    raise_amax(*tensor.m_scale, amax_of_m(f, step, largest));
    raise_amax(*tensor.v_scale, amax_of_v(f, step, largest));
    raise_amax(*tensor.master_scale, amax_of_master(f, step, largest));
    raise_amax(*tensor.weight_scale, amax_of_weight(f, step, largest));
  }
}

/// A piece of the compute weight, stored from element `stored` on.
void initialise_weights(const AdamwTensor& tensor, const TensorView& values, const Piece& piece,
                        std::int64_t stored) {
  const std::int64_t end = piece.begin + piece.count, shift = stored - piece.begin;
  if (!has_block_scales(tensor.formats.weight)) {
    for (std::int64_t i = piece.begin; i < end; ++i) {
      initialise_weight(tensor, values, i, i + shift);
    }
    return;
  }
  const AdamwTensorStep step = initial_step(tensor);
  for (std::int64_t begin = piece.begin; begin < end; begin += kTileSide * tensor.columns) {
    const AdamwPanel panel = panel_of(tensor, {.begin = begin});
    for (std::int64_t number = 0; number < panel.end; ++number) {
      cast_tile(tensor, step, nullptr, tile_of(tensor, panel, number), shift,
                [&](std::int64_t i) { return initial_master(tensor, values, i); });
    }
  }
}

}  // namespace

void adamw_initialise(const Context& ctx, const AdamwInit& init) {
  const AdamwTensor& tensor = init.tensor;
  cpu::measure_amax(ctx, init.values, tensor.master_scale);
  initialise_scales(tensor, tensor.master_scale->amax);
  if (!tensor.weight_is_shard) {
    initialise_weights(tensor, init.values, {.count = init.values.numel()}, 0);
  }
  std::int64_t local = 0;
  for (std::int64_t p = 0; p < init.piece_count; ++p) {
    const Piece& piece = init.pieces[p];
    if (tensor.weight_is_shard) initialise_weights(tensor, init.values, piece, local);
    for (std::int64_t i = 0; i < piece.count; ++i) {
      initialise_state(tensor, init.values, piece.begin + i, local + i);
    }
    local += piece.count;
  }
}

void adamw_measure(const Context&, const AdamwArgs& args, float* sums) {
#pragma omp parallel for schedule(dynamic) if (args.segment_count > 1)
  for (std::int64_t i = 0; i < args.segment_count; ++i) {
    const Segment& segment = args.segments[i];
    sums[segment.index] = measure_segment(args.tensors[segment.tensor], segment, args.nonfinite);
  }
}

void adamw_prepare(const Context&, const AdamwArgs& args) {
  AdamwScalars& s = *args.scalars;
  const double squares =
      args.max_norm > 0.0f
          ? pairwise_sum(args.total_segments,
                         [&](std::int64_t i) { return static_cast<double>(args.segment_sums[i]); })
          : 0.0;
  measure_clip(s, args.max_norm, args.config.maximize, squares);
  s.lr = args.lr_device != nullptr ? *args.lr_device : args.lr;
  for (std::int64_t g = 0; g < args.group_count; ++g) {
    args.group_scalars[g] =
        group_scalars(args.groups[g], args.config.decoupled_weight_decay, s.step, s.lr);
  }
  bool skip = must_skip(s, args.nonfinite);
  const auto bounds_at = [&](std::int64_t t) {
    const AdamwTensor& tensor = args.tensors[t];
    return bounds_of(s, args.group_scalars[tensor.group], tensor.gradient_dtype,
                     old_scales_of(tensor));
  };
  for (std::int64_t t = 0; t < args.tensor_count; ++t) {
    const AdamwTensor& tensor = args.tensors[t];
    const AdamwGroupScalars& group = args.group_scalars[tensor.group];
    skip = skip || !bounds_are_finite(bounds_at(t), group, tensor.formats);
  }
  end_decision(s, skip, args.nonfinite);
  for (std::int64_t t = 0; t < args.tensor_count; ++t) {
    const AdamwTensor& tensor = args.tensors[t];
    if (!skip) {
      store_scales(tensor, begin_tensor(s, args.group_scalars[tensor.group], tensor.formats,
                                        old_scales_of(tensor), bounds_at(t), args.steps[t]));
    }
    if (skip && args.nonfinite_counts != nullptr &&
        has_nonfinite_gradient(*tensor.gradient_scale, tensor.gradient_dtype)) {
      ++args.nonfinite_counts[t];
    }
    end_gradient(tensor);
  }
}

void adamw_update(const Context&, const AdamwArgs& args) {
  if (args.scalars->skip != 0) return;
#pragma omp parallel for schedule(dynamic) if (args.segment_count > 1)
  for (std::int64_t i = 0; i < args.segment_count; ++i) update_segment(args, args.segments[i]);
}

}  // namespace octet::detail::cpu
