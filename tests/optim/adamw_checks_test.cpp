// SPDX-License-Identifier: Apache-2.0
// What AdamW refuses, and that it says why.
#include <cmath>

#include "octet/optim/adamw.hpp"
#include "support/adamw_model.hpp"
#include "support/catch.hpp"
#include "support/errors.hpp"

namespace octet::test {

TEST_CASE("what AdamW refuses is named: the parameter, the field, the value") {
  const Context ctx = Context::cpu();
  const auto error_with = [&](const StateFormats& formats, DType gradient, AdamWConfig config) {
    return error_of([&] { AdamwModel(ctx, config, {{{4, 4}, formats, gradient}}); });
  };
  const auto formats_with = [](DType StateFormats::*field, DType dtype) {
    StateFormats formats = kO2;
    formats.*field = dtype;
    return formats;
  };
  using F = StateFormats;
  CHECK(error_with(kO2, DType::e4m3, {}) == "no error");
  const DType f32 = DType::f32;
  CHECK(missing(error_with(formats_with(&F::m, DType::f16), f32, {}), {"p0", "m ", "f16"}) == "");
  CHECK(missing(error_with(formats_with(&F::m, DType::e5m2), f32, {}), {"p0", "m ", "e5m2"}) == "");
  CHECK(missing(error_with(formats_with(&F::v, DType::e4m3), f32, {}), {"p0", "v ", "e4m3"}) == "");
  CHECK(missing(error_with(formats_with(&F::v, DType::e5m2), f32, {}), {"p0", "v ", "e5m2"}) == "");
  CHECK(missing(error_with(formats_with(&F::master, DType::bf16), f32, {}),
                {"p0", "master", "bf16"}) == "");
  CHECK(missing(error_with(formats_with(&F::weight, DType::f16), f32, {}),
                {"p0", "weight", "f16"}) == "");
  CHECK(missing(error_with(formats_with(&F::weight, f32), f32, {}), {"p0", "weight", "master"}) ==
        "");
  CHECK(missing(error_with(kO2, DType::f16, {}), {"p0", "gradient", "f16"}) == "");
  CHECK(missing(error_with(kO2, DType::e5m2, {}), {"p0", "gradient", "e5m2"}) == "");

  CHECK(missing(error_with(kPlain, f32, {.eps = 0.0f}), {"eps", "0"}) == "");
  CHECK(missing(error_with(kPlain, f32, {.eps = -1.0f}), {"eps", "-1"}) == "");
  CHECK(missing(error_with(kPlain, f32, {.eps = NAN}), {"eps", "nan"}) == "");
  CHECK(missing(error_with(kPlain, f32, {.beta1 = 1.0f}), {"beta1", "1"}) == "");
  CHECK(missing(error_with(kPlain, f32, {.beta1 = -0.5f}), {"beta1", "-0.5"}) == "");
  CHECK(missing(error_with(kPlain, f32, {.beta2 = 1.5f}), {"beta2", "1.5"}) == "");
  CHECK(missing(error_with(kPlain, f32, {.beta2 = NAN}), {"beta2", "nan"}) == "");
  const AdamWConfig unbounded{.beta1 = 0.9f, .beta2 = 0.8f};
  for (const StateFormats& formats : {kO1, kO2}) {
    CHECK(missing(error_with(formats, f32, unbounded), {"p0", "beta1", "beta2", "0.9", "0.8"}) ==
          "");
  }
  CHECK(error_with(kPlain, f32, unbounded) == "no error");
  CHECK(error_with(kO0, DType::bf16, unbounded) == "no error");
}

TEST_CASE("views that do not fit a parameter are refused by name") {
  const Context ctx = Context::cpu();
  const Tensor weight(ctx, DType::f32, {4, 4}), wrong(ctx, DType::f32, {4, 5});
  const ScaledTensor gradient(ctx, DType::f32, {4, 4});
  AdamWParam good;
  good.name = "layer";
  good.shape = {4, 4};
  good.gradient = gradient.view().data;
  good.gradient_scale = gradient.view().scale;
  good.weight = weight.view();
  const auto error_with = [&](auto change) {
    AdamWParam param = good;
    change(param);
    return error_of([&] { AdamW(ctx, {}, {param}); });
  };
  CHECK(error_with([](AdamWParam&) {}) == "no error");
  CHECK(missing(error_with([&](AdamWParam& p) { p.weight = wrong; }), {"layer", "weight"}) == "");
  CHECK(missing(error_with([&](AdamWParam& p) { p.gradient = wrong; }), {"layer", "gradient"}) ==
        "");
  CHECK(missing(error_with([](AdamWParam& p) { p.gradient_scale = nullptr; }),
                {"layer", "scale"}) == "");
  AdamW optimizer(ctx, {}, {good});
  CHECK(missing(error_of([&] { optimizer.initialise(0, wrong); }), {"layer", "[4, 5]"}) == "");
  CHECK(error_of([&] { optimizer.initialise(1, weight); }) != "no error");
}

}  // namespace octet::test
