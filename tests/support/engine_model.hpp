// SPDX-License-Identifier: Apache-2.0
// A small model whose gradients are made up, trained by engines on several ranks; everything they
// hold is read back and put together.
#pragma once

#include <functional>
#include <numeric>
#include <string>
#include <vector>

#include "octet/engine/engine.hpp"
#include "support/adamw_model.hpp"
#include "support/random.hpp"
#include "support/ranks.hpp"

namespace octet::test {

struct ModelParam {
  std::string name;
  Shape shape;
  bool fp8 = true;
};

/// Matrices with odd sizes, vectors, one element, just below and at the limit of FP8 management.
inline const std::vector<ModelParam>& model_params() {
  static const std::vector<ModelParam> list = {{"embedding", {300, 97}},
                                               {"bias", {1000}},
                                               {"odd", {129, 131}},
                                               {"one", {1}},
                                               {"below", {63, 65}},
                                               {"at", {64, 64}},
                                               {"cube", {3, 40, 50}},
                                               {"long", {20000}},
                                               {"opted out", {70, 64}, false},
                                               {"wide", {2, 9000}}};
  return list;
}

/// With Sharding::parameters: which parameter is in which unit.
inline int unit_of(std::size_t p) {
  constexpr int kUnits[] = {0, 1, 1, 1, 2, 2, 3, 3, 4, 4};
  return kUnits[p];
}
inline constexpr int kModelUnits = 5;

inline std::size_t numel_of(const ModelParam& param) {
  return static_cast<std::size_t>(param.shape.numel());
}

/// Gradient of parameter p on a rank in a step; empty: none is handed over.
using GradientFn = std::function<std::vector<float>(int rank, std::size_t p, int step)>;

/// Different values in every step and parameter, the same on all ranks.
inline std::vector<float> common_gradient(int, std::size_t p, int step) {
  return normal_values(numel_of(model_params()[p]),
                       static_cast<std::uint32_t>(1000 * step) + static_cast<std::uint32_t>(p),
                       0.01f * static_cast<float>(1 + p));
}

/// Different on every rank too.
inline std::vector<float> own_gradient(int rank, std::size_t p, int step) {
  return common_gradient(rank, p, step + 500 * (rank + 1));
}

struct RunOptions {
  EngineConfig config;
  int ranks = 1;
  int steps = 4;
  DeviceType device = DeviceType::cpu;
  /// Makes the engine's context beside the communicator's; empty: it is that, with one stream.
  std::function<Context(const Communicator&)> engine_context = {};
  GradientFn gradient = common_gradient;
  /// In which order a rank hands its gradients over; empty: as registered.
  std::function<std::vector<std::size_t>(int rank, int step)> order = {};
  float lr = 1e-3f;
  float max_norm = 0.0f;
  int clip_every = 1;  ///< every so many steps one clips

