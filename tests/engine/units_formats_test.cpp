// SPDX-License-Identifier: Apache-2.0
// Sharded weights in every format, and transposed copies with every sharding: codes, scales of
// tiles and copies are those of a rank that has everything.
#include "octet/engine/engine.hpp"
#include "support/catch.hpp"
#include "support/compare.hpp"
#include "support/devices.hpp"
#include "support/random.hpp"
#include "support/ranks.hpp"

namespace octet::test {
namespace {

/// Rows that are a multiple of 16, whole and short panels, whole and short tiles; something that no
/// level manages in between.
const std::vector<Shape> kShapes = {{304, 96}, {50}, {256, 128}, {48, 200}, {700}, {400, 256}};
const std::vector<int> kUnits = {0, 0, 1, 1, 1, 2};

std::vector<float> values_of(std::size_t p, std::uint32_t seed, float sigma) {
  return normal_values(static_cast<std::size_t>(kShapes[p].numel()),
                       100 * seed + static_cast<std::uint32_t>(p), sigma);
}

using Bytes = std::vector<std::uint8_t>;

/// Everything that a trainer can ask for of a parameter.
Bytes read_weight(const Engine& engine, const Context& ctx, int p) {
  const auto append = [&](Bytes& all, const void* data, std::size_t bytes) {
    const Bytes part = download<std::uint8_t>(ctx, data, bytes);
    all.insert(all.end(), part.begin(), part.end());
  };
  const auto append_blocks = [&](Bytes& all, const BlockScaledView& view) {
    append(all, view.data.data, view.data.bytes());
    append(all, view.scales,
           static_cast<std::size_t>(
               scale_bytes(view.granularity, view.data.shape[0], view.data.shape[1])));
  };
  Bytes all;
  const WeightFormat format = engine.weight_format({p});
  if (has_block_scales(format)) {
    append_blocks(all, engine.block_weight({p}));
    if (is_transposed(format)) append_blocks(all, engine.block_weight_transposed({p}));
  } else {
    const ScaledView view = engine.weight({p});
    append(all, view.data.data, view.data.bytes());
    if (view.scale != nullptr) append(all, view.scale, sizeof(TensorScale));
    if (is_transposed(format)) {
      const TensorView turned = engine.weight_transposed({p});
      append(all, turned.data, turned.bytes());
    }
  }
  const Shape& shape = kShapes[static_cast<std::size_t>(p)];
  const Buffer decoded(ctx, static_cast<std::size_t>(shape.numel()) * sizeof(float));
  engine.weight_as({p}, view_of(ctx, decoded, DType::f32, shape));
  append(all, decoded.data(), decoded.bytes());
  return all;
}

EngineConfig config_of(const Formats& formats, Sharding sharding) {
  return {.sharding = sharding,
          .formats = formats,
          .adamw = {.seed = 3},
          .reduced_gradient = formats.gradient};
}

/// Weights of all parameters after 0, 1, ... steps, on every rank; `apart`: engine and communicator
/// have a context each.
std::vector<std::vector<Bytes>> train(const EngineConfig& config, int ranks, DeviceType device,
                                      bool apart = false) {
  std::vector<std::vector<Bytes>> results(static_cast<std::size_t>(ranks));
  run_ranks(
      ranks,
      [&](Communicator& comm) {
        const Context ctx = apart ? Context::cpu() : comm.context();
        Engine engine(ctx, comm, config);
        std::vector<Buffer> keep;
        for (std::size_t p = 0; p < kShapes.size(); ++p) {
          keep.push_back(upload(ctx, values_of(p, 1, 0.02f)));
          engine.add({.name = "p" + std::to_string(p),
                      .shape = kShapes[p],
                      .init = view_of(ctx, keep.back(), DType::f32, kShapes[p]),
                      .unit = kUnits[p]});
        }
        engine.freeze();
        std::vector<Bytes>& result = results[static_cast<std::size_t>(comm.rank())];
        for (std::uint32_t step = 1; step <= 4; ++step) {
          for (int u : {0, 1, 2, 2, 1, 0}) {
            engine.gather(u);
            for (std::size_t p = kShapes.size(); p-- > 0;) {
              if (kUnits[p] == u) result.push_back(read_weight(engine, ctx, static_cast<int>(p)));
            }
            engine.release(u);
          }
          for (std::size_t p = kShapes.size(); p-- > 0;) {
            const Buffer gradient = upload(ctx, values_of(p, 10 + step, 0.1f));
            engine.add_gradient({static_cast<int>(p)},
                                view_of(ctx, gradient, DType::f32, kShapes[p]));
            ctx.synchronize();  // the buffer goes away
          }
          engine.step({.lr = 1e-2f, .max_norm = config.clipping && step % 2 == 0 ? 0.5f : 0.0f});
        }
      },
      device);
  return results;
}

void check_ranks(const std::vector<std::vector<Bytes>>& ranks, const std::vector<Bytes>& expected) {
  for (const std::vector<Bytes>& rank : ranks) {
    REQUIRE(rank.size() == expected.size());
    for (std::size_t i = 0; i < expected.size(); ++i) {
      CHECK(first_difference(rank[i], expected[i]) == "");
    }
  }
}

}  // namespace

TEST_CASE("sharded weights of every format are those of a rank that has everything") {
  using S = StateFormat;
  for (DeviceType device : rank_devices()) {
    for (WeightFormat weight : {WeightFormat::f32, WeightFormat::bf16, WeightFormat::e4m3,
                                WeightFormat::e4m3_and_transpose, WeightFormat::e4m3_tile,
                                WeightFormat::e4m3_tile_and_transpose}) {
      for (const StateFormats& states : {StateFormats{weight, S::f16, S::e4m3, S::f16},
                                         StateFormats{weight, S::f32, S::e4m3_block, S::f32},
                                         StateFormats{weight, S::split, S::bf16, S::f32}}) {
        if (weight == WeightFormat::f32 && states.master != S::f32) continue;
        if (states.master == S::split && !has_tensor_scale(weight)) continue;
        for (DType gradient : {DType::e4m3, DType::bf16}) {
          const Formats formats{gradient, states};
          const std::vector<Bytes> whole = train(config_of(formats, Sharding::none), 1, device)[0];
          for (int ranks : {2, 5}) {
            INFO(name_of(weight) << ", master " << name_of(states.master) << ", gradient "
                                 << name_of(gradient) << ", " << ranks << " ranks");
            check_ranks(train(config_of(formats, Sharding::parameters), ranks, device), whole);
          }
        }
      }
    }
  }
}

TEST_CASE("transposed copies of whole weights are those that an optimizer alone writes") {
  using S = StateFormat;
  const Formats cases[] = {
      {DType::e4m3, {WeightFormat::e4m3_and_transpose, S::f16, S::e4m3, S::f16}},
      {DType::e4m3, {WeightFormat::e4m3_and_transpose, S::split, S::bf16, S::f32}},
      {DType::e4m3, {WeightFormat::e4m3_tile_and_transpose, S::f16, S::e4m3, S::f16}},
      {DType::bf16, {WeightFormat::e4m3_tile_and_transpose, S::f32, S::e4m3_block, S::f32}}};
  for (DeviceType device : rank_devices()) {
    for (const Formats& formats : cases) {
      const std::vector<Bytes> whole = train(config_of(formats, Sharding::none), 1, device)[0];
      for (Sharding sharding : {Sharding::optimizer, Sharding::gradients}) {
        for (int ranks : {1, 2, 3, 5}) {
          for (const bool windows : {false, true}) {
            if (windows && device == DeviceType::cuda) continue;  // ranks may share a GPU here
            for (const bool apart : {false, true}) {
              if (apart && device == DeviceType::cuda) continue;
              EngineConfig config = config_of(formats, sharding);
              config.windows = windows;
              INFO(name_of(formats.state.weight)
                   << ", master " << name_of(formats.state.master) << ", sharding "
                   << name_of(sharding) << ", " << ranks << " ranks, windows " << windows
                   << ", two contexts " << apart << ", cuda " << (device == DeviceType::cuda));
              check_ranks(train(config, ranks, device, apart), whole);
            }
          }
        }
      }
    }
  }
}

TEST_CASE("transposed copies are the same after backward and fused") {
  for (WeightFormat weight :
       {WeightFormat::e4m3_and_transpose, WeightFormat::e4m3_tile_and_transpose}) {
    Formats formats = formats_of(Level::O2);
    formats.state.weight = weight;
    for (DeviceType device : rank_devices()) {
      for (const bool windows : {false, true}) {
        if (windows && device == DeviceType::cuda) continue;  // ranks may share a GPU here
        EngineConfig config = config_of(formats, Sharding::optimizer);
        config.reduced_gradient = DType::f32;
        config.windows = windows;
        config.clipping = false;
        config.schedule = Schedule::after_backward;
        const auto after = train(config, 3, device);
        config.schedule = Schedule::fused;
        INFO(name_of(weight) << ", windows " << windows);
        check_ranks(train(config, 3, device), after[0]);
      }
    }
  }
}

}  // namespace octet::test
