// SPDX-License-Identifier: Apache-2.0
// What this rank holds of the state, as ranges of elements, for those who save and load it.
#include "octet/engine/state.hpp"

#include <algorithm>

#include "engine/engine_impl.hpp"
#include "engine/make_transposed.hpp"

namespace octet {
namespace {

/// The part of a piece whose entries begin in it, where `array` has it.
void add_owned(StateArray& array, const Piece& piece, std::int64_t numel) {
  const auto rounded = [&](std::int64_t element) {
    return std::min(
        (element + array.entry_elements - 1) / array.entry_elements * array.entry_elements, numel);
  };
  const std::int64_t begin = rounded(piece.begin), end = rounded(piece.begin + piece.count);
  if (begin >= end) return;
  for (const StateRange& range : array.held) {
    if (begin < range.begin || end > range.begin + range.count) continue;
    array.owned.push_back({begin, end - begin,
                           static_cast<std::byte*>(range.data) + array.bytes(begin - range.begin)});
    return;
  }
  fail("Engine::state: elements ", begin, " to ", end,
       " are this rank's, but it does not hold them");
}

/// The pieces' entries lie one after the other from `data` on.
StateArray make_array(std::string_view name, std::string_view format, std::int64_t entry_elements,
                      std::size_t entry_bytes, void* data, const std::vector<Piece>& held) {
  StateArray array{
      .name = name, .format = format, .entry_elements = entry_elements, .entry_bytes = entry_bytes};
  auto* next = static_cast<std::byte*>(data);
  for (const Piece& piece : held) {
    if (piece.count == 0) continue;
    array.held.push_back({piece.begin, piece.count, next});
    next += array.bytes(piece.count);
  }
  return array;
}

void add_state(std::vector<StateArray>& arrays, std::string_view name, std::string_view blocks_name,
               const StateView& state, const std::vector<Piece>& held) {
  arrays.push_back(
      make_array(name, name_of(state.format), 1, size_of(state.format), state.data, held));
  if (!is_block(state.format)) return;
  arrays.push_back(make_array(blocks_name, "f32", kStateBlock, sizeof(float), state.blocks, held));
}

/// Scales of tiles: a row of them for every 128 rows. Those of rows of blocks lie column by column,
/// so they are one entry. Those of a piece are at their place among all of them.
StateArray make_weight_blocks(WeightFormat format, const Shape& shape, void* scales,
                              const std::vector<Piece>& held) {
  const Granularity granularity = granularity_of(format);
  const bool by_rows = granularity == Granularity::tile;
  const std::int64_t unit = by_rows ? panel_numel(shape) : shape.numel();
  const std::int64_t bytes =
      scale_bytes(granularity, by_rows ? std::min(shape[0], kPanelRows) : shape[0], shape[1]);
  StateArray array = make_array("weight_blocks", "f32", std::max<std::int64_t>(unit, 1),
                                static_cast<std::size_t>(bytes), scales, held);
  for (StateRange& range : array.held) {
    range.data = static_cast<std::byte*>(scales) + array.bytes(range.begin);
  }
  return array;
}

}  // namespace

EngineState Engine::state() {
  Impl& e = *impl_;
  e.require_frozen("state");
  for (const Impl::Param& p : e.params) {
    require(p.gradients == 0, "Engine::state: parameter \"", p.spec.name, "\" has ", p.gradients,
            p.gradients == 1 ? " gradient" : " gradients",
            " since the last step; the state is that between two steps");
  }
  if (e.units != nullptr) e.units->settle();
  EngineState state{.ctx = e.ctx,
                    .adamw = e.config.adamw,
                    .gradients = e.gradient_formats(),
                    .params = {},
                    .scales = e.adamw->scales(),
                    .scale_count = e.adamw->scale_count(),
                    .scalars = e.adamw->scalars(),
                    .whole_units = e.units != nullptr ? e.units->held_units() : std::string()};
  for (std::size_t i = 0; i < e.params.size(); ++i) {
    state.params.push_back(e.state_of(static_cast<int>(i)));
  }
  return state;
}

GradientFormats Engine::Impl::gradient_formats() const {
  GradientFormats formats;
  if (plan.fp8_parameters > 0) {
    const DType gradient = plan.formats.gradient;
    formats = {gradient, reduced(gradient), accumulator_of(gradient), 1};
  }
  formats.micro_batches = config.micro_batches;
  return formats;
}

ParamState Engine::Impl::state_of(int i) const {
  const Param& p = params[static_cast<std::size_t>(i)];
  ParamState state{.name = p.spec.name,
                   .shape = p.spec.shape,
                   .formats = p.formats.state,
                   .hyper = config.adamw.of(p.spec.group),
                   .arrays = {}};
  state.formats.weight = without_transpose(p.formats.state.weight);
  const WeightFormat format = state.formats.weight;
  const std::vector<Piece> whole = {{0, 0, p.spec.shape.numel()}};
  const std::vector<Piece>& states = sharded() ? p.pieces : whole;
  const std::vector<Piece>& weights = shards_weights() ? p.pieces : whole;
  void* const codes = shards_weights() ? units->shard(i).data : p.weight.view().data;
  state.arrays.push_back(
      make_array("weight", name_of(format), 1, size_of(dtype_of(format)), codes, weights));
  if (has_block_scales(format)) {
    void* const scales = shards_weights() ? units->blocks(i) : adamw->block_weight(i).scales;
    state.arrays.push_back(make_weight_blocks(format, p.spec.shape, scales, weights));
  }
  if (format != WeightFormat::f32) {
    add_state(state.arrays, "master", "", adamw->master(i), states);
  }
  add_state(state.arrays, "m", "m_blocks", adamw->m(i), states);
  add_state(state.arrays, "v", "v_blocks", adamw->v(i), states);
  for (StateArray& array : state.arrays) {
    for (const Piece& piece : p.pieces) add_owned(array, piece, p.spec.shape.numel());
  }
  return state;
}

void Engine::state_loaded() {
  Impl& e = *impl_;
  e.require_frozen("state_loaded");
  if (e.units != nullptr) {
    e.units->require_none_whole("Engine::state_loaded");
    e.units->invalidate();
    e.ctx.synchronize();
    return;
  }
  e.transpose_weights();
  e.ctx.synchronize();
}

BlockScaledView Engine::Impl::stored_weight(int i) const {
  const Param& p = params[static_cast<std::size_t>(i)];
  const WeightFormat format = p.formats.state.weight;
  if (has_block_scales(format)) return adamw->block_weight(i);
  return {.data = p.weight.view(), .granularity = granularity_of(format)};
}

BlockScaledView Engine::Impl::stored_transposed(int i) const {
  const Param& p = params[static_cast<std::size_t>(i)];
  const WeightFormat format = p.formats.state.weight;
  if (has_block_scales(format) && !transposes_weights()) return adamw->block_weight_transposed(i);
  return {.data = p.weight_transposed.view(),
          .granularity = granularity_of(format),
          .scales = p.transposed_blocks.data()};
}

void Engine::Impl::transpose_weights() {
  for (std::size_t i = 0; i < params.size(); ++i) transpose_weight(static_cast<int>(i));
}

// The casts pad rows to a multiple of 16, the optimizer's copy has none: odd ones, which only
// optimizers that are not cut have, go through a copy.
void Engine::Impl::transpose_weight(int i) {
  const Param& p = params[static_cast<std::size_t>(i)];
  const WeightFormat format = p.formats.state.weight;
  if (!is_transposed(format) || p.spec.shape.numel() == 0) return;
  const std::int64_t rows = p.spec.shape[0], columns = p.spec.shape[1];
  BlockScaledView copy = stored_transposed(i);
  if (padded_rows(rows) == rows) return make_transposed(ctx, stored_weight(i), copy);
  const Tensor wide(ctx, DType::e4m3, {columns, padded_rows(rows)});
  copy.data = wide.view();
  make_transposed(ctx, stored_weight(i), copy);
  for (std::int64_t c = 0; c < columns; ++c) {
    copy_bytes(ctx, p.weight_transposed.as<std::byte>() + c * rows,
               wide.as<std::byte>() + c * padded_rows(rows), static_cast<std::size_t>(rows));
  }
}

}  // namespace octet
