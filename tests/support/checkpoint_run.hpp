// SPDX-License-Identifier: Apache-2.0
// A small model for checkpoints: trained in legs, by any number of ranks, with everything that a
// rank holds read back through the engine's older interface.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "octet/checkpoint/checkpoint.hpp"
#include "octet/engine/engine.hpp"
#include "support/devices.hpp"
#include "support/random.hpp"
#include "support/ranks.hpp"

namespace octet::test {

struct SavedParam {
  std::string name;
  Shape shape;
  AdamWGroup group = {};
};

/// Matrices with odd sizes that are FP8-managed, one that is not, vectors, a tensor of three
/// dimensions, one element.
inline std::vector<SavedParam> saved_params() {
  return {{"embedding", {300, 97}},
          {"bias", {1000}},
          {"odd", {129, 131}, {.lr_factor = 0.5f, .weight_decay = 0.0f}},
          {"one", {1}},
          {"cube", {3, 10, 50}},
          {"below", {63, 65}},
          {"long", {20000}},
          {"wide", {32, 640}}};
}

/// The same number of them, with rows that transposed copies of sharded weights want.
inline std::vector<SavedParam> even_params() {
  std::vector<SavedParam> params = saved_params();
  params[0].shape = {304, 97};
  params[2].shape = {144, 131};
  return params;
}

inline EngineConfig saved_config() {
  return {.level = Level::O3, .adamw = {.weight_decay = 0.1f, .seed = 5}, .bucket_elements = 20000};
}

using Bytes = std::vector<std::uint8_t>;

/// Gradient of a parameter: the same on every rank if `common`.
inline std::vector<float> leg_gradient(std::size_t p, const Shape& shape, int step, int rank,
                                       bool common) {
  const int seed = 1000 * step + static_cast<int>(p) + (common ? 0 : 77777 * (rank + 1));
  return normal_values(static_cast<std::size_t>(shape.numel()), static_cast<std::uint32_t>(seed),
                       0.01f * static_cast<float>(1 + p));
}

inline void add_saved_params(Engine& engine, const Context& ctx, std::vector<Buffer>& keep,
                             const std::vector<SavedParam>& params = saved_params()) {
  for (std::size_t p = 0; p < params.size(); ++p) {
    const auto count = static_cast<std::size_t>(params[p].shape.numel());
    keep.push_back(upload(ctx, normal_values(count, 77 + static_cast<std::uint32_t>(p), 0.02f)));
    engine.add({.name = params[p].name,
                .shape = params[p].shape,
                .init = view_of(ctx, keep.back(), DType::f32, params[p].shape),
                .group = params[p].group});
  }
}

inline void take_step(Engine& engine, const Context& ctx, int step, int rank, bool common,
                      const std::vector<SavedParam>& params = saved_params()) {
  for (std::size_t p = params.size(); p-- > 0;) {  // as a backward pass makes them
    const Buffer buffer = upload(ctx, leg_gradient(p, params[p].shape, step, rank, common));
    engine.add_gradient({static_cast<int>(p)}, view_of(ctx, buffer, DType::f32, params[p].shape));
    ctx.synchronize();  // the buffer goes away
  }
  // A step that clips and one that does not; 0.01 is below the norm.
  engine.step({.lr = 1e-3f, .max_norm = step % 2 == 0 ? 0.01f : 0.0f});
}

/// Everything that lasts on this rank, transposed copies included.
inline Bytes held_bytes(Engine& engine, const Context& ctx) {
  engine.gather(0);  // where weights are sharded; all parameters are in one unit
  Bytes all;
  const auto append = [&](const void* data, std::size_t bytes) {
    const Bytes part = download<std::uint8_t>(ctx, data, bytes);
    all.insert(all.end(), part.begin(), part.end());
  };
  const auto append_view = [&](const TensorView& view) { append(view.data, view.bytes()); };
  const auto append_blocks = [&](const BlockScaledView& view) {
    append_view(view.data);
    append(view.scales, static_cast<std::size_t>(
                            scale_bytes(view.granularity, view.data.shape[0], view.data.shape[1])));
  };
  const auto append_state = [&](const StateView& state) {
    append(state.data, static_cast<std::size_t>(state.count) * size_of(state.format));
    append(state.blocks, static_cast<std::size_t>(block_count(state.format, state.count)) * 4);
  };
  const AdamW& optimizer = engine.optimizer();
  for (int p = 0; p < static_cast<int>(saved_params().size()); ++p) {
    const WeightFormat format = engine.weight_format({p});
    if (has_block_scales(format)) {
      append_blocks(engine.block_weight({p}));
      if (is_transposed(format)) append_blocks(engine.block_weight_transposed({p}));
    } else {
      append_view(engine.weight({p}).data);
      if (is_transposed(format)) append_view(engine.weight_transposed({p}));
    }
    append_state(optimizer.master(p));
    append_state(optimizer.m(p));
    append_state(optimizer.v(p));
  }
  append(optimizer.scales(), static_cast<std::size_t>(optimizer.scale_count()) * 16);
  append(&optimizer.scalars()->step, 8);
  append(&optimizer.scalars()->skipped, 8);
  engine.release(0);
  return all;
}

/// A trained engine of one rank.
struct Trained {
  explicit Trained(int until = 2, const Context& c = Context::cpu()) : ctx(c) {
    add_saved_params(engine, ctx, keep);
    engine.freeze();
    go_on(until);
  }
  void go_on(int until) {
    while (steps < until) take_step(engine, ctx, ++steps, 0, true);
  }
  Bytes held() { return held_bytes(engine, ctx); }

  Context ctx;
  std::unique_ptr<Communicator> comm = make_single(ctx);
  Engine engine{ctx, *comm, saved_config()};
  std::vector<Buffer> keep;
  int steps = 0;
};

/// A run of some ranks from one step to another.
struct Leg {
  EngineConfig config;
  int ranks = 1;
  int begin = 0, end = 0;  ///< steps done before and after
  int watched = -1;        ///< a step in between
  bool common = true;      ///< gradients
  DeviceType device = DeviceType::cpu;
  std::vector<SavedParam> params = saved_params();
  /// With a new engine, before the first step and after the last.
  std::function<void(Engine&, Communicator&)> before = {}, after = {};
};

/// What every rank holds before the first step, after the watched one, and after the last.
struct LegResult {
  std::vector<Bytes> before, watched, after;
};

inline LegResult run_leg(const Leg& leg) {
  LegResult result;
  result.before.resize(static_cast<std::size_t>(leg.ranks));
  result.watched.resize(static_cast<std::size_t>(leg.ranks));
  result.after.resize(static_cast<std::size_t>(leg.ranks));
  run_ranks(
      leg.ranks,
      [&](Communicator& comm) {
        const Context ctx = comm.context();
        const auto rank = static_cast<std::size_t>(comm.rank());
        Engine engine(ctx, comm, leg.config);
        std::vector<Buffer> keep;
        add_saved_params(engine, ctx, keep, leg.params);
        engine.freeze();
        if (leg.before) leg.before(engine, comm);
        result.before[rank] = held_bytes(engine, ctx);
        for (int step = leg.begin + 1; step <= leg.end; ++step) {
          take_step(engine, ctx, step, comm.rank(), leg.common, leg.params);
          if (step == leg.watched) result.watched[rank] = held_bytes(engine, ctx);
        }
        if (leg.after) leg.after(engine, comm);
        result.after[rank] = held_bytes(engine, ctx);
      },
      leg.device);
  return result;
}

}  // namespace octet::test
