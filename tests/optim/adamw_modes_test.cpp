// SPDX-License-Identifier: Apache-2.0
// The modes beside plain AdamW: L2 regularisation, maximize, rounding to nearest, bf16 moments.
#include <sstream>

#include "octet/optim/adamw.hpp"
#include "support/adamw_model.hpp"
#include "support/catch.hpp"
#include "support/compare.hpp"
#include "support/errors.hpp"
#include "support/random.hpp"

namespace octet::test {
namespace {

constexpr std::size_t kCount = 1037;
const StateFormats kBf16Moments = {DType::bf16, DType::f32, DType::bf16, DType::bf16};
const StateFormats kBf16O2 = {DType::e4m3, DType::f16, DType::bf16, DType::bf16};

std::string describe(const Context& ctx, const StateFormats& f) {
  std::ostringstream text;
  text << to_string(ctx.device()) << ", master " << name_of(f.master) << ", m " << name_of(f.m)
       << ", v " << name_of(f.v);
  return text.str();
}

/// One step; the first element that is off the double formulas, run on the decoded states of
/// before, by more than the gap of codes it lies in and the FP32 error; or an amax that is not the
/// largest stored magnitude.
std::string stepped(AdamwModel& model, AdamwReference reference, const std::vector<float>& gradient,
                    std::int64_t t, float max_norm = 0.0f) {
  const Doubles g = model.set_gradient(0, gradient);
  const Stored old_w = model.master(0), old_m = model.m(0), old_v = model.v(0);
  model.step(static_cast<float>(reference.lr), max_norm);
  reference.clip = static_cast<double>(model.scalars().clip);
  const Stored w = model.master(0), m = model.m(0), v = model.v(0);
  const double limit = reference.bound(t);
  std::ostringstream text;
  if (model.scalars().step != t) text << "skipped; ";
  for (std::size_t i = 0; i < g.size() && text.str().empty(); ++i) {
    const auto compare = [&](const char* what, const Stored& stored, double exact, double error) {
      const double scale = static_cast<double>(stored.scale.scale);
      const double largest = std::max(std::abs(exact), std::abs(stored.values[i]));
      if (stored.dtype != DType::f32) {
        error += table_of(stored.dtype).gap_at(largest * scale) / scale * (1 + 1e-6);
      }
      if (std::abs(stored.values[i] - exact) <= error) return;  // false for NaN
      text << what << "[" << i << "] at step " << t << ": " << stored.values[i] << " instead of "
           << exact << " (g " << g[i] << ", w " << old_w.values[i] << ", scale " << scale << "); ";
    };
    const double old = old_w.values[i];
    const double exact_m = reference.next_m(old_m.values[i], g[i], old);
    const double exact_v = reference.next_v(old_v.values[i], g[i], old);
    const double exact_ratio = reference.ratio(exact_m, exact_v, t, limit);
    // Sums may cancel: their FP32 error goes by the size of the terms.
    const double decay = reference.decoupled ? 0.0 : reference.weight_decay * std::abs(old);
    const double terms_g = reference.clip * std::abs(g[i]) + decay;
    const double terms_m =
        reference.beta1 * std::abs(old_m.values[i]) + (1 - reference.beta1) * terms_g;
    const double effective = std::abs(reference.effective(g[i], old));
    const double error_v =
        4e-7 * exact_v + 1e-44 +
        (1 - reference.beta2) * (2 * effective + 2e-7 * terms_g) * 2e-7 * terms_g;
    const double error_ratio = 3e-6 * reference.ratio(terms_m, exact_v, t, 1e30) +
                               std::abs(exact_ratio) * error_v / (exact_v + 1e-44) + 1e-6;
    compare("m", m, exact_m, 3e-7 * terms_m + 1e-44);
    compare("v", v, exact_v, error_v);
    compare("master", w, reference.next_weight(old, exact_ratio),
            2e-7 * std::abs(old) + reference.lr * error_ratio);
    if (exact_v > 2e-44 && v.codes[i] == 0) text << "v[" << i << "] > 0 was stored as 0; ";
  }
  for (const Stored* stored : {&w, &m, &v}) {
    const double amax = static_cast<double>(stored->scale.amax);
    if (!(std::isfinite(amax) && amax == amax_of(stored->values))) {
      text << name_of(stored->dtype) << " amax " << amax << " at step " << t << "; ";
    }
    if (stored->dtype == DType::bf16 && stored->scale.scale != 1.0f) text << "bf16 has a scale; ";
  }
  return text.str();
}

/// Everything stored after `steps` steps with clipping; gradients times `sign`.
std::vector<std::uint8_t> bytes_after(const Context& ctx, const AdamWConfig& config,
                                      const StateFormats& formats, DType gradient, int steps,
                                      float sign = 1.0f) {
  AdamwModel model(ctx, config, {{{17, 61}, formats, gradient, 0.1f}});
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
        AdamwModel model(ctx, config, {{{17, 61}, kPlain, DType::f32, 0.1f}});
        model.initialise(0, normal_values(kCount, 1));
        const AdamwReference reference(config, 1e-3f, 0.1f);
        Doubles w = model.master(0).values, m(kCount, 0.0), v(kCount, 0.0);
        for (std::int64_t t = 1; t <= 20; ++t) {
          const auto g = normal_values(kCount, static_cast<std::uint32_t>(1 + t), 0.05f);
          reference.step(t, Doubles(g.begin(), g.end()), w, m, v);
          REQUIRE(stepped(model, reference, g, t) == "");
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

TEST_CASE("the L2 term is in both moments, with either sign of the gradient and every format") {
  for (const Context& ctx : test_contexts()) {
    for (const StateFormats& formats : {kPlain, kO1, kO2, kBf16O2}) {
      for (bool maximize : {false, true}) {
        INFO(describe(ctx, formats) << ", maximize " << maximize);
        const AdamWConfig config{.decoupled_weight_decay = false, .maximize = maximize};
        AdamwModel model(ctx, config, {{{64}, formats, DType::f32, 0.5f}});
        model.initialise(0, std::vector<float>(64, 2.0f));  // 0.5 * 2 = 1 joins a zero gradient
        model.set_gradient(0, std::vector<float>(64, 0.0f));
        model.step(1e-2f);
        for (std::size_t i = 0; i < 64; ++i) {
          REQUIRE(std::abs(model.m(0).values[i] - 0.1) < 0.0125);
          REQUIRE(std::abs(model.v(0).values[i] - 0.05) < 0.0005);
          REQUIRE(std::abs(model.master(0).values[i] - 1.99) < 0.0021);
        }
      }
    }
  }
}

TEST_CASE("strong L2 with tiny gradients stays within the bounds of its scales") {
  for (const Context& ctx : test_contexts()) {
    for (const StateFormats& formats : {kO1, kO2, kBf16O2}) {
      INFO(describe(ctx, formats));
      const AdamWConfig config{.seed = 5, .decoupled_weight_decay = false};
      AdamwModel model(ctx, config, {{{17, 61}, formats, DType::e4m3, 10.0f}});
      model.initialise(0, normal_values(kCount, 30, 0.02f));
      const AdamwReference reference(config, 1e-3f, 10.0f);
      for (std::int64_t t = 1; t <= 200; ++t) {
        const auto g = normal_values(kCount, static_cast<std::uint32_t>(t), 1e-6f);
        REQUIRE(stepped(model, reference, g, t) == "");
      }
    }
  }
}

TEST_CASE("maximize is minimising the negated gradient, bit for bit") {
  for (const Context& ctx : test_contexts()) {
    for (const StateFormats& formats : {kPlain, kO0, kO1, kO2, kBf16Moments, kBf16O2}) {
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

TEST_CASE("bf16 moments take the steps of double-precision AdamW") {
  for (const Context& ctx : test_contexts()) {
    for (const StateFormats& base : {kPlain, kO0, kO2}) {
      for (DType m : kMFormats) {
        for (DType v : kVFormats) {
          if (m != DType::bf16 && v != DType::bf16) continue;
          const StateFormats formats = {base.weight, base.master, m, v};
          INFO(describe(ctx, formats));
          const AdamWConfig config{.seed = 11};
          AdamwModel model(ctx, config, {{{17, 61}, formats, DType::f32, 0.1f}});
          model.initialise(0, normal_values(kCount, 50, 0.02f));
          for (std::int64_t t = 1; t <= 10; ++t) {
            const auto g = normal_values(kCount, static_cast<std::uint32_t>(50 + t), 1e-3f);
            REQUIRE(stepped(model, {config, 1e-3f, 0.1f}, g, t, t > 5 ? 1e-2f : 0.0f) == "");
          }
        }
      }
    }
  }
}

TEST_CASE("a bf16 second moment follows a drop of the gradient and is never 0 by rounding") {
  const AdamWConfig config{.beta2 = 0.999f, .seed = 13};
  for (const Context& ctx : test_contexts()) {
    INFO(to_string(ctx.device()));
    AdamwModel model(ctx, config, {{{4096}, kBf16Moments}});
    model.initialise(0, std::vector<float>(4096, 1.0f));
    const AdamwReference reference(config, 0.0f, 0.0f);
    double exact = 0;
    for (int t = 0; t < 3000; ++t) {
      const float g = t < 1000 ? 1.0f : 0.1f;
      if (t % 1000 == 0) model.set_gradient(0, std::vector<float>(4096, g));
      model.step(0.0f);
      exact = reference.next_v(exact, static_cast<double>(g));
      if (t % 250 != 249) continue;
      double sum = 0;
      for (double value : model.v(0).values) sum += value;
      INFO("step " << t + 1 << ", mean " << sum / 4096 << ", exact " << exact);
      CHECK(std::abs(sum / 4096 / exact - 1) < 0.01);
    }
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
  for (const Context& ctx : test_contexts()) {
    for (const StateFormats& formats : {kO2, kBf16O2, kBf16Moments}) {
      INFO(describe(ctx, formats));
      const AdamWConfig config{.seed = 1, .stochastic_rounding = false};
      const AdamWConfig other{.seed = 2, .stochastic_rounding = false};
      AdamwModel model(ctx, config, {{{17, 61}, formats}});
      model.initialise(0, normal_values(kCount, 60));
      const std::vector<float> g = wide_values(kCount, 61, -20, 0);
      model.set_gradient(0, g);
      model.step(0.0f);
      const auto nearest = [](const Stored& stored, std::size_t i, float value) {
        const double scaled = static_cast<double>(value) * static_cast<double>(stored.scale.scale);
        return stored.codes[i] == table_of(stored.dtype).encode(scaled);
      };
      const Stored m = model.m(0), v = model.v(0);
      int wrong = 0;
      for (std::size_t i = 0; i < kCount; ++i) {  // from zero: one FP32 product each
        wrong +=
            (1.0f - config.beta1) * g[i] != 0.0f && !nearest(m, i, (1.0f - config.beta1) * g[i]);
        const float square = (1.0f - config.beta2) * (g[i] * g[i]);
        const bool lifted = square > 0 && v.codes[i] == 1;  // a positive v is not stored as 0
        wrong += !nearest(v, i, square) &&
                 !(lifted && square * v.scale.scale <= table_of(v.dtype).values()[1]);
      }
      CHECK(wrong == 0);
      // Zero gradients leave the decay: w' = (1 - lr wd) w, one FP32 product.
      AdamwModel decay(ctx, config, {{{17, 61}, kO2, DType::f32, 0.1f}});
      decay.initialise(0, normal_values(kCount, 62));
      decay.set_gradient(0, std::vector<float>(kCount, 0.0f));
      const Stored old = decay.master(0);
      decay.step(0.25f);
      const Stored w = decay.master(0);
      const float factor = std::fma(-0.25f, 0.1f, 1.0f);
      for (std::size_t i = 0; i < kCount; ++i)
        wrong += !nearest(w, i, factor * static_cast<float>(old.values[i]));
      CHECK(wrong == 0);
      const auto bytes = bytes_after(ctx, config, formats, DType::e4m3, 4);
      CHECK(first_difference(bytes_after(ctx, other, formats, DType::e4m3, 4), bytes) == "");
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
    for (const StateFormats& f : {kPlain, kO0, kO1, kO2, kBf16Moments, kBf16O2}) {
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
      const StateFormats formats = {DType::bf16, DType::f32, DType::bf16, DType::bf16};
      AdamwModel model(ctx, config, {{{8}, formats, DType::f32}});
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
