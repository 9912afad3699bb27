// SPDX-License-Identifier: Apache-2.0
// What quantised states must survive: gradients made to break them, and time.
#include <functional>

#include "support/adamw_model.hpp"
#include "support/adamw_step.hpp"
#include "support/catch.hpp"
#include "support/compare.hpp"
#include "support/random.hpp"

namespace octet::test {
namespace {

const StateFormats kSplit = {.weight = WeightFormat::e4m3, .master = StateFormat::split};

/// Gradients of a step, by element count and step.
using Source = std::function<std::vector<float>(std::size_t count, std::uint32_t t)>;

struct Adversary {
  const char* name;
  Source gradients;
};

std::vector<Adversary> adversaries() {
  const auto scaled = [](std::size_t count, std::uint32_t t, float factor) {
    std::vector<float> g = normal_values(count, t);
    for (float& x : g) x *= factor;
    return g;
  };
  return {
      {"one outlier of 1e6",
       [](std::size_t count, std::uint32_t t) {
         std::vector<float> g = normal_values(count, t);
         g[t % count] = t % 3 == 0 ? 1e6f : g[t % count];
         return g;
       }},
      {"sign flips of a constant",
       [](std::size_t count, std::uint32_t t) {
         return std::vector<float>(count, t % 2 == 0 ? 1.0f : -1.0f);
       }},
      {"growth and fall by 1e4",
       [scaled](std::size_t count, std::uint32_t t) {
         return scaled(count, t, std::pow(1e4f, std::sin(0.02f * static_cast<float>(t))));
       }},
      {"growth in every step, the worst case of the bound",
       [scaled](std::size_t count, std::uint32_t t) {
         return scaled(count, 1, std::pow(1.05f, static_cast<float>(t % 200)));
       }},
      {"zeros with rare impulses",
       [](std::size_t count, std::uint32_t t) {
         std::vector<float> g(count, 0.0f);
         if (t % 50 == 1) g[t % count] = 1.0f;
         return g;
       }},
      {"subnormal and tiny",
       [](std::size_t count, std::uint32_t t) { return wide_values(count, t, -149, -100); }},
      {"all magnitudes",
       [](std::size_t count, std::uint32_t t) { return wide_values(count, t, -60, 20); }},
  };
}

/// Whether the states are as they have to be; describes the first that is not.
std::string state_error(const Stored& state, double bound) {
  for (double value : state.values) {
    if (!std::isfinite(value)) return "a stored value is not finite";
  }
  const double amax = static_cast<double>(state.scale.amax);
  if (!state.blocks.empty()) {
    const double smallest = 448 * std::ldexp(1.0, -126);
    const double least = is_root(state.format) ? 0.0 : smallest;
    if (amax > std::max(bound, least) * (1 + 1e-5) + 1e-44) return "A exceeds the bound";
    return block_error(state, std::string(name_of(state.format)));
  }
  const double scale = static_cast<double>(state.scale.scale), top = state.table().max();
  if (bound * scale > top * (1 + 1e-5)) return "the bound does not fit the scale";
  // Stochastic rounding may reach the next code above the bound, never one further.
  if (amax != amax_of(state.values)) return "amax is not that of the stored values";
  if (amax > std::min(bound * (1 + 1e-5) + state.gap(0, bound), top / scale)) {
    return "amax " + std::to_string(amax) + " exceeds the bound " + std::to_string(bound);
  }
  return {};
}

/// Bounds of the coming step from the states of before (numerics section 3).
struct Bounds {
  double m, v, w;
};

Bounds bounds_of(const AdamwModel& model, const AdamwReference& reference, double g,
                 std::int64_t t) {
  return {reference.next_m(static_cast<double>(model.m(0).scale.amax), g),
          reference.next_v(static_cast<double>(model.v(0).scale.amax), g),
          std::abs(1 - reference.lr * reference.weight_decay) *
                  static_cast<double>(model.master(0).scale.amax) +
              reference.lr * reference.bound(t)};
}

}  // namespace

TEST_CASE("no gradient makes a stored state overflow its bound") {
  constexpr std::size_t kCount = 331;
  for (const Context& ctx : test_contexts()) {
    for (const auto& betas : {std::pair{0.9f, 0.95f}, std::pair{0.9f, 0.999f}}) {
      const AdamWConfig config{.beta1 = betas.first, .beta2 = betas.second, .seed = 5};
      for (const Adversary& adversary : adversaries()) {
        for (const StateFormats& formats : {kO2, kSmall}) {
          INFO(to_string(ctx.device()) << ", " << adversary.name << ", beta2 " << config.beta2
                                       << ", " << describe(formats));
          AdamwModel model(ctx, config, {{{kCount}, formats, DType::e4m3, 0.1f}});
          model.initialise(0, normal_values(kCount, 1, 0.02f));
          const AdamwReference reference(config, 1e-3f, 0.1f);
          for (std::uint32_t t = 1; t <= 300; ++t) {
            INFO("step " << t);
            const Doubles g = model.set_gradient(0, adversary.gradients(kCount, t));
            const Bounds bounds = bounds_of(model, reference, amax_of(g), t);
            const Stored old_v = model.v(0);
            model.step(1e-3f);
            const Stored v = model.v(0);
            REQUIRE(state_error(model.m(0), bounds.m) == "");
            REQUIRE(state_error(v, bounds.v) == "");
            REQUIRE(state_error(model.master(0), bounds.w) == "");
            REQUIRE(state_error(model.weight(0), bounds.w) == "");
            int lost = 0;
            for (std::size_t i = 0; i < kCount; ++i) {
              lost += reference.next_v(old_v.values[i], g[i]) > 1e-44 && v.codes[i] == 0;
            }
            REQUIRE(lost == 0);
          }
          CHECK(model.scalars().step == 300);
        }
      }
    }
  }
}

TEST_CASE("2,000 steps of mixed gradients stay finite and bounded") {
  constexpr std::size_t kCount = 257;
  const std::vector<Adversary> list = adversaries();
  const AdamWConfig config{.beta1 = 0.9f, .beta2 = 0.999f, .seed = 6};
  const AdamwReference reference(config, 1e-3f, 0.1f);
  for (const Context& ctx : test_contexts()) {
    for (const StateFormats& formats : {kO2, kSmall}) {
      AdamwModel model(ctx, config, {{{kCount}, formats, DType::e4m3, 0.1f}});
      model.initialise(0, normal_values(kCount, 2, 0.02f));
      double largest_move = 0;
      for (std::uint32_t t = 1; t <= 2000; ++t) {
        INFO(describe(formats) << ", step " << t);
        const Doubles g = model.set_gradient(0, list[(t / 37) % list.size()].gradients(kCount, t));
        const Bounds bounds = bounds_of(model, reference, amax_of(g), t);
        const Doubles before = model.master(0).values;
        model.step(1e-3f);
        const Stored w = model.master(0);
        REQUIRE(state_error(model.m(0), bounds.m) == "");
        REQUIRE(state_error(model.v(0), bounds.v) == "");
        REQUIRE(state_error(w, bounds.w) == "");
        // The clamp: no weight moves further than exact Adam could move it.
        const double farthest = 1e-3 * reference.bound(t) * (1 + 1e-5) + w.gap(0, bounds.w);
        int too_far = 0;
        for (std::size_t i = 0; i < kCount; ++i) {
          const double move = std::abs(w.values[i] - (1 - 1e-4) * before[i]);
          too_far += move > farthest;
          largest_move = std::max(largest_move, move);
        }
        REQUIRE(too_far == 0);
      }
      CHECK(model.scalars().step == 2000);
      CHECK(largest_move > 1e-3);
    }
  }
}

TEST_CASE("v keeps its decay after a tenfold drop of the gradient") {
  // sqrt(v) must follow the exact value: nearest rounding would not move at all, because one step
  // of beta2 = 0.999 is half a unit of the last place.
  constexpr std::size_t kCount = 4096;
  for (const Context& ctx : test_contexts()) {
    const AdamWConfig config{.beta1 = 0.9f, .beta2 = 0.999f, .seed = 8};
    for (const StateFormats& formats : {kO2, kSmall}) {
      AdamwModel model(ctx, config, {{{kCount}, formats, DType::f32}});
      model.initialise(0, normal_values(kCount, 3));
      const AdamwReference reference(config, 0.0f, 0.0f);
      Doubles w(kCount, 0.0), m(kCount, 0.0), v(kCount, 0.0);
      for (std::uint32_t t = 1; t <= 2000; ++t) {
        const float sigma = t <= 200 ? 1.0f : 0.1f;
        std::vector<float> g(kCount, t % 2 == 0 ? sigma : -sigma);
        g[0] = 3 * sigma;
        reference.step(t, model.set_gradient(0, g), w, m, v);
        model.step(0.0f);
      }
      double ratio = 0;
      const Stored stored = model.v(0);
      for (std::size_t i = 1; i < kCount; ++i) ratio += std::sqrt(stored.values[i] / v[i]);
      ratio /= kCount - 1;
      INFO(to_string(ctx.device())
           << ", " << describe(formats) << ": mean of sqrt(v) over the exact one is " << ratio);
      CHECK(std::abs(ratio - 1) < 0.005);
    }
  }
}

TEST_CASE("m decays to zero and v to its smallest code under zero gradients") {
  constexpr std::size_t kCount = 1000;
  for (const Context& ctx : test_contexts()) {
    const AdamWConfig config{.seed = 9};
    AdamwModel model(ctx, config, {{{kCount}, kO2, DType::e4m3}, {{kCount}, kPlain, DType::f32}});
    model.initialise(0, normal_values(kCount, 4));
    model.initialise(1, normal_values(kCount, 4));
    model.set_gradient(0, normal_values(kCount, 5));
    model.set_gradient(1, normal_values(kCount, 5));
    for (int t = 0; t < 10; ++t) model.step(1e-3f);
    const double start = static_cast<double>(model.m(0).scale.amax);
    model.set_gradient(0, std::vector<float>(kCount, 0.0f));
    model.set_gradient(1, std::vector<float>(kCount, 0.0f));
    for (int t = 0; t < 40; ++t) model.step(1e-3f);
    // The exact factor is 0.9^40 = 0.0148.
    const double after = static_cast<double>(model.m(0).scale.amax);
    CHECK(after < start * 0.03);
    CHECK(after > start * 0.005);
    const double mean = norm_of(model.m(0).values) / norm_of(model.m(1).values);
    CHECK(std::abs(mean - 1) < 0.05);
    for (int t = 0; t < 1200; ++t) model.step(1e-3f);
    CHECK(model.m(0).scale.amax < 1e-30f);
    CHECK(model.scalars().skipped == 0);
    for (double value : model.master(0).values) REQUIRE(std::isfinite(value));
  }
}

TEST_CASE("a quantised master follows steps far below its last place") {
  // Steps of 1e-6 on weights near 1: 1/1000 of a unit in the last place. Nearest rounding would
  // never move; stochastic rounding moves by the right amount on average.
  constexpr std::size_t kCount = 4096;
  for (const Context& ctx : test_contexts()) {
    const AdamWConfig config{.seed = 10};
    for (const StateFormats& formats : {kO1, kSplit}) {
      AdamwModel model(ctx, config, {{{kCount}, formats, DType::f32}});
      model.initialise(0, std::vector<float>(kCount, 1.0f));
      model.set_gradient(0, std::vector<float>(kCount, 1.0f));
      constexpr int kSteps = 1000;
      for (int t = 0; t < kSteps; ++t) model.step(1e-6f);
      double mean = 0;
      for (double value : model.master(0).values) mean += value / kCount;
      // Adam's ratio for a constant gradient is 1, so the sum of the steps is 1e-3. Rounding noise:
      // sqrt(p) units per element and step, p = 1e-6 / unit, over sqrt(steps * elements).
      // Below 1, where E4M3 has steps of 1/16.
      const double unit = formats.master == StateFormat::f16 ? 0x1p-11 : 0x1p-12;
      const double sigma = unit * std::sqrt(1e-6 / unit * kSteps / kCount);
      // The field has 10 bits: one step's probability is off by at most half of 1/1024.
      const double bias = unit * kSteps * 0.5 / 1024;
      INFO(to_string(ctx.device()) << ", " << describe(formats) << ": mean is 1 - " << 1 - mean);
      CHECK(std::abs(1 - mean - 1e-3) < 5 * sigma + bias);
      CHECK(1 - mean > 5e-4);
    }
  }
}

TEST_CASE("tiny steps from varied weights do not drift either way") {
  // Weights spread over binades: the field's resolution averages out, a bias would not.
  constexpr std::size_t kCount = 16384;
  for (const Context& ctx : test_contexts()) {
    for (const StateFormats& formats : {kO1, kSplit}) {
      AdamwModel model(ctx, {.seed = 11}, {{{kCount}, formats, DType::f32}});
      model.initialise(0, normal_values(kCount, 6, 0.05f));
      const Doubles start = model.master(0).values;
      std::vector<float> g(kCount);
      for (std::size_t i = 0; i < kCount; ++i) g[i] = i % 2 == 0 ? 1.0f : -1.0f;
      model.set_gradient(0, g);
      constexpr int kSteps = 300;
      for (int t = 0; t < kSteps; ++t) model.step(1e-7f);
      const Doubles end = model.master(0).values;
      double along = 0, outward = 0, size = 0;
      for (std::size_t i = 0; i < kCount; ++i) {
        const double move = end[i] - start[i];
        along -= move * static_cast<double>(g[i]) / kCount;
        outward += move * (start[i] > 0 ? 1 : -1) / kCount;
        size += std::abs(start[i]) / kCount;
      }
      INFO(to_string(ctx.device()) << ", " << describe(formats) << ": moved " << along << " with, "
                                   << outward << " outward");
      CHECK(std::abs(along - 1e-7 * kSteps) < 0.1 * 1e-7 * kSteps);
      // 1e-4 of the weights' size over 300 steps.
      CHECK(std::abs(outward) < 1e-4 * size);
    }
  }
}

}  // namespace octet::test
