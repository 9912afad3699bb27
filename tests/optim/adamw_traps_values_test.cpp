// SPDX-License-Identifier: Apache-2.0
// The known traps of values and sizes, 9 to 12: zeros, tiny and huge amaxes, NaN, overflow.
#include "octet/ops/quantize.hpp"
#include "support/adamw_model.hpp"
#include "support/adamw_step.hpp"
#include "support/catch.hpp"
#include "support/compare.hpp"
#include "support/random.hpp"

namespace octet::test {
namespace {

using S = StateFormat;
const StateFormats kBf16O2 = {WeightFormat::e4m3, S::f16, S::bf16, S::bf16};
// Two segments and a bit; rows that are no whole number of vectors.
const Shape kShape = {129, 255};
constexpr std::size_t kCount = 129 * 255;

std::string describe(const Context& ctx, const StateFormats& f) {
  return to_string(ctx.device()) + ", " + test::describe(f);
}

/// One checked step; the first violation.
std::string stepped(AdamwModel& model, const StateFormats& formats, const Shape& shape,
                    const AdamwReference& reference, const std::vector<float>& gradient,
                    std::int64_t t) {
  const Doubles g = model.set_gradient(0, gradient);
  const StepChecker checker(model, 0, formats, shape, g);
  model.step(static_cast<float>(reference.lr));
  return model.scalars().step == t ? checker.check(reference, t) : "skipped";
}

/// Whether all scales are powers of two within 2^+-126 with their exact inverse.
bool scales_are_sound(const AdamwModel& model) {
  for (const TensorScale& s : model.scales()) {
    if (!(s.scale >= 0x1p-126f && s.scale <= 0x1p126f)) return false;
    if (s.scale * s.scale_inv != 1.0f || std::ilogb(s.scale) != -std::ilogb(s.scale_inv)) {
      return false;
    }
    if (!std::isfinite(s.amax)) return false;
  }
  return true;
}

/// Overwrites element i of the gradient of parameter 0 with a code.
void poison(const AdamwModel& model, DType gradient, std::size_t i, std::uint32_t code) {
  auto* data = static_cast<std::uint8_t*>(model.gradient_view(0).data.data);
  data += i * size_of(gradient);
  if (gradient == DType::e4m3) {
    write_one(model.context(), data, static_cast<std::uint8_t>(code));
  } else if (gradient == DType::bf16) {
    write_one(model.context(), data, static_cast<std::uint16_t>(code));
  } else {
    write_one(model.context(), data, code);
  }
}

/// NaN of either sign, and infinity of either sign where there is one.
std::vector<std::uint32_t> bad_codes(DType gradient) {
  if (gradient == DType::e4m3) return {0x7F, 0xFF};
  if (gradient == DType::bf16) return {0x7FC0, 0xFF81, 0x7F80, 0xFF80};
  return {0x7FC00000, 0xFF800001, 0x7F800000, 0xFF800000};
}

std::vector<GradientAmax> unknown_for(DType gradient) {
  if (gradient == DType::e4m3) return {GradientAmax::measured};
  return {GradientAmax::measured, GradientAmax::no_scale};
}

}  // namespace

TEST_CASE("trap 9: zero tensors, zero blocks and blocks of equal values of every size") {
  for (const Context& ctx : test_contexts()) {
    for (const StateFormats& formats : {kO2, kBf16O2, kSmall, kBlocksAlone}) {
      for (std::size_t count : {1u, 2u, 127u, 128u, 129u, 257u, 385u}) {
        const AdamWConfig config{.seed = 2};
        const AdamwReference reference(config, 1e-3f, 0.0f);
        const Shape shape{static_cast<std::int64_t>(count)};
        INFO(describe(ctx, formats) << ", " << count << " elements");
        AdamwModel model(ctx, config, {{shape, formats, DType::e4m3}});
        // Nothing at all, then zero gradients for a weight, then one block of equal values.
        model.initialise(0, std::vector<float>(count, 0.0f));
        CHECK(stepped(model, formats, shape, reference, std::vector<float>(count, 0.0f), 1) == "");
        for (const Stored& state : {model.master(0), model.m(0), model.v(0)}) {
          CHECK(amax_of(state.values) == 0);
          for (float inv : state.blocks) CHECK(inv == 0x1p-126f);
        }
        CHECK(model.m(0).scale.scale == 1.0f);
        CHECK(model.v(0).scale.scale == 1.0f);
        model.initialise(0, normal_values(count, 3));
        const Doubles before = model.master(0).values;
        CHECK(stepped(model, formats, shape, reference, std::vector<float>(count, 0.0f), 2) == "");
        CHECK(first_difference(model.master(0).values, before) == "");
        std::vector<float> g(count, 0.0f);
        for (std::size_t i = count > 128 ? 128 : 0; i < count && i < 256; ++i) g[i] = 0.5f;
        CHECK(stepped(model, formats, shape, reference, g, 3) == "");
        const Stored m = model.m(0), v = model.v(0);
        for (std::size_t i = 0; i < count; ++i) {
          REQUIRE((m.codes[i] == 0) == (g[i] == 0.0f));
          REQUIRE((v.codes[i] == 0) == (g[i] == 0.0f));
          // Equal values and one scale: the top code of a block, or the one below it.
          if (g[i] != 0.0f && is_block(formats.m)) REQUIRE((m.codes[i] & 0x7F) >= 0x7D);
          if (g[i] != 0.0f && is_block(formats.v)) REQUIRE(v.codes[i] >= 0x7D);
        }
        CHECK(stepped(model, formats, shape, reference, normal_values(count, 4), 4) == "");
        CHECK(scales_are_sound(model));
      }
    }
  }
}

TEST_CASE("trap 9: empty tensors and empty shards are stepped over") {
  for (const Context& ctx : test_contexts()) {
    for (const StateFormats& formats : {kPlain, kO2, kSmall}) {
      INFO(describe(ctx, formats));
      AdamwModel model(ctx, {},
                       {{.shape = {300}, .formats = formats, .pieces = std::vector<Piece>()},
                        {.shape = {0}, .formats = formats},
                        {.shape = {5}, .formats = formats}});
      AdamwModel alone(ctx, {}, {{.shape = {5}, .formats = formats}});
      const auto before = [&] {
        model.initialise(0, normal_values(300, 1));
        model.set_gradient(0, normal_values(300, 2));
        return download_bytes(ctx, model.weight_view(0));
      }();
      for (AdamwModel* each : {&model, &alone}) {
        const int p = each == &model ? 2 : 0;
        each->initialise(p, normal_values(5, 3));
        each->set_gradient(p, normal_values(5, 4));
      }
      for (int t = 0; t < 3; ++t) {
        model.step(1e-3f, 100.0f);
        alone.step(1e-3f, 100.0f);
      }
      CHECK(model.scalars().step == 3);
      CHECK(first_difference(download_bytes(ctx, model.weight_view(0)), before) == "");
      CHECK(model.m(0).codes.empty());
      CHECK(model.v(1).codes.empty());
      // Of the random words only the index before it differs: 300 elements.
      if (formats == kPlain) CHECK(first_difference(model.bytes(2), alone.bytes(0)) == "");
      CHECK(scales_are_sound(model));
    }
  }
}

TEST_CASE("trap 9: pointers to the middle of a buffer give the bits of aligned ones") {
  constexpr std::int64_t kElements = 1037;
  for (const Context& ctx : test_contexts()) {
    for (const StateFormats& formats : {kO2, kSmall}) {
      const auto bytes_at = [&](std::int64_t offset) {
        const auto bytes = static_cast<std::size_t>(kElements + offset);
        const Buffer weight(ctx, bytes), gradient(ctx, bytes);
        const Encoded g = encode_values(DType::e4m3, normal_values(kElements, 5));
        const Buffer scale = upload<TensorScale>(ctx, {g.scale});
        AdamWParam param;
        param.shape = {kElements};
        param.formats = formats;
        param.weight = {weight.as<std::uint8_t>() + offset, DType::e4m3, param.shape, ctx.device()};
        param.gradient = param.weight;
        param.gradient.data = gradient.as<std::uint8_t>() + offset;
        param.gradient_scale = scale.as<TensorScale>();
        write(ctx, param.gradient.data, g.bytes);
        AdamW optimizer(ctx, {.seed = 1}, {param});
        const Buffer values = upload(ctx, normal_values(kElements, 6));
        optimizer.initialise(0, view_of(ctx, values, DType::f32, param.shape));
        for (int t = 0; t < 3; ++t) {
          optimizer.measure();
          optimizer.step({.lr = 1e-3f, .max_norm = 1.0f});
        }
        std::vector<std::uint8_t> all = download_bytes(ctx, param.weight);
        for (const StateView& view : {optimizer.master(0), optimizer.m(0), optimizer.v(0)}) {
          const auto part = download_state(ctx, view);
          all.insert(all.end(), part.begin(), part.end());
        }
        return all;
      };
      const auto aligned = bytes_at(0);
      for (std::int64_t offset : {1, 2, 3, 4, 7, 8, 15}) {
        INFO(describe(ctx, formats) << ", offset " << offset);
        CHECK(first_difference(bytes_at(offset), aligned) == "");
      }
    }
  }
}

TEST_CASE("trap 10: scales of the tiniest and of huge amaxes are finite, with exact inverses") {
  constexpr std::size_t kElements = 300;
  const float sizes[] = {1e-45f, 1e-42f, 0x1p-126f, 448 * 0x1p-128f, 448 * 0x1p-126f, 1e-30f,
                         1e-19f, 1e9f,   1e18f};
  for (const Context& ctx : test_contexts()) {
    for (const StateFormats& formats : {kPlain, kO2, kBf16O2, kSmall}) {
      for (DType gradient : kGradientFormats) {
        for (float size : sizes) {
          const AdamWConfig config{.seed = 4};
          const AdamwReference reference(config, 1e-3f, 0.0f);
          AdamwModel model(ctx, config, {{{kElements}, formats, gradient}});
          std::vector<float> values(kElements, 0.0f);
          for (std::size_t i = 0; i < kElements; ++i) values[i] = i % 3 == 0 ? -size : size / 4;
          model.initialise(0, values);
          INFO(describe(ctx, formats) << ", gradient " << name_of(gradient) << ", amax " << size);
          CHECK(scales_are_sound(model));
          for (std::int64_t t = 1; t <= 4; ++t) {
            if (size > 1e-18f) {
              REQUIRE(stepped(model, formats, {kElements}, reference, values, t) == "");
            } else {  // FP32 loses digits of v, or v, or the gradient itself
              const Doubles before = model.master(0).values;
              model.set_gradient(0, values);
              model.step(1e-3f);
              const Stored w = model.master(0);
              int wrong = 0;
              for (std::size_t i = 0; i < kElements; ++i) {
                const double step = before[i] - w.values[i], sign = values[i] > 0 ? 1 : -1;
                const double largest = 1e-3 * reference.bound(t) * (1 + 1e-6) + w.gap(i, 4e-3);
                wrong += !(std::abs(step) <= largest) || step * sign < 0;
              }
              REQUIRE(wrong == 0);
              REQUIRE(model.scalars().step == t);
            }
            REQUIRE(scales_are_sound(model));
          }
          for (const Stored& state : {model.m(0), model.v(0)}) {
            for (float inv : state.blocks) REQUIRE((inv >= 0x1p-126f && std::isfinite(inv)));
          }
        }
      }
    }
  }
}

TEST_CASE("trap 11: a NaN or an infinity anywhere is flagged and skips the step") {
  for (const Context& ctx : test_contexts()) {
    for (DType gradient : kGradientFormats) {
      std::vector<GradientAmax> modes = unknown_for(gradient);
      modes.push_back(GradientAmax::given);  // an amax that looks fine
      for (GradientAmax amax : modes) {
        AdamwModel model(ctx, {},
                         {{.shape = kShape, .formats = kSmall, .gradient = gradient, .amax = amax},
                          {.shape = {9}, .formats = kPlain}});
        model.initialise(0, normal_values(kCount, 1));
        model.initialise(1, normal_values(9, 1));
        model.set_gradient(1, normal_values(9, 2));
        const std::vector<float> good = normal_values(kCount, 3);
        model.set_gradient(0, good);
        model.step(1e-3f);
        const auto before = model.all_bytes();
        std::int64_t skipped = 0;
        for (std::uint32_t code : bad_codes(gradient)) {
          for (std::size_t place : {std::size_t{0}, std::size_t{16400}, kCount - 1}) {
            model.set_gradient(0, good);
            poison(model, gradient, place, code);
            model.optimizer().measure(model.flag());
            INFO(to_string(ctx.device())
                 << ", " << name_of(gradient) << ", amax " << static_cast<int>(amax) << ", code "
                 << code << " at " << place);
            CHECK(download_one<std::uint32_t>(ctx, model.flag()) == 1);
            model.optimizer().step({.lr = 1e-3f, .nonfinite = model.flag()});
            CHECK(download_one<std::uint32_t>(ctx, model.flag()) == 0);
            CHECK(model.scalars().skipped == ++skipped);
            CHECK(first_difference(model.all_bytes(), before) == "");
          }
        }
        // Nothing is left behind: the next gradient is taken.
        model.set_gradient(0, good);
        model.optimizer().measure(model.flag());
        CHECK(download_one<std::uint32_t>(ctx, model.flag()) == 0);
        model.optimizer().step({.lr = 1e-3f, .nonfinite = model.flag()});
        CHECK(model.scalars().step == 2);
        CHECK(first_difference(model.all_bytes(), before) != "");
      }
    }
  }
}

TEST_CASE("trap 11: an amax that is not finite skips without a flag, and once only") {
  for (const Context& ctx : test_contexts()) {
    for (DType gradient : kGradientFormats) {
      for (GradientAmax amax : unknown_for(gradient)) {
        AdamwModel model(ctx, {},
                         {{.shape = {300}, .formats = kO2, .gradient = gradient, .amax = amax}});
        model.initialise(0, normal_values(300, 1));
        const auto before = model.all_bytes();
        std::int64_t skipped = 0;
        for (std::uint32_t code : bad_codes(gradient)) {
          model.set_gradient(0, normal_values(300, 2));
          poison(model, gradient, 299, code);
          model.optimizer().measure();
          model.optimizer().step({.lr = 1e-3f});
          CHECK(first_difference(model.all_bytes(), before) == "");
          CHECK(model.scalars().skipped == ++skipped);
        }
        // Not through set_gradient(), which would take the amax down itself.
        poison(model, gradient, 299, 0);
        model.optimizer().measure();
        model.optimizer().step({.lr = 1e-3f});
        INFO(to_string(ctx.device()) << ", " << name_of(gradient));
        CHECK(model.scalars().step == 1);
        CHECK(model.scalars().skipped == skipped);
      }
    }
  }
}

TEST_CASE("trap 11: the cast to e4m3 keeps NaN, and its flag and amax skip the step") {
  for (const Context& ctx : test_contexts()) {
    for (float bad : {NAN, -NAN, INFINITY, -INFINITY}) {
      AdamwModel model(ctx, {}, {{{300}, kO2, DType::e4m3}});
      model.initialise(0, normal_values(300, 1));
      const auto before = model.all_bytes();
      std::vector<float> g = normal_values(300, 2);
      g[150] = bad;  // larger numbers before and behind it: fmaxf would forget a NaN
      g[149] = g[151] = 1e9f;
      const Buffer in = upload(ctx, g);
      quantize(ctx, {.in = view_of(ctx, in, DType::f32, {300}),
                     .out = model.gradient_view(0),
                     .nonfinite = model.flag()});
      CHECK(download_one<std::uint32_t>(ctx, model.flag()) == 1);
      CHECK(!std::isfinite(download_one<TensorScale>(ctx, model.gradient_view(0).scale).amax));
      const auto codes = download_bytes(ctx, model.gradient_view(0).data);
      INFO(to_string(ctx.device()) << ", " << bad);
      CHECK((codes[150] & 0x7F) == (std::isnan(bad) ? 0x7F : 0x7E));
      model.optimizer().step({.lr = 1e-3f, .nonfinite = model.flag()});
      model.optimizer().step({.lr = 1e-3f});  // by the amax alone
      CHECK(model.scalars().skipped == 2);
      CHECK(first_difference(model.all_bytes(), before) == "");
    }
  }
}

TEST_CASE("trap 12: v does not overflow when the gradient jumps by 1e4") {
  constexpr std::size_t kElements = 700;
  const StateFormats f16_alone = {.v = S::f16};
  for (const Context& ctx : test_contexts()) {
    for (const StateFormats& formats : {f16_alone, kO2, kBf16O2, kSmall}) {
      for (bool stochastic : {true, false}) {
        const AdamWConfig config{.seed = 5, .stochastic_rounding = stochastic};
        const AdamwReference reference(config, 1e-3f, 0.0f);
        AdamwModel model(ctx, config, {{{kElements}, formats, DType::e4m3}});
        model.initialise(0, normal_values(kElements, 1, 0.02f));
        INFO(describe(ctx, formats) << ", stochastic " << stochastic);
        float size = 1e-12f;
        for (std::int64_t t = 1; t <= 28; ++t) {
          // Jumps up by 1e4, four times, and all the way down again.
          if (t % 4 == 0) size = t % 20 == 0 ? 1e-12f : size * 1e4f;
          const auto seed = static_cast<std::uint32_t>(t);
          REQUIRE(stepped(model, formats, {kElements}, reference,
                          normal_values(kElements, seed, size), t) == "");
          if (formats.v != S::f16) continue;
          for (std::uint32_t code : model.v(0).codes) REQUIRE(code <= 0x7BFF);
        }
      }
    }
  }
}

TEST_CASE("trap 12: a step whose g^2 overflows FP32 is skipped, not garbage") {
  for (const Context& ctx : test_contexts()) {
    for (const StateFormats& formats : {kPlain, kO0, kO2, kBf16O2, kSmall}) {
      for (DType gradient : kGradientFormats) {
        INFO(describe(ctx, formats) << ", gradient " << name_of(gradient));
        const AdamWConfig config{.seed = 3};
        const AdamwReference reference(config, 1e-3f, 0.0f);
        AdamwModel model(ctx, config, {{{100}, formats, gradient}});
        model.initialise(0, normal_values(100, 19));
        std::vector<float> g = normal_values(100, 20);
        REQUIRE(stepped(model, formats, {100}, reference, g, 1) == "");
        const auto before = model.all_bytes();
        for (float large : {2.5e19f, -1e30f, 3e38f}) {
          g[50] = large;
          model.set_gradient(0, g);
          model.step(1e-3f);
          model.step(1e-3f, 1.0f);
        }
        CHECK(first_difference(model.all_bytes(), before) == "");
        CHECK(model.scalars().step == 1);
        CHECK(model.scalars().skipped == 6);
        // Its square is the largest but a little that FP32 holds.
        g[50] = 1.5e19f;
        CHECK(stepped(model, formats, {100}, reference, g, 2) == "");
      }
    }
  }
}

}  // namespace octet::test
