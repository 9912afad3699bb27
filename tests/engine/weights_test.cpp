// SPDX-License-Identifier: Apache-2.0
// Weights of matrices: with scales of blocks, with transposed copies, as the engine hands them out.
#include "octet/comm/collectives.hpp"
#include "octet/engine/engine.hpp"
#include "support/adamw_model.hpp"
#include "support/catch.hpp"
#include "support/compare.hpp"
#include "support/errors.hpp"
#include "support/random.hpp"
#include "support/ranks.hpp"

namespace octet::test {
namespace {

using Bytes = std::vector<std::uint8_t>;

constexpr WeightFormat kMatrixFormats[] = {WeightFormat::e4m3_and_transpose,
                                           WeightFormat::e4m3_row_block, WeightFormat::e4m3_tile,
                                           WeightFormat::e4m3_tile_and_transpose};
constexpr int kSteps = 3;
constexpr float kRate = 1e-2f;
constexpr float kMaxNorm = 0.5f;

/// Whole tiles and panels that a cut goes through, odd sizes, and two that no format of matrices
/// is for.
struct Case {
  Shape shape;
  bool fp8 = true;
};
const std::vector<Case> kCases = {{{384, 256}},         {{129, 131}}, {{1000}},   {{300, 97}},
                                  {{3, 40, 50}, false}, {{64, 64}},   {{2, 9000}}};
constexpr int kCount = 7;

bool is_managed(int p) {
  const Case& c = kCases[static_cast<std::size_t>(p)];
  return c.fp8 && c.shape.rank() == 2;
}

std::vector<float> values_of(int p, int step, float deviation) {
  return normal_values(static_cast<std::size_t>(kCases[static_cast<std::size_t>(p)].shape.numel()),
                       static_cast<std::uint32_t>(100 * step + p), deviation);
}

Formats formats_with(WeightFormat weight, DType gradient = DType::e4m3) {
  return {gradient, {weight, StateFormat::f16, StateFormat::e4m3, StateFormat::f16}};
}

AdamWConfig adamw_config() { return {.weight_decay = 0.1f, .seed = 5}; }

void append(Bytes& all, const Bytes& part) { all.insert(all.end(), part.begin(), part.end()); }

Bytes scale_bytes_of(const Context& ctx, const AdamW& adamw, int p) {
  return bytes_of(std::vector<TensorScale>{download_one<TensorScale>(ctx, adamw.weight_scale(p))});
}

void add_parameters(Engine& engine, const Context& ctx, std::vector<Buffer>& keep) {
  for (int p = 0; p < kCount; ++p) {
    const Case& c = kCases[static_cast<std::size_t>(p)];
    keep.push_back(upload(ctx, values_of(p, 0, 0.02f)));
    engine.add({.name = "p" + std::to_string(p),
                .shape = c.shape,
                .init = view_of(ctx, keep.back(), DType::f32, c.shape),
                .fp8 = c.fp8});
  }
}

void train_step(Engine& engine, const Context& ctx, int step, int seed = 0,
                float max_norm = kMaxNorm) {
  for (int p = 0; p < kCount; ++p) {
    const Buffer buffer = upload(ctx, values_of(p, step + seed, 0.1f));
    engine.add_gradient(
        {p}, view_of(ctx, buffer, DType::f32, kCases[static_cast<std::size_t>(p)].shape));
    ctx.synchronize();  // the buffer goes away
  }
  engine.step({.lr = kRate, .max_norm = max_norm});
}

/// All that the engine hands out of a weight, by its accessors.
Bytes handed_out(const Engine& engine, const Context& ctx, int p) {
  Bytes all;
  switch (engine.weight_format({p})) {
    case WeightFormat::e4m3_and_transpose:
      append(all, download_bytes(ctx, engine.weight({p}).data));
      append(all, download_bytes(ctx, engine.weight_transposed({p})));
      break;
    case WeightFormat::e4m3_row_block:
    case WeightFormat::e4m3_tile: {
      const Blocks blocks = read_blocks(ctx, engine.block_weight({p}));
      for (const Bytes& part : {blocks.codes, blocks.scales}) append(all, part);
      break;
    }
    case WeightFormat::e4m3_tile_and_transpose: {
      const Blocks blocks = read_blocks(ctx, engine.block_weight({p}));
      const Blocks transposed = read_blocks(ctx, engine.block_weight_transposed({p}));
      for (const Bytes& part : {blocks.codes, transposed.codes, blocks.scales, transposed.scales}) {
        append(all, part);
      }
      break;
    }
    default: append(all, download_bytes(ctx, engine.weight({p}).data));
  }
  append(all, scale_bytes_of(ctx, engine.optimizer(), p));
  return all;
}

/// The same weights by an AdamW alone: its gradients go through the same reduction, which replaces
/// their amax by its bound.
std::vector<Bytes> weights_of_adamw(const Formats& formats) {
  const Context ctx = Context::cpu();
  const auto comm = make_single(ctx);
  std::vector<ParamCase> cases;
  for (int p = 0; p < kCount; ++p) {
    const Formats own = is_managed(p) ? formats : Formats{};
    cases.push_back({.shape = kCases[static_cast<std::size_t>(p)].shape,
                     .formats = own.state,
                     .gradient = own.gradient,
                     .group = AdamWGroup{}});
  }
  AdamwModel model(ctx, adamw_config(), cases);
  for (int p = 0; p < kCount; ++p) model.initialise(p, values_of(p, 0, 0.02f));
  for (int step = 1; step <= kSteps; ++step) {
    for (int p = 0; p < kCount; ++p) {
      model.set_gradient(p, values_of(p, step, 0.1f));
      const ScaledView gradient = model.gradient_view(p);
      MeanReducer reducer(*comm, MeanReducer::Path::two_shot, {{gradient.data, {}}}, gradient.scale,
                          {{{0, 0, gradient.data.numel()}}});
      reducer.run(model.flag());
    }
    model.step(kRate, kMaxNorm);
  }
  std::vector<Bytes> weights;
  for (int p = 0; p < kCount; ++p) {
    Bytes all = download_bytes(ctx, model.weight_view(p));
    append(all, download_bytes(ctx, model.transposed_view(p)));
    append(all, block_scale_bytes(ctx, model.optimizer(), p, model.formats(p).weight));
    append(all, scale_bytes_of(ctx, model.optimizer(), p));
    weights.push_back(all);
  }
  return weights;
}

/// What every rank of an engine holds after the same steps; the gradients of rank r are those of
/// r * seeds steps later.
std::vector<std::vector<Bytes>> weights_of_engine(const EngineConfig& config, int ranks,
                                                  DeviceType device, float max_norm = kMaxNorm,
                                                  int seeds = 0) {
  std::vector<std::vector<Bytes>> results(static_cast<std::size_t>(ranks));
  run_ranks(
      ranks,
      [&](Communicator& comm) {
        const Context ctx = comm.context();
        Engine engine(ctx, comm, config);
        std::vector<Buffer> keep;
        add_parameters(engine, ctx, keep);
        engine.freeze();
        for (int step = 1; step <= kSteps; ++step) {
          train_step(engine, ctx, step, seeds * comm.rank(), max_norm);
        }
        for (int p = 0; p < kCount; ++p) {
          results[static_cast<std::size_t>(comm.rank())].push_back(handed_out(engine, ctx, p));
        }
      },
      device);
  return results;
}

void check_engine(const Formats& formats, Sharding sharding, std::initializer_list<int> ranks) {
  const std::vector<Bytes> expected = weights_of_adamw(formats);
  for (DeviceType device : rank_devices()) {
    for (int count : ranks) {
      const EngineConfig config{.sharding = sharding, .formats = formats, .adamw = adamw_config()};
      const auto results = weights_of_engine(config, count, device);
      for (std::size_t rank = 0; rank < results.size(); ++rank) {
        for (std::size_t p = 0; p < kCount; ++p) {
          INFO(name_of(formats.state.weight)
               << ", gradient " << name_of(formats.gradient) << ", sharding " << name_of(sharding)
               << ", rank " << rank << " of " << count << ", parameter " << p << ", cuda "
               << (device == DeviceType::cuda));
          CHECK(first_difference(results[rank][p], expected[p]) == "");
        }
      }
    }
  }
}

}  // namespace

TEST_CASE("weights of matrices are those of an AdamW alone, on any number of ranks") {
  for (WeightFormat weight : kMatrixFormats) {
    for (DType gradient : kGradientFormats) {
      check_engine(formats_with(weight, gradient), Sharding::none, {1, 2});
    }
    check_engine(formats_with(weight), Sharding::optimizer, {1});
  }
  // With another master, and with blocks of states that straddle tiles.
  StateFormats other = kRowBlocks;
  for (WeightFormat weight : {WeightFormat::e4m3_row_block, WeightFormat::e4m3_tile}) {
    other.weight = weight;
    check_engine({DType::bf16, other}, Sharding::none, {1, 2});
  }
  check_engine({DType::e4m3, kSmallTransposed}, Sharding::none, {1, 2});
}

TEST_CASE("scales of tiles are gathered with the codes of a sharded optimizer") {
  for (DType gradient : kGradientFormats) {
    check_engine(formats_with(WeightFormat::e4m3_tile, gradient), Sharding::optimizer, {2, 3, 4});
  }
}

TEST_CASE("tiles are the same after backward and fused") {
  const StateFormats of_blocks = {WeightFormat::e4m3_tile, StateFormat::f32,
                                  StateFormat::e4m3_block, StateFormat::sqrt_e4m3_block};
  for (const Formats& formats :
       {formats_with(WeightFormat::e4m3_tile), formats_with(WeightFormat::e4m3_tile, DType::bf16),
        Formats{DType::e4m3, of_blocks}}) {
    for (DeviceType device : rank_devices()) {
      for (int ranks : {2, 3, 5}) {
        EngineConfig config{.sharding = Sharding::optimizer,
                            .formats = formats,
                            .adamw = adamw_config(),
                            .schedule = Schedule::after_backward};
        const auto after = weights_of_engine(config, ranks, device, 0.0f, 50);
        config.schedule = Schedule::fused;
        config.clipping = false;
        const auto fused = weights_of_engine(config, ranks, device, 0.0f, 50);
        for (std::size_t rank = 0; rank < fused.size(); ++rank) {
          for (std::size_t p = 0; p < kCount; ++p) {
            INFO("rank " << rank << " of " << ranks << ", parameter " << p << ", cuda "
                         << (device == DeviceType::cuda));
            CHECK(first_difference(fused[rank][p], after[rank][p]) == "");
            CHECK(first_difference(fused[rank][p], fused[0][p]) == "");
          }
        }
      }
    }
  }
}

TEST_CASE("a weight in blocks decodes on demand, stays where it is and changes in a step") {
  for (const Context& ctx : test_contexts()) {
    for (WeightFormat format : kMatrixFormats) {
      INFO(name_of(format) << " on " << ctx.device());
      const auto comm = make_single(ctx);
      Engine engine(ctx, *comm, {.formats = formats_with(format)});
      std::vector<Buffer> keep;
      add_parameters(engine, ctx, keep);
      engine.freeze();
      for (int p = 0; p < kCount; ++p) {
        const Shape& shape = kCases[static_cast<std::size_t>(p)].shape;
        const WeightFormat own = is_managed(p) ? format : WeightFormat::f32;
        CHECK(engine.weight_format({p}) == own);
        Stored stored;
        if (has_block_scales(own)) {
          stored = read_tensor(ctx, {engine.block_weight({p}).data, nullptr});
          decode_blocks(stored, shape, granularity_of(own),
                        read_blocks(ctx, engine.block_weight({p})));
        } else {
          stored = read_tensor(ctx, engine.weight({p}));
        }
        for (DType out : {DType::f32, DType::bf16, DType::f16}) {
          const Tensor decoded(ctx, out, shape);
          engine.weight_as({p}, decoded);
          const Stored read = read_tensor(ctx, {decoded.view(), nullptr});
          int wrong = 0;
          for (std::size_t i = 0; i < stored.values.size(); ++i) {
            const double value = stored.values[i];
            wrong += read.values[i] != (out == DType::f32 ? value : table_of(out).round(value));
          }
          CHECK(wrong == 0);
        }
      }
      const auto place = [&] {
        return has_block_scales(format) ? engine.block_weight({0}).data.data
                                        : engine.weight_transposed({0}).data;
      };
      const void* const before = place();
      const Bytes bytes = handed_out(engine, ctx, 0);
      train_step(engine, ctx, 1);
      CHECK(place() == before);
      CHECK(first_difference(handed_out(engine, ctx, 0), bytes) != "");
    }
  }
}

TEST_CASE("weights that a format does not have are refused by name") {
  const Context ctx = Context::cpu();
  const auto comm = make_single(ctx);
  for (WeightFormat format : {WeightFormat::f32, WeightFormat::bf16, WeightFormat::e4m3,
                              WeightFormat::e4m3_and_transpose, WeightFormat::e4m3_row_block,
                              WeightFormat::e4m3_tile, WeightFormat::e4m3_tile_and_transpose}) {
    Formats formats = formats_with(format);
    if (format == WeightFormat::f32) formats.state.master = StateFormat::f32;
    Engine engine(ctx, *comm, {.formats = formats});
    std::vector<Buffer> keep;
    add_parameters(engine, ctx, keep);
    for (const auto& error : {error_of([&] { engine.block_weight({0}); }),
                              error_of([&] { engine.block_weight_transposed({0}); }),
                              error_of([&] { engine.weight_transposed({0}); })}) {
      CHECK(missing(error, {"weight", "freeze"}) == "");
    }
    engine.freeze();
    const auto check = [&](bool exists, const std::string& error) {
      INFO(name_of(format));
      CHECK((exists ? error == "no error"
                    : missing(error, {"\"p0\"", std::string(name_of(format))}) == ""));
    };
    const bool blocks = has_block_scales(format);
    check(!blocks, error_of([&] { engine.weight({0}); }));
    check(blocks, error_of([&] { engine.block_weight({0}); }));
    check(is_transposed(format) && !blocks, error_of([&] { engine.weight_transposed({0}); }));
    check(is_transposed(format) && blocks, error_of([&] { engine.block_weight_transposed({0}); }));
    const Tensor turned(ctx, DType::f32, {256, 384});
    CHECK(missing(error_of([&] { engine.weight_as({0}, turned); }), {"[256, 384]"}) == "");
  }
}

TEST_CASE("parameters and shardings that the formats of matrices are not for are refused") {
  const Context ctx = Context::cpu();
  const auto comm = make_single(ctx);
  const Tensor cube(ctx, DType::f32, {3, 40, 50});
  for (WeightFormat format : kMatrixFormats) {
    const std::string name(name_of(format));
    Engine engine(ctx, *comm, {.formats = formats_with(format)});
    const auto add = [&](bool fp8) {
      return error_of([&] {
        engine.add({.name = "cube", .shape = {3, 40, 50}, .init = cube, .fp8 = fp8});
      });
    };
    CHECK(missing(add(true), {"\"cube\"", "formats.weight", name, "[3, 40, 50]"}) == "");
    CHECK(add(false) == "no error");

    std::vector<std::string> errors(2);
    run_ranks(2, [&](Communicator& pair) {
      errors[static_cast<std::size_t>(pair.rank())] = error_of([&] {
        const Engine sharded(pair.context(), pair,
                             {.sharding = Sharding::optimizer, .formats = formats_with(format)});
      });
    });
    for (const std::string& error : errors) {
      INFO(name);
      CHECK((format != WeightFormat::e4m3_row_block
                 ? error == "no error"
                 : missing(error, {"weight", name, "sharding", "optimizer", "2 ranks"}) == ""));
    }
  }
}

}  // namespace octet::test
