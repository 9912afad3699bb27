// SPDX-License-Identifier: Apache-2.0
// The formats of an engine's weights, states and gradients.
#include "octet/engine/engine.hpp"
#include "support/catch.hpp"
#include "support/compare.hpp"
#include "support/engine_model.hpp"

namespace octet::test {
namespace {

constexpr Level kLevels[] = {Level::O0, Level::O1, Level::O2, Level::O3};

EngineConfig config_of(Level level, std::optional<Sharding> sharding = {}) {
  return {.level = level, .sharding = sharding, .adamw = {.weight_decay = 0.1f, .seed = 5}};
}

}  // namespace

TEST_CASE("gradients come in f32, bf16 and f16") {
  for (DType dtype : {DType::bf16, DType::f16}) {
    std::vector<Bytes> weights;
    for (DType given : {DType::f32, dtype}) {
      const Context ctx = Context::cpu();
      const auto comm = make_single(ctx);
      Engine engine(ctx, *comm, config_of(Level::O2));
      std::vector<Buffer> keep;
      add_parameters(engine, ctx, keep);
      engine.freeze();
      for (std::size_t p = 0; p < model_params().size(); ++p) {
        const Encoded narrow = encode_values(dtype, common_gradient(0, p, 1));
        const std::vector<float> wide(narrow.decoded.begin(), narrow.decoded.end());
        const Buffer buffer = given == DType::f32 ? upload(ctx, wide) : upload(ctx, narrow.bytes);
        engine.add_gradient({static_cast<int>(p)},
                            view_of(ctx, buffer, given, model_params()[p].shape));
      }
      engine.step({.lr = 1e-2f});
      Bytes all;
      for (const Bytes& part : read_back(engine, ctx).weights) {
        all.insert(all.end(), part.begin(), part.end());
      }
      weights.push_back(all);
    }
    INFO(name_of(dtype));
    CHECK(first_difference(weights[1], weights[0]) == "");
  }
}

TEST_CASE("weights have the level's format, stay where they are and decode on demand") {
  for (DeviceType device : rank_devices()) {
    run_ranks(
        1,
        [&](Communicator& comm) {
          const Context ctx = comm.context();
          for (Level level : kLevels) {
            Engine engine(ctx, comm, config_of(level));
            std::vector<Buffer> keep;
            add_parameters(engine, ctx, keep);
            engine.freeze();
            for (int p = 0; p < static_cast<int>(model_params().size()); ++p) {
              const auto index = static_cast<std::size_t>(p);
              const DType expected = !is_managed(index)   ? DType::f32
                                     : level == Level::O0 ? DType::bf16
                                                          : DType::e4m3;
              const ScaledView weight = engine.weight({p});
              CHECK(weight.data.dtype == expected);
              CHECK(weight.data.shape == model_params()[index].shape);
              CHECK((weight.scale != nullptr) == is_fp8(expected));
              const Stored stored = read_tensor(ctx, weight);
              for (DType out : {DType::f32, DType::bf16, DType::f16}) {
                const Tensor decoded(ctx, out, model_params()[index].shape);
                engine.weight_as({p}, decoded);
                const Stored read = read_tensor(ctx, {decoded.view(), nullptr});
                int wrong = 0;
                for (std::size_t i = 0; i < stored.values.size(); ++i) {
                  const double value = stored.values[i];
                  wrong +=
                      read.values[i] != (out == DType::f32 ? value : table_of(out).round(value));
                }
                CHECK(wrong == 0);
              }
            }
            const void* const place = engine.weight({0}).data.data;
            hand_over(engine, ctx, common_gradient, 0, 1);
            const Bytes before = download_bytes(ctx, engine.weight({0}).data);
            engine.step({.lr = 1e-2f});
            CHECK(engine.weight({0}).data.data == place);
            CHECK(first_difference(download_bytes(ctx, engine.weight({0}).data), before) != "");
          }
        },
        device);
  }
}

TEST_CASE("the plan says how the optimizer runs, and why not faster") {
  for (const Context& ctx : test_contexts()) {
    const auto comm = make_single(ctx);
    const auto plan_of = [&](const EngineConfig& config) {
      Engine engine(ctx, *comm, config);
      std::vector<Buffer> keep;
      add_parameters(engine, ctx, keep);
      engine.freeze();
      CHECK(engine.plan().to_markdown().find(engine.plan().optimizer) != std::string::npos);
      return engine.plan().optimizer;
    };
    EngineConfig config = config_of(Level::O2);
    config.adamw.stochastic_rounding = false;
    const std::string slow = plan_of(config);
    INFO(slow);
    const bool is_cuda = ctx.device().type == DeviceType::cuda;
    CHECK((slow.find("stochastic_rounding is false") != std::string::npos) == is_cuda);
    CHECK((slow.find(model_params()[0].name) != std::string::npos) == is_cuda);
    for (Level level : kLevels) {
      CHECK(plan_of(config_of(level)) ==
            (is_cuda ? "fast code for all formats" : "one loop for all formats"));
    }
    config = config_of(Level::O2);
    config.formats = small_formats();
    CHECK(plan_of(config) == (is_cuda ? "fast code for all formats" : "one loop for all formats"));
  }
}

TEST_CASE("formats set by hand work in every combination that the engine has, for any ranks") {
  RunOptions options;
  options.steps = 2;
  options.max_norm = 0.5f;
  for (const StateFormats& formats : all_formats()) {
    if (formats.weight == WeightFormat::none || needs_matrix(formats.weight)) continue;
    for (DType gradient : kGradientFormats) {
      options.config = config_of(Level::O2, Sharding::optimizer);
      options.config.formats = Formats{gradient, formats};
      INFO(describe(formats, gradient));
      options.ranks = 1;
      const std::vector<RankResult> single = train(options);
      options.ranks = 2;
      const std::vector<RankResult> results = train(options);
      REQUIRE(rank_difference(results) == "");
      REQUIRE(first_difference(everything(results), everything(single)) == "");
      CHECK(results[0].step == 2);
      CHECK(results[0].plan.formats == *options.config.formats);
    }
  }
}

}  // namespace octet::test
