// SPDX-License-Identifier: Apache-2.0
// The compute weight with a scale for every 128 of a row or every tile: bit for bit what
// block_quantize() makes of the decoded master.
#include "support/adamw_step.hpp"
#include "support/catch.hpp"
#include "support/errors.hpp"
#include "support/random.hpp"

namespace octet::test {
namespace {

using S = StateFormat;
constexpr WeightFormat kFormats[] = {WeightFormat::e4m3_row_block, WeightFormat::e4m3_tile,
                                     WeightFormat::e4m3_tile_and_transpose};

// Around a lane's elements, a block and a panel; more segments than one, more tiles than segments,
// primes, and tiles that the fast code takes with a short panel after them.
const Shape kShapes[] = {{1, 1},     {1, 15},     {15, 127},  {127, 128}, {128, 129},
                         {129, 130}, {128, 128},  {256, 384}, {300, 128}, {264, 256},
                         {2, 5743},  {131, 1031}, {640, 3}};

/// What the library's cast makes of the decoded master; a transposed copy without its padding.
struct Casts {
  Blocks rows, columns;
};
Casts cast_of(const Context& ctx, const Stored& master, const Shape& shape,
              Granularity granularity) {
  const std::vector<float> values(master.values.begin(), master.values.end());
  const Buffer in = upload(ctx, values);
  const Shape padded{shape[1], rounded_up(shape[0], 16)};
  const Tensor out(ctx, DType::e4m3, shape), turned(ctx, DType::e4m3, padded);
  const auto blocks = [&](const Tensor& tensor, const Buffer& scales) {
    return BlockScaledView{
        .data = tensor.view(), .granularity = granularity, .scales = scales.data()};
  };
  const auto bytes = [&](const Shape& of) {
    return static_cast<std::size_t>(scale_bytes(granularity, of[0], of[1]));
  };
  const Buffer scales(ctx, bytes(shape)), turned_scales(ctx, bytes(padded));
  const BlockScaledView rows = blocks(out, scales), columns = blocks(turned, turned_scales);
  block_quantize(ctx,
                 {.in = view_of(ctx, in, DType::f32, shape), .out = rows, .transposed = columns});
  Casts result{read_blocks(ctx, rows), read_blocks(ctx, columns)};
  Codes unpadded;
  for (std::int64_t row = 0; row < padded[0]; ++row) {
    const auto line = result.columns.codes.begin() + row * padded[1];
    unpadded.insert(unpadded.end(), line, line + shape[0]);
  }
  result.columns.codes = unpadded;
  return result;
}

/// Empty if the weight of parameter 0 is that cast.
std::string cast_difference(const AdamwModel& model, const Shape& shape) {
  const WeightFormat format = model.formats(0).weight;
  const Casts expected = cast_of(model.context(), model.master(0), shape, granularity_of(format));
  const Blocks rows = model.block_weight(0);
  std::string text = first_difference(rows.codes, expected.rows.codes) +
                     first_difference(rows.scales, expected.rows.scales);
  if (!is_transposed(format)) return text;
  const Blocks columns = model.block_weight_transposed(0);
  return text + first_difference(columns.codes, expected.columns.codes) +
         first_difference(columns.scales, expected.columns.scales);
}

/// Leaves no byte of the weight as it was, padding of the scales included.
void spoil_weight(AdamwModel& model) {
  const auto spoil = [&](const BlockScaledView& view) {
    const Shape& shape = view.data.shape;
    const auto bytes = static_cast<std::size_t>(scale_bytes(view.granularity, shape[0], shape[1]));
    write(model.context(), view.data.data, Codes(view.data.bytes(), 0xA5));
    write(model.context(), view.scales, Codes(bytes, 0xA5));
  };
  spoil(model.optimizer().block_weight(0));
  if (is_transposed(model.formats(0).weight)) spoil(model.optimizer().block_weight_transposed(0));
}

/// Blocks of very different size.
std::vector<float> uneven_values(const Shape& shape, std::uint32_t seed, float size) {
  std::vector<float> values = normal_values(static_cast<std::size_t>(shape.numel()), seed, size);
  for (std::size_t i = 0; i < values.size(); ++i) {
    const auto at = static_cast<std::int64_t>(i);
    const std::int64_t tile = at / shape[1] / 128 * 5 + at % shape[1] / 128 * 3;
    values[i] = std::ldexp(values[i], -5 * static_cast<int>(tile % 4));
  }
  return values;
}

}  // namespace

TEST_CASE("a weight in blocks is the cast of the stored master, for every size") {
  const StateFormats states[] = {{.master = S::f16, .m = S::e4m3, .v = S::f16},
                                 {.master = S::f32, .m = S::e4m3_block, .v = S::sqrt_e4m3_block},
                                 {.master = S::f16, .m = S::bf16, .v = S::sqrt_e4m3_block}};
  for (const Context& ctx : test_contexts()) {
    for (StateFormats formats : states) {
      for (WeightFormat weight : kFormats) {
        formats.weight = weight;
        for (const Shape& shape : kShapes) {
          INFO(describe(formats) << ", " << shape << " on " << to_string(ctx.device()));
          AdamwModel model(ctx, {.seed = 3}, {{shape, formats, DType::e4m3, 0.1f}});
          spoil_weight(model);
          model.initialise(0, uneven_values(shape, 7, 0.5f));
          REQUIRE(cast_difference(model, shape) == "");
          for (std::uint32_t t = 1; t <= 2; ++t) {
            model.set_gradient(0, uneven_values(shape, t, 0.1f));
            spoil_weight(model);
            model.step(1e-2f);
            REQUIRE(cast_difference(model, shape) == "");
            REQUIRE(block_weight_error(model, 0, weight, shape) == "");
            const Stored stored = model.weight(0);
            REQUIRE(static_cast<double>(stored.scale.amax) == amax_of(stored.values));
            REQUIRE(stored.scale.scale == 1.0f);
          }
          REQUIRE(model.scalars().step == 2);
        }
      }
    }
  }
}

TEST_CASE("a weight in blocks changes no state") {
  const Shape shape = {131, 1031};
  const auto g = uneven_values(shape, 2, 0.1f), values = uneven_values(shape, 1, 0.5f);
  for (const Context& ctx : test_contexts()) {
    for (S m : {S::f32, S::e4m3_block}) {
      std::vector<std::uint8_t> expected;
      for (WeightFormat weight : {WeightFormat::bf16, kFormats[0], kFormats[1], kFormats[2]}) {
        INFO(name_of(weight) << ", m " << name_of(m) << " on " << to_string(ctx.device()));
        AdamwModel model(ctx, {.seed = 3}, {{shape, {weight, S::f16, m, S::f16}}});
        model.initialise(0, values);
        model.set_gradient(0, g);
        for (int t = 0; t < 2; ++t) model.step(1e-2f, 1.0f);
        std::vector<std::uint8_t> states;
        AdamW& optimizer = model.optimizer();
        for (const StateView& view : {optimizer.master(0), optimizer.m(0), optimizer.v(0)}) {
          const auto part = download_state(ctx, view);
          states.insert(states.end(), part.begin(), part.end());
        }
        if (expected.empty()) expected = states;
        CHECK(first_difference(states, expected) == "");
      }
    }
  }
}

TEST_CASE("zeros, tiny blocks and blocks that are not finite are cast like any other") {
  const Shape shape = {256, 384};
  std::vector<float> values = normal_values(256 * 384, 5);
  for (std::size_t i = 0; i < values.size(); ++i) {
    const std::size_t row = i / 384, column = i % 384;
    if (row < 128 && column < 128) values[i] = 0.0f;
    if (row < 128 && column >= 128 && column < 256) values[i] *= 0x1p-130f;
    if (row >= 128 && column < 128) values[i] *= 0x1p-20f;
  }
  for (const Context& ctx : test_contexts()) {
    for (WeightFormat weight : kFormats) {
      for (S master : {S::f32, S::f16}) {
        const StateFormats formats = {weight, master, S::e4m3, S::f16};
        INFO(describe(formats) << " on " << to_string(ctx.device()));
        AdamwModel model(ctx, {.seed = 3}, {{shape, formats, DType::e4m3}});
        model.initialise(0, values);
        CHECK(cast_difference(model, shape) == "");
        model.set_gradient(0, std::vector<float>(values.size(), 0.0f));
        model.step(1e-3f);
        CHECK(model.scalars().step == 1);
        CHECK(cast_difference(model, shape) == "");
        const Blocks blocks = model.block_weight(0);
        const BlockKind kind{granularity_of(weight)};
        CHECK(scale_value(kind, &blocks.scales[0]) == 1.0);
        CHECK(blocks.codes[0] == 0);
        if (master != S::f32) continue;
        std::vector<float> spoilt = values;
        spoilt[5] = INFINITY;
        spoilt[130] = -NAN;
        spoilt[200 * 384 + 3] = -INFINITY;
        model.initialise(0, spoilt);
        CHECK(cast_difference(model, shape) == "");
        CHECK((model.block_weight(0).codes[130] & 0x7Fu) == 0x7Fu);
      }
    }
  }
}

TEST_CASE("a step that is skipped leaves a weight in blocks as it is") {
  const Shape shape = {129, 130};
  for (const Context& ctx : test_contexts()) {
    for (WeightFormat weight : kFormats) {
      INFO(name_of(weight) << " on " << to_string(ctx.device()));
      AdamwModel model(ctx, {.seed = 3}, {{shape, {weight, S::f16, S::e4m3, S::f16}}});
      model.initialise(0, uneven_values(shape, 1, 0.5f));
      model.set_gradient(0, uneven_values(shape, 2, 0.1f));
      const auto before = model.bytes(0);
      write_one(ctx, model.flag(), std::uint32_t{1});
      model.step(1e-2f);
      CHECK(model.scalars().skipped == 1);
      CHECK(first_difference(model.bytes(0), before) == "");
      model.step(1e-2f);
      CHECK(first_difference(model.bytes(0), before) != "");
    }
  }
}

TEST_CASE("what a weight in blocks cannot be is refused by name") {
  const Context ctx = Context::cpu();
  const auto error_with = [&](const Shape& shape, const StateFormats& formats) {
    return error_of([&] { AdamwModel(ctx, {}, {{shape, formats}}); });
  };
  for (WeightFormat weight : kFormats) {
    const std::string name(name_of(weight));
    CHECK(error_with({4, 6}, {.weight = weight}) == "no error");
    CHECK(missing(error_with({24}, {.weight = weight}), {"p0", name, "[24]", "matrix"}) == "");
    CHECK(missing(error_with({2, 3, 4}, {.weight = weight}), {name, "[2, 3, 4]", "matrix"}) == "");
    CHECK(missing(error_with({4, 6}, {.weight = weight, .master = S::split}), {"split", name}) ==
          "");
    // Its scales follow from its own values, so they need no bound on the update.
    const AdamWConfig unbounded{.beta1 = 0.9f, .beta2 = 0.5f};
    CHECK(error_of([&] {
            AdamwModel(ctx, unbounded, {{{4, 6}, {.weight = weight}}});
          }) == "no error");
  }
  const AdamwModel model(ctx, {}, {{{4, 6}, kO2}, {{4, 6}, {.weight = WeightFormat::e4m3_tile}}});
  CHECK(missing(error_of([&] { (void)model.block_weight(0); }), {"p0", "e4m3", "blocks"}) == "");
  CHECK(missing(error_of([&] { (void)model.block_weight_transposed(1); }),
                {"p1", "e4m3_tile", "transposed"}) == "");
}

}  // namespace octet::test
