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
