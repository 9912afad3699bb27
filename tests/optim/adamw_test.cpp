// SPDX-License-Identifier: Apache-2.0
#include "octet/optim/adamw.hpp"

#include "support/adamw_model.hpp"
#include "support/adamw_step.hpp"
#include "support/catch.hpp"
#include "support/compare.hpp"
#include "support/random.hpp"

namespace octet::test {
namespace {

/// The value as a master of this format holds it, rounded to nearest, ties to even.
double rounded_master(StateFormat format, double value, double scale) {
  if (format == StateFormat::f32) return value;
  if (format == StateFormat::f16) return table_of(DType::f16).round(value * scale) / scale;
  return std::copysign(split_value(nearest_split(value * scale)) / scale, value);
}

}  // namespace

TEST_CASE("the initial state is the rounded values, zeros and exact scales") {
  const Shape shape{17, 61};
  for (const Context& ctx : test_contexts()) {
    for (const StateFormats& formats : all_formats()) {
      INFO(to_string(ctx.device()) << ", " << describe(formats));
      AdamwModel model(ctx, {}, {{shape, formats}});
      std::vector<float> values = normal_values(1037, 1, 0.02f);
      values[5] = 1e-30f;
      values[6] = -1e-30f;
      values[7] = 0x1p-6f * (1 + 0x1p-12f);  // ties of a split code: down and up to even
      values[8] = 0x1p-6f * (1 + 3 * 0x1p-12f);
      values[9] = 0x1p-6f * (1 + 0x1p-4f);  // tie of E4M3 itself
      // The largest rounds down to where a scale from the stored amax would be twice as large.
      values[10] = 224 * 0x1p-11f * (1 + 0x1p-20f);
      model.initialise(0, values);
      const Stored master = model.master(0), m = model.m(0), v = model.v(0);
      const double amax = amax_of(Doubles(values.begin(), values.end()));
      int wrong = 0;
      for (std::size_t i = 0; i < values.size(); ++i) {
        wrong += master.values[i] != rounded_master(formats.master, static_cast<double>(values[i]),
                                                    static_cast<double>(master.scale.scale));
        wrong += m.codes[i] != 0;
        wrong += v.codes[i] != 0;
      }
      CHECK(wrong == 0);
      CHECK(scale_error(master, amax, "master") == "");
      // Zeros: the smallest inv in every block.
      for (const Stored* zeros : {&m, &v}) {
        for (float inv : zeros->blocks) wrong += inv != 0x1p-126f;
        if (zeros->blocks.empty()) CHECK(scale_error(*zeros, 0, "moment") == "");
        CHECK(zeros->scale.amax == 0.0f);
      }
      CHECK(m.blocks.size() == (formats.m == StateFormat::e4m3_block ? 9u : 0u));
      CHECK(v.blocks.size() == (formats.v == StateFormat::sqrt_e4m3_block ? 9u : 0u));
      CHECK(wrong == 0);
      if (formats.weight == WeightFormat::none) continue;
      const bool has_blocks = has_block_scales(formats.weight);
      CHECK(scale_error(model.weight(0), has_blocks ? 0 : amax, "weight") == "");
      CHECK(weight_error(model, 0, formats, shape) == "");
    }
  }
}

TEST_CASE("initial values may be f32, bf16 or f16") {
  for (const Context& ctx : test_contexts()) {
    for (DType dtype : {DType::f32, DType::bf16, DType::f16}) {
      for (const StateFormats& formats : {kO2, kSmall}) {
        AdamwModel model(ctx, {}, {{{129}, formats}});
        const Encoded encoded = encode_values(dtype, normal_values(129, 2));
        const Buffer buffer = upload(ctx, encoded.bytes);
        model.optimizer().initialise(0, view_of(ctx, buffer, dtype, {129}));
        const Stored master = model.master(0);
        for (std::size_t i = 0; i < 129; ++i) {
          REQUIRE(master.values[i] == rounded_master(formats.master, encoded.decoded[i],
                                                     static_cast<double>(master.scale.scale)));
        }
      }
    }
  }
}

TEST_CASE("every combination of formats takes the steps of double-precision AdamW") {
  const AdamWConfig config{.beta1 = 0.9f, .beta2 = 0.95f, .eps = 1e-8f, .seed = 3};
  const AdamwReference reference(config, 1e-3f, 0.1f);
  const Shape shape{17, 61};
  for (const Context& ctx : test_contexts()) {
    for (const StateFormats& formats : all_formats()) {
      for (DType gradient : kGradientFormats) {
        INFO(to_string(ctx.device()) << ", " << describe(formats, gradient));
        AdamwModel model(ctx, config, {{shape, formats, gradient, 0.1f}});
        model.initialise(0, normal_values(1037, 4, 0.02f));
        for (std::int64_t t = 1; t <= 6; ++t) {
          std::vector<float> g = normal_values(1037, static_cast<std::uint32_t>(t), 1e-3f);
          g[0] = 0.0f;
          g[1] = 1e-25f;
          g[2] = 0.5f * std::abs(g[3]);
          // Blocks of very different size, and one that sees a gradient only in the first step.
          for (std::size_t i = 256; i < 384; ++i) g[i] *= 1e-6f;
          for (std::size_t i = 512; i < 640 && t > 1; ++i) g[i] = 0.0f;
          const Doubles decoded = model.set_gradient(0, g);
          const StepChecker checker(model, 0, formats, shape, decoded);
          model.step(1e-3f);
          REQUIRE(checker.check(reference, t) == "");
        }
        const AdamwScalars s = model.scalars();
        CHECK(s.step == 6);
        CHECK(s.skipped == 0);
        CHECK(s.skip == 0);
      }
    }
  }
}

TEST_CASE("many steps stay near the double-precision run") {
  struct Row {
    StateFormats formats;
    DType gradient;
    double tolerance;  ///< of the displacement, relative in the 2-norm
  };
  // FP32 rounding; bf16 and E4M3 gradients are decoded before the comparison, so what remains is
  // the rounding of the states: 2^-11 steps of master and v, 2^-8 of bf16, 2^-4 steps of m and of
  // the root of v, averaged.
  using S = StateFormat;
  const StateFormats root = {WeightFormat::e4m3, S::f32, S::f32, S::sqrt_e4m3_block};
  const Row rows[] = {{kPlain, DType::f32, 2e-6},
                      {kPlain, DType::e4m3, 2e-6},
                      {kO0, DType::bf16, 2e-6},
                      {{.weight = WeightFormat::bf16, .v = S::f16}, DType::f32, 4e-4},
                      {{.weight = WeightFormat::bf16, .m = S::bf16}, DType::f32, 0.003},
                      {{.weight = WeightFormat::bf16, .v = S::bf16}, DType::f32, 0.003},
                      {{.weight = WeightFormat::bf16, .m = S::e4m3}, DType::f32, 0.05},
                      {{.weight = WeightFormat::none, .m = S::e4m3_block}, DType::f32, 0.05},
                      {root, DType::f32, 0.07},
                      {{.weight = WeightFormat::e4m3, .master = S::split}, DType::f32, 0.003},
                      {kO1, DType::e4m3, 0.003},
                      {kO2, DType::e4m3, 0.05},
                      {kSmall, DType::e4m3, 0.07},
                      {kSmallTransposed, DType::bf16, 0.07}};
  const AdamWConfig config{.seed = 7};
  for (const Context& ctx : test_contexts()) {
    for (const Row& row : rows) {
      AdamwModel model(ctx, config, {{{31, 67}, row.formats, row.gradient, 0.05f}});
      model.initialise(0, normal_values(2077, 8, 0.02f));
      const AdamwReference reference(config, 2e-3f, 0.05f);
      Doubles w = model.master(0).values;
      const Doubles start = w;
      Doubles m(w.size(), 0.0), v(w.size(), 0.0);
      for (std::int64_t t = 1; t <= 60; ++t) {
        std::vector<float> g = normal_values(2077, static_cast<std::uint32_t>(100 + t), 1e-3f);
        for (std::size_t i = 0; i < g.size(); i += 2) g[i] += 1e-3f;  // half of them drift
        reference.step(t, model.set_gradient(0, g), w, m, v);
        model.step(2e-3f);
      }
      const Doubles end = model.master(0).values;
      Doubles difference(w.size()), displacement(w.size());
      for (std::size_t i = 0; i < w.size(); ++i) {
        difference[i] = end[i] - w[i];
        displacement[i] = w[i] - start[i];
      }
      INFO(to_string(ctx.device()) << ", " << describe(row.formats, row.gradient));
      CHECK(norm_of(difference) < row.tolerance * norm_of(displacement));
    }
  }
}

TEST_CASE("a norm below the limit, and no limit, leave the gradients alone") {
  for (const Context& ctx : test_contexts()) {
    AdamwModel model(ctx, {}, {{{1000}, kPlain}});
    model.initialise(0, normal_values(1000, 13));
    const Doubles g = model.set_gradient(0, normal_values(1000, 14));
    model.step(1e-3f, 1e6f);
    CHECK(model.scalars().clip == 1.0f);
    CHECK(std::abs(static_cast<double>(model.scalars().norm) / norm_of(g) - 1) < 1e-6);
    model.step(1e-3f);
    CHECK(model.scalars().clip == 1.0f);
    CHECK(model.scalars().norm == 0.0f);
    CHECK(model.scalars().step == 2);
  }
}

TEST_CASE("a step whose learning rate on the device is negative or no number is skipped") {
  for (const Context& ctx : test_contexts()) {
    AdamwModel model(ctx, {}, {{{100}, kO2, DType::f32}});
    model.initialise(0, normal_values(100, 19));
    model.set_gradient(0, std::vector<float>(100, 1.0f));
    const auto before = model.all_bytes();
    std::int64_t skipped = 0;
    for (float rate : {NAN, INFINITY, -INFINITY, -1e-3f, -1e-45f}) {
      const Buffer lr = upload<float>(ctx, {rate});
      model.optimizer().step({.lr = 1e-3f, .lr_device = lr.as<float>()});
      CHECK(first_difference(model.all_bytes(), before) == "");
      CHECK(model.scalars().skipped == ++skipped);
    }
    const Buffer zero = upload<float>(ctx, {-0.0f});
    model.optimizer().step({.lr_device = zero.as<float>()});
    CHECK(model.scalars().step == 1);
  }
}

TEST_CASE("a learning rate on the device takes the place of the argument") {
  for (const Context& ctx : test_contexts()) {
    std::vector<std::vector<std::uint8_t>> bytes;
    const Buffer lr = upload<float>(ctx, {1e-2f});
    for (bool on_device : {false, true}) {
      AdamwModel model(ctx, {}, {{{1037}, kSmall, DType::e4m3, 0.1f}});
      model.initialise(0, normal_values(1037, 20));
      model.set_gradient(0, normal_values(1037, 21));
      AdamWStep step{.lr = 1e-2f};
      if (on_device) step = {.lr = 77.0f, .lr_device = lr.as<float>()};
      model.optimizer().step(step);
      CHECK(model.scalars().lr == 1e-2f);
      bytes.push_back(model.all_bytes());
    }
    CHECK(first_difference(bytes[1], bytes[0]) == "");
  }
}

TEST_CASE("a learning rate of zero changes the moments and keeps the weights") {
  for (const Context& ctx : test_contexts()) {
    for (const StateFormats& formats : {kO2, kSmallTransposed}) {
      AdamwModel model(ctx, {}, {{{17, 61}, formats, DType::f32, 0.1f}});
      model.initialise(0, normal_values(1037, 22));
      model.set_gradient(0, normal_values(1037, 23));
      const Stored weight = model.weight(0), master = model.master(0);
      for (int i = 0; i < 3; ++i) model.step(0.0f);
      INFO(to_string(ctx.device()) << ", " << describe(formats));
      CHECK(first_difference(model.weight(0).values, weight.values) == "");
      CHECK(first_difference(model.master(0).values, master.values) == "");
      CHECK(model.m(0).scale.amax > 0.0f);
    }
  }
}

TEST_CASE("seed and step decide the rounding of every state, and runs repeat") {
  using S = StateFormat;
  const StateFormats list[] = {{.weight = WeightFormat::bf16, .master = S::f16},
                               {.weight = WeightFormat::e4m3, .master = S::split},
                               {.m = S::bf16},
                               {.m = S::e4m3},
                               {.m = S::e4m3_block},
                               {.v = S::bf16},
                               {.v = S::f16},
                               {.v = S::sqrt_e4m3_block}};
  for (const Context& ctx : test_contexts()) {
    for (const StateFormats& formats : list) {
      INFO(to_string(ctx.device()) << ", " << describe(formats));
      std::vector<std::vector<std::uint8_t>> bytes;
      for (std::uint64_t seed : {1u, 1u, 2u}) {
        AdamwModel model(ctx, {.seed = seed}, {{{64, 65}, formats, DType::e4m3}});
        model.initialise(0, normal_values(4160, 24));
        for (std::uint32_t t = 0; t < 3; ++t) {
          model.set_gradient(0, normal_values(4160, 25 + t));
          model.step(1e-3f);
        }
        bytes.push_back(model.all_bytes());
      }
      CHECK(first_difference(bytes[1], bytes[0]) == "");
      CHECK(first_difference(bytes[2], bytes[0]) != "");
    }
  }
}

}  // namespace octet::test
