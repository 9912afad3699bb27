// SPDX-License-Identifier: Apache-2.0
// The modes beside plain AdamW: L2 regularisation, maximize, rounding to nearest, bf16 moments.
#include "octet/core/detail/random.hpp"
#include "octet/optim/adamw.hpp"
#include "support/adamw_model.hpp"
#include "support/adamw_step.hpp"
#include "support/catch.hpp"
#include "support/compare.hpp"
#include "support/errors.hpp"
#include "support/random.hpp"

namespace octet::test {
namespace {

constexpr std::size_t kCount = 1037;
const Shape kShape = {17, 61};
const StateFormats kBf16Moments = {WeightFormat::bf16, StateFormat::f32, StateFormat::bf16,
                                   StateFormat::bf16};
const StateFormats kBf16O2 = {WeightFormat::e4m3, StateFormat::f16, StateFormat::bf16,
                              StateFormat::bf16};

std::string describe(const Context& ctx, const StateFormats& f) {
  return to_string(ctx.device()) + ", " + test::describe(f);
}

/// One checked step; the first violation.
std::string stepped(AdamwModel& model, const StateFormats& formats, const Shape& shape,
                    AdamwReference reference, const std::vector<float>& gradient, std::int64_t t,
                    float max_norm = 0.0f) {
  const Doubles g = model.set_gradient(0, gradient);
  const StepChecker checker(model, 0, formats, shape, g);
  model.step(static_cast<float>(reference.lr), max_norm);
  reference.clip = static_cast<double>(model.scalars().clip);
  return model.scalars().step == t ? checker.check(reference, t) : "skipped";
}

std::uint32_t bits_between(std::uint32_t word, int first, int count) {
  return (word >> first) & ((1u << count) - 1);
}

/// Code of a scaled magnitude with a random field of `bits` bits, as the contract has it.
std::uint32_t stochastic_code(StateFormat format, float y, std::uint32_t field, int bits) {
  const bool bf16 = format == StateFormat::bf16, f16 = format == StateFormat::f16;
  const bool split = format == StateFormat::split;
  const float lower = bf16 ? 1.0f : f16 ? 0x1p-112f : 0x1p-120f;
  const int dropped = bf16 ? 16 : f16 ? 13 : split ? 12 : 20;
  const std::uint32_t top = bf16 ? 0x7F7F : f16 ? 0x7BFF : split ? 0x7E00 : 0x7E;
  const std::uint32_t noise = (field << (dropped - bits)) | (1u << (dropped - bits - 1));
  return std::min((bits_of(std::abs(y) * lower) + noise) >> dropped, top);
}

/// Scale to encode of every element: the tensor's, or 448 / amax of the block's FP32 values, whose
/// inverse must be what is stored.
std::vector<float> scales_of(const Stored& stored, const std::vector<float>& values) {
  std::vector<float> scales(values.size(), stored.scale.scale);
  for (std::size_t block = 0; block < stored.blocks.size(); ++block) {
    float amax = 448.0f * 0x1p-126f;
    const std::size_t begin = 128 * block, end = std::min(begin + 128, values.size());
    for (std::size_t i = begin; i < end; ++i) amax = std::max(amax, std::abs(values[i]));
    REQUIRE(stored.blocks[block] == amax / 448.0f);
    for (std::size_t i = begin; i < end; ++i) scales[i] = 448.0f / amax;
  }
  return scales;
}

/// Everything stored after `steps` steps with clipping; gradients times `sign`.
std::vector<std::uint8_t> bytes_after(const Context& ctx, const AdamWConfig& config,
                                      const StateFormats& formats, DType gradient, int steps,
                                      float sign = 1.0f) {
  AdamwModel model(ctx, config, {{kShape, formats, gradient, 0.1f}});
  model.initialise(0, normal_values(kCount, 40, 0.02f));
  for (int t = 0; t < steps; ++t) {
    std::vector<float> g = normal_values(kCount, static_cast<std::uint32_t>(41 + t), 0.1f);
    g[7] = 0.0f;
    for (float& value : g) value *= sign;
    model.set_gradient(0, g);
    model.step(1e-3f, 1.0f);
  }
  CHECK(model.scalars().step == steps);
  CHECK(model.scalars().clip < 1.0f);
  return model.all_bytes();
}

}  // namespace

TEST_CASE("L2 regularisation and maximize take the steps of double-precision Adam") {
  for (const Context& ctx : test_contexts()) {
    for (bool decoupled : {false, true}) {
      for (bool maximize : {false, true}) {
        INFO(to_string(ctx.device()) << ", decoupled " << decoupled << ", maximize " << maximize);
        const AdamWConfig config{.decoupled_weight_decay = decoupled, .maximize = maximize};
        AdamwModel model(ctx, config, {{kShape, kPlain, DType::f32, 0.1f}});
        model.initialise(0, normal_values(kCount, 1));
        const AdamwReference reference(config, 1e-3f, 0.1f);
        Doubles w = model.master(0).values, m(kCount, 0.0), v(kCount, 0.0);
        for (std::int64_t t = 1; t <= 20; ++t) {
          const auto g = normal_values(kCount, static_cast<std::uint32_t>(1 + t), 0.05f);
          reference.step(t, Doubles(g.begin(), g.end()), w, m, v);
          REQUIRE(stepped(model, kPlain, kShape, reference, g, t) == "");
        }
        Doubles off_w = model.master(0).values, off_m = model.m(0).values,
                off_v = model.v(0).values;
        for (std::size_t i = 0; i < kCount; ++i) {
          off_w[i] -= w[i], off_m[i] -= m[i], off_v[i] -= v[i];
        }
        CHECK(norm_of(off_w) < 2e-6 * norm_of(w));
        CHECK(norm_of(off_m) < 1e-5 * norm_of(m));
        CHECK(norm_of(off_v) < 1e-5 * norm_of(v));
      }
    }
  }
}

TEST_CASE("strong L2 with tiny gradients stays within the bounds of its scales") {
  for (const Context& ctx : test_contexts()) {
    for (const StateFormats& formats : {kO1, kO2, kBf16O2, kSmall}) {
      INFO(describe(ctx, formats));
      const AdamWConfig config{.seed = 5, .decoupled_weight_decay = false};
      AdamwModel model(ctx, config, {{kShape, formats, DType::e4m3, 10.0f}});
      model.initialise(0, normal_values(kCount, 30, 0.02f));
      const AdamwReference reference(config, 1e-3f, 10.0f);
      for (std::int64_t t = 1; t <= 200; ++t) {
        const auto g = normal_values(kCount, static_cast<std::uint32_t>(t), 1e-6f);
        REQUIRE(stepped(model, formats, kShape, reference, g, t) == "");
      }
    }
  }
}

TEST_CASE("maximize is minimising the negated gradient, bit for bit") {
  for (const Context& ctx : test_contexts()) {
    for (const StateFormats& formats :
         {kPlain, kO0, kO1, kO2, kBf16Moments, kBf16O2, kSmallTransposed}) {
      for (DType gradient : kGradientFormats) {
        for (bool decoupled : {true, false}) {
          INFO(describe(ctx, formats) << ", gradient " << name_of(gradient));
          const AdamWConfig down{.seed = 9, .decoupled_weight_decay = decoupled};
          const AdamWConfig up{.seed = 9, .decoupled_weight_decay = decoupled, .maximize = true};
          const auto ascent = bytes_after(ctx, up, formats, gradient, 4);
          CHECK(first_difference(ascent, bytes_after(ctx, down, formats, gradient, 4, -1)) == "");
          CHECK(first_difference(ascent, bytes_after(ctx, down, formats, gradient, 4)) != "");
        }
      }
    }
  }
}

TEST_CASE("every combination of formats takes clipped steps in the modes apart from the default") {
  const AdamWConfig config{
      .seed = 11, .decoupled_weight_decay = false, .maximize = true, .stochastic_rounding = false};
  for (const Context& ctx : test_contexts()) {
    for (const StateFormats& formats : all_formats()) {
      INFO(describe(ctx, formats));
      AdamwModel model(ctx, config, {{kShape, formats, DType::f32, 0.1f}});
      model.initialise(0, normal_values(kCount, 50, 0.02f));
      for (std::int64_t t = 1; t <= 6; ++t) {
        const auto g = normal_values(kCount, static_cast<std::uint32_t>(50 + t), 1e-3f);
        const float max_norm = t > 3 ? 1e-2f : 0.0f;
        REQUIRE(stepped(model, formats, kShape, {config, 1e-3f, 0.1f}, g, t, max_norm) == "");
      }
    }
  }
}

TEST_CASE("a bf16 second moment is never 0 by rounding") {
  for (const Context& ctx : test_contexts()) {
    INFO(to_string(ctx.device()));
    for (bool stochastic : {true, false}) {
      AdamwModel tiny(ctx, {.stochastic_rounding = stochastic}, {{{4096}, kBf16Moments}});
      tiny.initialise(0, normal_values(4096, 15));
      const std::vector<float> g = wide_values(4096, 14, -70, 0);
      tiny.set_gradient(0, g);
      tiny.step(1e-3f);
      const Stored v = tiny.v(0);
      for (std::size_t i = 0; i < g.size(); ++i) REQUIRE((v.codes[i] == 0) == (g[i] == 0.0f));
    }
  }
}

TEST_CASE("without stochastic rounding every state is the nearest code and no seed matters") {
  const AdamWConfig config{.seed = 1, .stochastic_rounding = false};
  const AdamWConfig other{.seed = 2, .stochastic_rounding = false};
  for (const Context& ctx : test_contexts()) {
    for (const StateFormats& formats : {kO2, kBf16O2, kBf16Moments, kSmall, kBlocksAlone}) {
      INFO(describe(ctx, formats));
      AdamwModel model(ctx, config, {{kShape, formats}});
      model.initialise(0, normal_values(kCount, 60));
      std::vector<float> g = wide_values(kCount, 61, -20, 0);
      for (std::size_t i = 256; i < 384; ++i) g[i] = 0.0f;
      for (std::size_t i = 512; i < 640; ++i) g[i] *= 0x1p-122f;  // below the smallest block scale
      model.set_gradient(0, g);
      model.step(0.0f);
      // From zero: one FP32 product each, and its root.
      std::vector<float> first(kCount), second(kCount);
      for (std::size_t i = 0; i < kCount; ++i) {
        first[i] = (1.0f - config.beta1) * g[i];
        second[i] = (1.0f - config.beta2) * (g[i] * g[i]);
        if (formats.v == StateFormat::sqrt_e4m3_block) second[i] = std::sqrt(second[i]);
      }
      const Stored m = model.m(0), v = model.v(0);
      const std::vector<float> m_scales = scales_of(m, first), v_scales = scales_of(v, second);
      const auto nearest = [](const Stored& stored, float value, float scale) {
        return stored.table().encode(static_cast<double>(value * scale));
      };
      int wrong = 0;
      for (std::size_t i = 0; i < kCount; ++i) {
        wrong += first[i] != 0.0f && m.codes[i] != nearest(m, first[i], m_scales[i]);
        const std::uint32_t code = nearest(v, second[i], v_scales[i]);
        wrong += v.codes[i] != (second[i] > 0 ? std::max(code, 1u) : code);
      }
      CHECK(wrong == 0);
      const auto bytes = bytes_after(ctx, config, formats, DType::e4m3, 4);
      CHECK(first_difference(bytes_after(ctx, other, formats, DType::e4m3, 4), bytes) == "");
    }
  }
}

TEST_CASE("without stochastic rounding a decayed master is the nearest code") {
  // Zero gradients leave the decay: w' = (1 - lr wd) w, one FP32 product.
  const AdamWConfig config{.stochastic_rounding = false};
  for (const Context& ctx : test_contexts()) {
    for (const StateFormats& formats : {kO2, kSmall}) {
      INFO(describe(ctx, formats));
      AdamwModel model(ctx, config, {{kShape, formats, DType::f32, 0.1f}});
      model.initialise(0, normal_values(kCount, 62));
      model.set_gradient(0, std::vector<float>(kCount, 0.0f));
      const Stored old = model.master(0);
      model.step(0.25f);
      const Stored w = model.master(0);
      const float factor = std::fma(-0.25f, 0.1f, 1.0f);
      int wrong = 0;
      for (std::size_t i = 0; i < kCount; ++i) {
        const float value = factor * static_cast<float>(old.values[i]);
        const double y = static_cast<double>(value * w.scale.scale);
        const std::uint32_t sign = std::signbit(y) ? 0x8000u : 0u;
        const bool split = formats.master == StateFormat::split;
        wrong += w.codes[i] != (split ? sign | nearest_split(y) : w.table().encode(y));
      }
      CHECK(wrong == 0);
    }
  }
}

TEST_CASE(
    "stochastic rounding takes its fields of the element's word: m 10, v 12, master 10 bits") {
  const AdamWConfig config{.weight_decay = 0.1f, .seed = 19};
  const auto magnitude = [](const Stored& stored, std::size_t i) {
    return stored.codes[i] & (stored.table().sign_bit() - 1);
  };
  for (const Context& ctx : test_contexts()) {
    for (const StateFormats& formats : {kO2, kBf16O2, kSmall}) {
      INFO(describe(ctx, formats));
      AdamwModel model(ctx, config, {{kShape, formats, DType::f32, 0.1f}});
      model.initialise(0, normal_values(kCount, 63));
      // The moments from zero: one FP32 product each, and its root.
      const std::vector<float> g = normal_values(kCount, 64);
      model.set_gradient(0, g);
      model.step(0.0f);
      const Stored m = model.m(0), v = model.v(0);
      std::vector<float> first(kCount), second(kCount);
      for (std::size_t i = 0; i < kCount; ++i) {
        first[i] = (1.0f - config.beta1) * g[i];
        second[i] = (1.0f - config.beta2) * (g[i] * g[i]);
        if (is_root(formats.v)) second[i] = std::sqrt(second[i]);
      }
      const std::vector<float> m_scales = scales_of(m, first), v_scales = scales_of(v, second);
      int wrong = 0;
      for (std::size_t i = 0; i < kCount; ++i) {
        const std::uint32_t word = detail::random_word(19, 1, i);
        wrong += magnitude(m, i) !=
                 stochastic_code(formats.m, first[i] * m_scales[i], bits_between(word, 14, 10), 10);
        const std::uint32_t code =
            stochastic_code(formats.v, second[i] * v_scales[i], bits_between(word, 2, 12), 12);
        wrong += magnitude(v, i) != (second[i] > 0 ? std::max(code, 1u) : code);
      }
      CHECK(wrong == 0);

      // The master by the decay alone: one FP32 product.
      AdamwModel decayed(ctx, config, {{kShape, formats, DType::f32, 0.1f}});
      decayed.initialise(0, normal_values(kCount, 65));
      const Stored old = decayed.master(0);
      decayed.set_gradient(0, std::vector<float>(kCount, 0.0f));
      decayed.step(0.25f);
      const Stored w = decayed.master(0);
      const float factor = std::fma(-0.25f, 0.1f, 1.0f);
      for (std::size_t i = 0; i < kCount; ++i) {
        const float y = factor * static_cast<float>(old.values[i]) * w.scale.scale;
        const std::uint32_t word = detail::random_word(19, 1, i);
        const std::uint32_t field = bits_between(word, 24, 8) | bits_between(word, 0, 2) << 8;
        wrong += (w.codes[i] & 0x7FFF) != stochastic_code(formats.master, y, field, 10);
      }
      CHECK(wrong == 0);
    }
  }
}

TEST_CASE("amsgrad is refused by name") {
  CHECK(missing(error_of([] { check_adamw({.amsgrad = true}); }), {"amsgrad"}) == "");
}

TEST_CASE("CPU and CUDA store the same bytes in every mode") {
  const auto contexts = test_contexts();
  for (int mode = 0; mode < 8 && contexts.size() > 1; ++mode) {
    const AdamWConfig config{.seed = 3,
                             .decoupled_weight_decay = (mode & 1) == 0,
                             .maximize = (mode & 2) != 0,
                             .stochastic_rounding = (mode & 4) == 0};
    for (const StateFormats& f : {kPlain, kO0, kO1, kO2, kBf16Moments, kBf16O2, kSmallTransposed}) {
      for (DType gradient : kGradientFormats) {
        INFO(describe(contexts[1], f) << ", gradient " << name_of(gradient) << ", mode " << mode);
        CHECK(first_difference(bytes_after(contexts[1], config, f, gradient, 4),
                               bytes_after(contexts[0], config, f, gradient, 4)) == "");
      }
    }
  }
}

TEST_CASE("bf16 moments near FP32's maximum stay finite however they are rounded") {
  for (const Context& ctx : test_contexts()) {
    for (bool stochastic : {false, true}) {
      const AdamWConfig config{.beta1 = 0.0f, .beta2 = 0.1f, .stochastic_rounding = stochastic};
      AdamwModel model(ctx, config, {{{8}, kBf16Moments, DType::f32}});
      model.initialise(0, normal_values(8, 1));
      std::vector<float> g(8, 1.0f);
      g[0] = 1.8446e19f;  // its square is the largest that FP32 holds
      model.set_gradient(0, g);
      for (int t = 0; t < 24; ++t) model.step(1e-3f);
      CHECK(model.scalars().skipped == 0);
      CHECK(model.v(0).codes[0] == 0x7F7F);
    }
  }
}

}  // namespace octet::test
