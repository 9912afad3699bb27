// SPDX-License-Identifier: Apache-2.0
// What AdamW refuses, and that it says why.
#include <algorithm>
#include <cmath>

#include "octet/optim/adamw.hpp"
#include "support/adamw_model.hpp"
#include "support/catch.hpp"
#include "support/errors.hpp"

namespace octet::test {

TEST_CASE("what AdamW refuses is named: the parameter, the field, the value") {
  const Context ctx = Context::cpu();
  const DType f32 = DType::f32;
  const auto error_with = [&](const StateFormats& formats, DType gradient, AdamWConfig config) {
    return error_of([&] { AdamwModel(ctx, config, {{{4, 4}, formats, gradient}}); });
  };
  using W = WeightFormat;
  using S = StateFormat;
  const auto error_of_formats = [&](const StateFormats& f) { return error_with(f, f32, {}); };
  const auto state_with = [](S StateFormats::*field, S format) {
    StateFormats formats = kO2;
    formats.*field = format;
    return formats;
  };
  CHECK(error_with(kO2, DType::e4m3, {}) == "no error");
  const struct {
    const char* name;
    S StateFormats::*field;
    std::vector<S> allowed;
  } fields[] = {
      {"master", &StateFormats::master, {S::f32, S::f16, S::split}},
      {"m", &StateFormats::m, {S::f32, S::bf16, S::e4m3, S::e4m3_block}},
      {"v", &StateFormats::v, {S::f32, S::bf16, S::f16, S::sqrt_e4m3_block}},
  };
  for (const auto& field : fields) {
    for (S format :
         {S::f32, S::bf16, S::f16, S::e4m3, S::e4m3_block, S::sqrt_e4m3_block, S::split}) {
      const std::string error = error_of_formats(state_with(field.field, format));
      const std::string name(name_of(format));
      INFO(field.name << " " << name);
      if (std::find(field.allowed.begin(), field.allowed.end(), format) != field.allowed.end()) {
        CHECK(error == "no error");
      } else {
        CHECK(missing(error, {"p0", field.name, " is " + name, "allowed"}) == "");
      }
    }
  }
  // An f32 weight is its own master; a split master needs an E4M3 weight.
  for (S master : {S::f16, S::split}) {
    CHECK(missing(error_of_formats({.weight = W::f32, .master = master}),
                  {"p0", "weight is f32", "master", std::string(name_of(master))}) == "");
  }
  for (W weight : {W::none, W::bf16}) {
    CHECK(missing(error_of_formats({.weight = weight, .master = S::split}),
                  {"p0", "split", "weight", std::string(name_of(weight))}) == "");
  }
  CHECK(missing(error_with(kO2, DType::f16, {}), {"p0", "gradient", "f16"}) == "");
  CHECK(missing(error_with(kO2, DType::e5m2, {}), {"p0", "gradient", "e5m2"}) == "");

  CHECK(missing(error_with(kPlain, f32, {.eps = 0.0f}), {"eps", "0"}) == "");
  CHECK(missing(error_with(kPlain, f32, {.eps = -1.0f}), {"eps", "-1"}) == "");
  CHECK(missing(error_with(kPlain, f32, {.eps = NAN}), {"eps", "nan"}) == "");
  // 2^-100 and 2^60 are the ends of what is allowed.
  CHECK(missing(error_with(kPlain, f32, {.eps = 7e-31f}), {"eps", "7e-31"}) == "");
  CHECK(missing(error_with(kPlain, f32, {.eps = 2e18f}), {"eps", "2e+18"}) == "");
  CHECK(error_with(kPlain, f32, {.eps = 0x1p-100f}) == "no error");
  CHECK(error_with(kPlain, f32, {.eps = 0x1p60f}) == "no error");
  CHECK(missing(error_with(kPlain, f32, {.beta1 = 1.0f}), {"beta1", "1"}) == "");
  CHECK(missing(error_with(kPlain, f32, {.beta1 = -0.5f}), {"beta1", "-0.5"}) == "");
  CHECK(missing(error_with(kPlain, f32, {.beta2 = 1.5f}), {"beta2", "1.5"}) == "");
  CHECK(missing(error_with(kPlain, f32, {.beta2 = NAN}), {"beta2", "nan"}) == "");
  const AdamWConfig unbounded{.beta1 = 0.9f, .beta2 = 0.8f};
  const StateFormats one_quantised[] = {{.weight = W::e4m3},
                                        {.weight = W::bf16, .master = S::f16},
                                        {.m = S::bf16},
                                        {.m = S::e4m3_block},
                                        {.v = S::sqrt_e4m3_block},
                                        kO1,
                                        kO2,
                                        kSmall};
  for (const StateFormats& formats : one_quantised) {
    CHECK(missing(error_with(formats, f32, unbounded), {"p0", "beta1", "beta2", "0.9", "0.8"}) ==
          "");
  }
  CHECK(error_with(kPlain, f32, unbounded) == "no error");
  CHECK(error_with(kO0, DType::bf16, unbounded) == "no error");
  CHECK(error_with({.weight = W::none}, DType::bf16, unbounded) == "no error");
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
  CHECK(error_with([](AdamWParam& p) { p.gradient_scale = nullptr; }) == "no error");
  const ScaledTensor fp8(ctx, DType::e4m3, {4, 4});
  CHECK(missing(error_with([&](AdamWParam& p) {
                  p.gradient = fp8.view().data;
                  p.gradient_scale = nullptr;
                }),
                {"layer", "gradient", "e4m3", "scale"}) == "");
  AdamW optimizer(ctx, {}, {good});
  CHECK(missing(error_of([&] { optimizer.initialise(0, wrong); }), {"layer", "[4, 5]"}) == "");
  CHECK(error_of([&] { optimizer.initialise(1, weight); }) != "no error");
  CHECK(missing(error_of([&] { optimizer.weight_scale(1); }), {"parameter 1", "there are 1"}) ==
        "");
  CHECK(missing(error_of([&] { optimizer.state_bytes(-1); }), {"parameter -1"}) == "");
}

TEST_CASE("weights that do not fit their format are refused by name") {
  const Context ctx = Context::cpu();
  const Tensor fp8(ctx, DType::e4m3, {4, 6}), turned(ctx, DType::e4m3, {6, 4});
  const Tensor turned_bf16(ctx, DType::bf16, {6, 4}), line(ctx, DType::e4m3, {24});
  const ScaledTensor gradient(ctx, DType::f32, {4, 6});
  AdamWParam good;
  good.name = "layer";
  good.shape = {4, 6};
  good.formats.weight = WeightFormat::e4m3_and_transpose;
  good.gradient = gradient.view().data;
  good.gradient_scale = gradient.view().scale;
  good.weight = fp8.view();
  good.weight_transposed = turned.view();
  const auto error_with = [&](auto change) {
    AdamWParam param = good;
    change(param);
    return error_of([&] { AdamW(ctx, {}, {param}); });
  };
  CHECK(error_with([](AdamWParam&) {}) == "no error");
  CHECK(missing(error_with([&](AdamWParam& p) { p.weight_transposed = fp8; }),
                {"layer", "transposed", "[4, 6]", "[6, 4]"}) == "");
  CHECK(missing(error_with([&](AdamWParam& p) { p.weight_transposed = turned_bf16; }),
                {"layer", "transposed", "bf16", "e4m3"}) == "");
  CHECK(missing(error_with([](AdamWParam& p) { p.weight_transposed = {}; }),
                {"layer", "transposed"}) == "");
  CHECK(missing(error_with([](AdamWParam& p) { p.weight_transposed.data = nullptr; }),
                {"layer", "transposed", "null"}) == "");
  CHECK(missing(error_with([&](AdamWParam& p) {
                  p.shape = {24};
                  p.gradient.shape = {24};
                  p.weight = line;
                  p.weight_transposed = line;
                }),
                {"layer", "e4m3_and_transpose", "[24]", "matrix"}) == "");
  CHECK(missing(error_with([](AdamWParam& p) { p.formats.weight = WeightFormat::e4m3; }),
                {"layer", "transposed", "e4m3"}) == "");
  CHECK(missing(error_with([](AdamWParam& p) {
                  p.formats.weight = WeightFormat::none;
                  p.weight_transposed = {};
                }),
                {"layer", "weight", "none"}) == "");
  CHECK(error_with([](AdamWParam& p) {
          p.formats.weight = WeightFormat::none;
          p.weight_transposed = {};
          p.weight = {};
        }) == "no error");
  CHECK(missing(error_with([](AdamWParam& p) { p.weight.data = nullptr; }),
                {"layer", "weight", "null"}) == "");
}

TEST_CASE("a shard of a weight that does not fit is refused by name") {
  const Context ctx = Context::cpu();
  const Tensor shard(ctx, DType::e4m3, {128 * 6});
  const ScaledTensor gradient(ctx, DType::f32, {200, 6});
  AdamWParam good;
  good.name = "layer";
  good.shape = {200, 6};
  good.formats.weight = WeightFormat::e4m3;
  good.gradient = gradient.view().data;
  good.gradient_scale = gradient.view().scale;
  good.pieces = std::vector<Piece>{{0, 0, 128 * 6}};
  good.weight = shard.view();
  good.weight_is_shard = true;
  const auto error_with = [&](auto change) {
    AdamWParam param = good;
    change(param);
    return error_of([&] { AdamW(ctx, {}, {param}); });
  };
  CHECK(error_with([](AdamWParam&) {}) == "no error");
  CHECK(missing(error_with([](AdamWParam& p) { p.weight_is_shard = false; }),
                {"layer", "weight", "[768]", "[200, 6]"}) == "");
  CHECK(missing(error_with([](AdamWParam& p) { p.pieces = std::nullopt; }),
                {"layer", "weight", "[768]", "[1200]", "pieces"}) == "");
  for (WeightFormat format :
       {WeightFormat::none, WeightFormat::e4m3_and_transpose, WeightFormat::e4m3_row_block,
        WeightFormat::e4m3_tile_and_transpose}) {
    CHECK(missing(error_with([&](AdamWParam& p) { p.formats.weight = format; }),
                  {"layer", "weight_is_shard", std::string(name_of(format)), "e4m3_tile"}) == "");
  }
  CHECK(missing(error_with([&](AdamWParam& p) {
                  p.weight_copies = {{shard.view().data, nullptr}};
                }),
                {"layer", "copies", "weight_is_shard"}) == "");
  AdamWParam tiles = good;
  tiles.formats.weight = WeightFormat::e4m3_tile;
  AdamW optimizer(ctx, {}, {tiles});
  CHECK(missing(error_of([&] { optimizer.block_weight(0); }), {"layer", "shard"}) == "");
}

}  // namespace octet::test
