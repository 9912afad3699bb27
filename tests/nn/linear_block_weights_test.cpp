// SPDX-License-Identifier: Apache-2.0
// A Linear that takes the weight in tiles, as AdamW writes it: the bits of one that casts the
// decoded master itself.
#include "nn/linear_model.hpp"
#include "support/adamw_model.hpp"
#include "support/catch.hpp"
#include "support/compare.hpp"
#include "support/errors.hpp"

namespace octet::test {
namespace {

constexpr DType f32 = DType::f32, e4m3 = DType::e4m3;
constexpr std::int64_t kTokens = 33, kIn = 400;

/// A step of AdamW that leaves a weight in tiles, and its decoded master.
struct Weight {
  AdamwModel model;
  Buffer master;
  Shape shape;

  Weight(const Context& ctx, std::int64_t out, WeightFormat format)
      : model(ctx, {.seed = 3},
              {{{out, kIn}, {format, StateFormat::f16, StateFormat::e4m3, StateFormat::f16}}}),
        shape{out, kIn} {
    const Matrix values = random_matrix(out, kIn, 3, 0.1, f32),
                 g = random_matrix(out, kIn, 4, 1, f32);
    model.initialise(0, {values.values.begin(), values.values.end()});
    model.set_gradient(0, {g.values.begin(), g.values.end()});
    model.step(1e-2f);
    const Doubles decoded = model.master(0).values;
    master = upload(ctx, std::vector<float>(decoded.begin(), decoded.end()));
  }
  BlockScaledView view() { return model.optimizer().block_weight(0); }
  BlockScaledView transposed() { return model.optimizer().block_weight_transposed(0); }
  ScaledView wide() const { return {view_of(model.context(), master, f32, shape), nullptr}; }
};

/// A Linear with the recipe blockwise; run() returns y and dx of a micro-batch.
struct Layer {
  Context ctx;
  GemmRegistry gemms;
  std::int64_t out;
  Linear linear;
  Tensor y, dx, dw;

  Layer(const Context& context, std::int64_t out_features, DType weight_dtype, bool cache = false)
      : ctx(context),
        gemms(context),
        out(out_features),
        linear(gemms, {.in_features = kIn,
                       .out_features = out,
                       .max_tokens = kTokens,
                       .recipe = Fp8Recipe::blockwise,
                       .weight_dtype = weight_dtype,
                       .cache_weight = cache}),
        y(context, f32, {kTokens, out}),
        dx(context, f32, {kTokens, kIn}),
        dw(context, f32, {out, kIn}) {}

