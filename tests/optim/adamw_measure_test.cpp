// SPDX-License-Identifier: Apache-2.0
// measure(): gradients whose amax nobody knows, values that are not finite, sums of squares.
#include "octet/optim/adamw.hpp"
#include "support/adamw_model.hpp"
#include "support/catch.hpp"
#include "support/compare.hpp"
#include "support/errors.hpp"
#include "support/random.hpp"

namespace octet::test {
namespace {

// Two segments and a bit; rows that are no whole number of vectors.
const Shape kShape = {129, 255};
constexpr std::size_t kCount = 129 * 255;

std::string name_of(GradientAmax amax) {
  return amax == GradientAmax::given      ? "given"
         : amax == GradientAmax::measured ? "measured"
                                          : "own";
}

std::vector<GradientAmax> unknown_for(DType gradient) {
  if (gradient == DType::e4m3) return {GradientAmax::measured};
  return {GradientAmax::measured, GradientAmax::no_scale};
}

std::vector<std::uint8_t> bytes_after(const Context& ctx, const StateFormats& formats,
                                      DType gradient, GradientAmax amax, float max_norm) {
  AdamwModel model(ctx, {.seed = 4},
                   {{.shape = kShape, .formats = formats, .gradient = gradient, .amax = amax},
                    {.shape = {77}, .formats = kPlain}});
  model.initialise(0, normal_values(kCount, 1, 0.02f));
  model.initialise(1, normal_values(77, 2));
  model.set_gradient(1, normal_values(77, 3));
  // Falling amax: one left over from the step before would show.
  for (int t = 0; t < 3; ++t) {
    model.set_gradient(
        0, normal_values(kCount, static_cast<std::uint32_t>(10 + t), std::ldexp(1.0f, -4 * t)));
    model.step(1e-3f, max_norm);
  }
  CHECK(model.scalars().step == 3);
  return model.all_bytes();
}

}  // namespace

TEST_CASE("a gradient without an amax gives the bits of the run where it is known") {
  for (const Context& ctx : test_contexts()) {
    for (const StateFormats& formats : {kPlain, kO0, kO2, kSmallTransposed}) {
      for (DType gradient : kGradientFormats) {
        for (float max_norm : {0.0f, 1.0f}) {
          const auto known = bytes_after(ctx, formats, gradient, GradientAmax::given, max_norm);
          for (GradientAmax amax : unknown_for(gradient)) {
            INFO(to_string(ctx.device()) << ", " << describe(formats, gradient) << ", amax "
                                         << name_of(amax) << ", max_norm " << max_norm);
            CHECK(first_difference(bytes_after(ctx, formats, gradient, amax, max_norm), known) ==
                  "");
          }
        }
      }
    }
  }
}

TEST_CASE("measure() finds the amax as decoded, and the step takes it down again") {
  for (const Context& ctx : test_contexts()) {
    for (DType gradient : kGradientFormats) {
      for (std::size_t place :
           {std::size_t{0}, std::size_t{16383}, std::size_t{16384}, kCount - 1}) {
        AdamwModel model(ctx, {},
                         {{.shape = kShape,
                           .formats = kSmall,
                           .gradient = gradient,
                           .amax = GradientAmax::measured}});
        model.initialise(0, normal_values(kCount, 1));
        std::vector<float> g = normal_values(kCount, 2);
        g[place] = -77.7f;
        const Doubles decoded = model.set_gradient(0, g);
        const auto amax = [&] {
          return download_one<TensorScale>(ctx, model.gradient_view(0).scale).amax;
        };
        INFO(to_string(ctx.device()) << ", " << octet::name_of(gradient) << ", at " << place);
        CHECK(amax() == 0.0f);
        model.optimizer().measure();
        CHECK(static_cast<double>(amax()) == amax_of(decoded));
        CHECK(static_cast<double>(amax()) == std::abs(decoded[place]));
        model.optimizer().measure();  // twice is as good as once
        CHECK(static_cast<double>(amax()) == amax_of(decoded));
        model.optimizer().step({.lr = 1e-3f});
        CHECK(amax() == 0.0f);
        CHECK(model.scalars().step == 1);
      }
    }
  }
}

TEST_CASE("an amax that is given is neither measured nor taken down") {
  for (const Context& ctx : test_contexts()) {
    AdamwModel model(ctx, {}, {{.shape = {1000}, .formats = kSmall}});
    model.initialise(0, normal_values(1000, 1));
    model.set_gradient(0, normal_values(1000, 2));
    const TensorScale given{1.0f, 1.0f, 123.0f};  // a bound, above the true one
    write_one(ctx, model.gradient_view(0).scale, given);
    model.optimizer().measure();
    model.optimizer().step({.lr = 1e-3f, .max_norm = 1.0f});
    CHECK(download_one<TensorScale>(ctx, model.gradient_view(0).scale).amax == 123.0f);
    CHECK(model.scalars().step == 1);
  }
}

TEST_CASE("a step without measure() is refused where an amax is unknown, every time") {
  for (const Context& ctx : test_contexts()) {
    for (GradientAmax amax : {GradientAmax::measured, GradientAmax::no_scale}) {
      AdamwModel model(
          ctx, {},
          {{.shape = {9}, .formats = kPlain}, {.shape = {1000}, .formats = kO2, .amax = amax}});
      model.initialise(0, normal_values(9, 1));
      model.initialise(1, normal_values(1000, 1));
      model.set_gradient(0, normal_values(9, 2));
      model.set_gradient(1, normal_values(1000, 2));
      const auto before = model.all_bytes();
      const auto step = [&] { model.optimizer().step({.lr = 1e-3f}); };
      CHECK(missing(error_of(step), {"step", "amax", "measure()"}) == "");
      CHECK(first_difference(model.all_bytes(), before) == "");
      model.optimizer().measure();
      CHECK(error_of(step) == "no error");
      CHECK(missing(error_of(step), {"measure()"}) == "");
      CHECK(model.scalars().step == 1);
    }
  }
}

TEST_CASE("measure() leaves a raised flag up and calls large finite values finite") {
  for (const Context& ctx : test_contexts()) {
    AdamwModel model(ctx, {}, {{.shape = {300}, .formats = kPlain}});
    model.initialise(0, normal_values(300, 1));
    std::vector<float> g(300, 3e38f);  // its square is not finite
    model.set_gradient(0, g);
    model.optimizer().measure(model.flag());
    CHECK(download_one<std::uint32_t>(ctx, model.flag()) == 0);
    write_one(ctx, model.flag(), std::uint32_t{1});
    model.set_gradient(0, std::vector<float>(300, 1.0f));
    model.optimizer().measure(model.flag());
    CHECK(download_one<std::uint32_t>(ctx, model.flag()) == 1);
  }
}

TEST_CASE("owners of pieces find the amax of what they own") {
  const std::vector<Piece> panels = panels_of(0, {300, 97});
  REQUIRE(panels.size() == 3);
  for (const Context& ctx : test_contexts()) {
    std::vector<float> g = normal_values(300 * 97, 1);
    for (std::size_t owner = 0; owner < 3; ++owner) {
      g[static_cast<std::size_t>(panels[owner].begin) + 5] = 100.0f * static_cast<float>(1 + owner);
    }
    for (std::size_t owner = 0; owner < 3; ++owner) {
      AdamwModel model(ctx, {},
                       {{.shape = {300, 97},
                         .formats = kSmall,
                         .gradient = DType::bf16,
                         .pieces = std::vector<Piece>{panels[owner]},
                         .amax = GradientAmax::measured}});
      model.initialise(0, normal_values(300 * 97, 2));
      const Doubles decoded = model.set_gradient(0, g);
      model.optimizer().measure();
      const float amax = download_one<TensorScale>(ctx, model.gradient_view(0).scale).amax;
      CHECK(static_cast<double>(amax) ==
            decoded[static_cast<std::size_t>(panels[owner].begin) + 5]);
    }
  }
}

}  // namespace octet::test
