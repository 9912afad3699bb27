// SPDX-License-Identifier: Apache-2.0
// Groups of parameters with hyper-parameters of their own.
#include <limits>

#include "octet/optim/adamw.hpp"
#include "support/adamw_model.hpp"
#include "support/adamw_step.hpp"
#include "support/catch.hpp"
#include "support/compare.hpp"
#include "support/errors.hpp"
#include "support/random.hpp"

namespace octet::test {
namespace {

const Shape kShape = {17, 61};
constexpr std::size_t kCount = 1037;

const AdamwHyper kGroups[] = {
    {},
    {.lr_factor = 0.25f},
    {.beta1 = 0.5f, .beta2 = 0.999f},
    {.eps = 1e-3f, .weight_decay = 0.3f},
    {.lr_factor = 3.0f, .beta1 = 0.0f, .beta2 = 0.5f, .eps = 1e-6f, .weight_decay = 0.05f},
};

std::vector<float> gradient_of(std::size_t i, int step) {
  return normal_values(
      kCount, static_cast<std::uint32_t>(100 * step) + static_cast<std::uint32_t>(i), 0.01f);
}

/// Takes `steps` steps with all parameters of a model.
void run(AdamwModel& model, std::size_t params, int steps, float lr, float max_norm) {
  for (std::size_t i = 0; i < params; ++i) {
    model.initialise(static_cast<int>(i),
                     normal_values(kCount, 7 + static_cast<std::uint32_t>(i), 0.02f));
  }
  for (int step = 1; step <= steps; ++step) {
    for (std::size_t i = 0; i < params; ++i) {
      model.set_gradient(static_cast<int>(i), gradient_of(i, step));
    }
    model.step(lr, max_norm);
  }
  REQUIRE(model.scalars().step == steps);
}

/// A group that leaves nothing to the configuration.
AdamWGroup all_of(const AdamwHyper& hyper) {
  return {.lr_factor = hyper.lr_factor,
          .beta1 = hyper.beta1,
          .beta2 = hyper.beta2,
          .eps = hyper.eps,
          .weight_decay = hyper.weight_decay};
}

}  // namespace

TEST_CASE("what a group does not set is the configuration's") {
  const AdamWConfig config{.beta1 = 0.8f, .beta2 = 0.99f, .eps = 1e-6f, .weight_decay = 0.3f};
  CHECK(config.of() == AdamwHyper{1.0f, 0.8f, 0.99f, 1e-6f, 0.3f});
  CHECK(config.of({.weight_decay = 0.0f}) == AdamwHyper{1.0f, 0.8f, 0.99f, 1e-6f, 0.0f});
  CHECK(config.of({.lr_factor = 2.0f, .beta2 = 0.9f}) == AdamwHyper{2.0f, 0.8f, 0.9f, 1e-6f, 0.3f});
  for (const Context& ctx : test_contexts()) {
    AdamwModel model(ctx, config,
                     {{.shape = {3}, .formats = {}, .group = AdamWGroup{.eps = 1e-4f}}});
    model.initialise(0, normal_values(3, 1));
    model.step(0.5f);
    const AdamwGroupScalars s = model.group_scalars(0);
    CHECK(s.beta1 == 0.8f);
    CHECK(s.beta2 == 0.99f);
    CHECK(s.weight_factor == std::fma(-0.5f, 0.3f, 1.0f));
  }
}

TEST_CASE("a group gives the bits of a run with its hyper-parameters as the configuration") {
  constexpr float kRate = 1e-2f;
  for (const Context& ctx : test_contexts()) {
    for (const StateFormats& formats : {kPlain, kO0, kO2, kSmallTransposed, kBlocksAlone}) {
      for (bool decoupled : {true, false}) {
        for (float max_norm : {0.0f, 0.1f}) {
          // Equal lists: the same random bits and the same norm for the same parameter.
          std::vector<ParamCase> grouped, single;
          for (const AdamwHyper& group : kGroups) {
            grouped.push_back({.shape = kShape, .formats = formats, .group = all_of(group)});
          }
          const AdamWConfig config{.weight_decay = 7.0f,  // belongs to nobody
                                   .seed = 3,
                                   .decoupled_weight_decay = decoupled};
          AdamwModel groups(ctx, config, grouped);
          run(groups, std::size(kGroups), 4, kRate, max_norm);
          std::vector<std::vector<std::uint8_t>> all;
          for (std::size_t i = 0; i < std::size(kGroups); ++i) {
            const AdamwHyper& group = kGroups[i];
            single.assign(
                std::size(kGroups),
                {.shape = kShape, .formats = formats, .weight_decay = group.weight_decay});
            AdamwModel alone(ctx,
                             {.beta1 = group.beta1,
                              .beta2 = group.beta2,
                              .eps = group.eps,
                              .weight_decay = group.weight_decay,
                              .seed = 3,
                              .decoupled_weight_decay = decoupled},
                             single);
            run(alone, std::size(kGroups), 4, kRate * group.lr_factor, max_norm);
            INFO(to_string(ctx.device())
                 << ", " << describe(formats) << ", group " << i << ", decoupled " << decoupled
                 << ", max_norm " << max_norm);
            const int p = static_cast<int>(i);
            CHECK(first_difference(groups.bytes(p), alone.bytes(p)) == "");
            // The group matters: parameter 0, in the group of the defaults, moved otherwise.
            if (i > 0) CHECK(first_difference(groups.bytes(0), alone.bytes(0)) != "");
          }
        }
      }
    }
  }
}

TEST_CASE("the steps of every group are those of double-precision AdamW") {
  const AdamWConfig config{.seed = 5};
  for (const Context& ctx : test_contexts()) {
    for (const StateFormats& formats : {kPlain, kO2, kSmall}) {
      for (const AdamwHyper& group : kGroups) {
        AdamwModel model(ctx, config,
                         {{.shape = kShape, .formats = formats, .group = all_of(group)},
                          {.shape = {5}, .formats = {}, .group = AdamWGroup{.lr_factor = 9.0f}}});
        model.initialise(0, normal_values(kCount, 1, 0.02f));
        model.initialise(1, normal_values(5, 2));
        const AdamwReference reference(config, all_of(group), 1e-3f);
        for (int t = 1; t <= 5; ++t) {
          const Doubles g = model.set_gradient(0, gradient_of(0, t));
          const StepChecker checker(model, 0, formats, kShape, g);
          model.step(1e-3f);
          INFO(to_string(ctx.device()) << ", " << describe(formats) << ", beta1 " << group.beta1
                                       << ", lr_factor " << group.lr_factor);
          REQUIRE(checker.check(reference, t) == "");
        }
        const AdamwGroupScalars s = model.group_scalars(0);
        CHECK(s.lr == 1e-3f * group.lr_factor);
        CHECK(s.beta1 == group.beta1);
        CHECK(s.beta2 == group.beta2);
        const double eps = reference.eps / reference.k1(5);
        CHECK(std::abs(static_cast<double>(s.root_eps) - eps) < 1e-6 * eps);
        CHECK(s.weight_factor == std::fma(-s.lr, group.weight_decay, 1.0f));
        CHECK(model.group_scalars(1).lr == 1e-3f * 9.0f);
        CHECK(model.scalars().lr == 1e-3f);
      }
    }
  }
}

TEST_CASE("equal groups share their scalars; no group is the configuration's") {
  const Context ctx = Context::cpu();
  const AdamWConfig config{.beta1 = 0.8f, .beta2 = 0.99f, .eps = 1e-5f};
  const AdamWGroup same{.beta1 = 0.8f, .beta2 = 0.99f, .eps = 1e-5f};
  AdamwModel model(ctx, config,
                   {{.shape = {3}, .formats = {}},
                    {.shape = {3}, .formats = {}, .group = AdamWGroup{.lr_factor = 2.0f}},
                    {.shape = {3}, .formats = {}, .group = same}});
  const AdamW& optimizer = model.optimizer();
  CHECK(optimizer.group_scalars(0) == optimizer.group_scalars(2));
  CHECK(optimizer.group_scalars(0) != optimizer.group_scalars(1));
  CHECK(error_of([&] { optimizer.group_scalars(3); }) != "no error");
  model.step(1e-3f);
  CHECK(model.group_scalars(0).beta1 == 0.8f);
  CHECK(model.group_scalars(1).beta1 == 0.8f);
}

TEST_CASE("a factor of zero freezes the weights of its group alone") {
  for (const Context& ctx : test_contexts()) {
    for (const StateFormats& formats : {kPlain, kO2, kSmallTransposed}) {
      const AdamWGroup frozen{.lr_factor = 0.0f, .weight_decay = 0.5f};
      AdamwModel model(ctx, {},
                       {{.shape = kShape, .formats = formats, .group = frozen},
                        {.shape = kShape, .formats = formats}});
      for (int i : {0, 1}) model.initialise(i, normal_values(kCount, 3));
      const Doubles before = model.weight(0).values, other = model.weight(1).values;
      for (int t = 1; t <= 3; ++t) {
        for (int i : {0, 1}) model.set_gradient(i, gradient_of(0, t));
        model.step(0.1f);
      }
      INFO(to_string(ctx.device()) << ", " << describe(formats));
      CHECK(first_difference(model.weight(0).values, before) == "");
      CHECK(first_difference(model.weight(1).values, other) != "");
      if (formats == kPlain) CHECK(first_difference(model.m(0).values, model.m(1).values) == "");
      CHECK(model.m(0).scale.amax > 0.0f);
    }
  }
}

TEST_CASE("a learning rate that overflows in one group skips the step of all") {
  for (const Context& ctx : test_contexts()) {
    AdamwModel model(ctx, {},
                     {{.shape = {100}, .formats = {}},
                      {.shape = {100}, .formats = {}, .group = AdamWGroup{.lr_factor = 1e30f}}});
    for (int i : {0, 1}) {
      model.initialise(i, normal_values(100, 4));
      model.set_gradient(i, normal_values(100, 5));
    }
    const auto before = model.all_bytes();
    model.step(1e20f);
    CHECK(first_difference(model.all_bytes(), before) == "");
    CHECK(model.scalars().skipped == 1);
    model.step(1e-30f);
    CHECK(model.scalars().step == 1);
  }
}

TEST_CASE("one group may lack a bound while the states of another are quantised") {
  const AdamWGroup unbounded{.beta1 = 0.9f, .beta2 = 0.8f};
  for (const Context& ctx : test_contexts()) {
    const AdamWConfig config{.seed = 2};
    AdamwModel model(ctx, config,
                     {{.shape = kShape, .formats = kPlain, .group = unbounded},
                      {.shape = kShape, .formats = kSmall}});
    for (int i : {0, 1}) model.initialise(i, normal_values(kCount, 6, 0.02f));
    AdamwReference reference(config, unbounded, 1e-3f);
    for (int t = 1; t <= 4; ++t) {
      const Doubles first = model.set_gradient(0, gradient_of(0, t));
      const Doubles second = model.set_gradient(1, gradient_of(1, t));
      const StepChecker checker(model, 1, kSmall, kShape, second);
      Doubles w = model.master(0).values, m = model.m(0).values, v = model.v(0).values;
      model.step(1e-3f);
      CHECK(checker.check({config, 1e-3f, 0.0f}, t) == "");
      const Doubles after = model.master(0).values;
      for (std::size_t i = 0; i < kCount; ++i) {
        const double exact_m = reference.next_m(m[i], first[i]);
        const double exact_v = reference.next_v(v[i], first[i]);
        const double exact =
            reference.next_weight(w[i], reference.ratio(exact_m, exact_v, t, INFINITY));
        REQUIRE(std::abs(after[i] - exact) < 1e-8);
      }
    }
    CHECK(std::isinf(model.group_scalars(0).bound));
    CHECK(std::isfinite(model.group_scalars(1).bound));
  }
}

TEST_CASE("groups that no step could use are refused: the parameter, the field, the value") {
  const Context ctx = Context::cpu();
  const auto error_with = [&](const AdamWGroup& group, const StateFormats& formats) {
    // The first parameter is fine and so is the configuration: the error is about "p1" alone.
    return error_of([&] {
      AdamwModel(ctx, {},
                 {{.shape = {4, 4}, .formats = kSmall},
                  {.shape = {4, 4}, .formats = formats, .group = group}});
    });
  };
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  const struct {
    AdamWGroup group;
    std::initializer_list<std::string> named;
  } rows[] = {
      {{.lr_factor = -1.0f}, {"lr_factor", "-1"}},
      {{.lr_factor = INFINITY}, {"lr_factor", "inf"}},
      {{.lr_factor = kNan}, {"lr_factor", "nan"}},
      {{.beta1 = 1.0f}, {"beta1", "1"}},
      {{.beta1 = -0.5f}, {"beta1", "-0.5"}},
      {{.beta1 = kNan}, {"beta1", "nan"}},
      {{.beta2 = 1.5f}, {"beta2", "1.5"}},
      {{.beta2 = kNan}, {"beta2", "nan"}},
      {{.eps = 0.0f}, {"eps", "0"}},
      {{.eps = 7e-31f}, {"eps", "7e-31"}},
      {{.eps = 2e18f}, {"eps", "2e+18"}},
      {{.eps = kNan}, {"eps", "nan"}},
      {{.weight_decay = -0.1f}, {"weight_decay", "-0.1"}},
      {{.weight_decay = INFINITY}, {"weight_decay", "inf"}},
  };
  for (const auto& row : rows) {
    for (const StateFormats& formats : {kPlain, kSmall}) {
      const std::string error = error_with(row.group, formats);
      INFO(error);
      CHECK(missing(error, {"\"p1\""}) == "");
      CHECK(missing(error, row.named) == "");
      CHECK(missing(error_of([&] { check_hyper("here", AdamWConfig{}.of(row.group)); }),
                    row.named) == "");
    }
  }
  const AdamWGroup unbounded{.beta1 = 0.9f, .beta2 = 0.8f};
  CHECK(error_with(unbounded, kPlain) == "no error");
  for (const StateFormats& formats : {kO1, kO2, kSmall, kBlocksAlone}) {
    CHECK(missing(error_with(unbounded, formats),
                  {"\"p1\"", "beta1", "0.9", "beta2", "0.8", "beta1^2"}) == "");
  }
  CHECK(error_with({.lr_factor = 0.0f, .eps = 0x1p-100f}, kSmall) == "no error");
}

}  // namespace octet::test