  RankDevices rank_devices() const { return {device, config.windows.value_or(false)}; }
};

using Bytes = std::vector<std::uint8_t>;

/// What one rank ends with.
struct RankResult {
  std::vector<Bytes> weights;
  std::vector<TensorScale> weight_scales;
  std::vector<TensorScale> scales;  ///< all of the optimizer
  std::vector<Segment> segments;
  std::vector<Bytes> master, m, v;        ///< this rank's shards
  std::vector<Bytes> m_blocks, v_blocks;  ///< and their block scales
  std::vector<float> norms;               ///< of every step
  std::int64_t step = 0, skipped = 0;
  Plan plan;
  std::uint64_t payload_per_step = 0;  ///< measured in the last step
};

inline void add_parameters(Engine& engine, const Context& ctx, std::vector<Buffer>& keep) {
  for (std::size_t p = 0; p < model_params().size(); ++p) {
    const ModelParam& param = model_params()[p];
    keep.push_back(
        upload(ctx, normal_values(numel_of(param), 77 + static_cast<std::uint32_t>(p), 0.02f)));
    engine.add({.name = param.name,
                .shape = param.shape,
                .init = view_of(ctx, keep.back(), DType::f32, param.shape),
                .fp8 = param.fp8,
                .unit = unit_of(p)});
  }
}

inline void hand_over(Engine& engine, const Context& ctx, const GradientFn& gradient, int rank,
                      int step) {
  for (std::size_t p = 0; p < model_params().size(); ++p) {
    const std::vector<float> values = gradient(rank, p, step);
    if (values.empty()) continue;
    const Buffer buffer = upload(ctx, values);
    engine.add_gradient({static_cast<int>(p)},
                        view_of(ctx, buffer, DType::f32, model_params()[p].shape));
    ctx.synchronize();  // the buffer goes away
  }
}

/// The step that the gradient of a micro-batch belongs to for a GradientFn.
inline int micro_step(int step, int micro_batch) { return step + 100 * micro_batch; }

/// All micro-batches of a step.
inline void hand_over(Engine& engine, const Context& ctx, const RunOptions& options, int rank,
                      int step) {
  std::vector<std::size_t> order(model_params().size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  for (int m = 0; m < options.config.micro_batches; ++m) {
    const int at = micro_step(step, m);
    if (options.order) order = options.order(rank, at);
    for (std::size_t p : order) {
      const std::vector<float> values = options.gradient(rank, p, at);
      if (values.empty()) continue;
      const Buffer buffer = upload(ctx, values);
      engine.add_gradient({static_cast<int>(p)},
                          view_of(ctx, buffer, DType::f32, model_params()[p].shape));
      ctx.synchronize();  // the buffer goes away
    }
  }
}

inline Bytes codes_of(const Context& ctx, const StateView& view) {
  const auto count = static_cast<std::size_t>(view.count);
  return download<std::uint8_t>(ctx, view.data, count * size_of(view.format));
}
inline Bytes blocks_of(const Context& ctx, const StateView& view) {
  const auto blocks = static_cast<std::size_t>(block_count(view.format, view.count));
  return download<std::uint8_t>(ctx, view.blocks, blocks * sizeof(float));
}

inline RankResult read_back(Engine& engine, const Context& ctx) {
  RankResult result;
  const AdamW& optimizer = engine.optimizer();
  for (int p = 0; p < static_cast<int>(model_params().size()); ++p) {
    engine.gather(unit_of(static_cast<std::size_t>(p)));
    const ScaledView weight = engine.weight({p});
    result.weights.push_back(download_bytes(ctx, weight.data));
    result.weight_scales.push_back(
        weight.scale != nullptr ? download_one<TensorScale>(ctx, weight.scale) : TensorScale{});
    engine.release(unit_of(static_cast<std::size_t>(p)));
    const StateView master = optimizer.master(p), m = optimizer.m(p), v = optimizer.v(p);
    result.master.push_back(codes_of(ctx, master));
    result.m.push_back(codes_of(ctx, m));
    result.v.push_back(codes_of(ctx, v));
    result.m_blocks.push_back(blocks_of(ctx, m));
    result.v_blocks.push_back(blocks_of(ctx, v));
  }
  result.scales = download<TensorScale>(ctx, optimizer.scales(),
                                        static_cast<std::size_t>(optimizer.scale_count()));
  result.segments = optimizer.segments();
  result.plan = engine.plan();
  return result;
}

/// Trains and returns what every rank holds.
inline std::vector<RankResult> train(const RunOptions& options) {
  std::vector<RankResult> results(static_cast<std::size_t>(options.ranks));
  const auto run_rank = [&](Communicator& comm) {
    const Context ctx = options.engine_context ? options.engine_context(comm) : comm.context();
    Engine engine(ctx, comm, options.config);
    std::vector<Buffer> keep;
    add_parameters(engine, ctx, keep);
    engine.freeze();
    std::vector<float> norms;
    std::uint64_t payload = 0;
    RankResult& result = results[static_cast<std::size_t>(comm.rank())];
    for (int step = 1; step <= options.steps; ++step) {
      payload = comm.wire_bytes().payload;
      hand_over(engine, ctx, options, comm.rank(), step);
      const float max_norm = step % options.clip_every == 0 ? options.max_norm : 0.0f;
      const StepResult done = engine.step({.lr = options.lr, .max_norm = max_norm});
      payload = comm.wire_bytes().payload - payload;
      norms.push_back(done.norm.read_sync());
      result.step = done.step.read_sync();
      result.skipped = done.skipped.read_sync();
    }
    const std::int64_t step = result.step, skipped = result.skipped;
    result = read_back(engine, ctx);
    result.step = step;
    result.skipped = skipped;
    result.norms = norms;
    result.payload_per_step = payload;
  };
  run_ranks(options.ranks, run_rank, options.rank_devices());
  return results;
}

inline bool is_managed(std::size_t p) {
  const ModelParam& param = model_params()[p];
  return param.fp8 && param.shape.rank() >= 2 && param.shape.numel() >= 4096;
}

inline Formats formats_of_param(const RankResult& result, std::size_t p) {
  return is_managed(p) ? result.plan.formats : Formats{};
}

/// One state of one parameter, whole, from all ranks' shards: `width` bytes for every `run`
/// elements.
inline Bytes gather_state(const std::vector<RankResult>& results, std::size_t p,
                          std::vector<Bytes> RankResult::*state, std::size_t width,
                          std::int64_t run = 1) {
  // An FP32 weight is its own master and, unless weights are cut, whole on every rank.
  const StateFormats formats = formats_of_param(results[0], p).state;
  const bool is_whole = state == &RankResult::master && formats.weight == WeightFormat::f32 &&
                        results[0].plan.sharding != Sharding::parameters;
  const auto bytes_for = [&](std::int64_t elements) {
    return static_cast<std::size_t>((elements + run - 1) / run) * width;
  };
  Bytes whole(bytes_for(model_params()[p].shape.numel()), 0xEE);
  for (const RankResult& result : results) {
    const Bytes& shard = (result.*state)[p];
    for (const Segment& segment : result.segments) {
      if (segment.tensor != static_cast<std::int32_t>(p)) continue;
      const std::size_t from = bytes_for(is_whole ? segment.begin : segment.local);
      std::copy_n(shard.begin() + static_cast<std::ptrdiff_t>(from), bytes_for(segment.count),
                  whole.begin() + static_cast<std::ptrdiff_t>(bytes_for(segment.begin)));
    }
  }
  return whole;
}

/// Weights of rank 0, all states gathered and the scales: what has to be equal between runs.
inline Bytes everything(const std::vector<RankResult>& results) {
  Bytes all;
  const auto append = [&all](const Bytes& part) {
    all.insert(all.end(), part.begin(), part.end());
  };
  for (std::size_t p = 0; p < model_params().size(); ++p) {
    const StateFormats f = formats_of_param(results[0], p).state;
    append(results[0].weights[p]);
    append(gather_state(results, p, &RankResult::master, size_of(f.master)));
    append(gather_state(results, p, &RankResult::m, size_of(f.m)));
    append(gather_state(results, p, &RankResult::v, size_of(f.v)));
    if (is_block(f.m)) append(gather_state(results, p, &RankResult::m_blocks, 4, kStateBlock));
    if (is_block(f.v)) append(gather_state(results, p, &RankResult::v_blocks, 4, kStateBlock));
  }
  append(bytes_of(results[0].scales));
  return all;
}

/// Whether all ranks hold the same weights and scales; names the first that does not.
inline std::string rank_difference(const std::vector<RankResult>& results) {
  for (std::size_t rank = 1; rank < results.size(); ++rank) {
    for (std::size_t p = 0; p < model_params().size(); ++p) {
      if (results[rank].weights[p] != results[0].weights[p]) {
        return "weight \"" + model_params()[p].name + "\" of rank " + std::to_string(rank);
      }
    }
    for (std::size_t i = 0; i < results[0].scales.size(); ++i) {
      const TensorScale& a = results[0].scales[i];
      const TensorScale& b = results[rank].scales[i];
      if (a.scale != b.scale || a.scale_inv != b.scale_inv || a.amax != b.amax) {
        return "scale " + std::to_string(i) + " of rank " + std::to_string(rank);
      }
    }
  }
  return {};
}

}  // namespace octet::test
