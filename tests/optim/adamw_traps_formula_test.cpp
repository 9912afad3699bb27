// SPDX-License-Identifier: Apache-2.0
// The known traps of Adam's formulas, 7, 8 and 13 to 15: eps, bias correction, clipping, the bound.
#include "support/adamw_model.hpp"
#include "support/adamw_step.hpp"
#include "support/catch.hpp"
#include "support/compare.hpp"
#include "support/random.hpp"

namespace octet::test {
namespace {

using S = StateFormat;
const StateFormats kBf16O2 = {WeightFormat::e4m3, S::f16, S::bf16, S::bf16};

std::string describe(const Context& ctx, const StateFormats& f) {
  return to_string(ctx.device()) + ", " + test::describe(f);
}

}  // namespace

TEST_CASE("trap 7: eps stands outside the root, after bias correction") {
  constexpr std::size_t kCount = 1024;
  constexpr int kSteps = 5;
  for (const Context& ctx : test_contexts()) {
    for (const StateFormats& formats : {kPlain, kO0, kO2, kBf16O2, kSmall}) {
      for (float size : {1e-8f, 1e-9f, 1e-10f, 1e-11f, 1e-12f}) {
        const AdamWConfig config{.beta2 = 0.999f, .eps = 1e-8f, .seed = 3};
        const AdamwReference reference(config, 1.0f, 0.0f);
        AdamwModel model(ctx, config, {{{kCount}, formats}});
        model.initialise(0, std::vector<float>(kCount, 0.0f));
        std::vector<float> g(kCount, size);
        for (std::size_t i = 0; i < kCount; i += 2) g[i] = -size;
        const Doubles exact = model.set_gradient(0, g);
        Doubles w(kCount, 0.0), m = w, v = w;
        double inside = 0, before = 0;  // where eps must not stand
        for (int t = 1; t <= kSteps; ++t) {
          model.step(1.0f);
          reference.step(t, exact, w, m, v);
          const double k1 = reference.k1(t), k2 = reference.k2(t);
          inside += m[1] * k1 / std::sqrt(v[1] * k2 * k2 + reference.eps);
          before += m[1] * k1 / ((std::sqrt(v[1]) + reference.eps) * k2);
        }
        double moved = 0, expected = 0;
        const Doubles stored = model.master(0).values;
        for (std::size_t i = 0; i < kCount; ++i) {
          const double sign = exact[i] > 0 ? -1.0 : 1.0;
          moved += sign * stored[i] / kCount;
          expected += sign * w[i] / kCount;
        }
        INFO(describe(ctx, formats)
             << ", gradients of " << size << ": moved " << moved << " instead of " << expected);
        const bool fp32 = formats.m == S::f32;
        CHECK(std::abs(moved / expected - 1) < (fp32 ? 1e-5 : 0.02));
        CHECK(std::abs(inside / expected - 1) > 0.1);
        CHECK(std::abs(before / expected - 1) > 0.1);
        CHECK(model.scalars().step == kSteps);
      }
    }
  }
}

TEST_CASE("trap 8: the first step is the learning rate against the sign of the gradient") {
  constexpr std::size_t kCount = 1001;
  for (const Context& ctx : test_contexts()) {
    for (const StateFormats& formats : {kPlain, kO0, kO1, kO2, kBf16O2, kSmall}) {
      for (float beta2 : {0.95f, 0.999f, 0.9999f}) {
        AdamwModel model(ctx, {.beta2 = beta2, .seed = 6}, {{{kCount}, formats}});
        const std::vector<float> start = normal_values(kCount, 5);
        model.initialise(0, start);
        const Doubles before = model.master(0).values;
        const std::vector<float> g = wide_values(kCount, 6, -12, 12);
        model.set_gradient(0, g);
        model.step(0.125f);
        const Stored w = model.master(0);
        int wrong = 0;
        for (std::size_t i = 0; i < g.size(); ++i) {
          const double sign = g[i] > 0 ? 1.0 : g[i] < 0 ? -1.0 : 0.0;
          const double expected = before[i] - 0.125 * sign;
          wrong += std::abs(w.values[i] - expected) > w.allowed(i, expected, 1e-5);
        }
        INFO(describe(ctx, formats) << ", beta2 " << beta2);
        CHECK(wrong == 0);
      }
    }
  }
}

TEST_CASE("trap 8: the bias correction of beta2 = 0.9999 keeps its digits at every step") {
  for (const Context& ctx : test_contexts()) {
    const AdamWConfig config{.beta2 = 0.9999f};
    const AdamwReference reference(config, 1e-3f, 0.0f);
    AdamwModel model(ctx, config, {{{4}, kPlain}});
    model.initialise(0, normal_values(4, 1));
    model.set_gradient(0, normal_values(4, 2));
    // 1 - b^t in FP32 would be off by 6e-4 at step 1; b^t by long double is another way to it.
    const auto beta = [](float b) { return static_cast<long double>(b); };
    for (int t = 1; t <= 20000; ++t) {
      model.step(1e-3f);
      if (t > 20 && t % 997 != 0) continue;
      const long double first = 1 - std::pow(beta(config.beta1), static_cast<long double>(t));
      const long double second = 1 - std::pow(beta(config.beta2), static_cast<long double>(t));
      const AdamwGroupScalars s = model.group_scalars(0);
      const auto off = [](float value, long double exact) {
        return std::abs(static_cast<double>(static_cast<long double>(value) / exact - 1));
      };
      INFO(to_string(ctx.device()) << ", step " << t);
      REQUIRE(off(s.root_factor, first / std::sqrt(second)) < 1.2e-7);
      REQUIRE(off(s.root_eps, beta(config.eps) * first) < 1.2e-7);
    }
  }
}

TEST_CASE("trap 8: a skipped step changes no byte of the state and is counted") {
  for (const Context& ctx : test_contexts()) {
    for (const StateFormats& formats :
         {kPlain, kO0, kO1, kO2, kBf16O2, kSmallTransposed, kBlocksAlone}) {
      const DType gradient = formats == kPlain ? DType::f32 : DType::e4m3;
      const AdamWConfig config{.seed = 1};
      AdamwModel model(ctx, config, {{{17, 61}, formats, gradient}, {{9}, kPlain, DType::f32}});
      AdamwModel never(ctx, config, {{{17, 61}, formats, gradient}, {{9}, kPlain, DType::f32}});
      for (AdamwModel* each : {&model, &never}) {
        each->initialise(0, normal_values(1037, 15, 0.02f));
        each->initialise(1, normal_values(9, 16));
        each->set_gradient(0, normal_values(1037, 17));
        each->set_gradient(1, normal_values(9, 18));
        for (int i = 0; i < 3; ++i) each->step(1e-3f);
      }
      const auto before = model.all_bytes();
      INFO(describe(ctx, formats));

      write_one(ctx, model.flag(), std::uint32_t{1});
      model.step(1e-3f);
      CHECK(first_difference(model.all_bytes(), before) == "");
      CHECK(download_one<std::uint32_t>(ctx, model.flag()) == 0);
      CHECK(model.scalars().skip == 1);

      // Without the flag a gradient that is not finite shows in its amax.
      TensorScale scale = download_one<TensorScale>(ctx, model.gradient_view(1).scale);
      const TensorScale good = scale;
      for (float bad : {NAN, INFINITY}) {
        scale.amax = bad;
        write_one(ctx, model.gradient_view(1).scale, scale);
        model.step(1e-3f);
        CHECK(first_difference(model.all_bytes(), before) == "");
      }
      write_one(ctx, model.gradient_view(1).scale, good);
      CHECK(model.scalars().step == 3);
      CHECK(model.scalars().skipped == 3);

      // The step after it is the one that would have come without it.
      model.step(1e-3f);
      never.step(1e-3f);
      CHECK(first_difference(model.all_bytes(), before) != "");
      CHECK(first_difference(model.all_bytes(), never.all_bytes()) == "");
      CHECK(model.scalars().step == 4);
      CHECK(model.scalars().skipped == 3);
      CHECK(model.scalars().skip == 0);
    }
  }
}

TEST_CASE("trap 13: the L2 term is in both moments and in their scales") {
  for (const Context& ctx : test_contexts()) {
    for (const StateFormats& formats : {kPlain, kO1, kO2, kBf16O2, kSmall, kBlocksAlone}) {
      for (bool maximize : {false, true}) {
        INFO(describe(ctx, formats) << ", maximize " << maximize);
        const AdamWConfig config{.decoupled_weight_decay = false, .maximize = maximize};
        AdamwModel model(ctx, config, {{{64}, formats, DType::f32, 0.5f}});
        model.initialise(0, std::vector<float>(64, 2.0f));  // 0.5 * 2 = 1 joins a zero gradient
        const Doubles zeros = model.set_gradient(0, std::vector<float>(64, 0.0f));
        const StepChecker checker(model, 0, formats, {64}, zeros);
        model.step(1e-2f);
        // The scales by their bounds, which hold the term, and every element.
        CHECK(checker.check({config, 1e-2f, 0.5f}, 1) == "");
        const Stored w = model.master(0), m = model.m(0), v = model.v(0);
        for (std::size_t i = 0; i < 64; ++i) {
          REQUIRE(std::abs(m.values[i] - 0.1) < 0.0125);
          REQUIRE(std::abs(v.values[i] - 0.05) < 0.0005);
          REQUIRE(std::abs(w.values[i] - 1.99) < 0.0021);
        }
      }
    }
  }
}

TEST_CASE("trap 13: clipping scales the gradients by max_norm over their norm") {
  // The moments after one step from zero show the factor; Adam's ratio would hide it.
  for (const Context& ctx : test_contexts()) {
    for (const StateFormats& formats : {kPlain, kO2, kSmall}) {
      for (DType gradient : {DType::f32, DType::bf16, DType::e4m3}) {
        const AdamWConfig config{};
        const Shape shapes[] = {{129, 131}, {40000}};
        AdamwModel model(ctx, config,
                         {{shapes[0], formats, gradient}, {shapes[1], kPlain, gradient}});
        model.initialise(0, normal_values(16899, 9));
        model.initialise(1, normal_values(40000, 10));
        const Doubles first = model.set_gradient(0, normal_values(16899, 11, 0.5f));
        const Doubles second = model.set_gradient(1, normal_values(40000, 12, 2.0f));
        const double norm = std::hypot(norm_of(first), norm_of(second));
        const StepChecker checker(model, 0, formats, shapes[0], first);
        model.step(1e-3f, 1.0f);
        const AdamwScalars s = model.scalars();
        INFO(describe(ctx, formats) << ", gradient " << name_of(gradient));
        CHECK(std::abs(static_cast<double>(s.norm) / norm - 1) < 1e-5);
        CHECK(std::abs(s.sum_squares / (norm * norm) - 1) < 2e-5);
        CHECK(std::abs(static_cast<double>(s.clip) * norm - 1) < 1e-5);
        const Stored m[] = {model.m(0), model.m(1)}, v[] = {model.v(0), model.v(1)};
        double wrong = 0;
        for (std::size_t p : {0u, 1u}) {
          const Doubles& gradients = p == 0 ? first : second;
          for (std::size_t i = 0; i < gradients.size(); ++i) {
            const double g = gradients[i] / norm, square = 0.05 * g * g;
            wrong +=
                std::abs(m[p].values[i] - 0.1 * g) > m[p].allowed(i, 0.1 * g, 1e-6 * std::abs(g));
            wrong += std::abs(v[p].values[i] - square) > v[p].allowed(i, square, 3e-5 * g * g);
          }
        }
        CHECK(wrong == 0);
        AdamwReference reference(config, 1e-3f, 0.0f);
        reference.clip = static_cast<double>(s.clip);
        CHECK(checker.check(reference, 1) == "");
      }
    }
  }
}

TEST_CASE("trap 14: gradients made to reach the bound reach it at every step and never pass") {
  // The extreme history is g ~ (b2 / b1)^t: by Cauchy-Schwarz exact Adam is at the bound all along.
  // A learning rate and a decay of 1 leave w = -ratio.
  constexpr std::size_t kCount = 256;
  for (const Context& ctx : test_contexts()) {
    for (const StateFormats& formats : {kPlain, kO1, kO2, kBf16O2, kSmall}) {
      for (float beta2 : {0.999f, 0.95f}) {
        const AdamWConfig config{.beta2 = beta2, .eps = 1e-30f, .seed = 12};
        const AdamwReference reference(config, 1.0f, 1.0f);
        AdamwModel model(ctx, config, {{{kCount}, formats, DType::f32, 1.0f}});
        model.initialise(0, std::vector<float>(kCount, 1.0f));
        const bool exact = formats.m == S::f32;
        double largest = 0;
        for (int t = 1; t <= 60; ++t) {
          const double size = std::pow(static_cast<double>(beta2) / 0.9, t - 30);
          std::vector<float> g(kCount, static_cast<float>(size));
          for (std::size_t i = 0; i < kCount; i += 2) g[i] = -g[i];
          model.set_gradient(0, g);
          model.step(1.0f);
          const double bound = reference.bound(t);
          const Stored w = model.master(0);
          INFO(describe(ctx, formats) << ", beta2 " << beta2 << ", step " << t);
          // One gap: the master's own rounding.
          const double gap = w.format == S::f32 ? 0 : w.gap(0, bound);
          REQUIRE(amax_of(w.values) <= bound * (1 + 1e-6) + gap);
          if (exact) REQUIRE(amax_of(w.values) > bound * (1 - 1e-5) - gap);
          largest = std::max(largest, amax_of(w.values) / bound);
        }
        CHECK(largest > 0.999);
        CHECK(std::abs(reference.bound(60) - (beta2 > 0.99f ? 1.76 : 1.165)) < 0.03);
      }
    }
  }
}

TEST_CASE("trap 15: runs repeat, and the sum of squares does not depend on the sharding") {
  const std::vector<Shape> shapes = {{300, 97}, {40000}, {7}};
  const auto numel = [&](std::size_t p) { return static_cast<std::size_t>(shapes[p].numel()); };
  for (const Context& ctx : test_contexts()) {
    for (const StateFormats& formats : {kO2, kSmall}) {
      const auto run = [&](std::optional<std::size_t> owner) {
        std::vector<ParamCase> cases;
        std::size_t dealt = 0;
        for (std::size_t p = 0; p < shapes.size(); ++p) {
          cases.push_back({shapes[p], formats, DType::f32});  // sums of E4M3 may be exact
          if (!owner) continue;
          cases.back().pieces = std::vector<Piece>();
          for (const Piece& panel : panels_of(static_cast<std::int32_t>(p), shapes[p])) {
            if (dealt++ % 3 == *owner) cases.back().pieces->push_back(panel);
          }
        }
        auto model = std::make_unique<AdamwModel>(ctx, AdamWConfig{.seed = 7}, cases);
        for (std::size_t p = 0; p < shapes.size(); ++p) {
          const auto seed = static_cast<std::uint32_t>(p);
          model->initialise(static_cast<int>(p), normal_values(numel(p), seed));
          model->set_gradient(static_cast<int>(p), normal_values(numel(p), 10 + seed));
        }
        return model;
      };
      const auto sums_of = [&](AdamwModel& model) {
        return download<float>(ctx, model.optimizer().segment_sums(),
                               static_cast<std::size_t>(model.optimizer().total_segments()));
      };
      INFO(describe(ctx, formats));
      const auto once = run({}), again = run({});
      for (int t = 0; t < 3; ++t) {
        once->step(1e-3f, 1.0f);
        again->step(1e-3f, 1.0f);
      }
      CHECK(once->scalars().clip < 1.0f);
      CHECK(first_difference(again->all_bytes(), once->all_bytes()) == "");
      const std::vector<float> whole = sums_of(*once);
      std::vector<float> gathered(whole.size(), -1.0f);
      for (std::size_t owner = 0; owner < 3; ++owner) {
        const auto part = run(owner);
        part->optimizer().measure();
        const std::vector<float> sums = sums_of(*part);
        for (const Segment& segment : part->optimizer().segments()) {
          const auto index = static_cast<std::size_t>(segment.index);
          gathered[index] = sums[index];
        }
      }
      CHECK(first_difference(gathered, whole) == "");
    }
  }
}

}  // namespace octet::test