  /// With the arguments that say what the weight is.
  std::vector<std::uint8_t> run(LinearForward forward, LinearBackward backward) {
    const Buffer x = upload_as(ctx, random_matrix(kTokens, kIn, 10, 1.0, f32), f32);
    const Buffer dy = upload_as(ctx, random_matrix(kTokens, out, 11, 0.01, f32), f32);
    forward.x = view_of(ctx, x, f32, {kTokens, kIn}), forward.y = y;
    backward.dy = view_of(ctx, dy, f32, {kTokens, out}), backward.dx = dx;
    backward.dw = {dw.view(), nullptr};
    linear.forward(forward);
    linear.backward(backward);
    std::vector<std::uint8_t> all = download_bytes(ctx, y.view());
    for (const Tensor* tensor : {&dx, &dw}) {
      const auto part = download_bytes(ctx, tensor->view());
      all.insert(all.end(), part.begin(), part.end());
    }
    return all;
  }
  std::vector<std::uint8_t> run(const BlockScaledView& w, const BlockScaledView& transposed = {}) {
    return run({.block_weight = w}, {.block_weight = w, .block_weight_transposed = transposed});
  }
};

}  // namespace

TEST_CASE("a weight in tiles from the optimizer gives the products of its decoded master") {
  for (const Context& ctx : test_contexts()) {
    // Whole tiles, parts of one, and columns of the transposed copy that are padding.
    for (std::int64_t out : {256, 272, 16, 135}) {
      for (bool cache : {false, true}) {
        INFO(out << " features" << (cache ? ", kept" : "") << " on " << to_string(ctx.device()));
        Weight w(ctx, out, WeightFormat::e4m3_tile_and_transpose);
        Layer wide(ctx, out, f32), layer(ctx, out, e4m3, cache);
        const auto expected = wide.run({.weight = w.wide()}, {.weight = w.wide()});
        CHECK(first_difference(layer.run(w.view()), expected) == "");
        CHECK(first_difference(layer.run(w.view()), expected) == "");
        if (out % 16 != 0) continue;
        // Calls with and without may take turns.
        CHECK(first_difference(layer.run(w.view(), w.transposed()), expected) == "");
        const BlockScaledView copy = w.transposed();
        zero_bytes(ctx, copy.data.data, copy.data.bytes());
        layer.run(w.view(), copy);
        const auto dx = download<float>(ctx, layer.dx.view().data, kTokens * kIn);
        CHECK(first_difference(dx, std::vector<float>(kTokens * kIn, 0.0f)) == "");
      }
    }
  }
}

TEST_CASE("a kept transposed copy of a weight in tiles stays until the weight has changed") {
  constexpr std::int64_t kOut = 144;
  for (const Context& ctx : test_contexts()) {
    INFO(to_string(ctx.device()));
    Weight w(ctx, kOut, WeightFormat::e4m3_tile);
    Layer anew(ctx, kOut, e4m3), kept(ctx, kOut, e4m3, true);
    const auto dx_of = [&](Layer& layer) {
      layer.run(w.view());
      return download_bytes(ctx, layer.dx.view());
    };
    const auto first = dx_of(anew);
    CHECK(first_difference(dx_of(kept), first) == "");
    w.model.step(0.1f);
    const auto second = dx_of(anew);
    CHECK(first_difference(second, first) != "");
    CHECK(first_difference(dx_of(kept), first) == "");
    kept.linear.weight_changed();
    CHECK(first_difference(dx_of(kept), second) == "");
  }
}

TEST_CASE("a weight in tiles that does not fit is refused by name") {
  constexpr std::int64_t kOut = 48;
  const Context ctx = Context::cpu();
  Weight w(ctx, kOut, WeightFormat::e4m3_tile_and_transpose);
  Layer layer(ctx, kOut, e4m3);
  const auto error_with = [&](auto change) {
    LinearForward forward{.block_weight = w.view()};
    LinearBackward backward{.block_weight = w.view(), .block_weight_transposed = w.transposed()};
    change(forward, backward);
    return error_of([&] { layer.run(forward, backward); });
  };
  using F = LinearForward;
  using B = LinearBackward;
  CHECK(error_with([](F&, B&) {}) == "no error");
  const ScaledTensor codes(ctx, e4m3, w.shape);
  CHECK(missing(error_with([&](F& f, B&) { f.weight = codes.view(); }),
                {"the weight and block_weight", "both"}) == "");
  CHECK(missing(error_with([](F& f, B&) { f.block_weight = {}; }), {"the weight has shape []"}) ==
        "");
  CHECK(missing(error_with([](F& f, B&) {
                  f.block_weight.data.shape = {kIn, kOut};
                }),
                {"block_weight has shape [400, 48]", "[48, 400]"}) == "");
  CHECK(missing(error_with([](F& f, B&) { f.block_weight.data.dtype = DType::e5m2; }),
                {"block_weight is e5m2", "e4m3"}) == "");
  CHECK(missing(error_with([](F& f, B&) { f.block_weight.granularity = Granularity::row_block; }),
                {"block_weight has scales per row_block", "per tile"}) == "");
  CHECK(missing(error_with([](F& f, B&) { f.block_weight.scales = nullptr; }),
                {"block_weight has no scales"}) == "");
  CHECK(missing(error_with([](F& f, B&) {
                  f.block_weight.scales = static_cast<char*>(f.block_weight.scales) + 4;
                }),
                {"scales of block_weight", "16 bytes"}) == "");
  CHECK(missing(error_with([&](F&, B& b) { b.weight_transposed = w.transposed().data; }),
                {"weight_transposed", "one scale"}) == "");
  CHECK(missing(error_with([&](F&, B& b) {
                  b.block_weight = {};
                  b.weight = codes.view();
                }),
                {"block_weight_transposed is given, but no block_weight"}) == "");
  CHECK(missing(error_with([&](F&, B& b) { b.block_weight_transposed.data.shape = w.shape; }),
                {"block_weight_transposed has shape [48, 400]", "[400, 48]"}) == "");
  CHECK(missing(error_with([](F&, B& b) { b.block_weight_transposed.scales = nullptr; }),
                {"block_weight_transposed has no scales"}) == "");

  Weight odd(ctx, 24, WeightFormat::e4m3_tile_and_transpose);
  Layer odd_layer(ctx, 24, e4m3);
  CHECK(missing(error_of([&] { odd_layer.run(odd.view(), odd.transposed()); }),
                {"block_weight_transposed", "out_features is 24", "16"}) == "");
  // Other recipes and weights.
  GemmRegistry gemms(ctx);
  for (LinearConfig config : {LinearConfig{.recipe = Fp8Recipe::tensorwise},
                              LinearConfig{.recipe = Fp8Recipe::mxfp8}, LinearConfig{.fp8 = false},
                              LinearConfig{.recipe = Fp8Recipe::blockwise, .weight_dtype = f32}}) {
    config.in_features = kIn, config.out_features = kOut, config.max_tokens = kTokens;
    Linear linear(gemms, config);
    const Tensor x(ctx, f32, {kTokens, kIn});
    zero_bytes(ctx, x.view().data, x.bytes());
    CHECK(
        missing(error_of([&] { linear.forward({.x = x, .block_weight = w.view(), .y = layer.y}); }),
                {"block_weight is given", "blockwise", "e4m3"}) == "");
  }
}

}  // namespace octet::test
