// SPDX-License-Identifier: Apache-2.0
// Linear with scales from earlier steps, and with gradients of activations in E4M3.
#include <cmath>
#include <cstring>

#include "octet/nn/linear.hpp"
#include "support/catch.hpp"
#include "support/compare.hpp"
#include "support/devices.hpp"
#include "support/errors.hpp"
#include "support/random.hpp"
#include "support/reference.hpp"

namespace octet::test {
namespace {

constexpr std::int64_t kTokens = 50, kIn = 48, kOut = 32;

std::vector<float> values_of(std::int64_t rows, std::int64_t columns, std::uint32_t seed) {
  return normal_values(static_cast<std::size_t>(rows * columns), seed, 1.0f);
}

/// A Linear with a fixed weight, fed with FP32.
class Layer {
 public:
  Layer(const Context& ctx, Fp8Recipe recipe, Fp8Format format = Fp8Format::hybrid)
      : ctx_(ctx),
        gemms_(ctx),
        gradient_(gradient_dtype(format)),
        counters_(upload<CastCounters>(ctx, {{}})),
        linear_(gemms_, {.in_features = kIn,
                         .out_features = kOut,
                         .max_tokens = kTokens,
                         .recipe = recipe,
                         .format = format,
                         .counters = counters_.as<CastCounters>()}),
        weight_(ctx, DType::e4m3, {kOut, kIn}),
        y_(ctx, DType::f32, {kTokens, kOut}),
        dx_(ctx, DType::f32, {kTokens, kIn}),
        dw_(ctx, DType::f32, {kOut, kIn}) {
    const Buffer w = upload(ctx, values_of(kOut, kIn, 1));
    quantize(ctx, {.in = view_of(ctx, w, DType::f32, {kOut, kIn}), .out = weight_.view()});
    ctx.synchronize();
  }

  /// y, dx and dw of one pass, one after the other.
  template <class Between>
  std::vector<std::uint8_t> pass(std::uint32_t seed, float size, float gradient_size,
                                 const Between& between) {
    std::vector<float> x = values_of(kTokens, kIn, seed), dy = values_of(kTokens, kOut, seed + 1);
    for (float& value : x) value *= size;
    for (float& value : dy) value *= gradient_size;
    last_[0] = x, last_[1] = dy;
    const Buffer in = upload(ctx_, x), gradient = upload(ctx_, dy);
    linear_.forward(
        {.x = view_of(ctx_, in, DType::f32, {kTokens, kIn}), .weight = weight_.view(), .y = y_});
    between();
    std::vector<std::uint8_t> all = download_bytes(ctx_, y_.view());
    const auto part = run_backward(gradient);
    all.insert(all.end(), part.begin(), part.end());
    return all;
  }
  std::vector<std::uint8_t> pass(std::uint32_t seed, float size, float gradient_size = 1.0f) {
    return pass(seed, size, gradient_size, [] {});
  }
  /// dx and dw of a backward of its own, with the dy of pass().
  std::vector<std::uint8_t> backward(std::uint32_t seed, float size) {
    std::vector<float> dy = values_of(kTokens, kOut, seed + 1);
    for (float& value : dy) value *= size;
    return run_backward(upload(ctx_, dy));
  }
  /// A forward of its own.
  std::vector<std::uint8_t> forward(std::uint32_t seed, float size, bool record, bool save) {
    std::vector<float> x = values_of(kTokens, kIn, seed);
    for (float& value : x) value *= size;
    const Buffer in = upload(ctx_, x);
    linear_.forward({.x = view_of(ctx_, in, DType::f32, {kTokens, kIn}),
                     .weight = weight_.view(),
                     .y = y_,
                     .record_amax = record,
                     .save_for_backward = save});
    return download_bytes(ctx_, y_.view());
  }
  /// Of x (0) or dy (1), as delayed scaling has it.
  TensorScale scale(std::size_t i) const {
    return download_one<TensorScale>(ctx_, linear_.delayed_entries()[i].scale);
  }
  /// What current scaling makes of the last x (0) or dy (1).
  TensorScale own_scale(std::size_t i) const {
    double amax = 0;
    for (float value : last_[i]) amax = std::max(amax, std::abs(static_cast<double>(value)));
    const double max = table_of(i == 1 ? gradient_ : DType::e4m3).max();
    return {.scale = static_cast<float>(reference_scale(amax, max)),
            .amax = static_cast<float>(amax)};
  }
  Linear& linear() { return linear_; }
  CastCounters counters() const { return download_one<CastCounters>(ctx_, counters_.data()); }

 private:
  std::vector<std::uint8_t> run_backward(const Buffer& gradient) {
    linear_.backward({.dy = view_of(ctx_, gradient, DType::f32, {kTokens, kOut}),
                      .weight = weight_.view(),
                      .dx = dx_,
                      .dw = {dw_.view(), nullptr}});
    std::vector<std::uint8_t> all = download_bytes(ctx_, dx_.view());
    const auto part = download_bytes(ctx_, dw_.view());
    all.insert(all.end(), part.begin(), part.end());
    return all;
  }

  Context ctx_;
  GemmRegistry gemms_;
  DType gradient_;
  std::vector<float> last_[2];
  Buffer counters_;
  Linear linear_;
  ScaledTensor weight_;
  Tensor y_, dx_, dw_;
};

}  // namespace

TEST_CASE("with delayed scaling the first pass measures and later ones take the scales they find") {
  for (const Context& ctx : test_contexts()) {
    for (Fp8Format format : {Fp8Format::hybrid, Fp8Format::e4m3}) {
      // Of activations (0) and of their gradients (1).
      for (std::size_t which : {0u, 1u}) {
        INFO(name_of(format) << ", " << which << " on " << to_string(ctx.device()));
        Layer current(ctx, Fp8Recipe::tensorwise, format), delayed(ctx, Fp8Recipe::delayed, format);
        DelayedScaling scaling(ctx, {.amax_history_len = 4}, delayed.linear().delayed_entries());
        const auto pass = [which](Layer& layer, float size) {
          return which == 0 ? layer.pass(10, size) : layer.pass(10, 1.0f, size);
        };
        CHECK(first_difference(pass(delayed, 1.0f), pass(current, 1.0f)) == "");
        scaling.update();
        // The same values have the scale that current scaling gives them.
        CHECK(first_difference(pass(delayed, 1.0f), pass(current, 1.0f)) == "");
        CHECK(delayed.counters().saturated == 0);
        const TensorScale before = delayed.scale(which);
        // Sixteen times as large: saturated, with the scale of before; measured for the next step.
        CHECK(first_difference(pass(delayed, 16.0f), pass(current, 16.0f)) != "");
        CHECK(delayed.counters().saturated > 100);
        CHECK(delayed.scale(which).scale == before.scale);
        CHECK(delayed.scale(which).amax == current.own_scale(which).amax);
        scaling.update();
        CHECK(delayed.scale(which).scale == current.own_scale(which).scale);
        const auto saturated = delayed.counters().saturated;
        CHECK(first_difference(pass(delayed, 16.0f), pass(current, 16.0f)) == "");
        CHECK(delayed.counters().saturated == saturated);
        // The largest stays in the history for four steps.
        for (int t = 0; t < 3; ++t) {
          scaling.update();
          pass(delayed, 0.25f);
          CHECK(delayed.scale(which).scale == current.own_scale(which).scale);
        }
        scaling.update();
        pass(delayed, 0.25f);
        scaling.update();
        pass(current, 0.25f);
        CHECK(delayed.scale(which).scale == current.own_scale(which).scale);
      }
    }
  }
}

TEST_CASE("the micro-batches of a step have one scale and are one entry of the history") {
  for (const Context& ctx : test_contexts()) {
    Layer layer(ctx, Fp8Recipe::delayed);
    const DelayedScalingConfig two{.amax_history_len = 2};
    DelayedScaling scaling(ctx, two, layer.linear().delayed_entries());
    layer.pass(10, 1.0f);
    scaling.update();
    const TensorScale small[] = {layer.scale(0), layer.scale(1)};
    // The largest in the middle, neither first nor last.
    TensorScale large[2];
    for (float size : {2.0f, 32.0f, 0.5f, 4.0f}) {
      layer.pass(10, size, size);
      for (std::size_t i : {0u, 1u}) {
        if (size == 32.0f) large[i] = layer.own_scale(i);
        CHECK(layer.scale(i).scale == small[i].scale);
      }
    }
    for (std::size_t i : {0u, 1u}) CHECK(layer.scale(i).amax == large[i].amax);
    scaling.update();
    for (std::size_t i : {0u, 1u}) CHECK(layer.scale(i).scale == large[i].scale);
    // One step later it is still there; it leaves with the second, not with a micro-batch.
    for (float expected_of : {32.0f, 1.0f}) {
      for (int micro = 0; micro < 3; ++micro) layer.pass(10, 1.0f);
      scaling.update();
      for (std::size_t i : {0u, 1u}) {
        CHECK(layer.scale(i).scale == (expected_of == 32.0f ? large : small)[i].scale);
      }
    }
  }
}

TEST_CASE("an update between a forward and its backward does not reach the saved activation") {
  for (const Context& ctx : test_contexts()) {
    Layer plain(ctx, Fp8Recipe::delayed), updated(ctx, Fp8Recipe::delayed);
    // Two entries with scales of x alone, so that those of dy are the same in both.
    const auto x_only = [](Layer& layer) {
      return std::vector<DelayedScaling::Entry>{layer.linear().delayed_entries()[0]};
    };
    DelayedScaling first(ctx, {.amax_history_len = 1}, x_only(plain));
    DelayedScaling second(ctx, {.amax_history_len = 1}, x_only(updated));
    plain.pass(10, 1.0f);
    updated.pass(10, 1.0f);
    const auto expected = plain.pass(10, 16.0f);
    const auto bytes = updated.pass(10, 16.0f, 1.0f, [&] { second.update(); });
    CHECK(updated.scale(0).scale < plain.scale(0).scale);
    CHECK(first_difference(bytes, expected) == "");
    first.update();
    CHECK(first_difference(updated.pass(10, 16.0f), plain.pass(10, 16.0f)) == "");
  }
}

TEST_CASE("after a first cast of zeros the scale is 1 until a step has recorded another") {
  for (const Context& ctx : test_contexts()) {
    Layer layer(ctx, Fp8Recipe::delayed);
    DelayedScaling scaling(ctx, {.amax_history_len = 4}, layer.linear().delayed_entries());
    layer.pass(10, 0.0f, 0.0f);
    scaling.update();
    layer.pass(10, 1.0f, 0x1p-30f);
    CHECK(layer.scale(1).scale == 1.0f);
    CHECK(layer.counters().flushed > 0);
    scaling.update();
    CHECK(layer.scale(0).scale > 1.0f);
    CHECK(layer.scale(1).scale > 0x1p30f);
  }
}

TEST_CASE("scales that were set are kept") {
  for (const Context& ctx : test_contexts()) {
    Layer first(ctx, Fp8Recipe::delayed), resumed(ctx, Fp8Recipe::delayed);
    first.pass(10, 16.0f);
    const auto from = first.linear().delayed_entries(), to = resumed.linear().delayed_entries();
    for (std::size_t i = 0; i < 2; ++i) {
      write_one(ctx, to[i].scale, download_one<TensorScale>(ctx, from[i].scale));
    }
    resumed.linear().keep_scales();
    CHECK(first_difference(resumed.pass(20, 1.0f), first.pass(20, 1.0f)) == "");
    CHECK(resumed.scale(0).scale == first.scale(0).scale);
    Layer measured(ctx, Fp8Recipe::tensorwise);
    measured.pass(20, 1.0f);
    CHECK(measured.own_scale(0).scale != first.scale(0).scale);
    CHECK(missing(error_of([&] { measured.linear().keep_scales(); }), {"keep_scales", "delayed"}) ==
          "");
  }
}

TEST_CASE("gradients of activations in E4M3 are nearer to the exact product than in E5M2") {
  for (const Context& ctx : test_contexts()) {
    double error[2] = {};
    for (Fp8Format format : {Fp8Format::e4m3, Fp8Format::hybrid}) {
      Layer layer(ctx, Fp8Recipe::tensorwise, format);
      const auto bytes = layer.pass(20, 1.0f);
      std::vector<float> dx(static_cast<std::size_t>(kTokens * kIn));
      std::memcpy(dx.data(), bytes.data() + kTokens * kOut * 4, dx.size() * sizeof(float));
      const std::vector<float> w = values_of(kOut, kIn, 1), dy = values_of(kTokens, kOut, 21);
      double& sum = error[format == Fp8Format::hybrid ? 1 : 0];
      for (std::size_t t = 0; t < kTokens; ++t) {
        for (std::size_t k = 0; k < kIn; ++k) {
          double exact = 0;
          for (std::size_t n = 0; n < kOut; ++n) {
            exact += static_cast<double>(dy[t * kOut + n]) * static_cast<double>(w[n * kIn + k]);
          }
          const double off = static_cast<double>(dx[t * kIn + k]) - exact;
          sum += off * off;
        }
      }
    }
    CHECK(error[0] < 0.8 * error[1]);
    CHECK(error[0] > 0);
  }
}

TEST_CASE("a forward that is not recorded leaves no trace in delayed scaling") {
  for (const Context& ctx : test_contexts()) {
    Layer plain(ctx, Fp8Recipe::delayed), validated(ctx, Fp8Recipe::delayed);
    DelayedScaling first(ctx, {.amax_history_len = 2}, plain.linear().delayed_entries());
    DelayedScaling second(ctx, {.amax_history_len = 2}, validated.linear().delayed_entries());
    // Before any recorded cast it measures for itself, and the next one still measures.
    Layer measured(ctx, Fp8Recipe::tensorwise);
    CHECK(first_difference(validated.forward(30, 8.0f, false, false),
                           measured.forward(30, 8.0f, true, true)) == "");
    for (int step = 0; step < 3; ++step) {
      const float size = step == 1 ? 4.0f : 1.0f;
      const auto validate = [&] {
        validated.forward(30, 64.0f, false, false);  // far beyond what the scale is for
      };
      const auto expected = plain.pass(10, size);
      // Neither between the steps nor between a forward and its backward. (y is overwritten.)
      const auto y = validated.forward(10, size, true, true);
      CHECK(std::equal(y.begin(), y.end(), expected.begin()));
      const auto bytes = validated.pass(10, size, 1.0f, validate);
      CHECK(std::equal(bytes.begin() + kTokens * kOut * 4, bytes.end(),
                       expected.begin() + kTokens * kOut * 4));
      validate();
      CHECK(validated.scale(0).amax == plain.scale(0).amax);
      first.update(), second.update();
      CHECK(validated.scale(0).scale == plain.scale(0).scale);
    }
    // With the scale of the steps, not with its own.
    CHECK(first_difference(validated.forward(30, 64.0f, false, false),
                           measured.forward(30, 64.0f, true, true)) != "");
    // One that is saved but not recorded: a recomputed activation.
    const auto expected = plain.pass(10, 1.0f);
    validated.forward(10, 1.0f, true, false);
    const float amax = validated.scale(0).amax;
    validated.forward(10, 1.0f, false, true);
    CHECK(validated.scale(0).amax == amax);
    CHECK(first_difference(validated.backward(10, 1.0f),
                           {expected.begin() + kTokens * kOut * 4, expected.end()}) == "");
  }
}

TEST_CASE("what BF16 GEMMs do not take is refused") {
  GemmRegistry gemms(Context::cpu());
  CastCounters counters;
  const auto error_with = [&](auto change) {
    LinearConfig config{.in_features = kIn, .out_features = kOut, .max_tokens = 1};
    change(config);
    return error_of([&] { Linear(gemms, config); });
  };
  CHECK(error_with([](LinearConfig&) {}) == "no error");
  CHECK(missing(error_with([](LinearConfig& c) { c.recipe = static_cast<Fp8Recipe>(9); }),
                {"recipe is 9", "delayed", "mxfp8"}) == "");
  CHECK(missing(error_with([](LinearConfig& c) { c.format = static_cast<Fp8Format>(9); }),
                {"format is 9", "hybrid", "e4m3"}) == "");
  const auto with_bf16 = [&](auto change) {
    return error_with([&](LinearConfig& c) {
      c.fp8 = false;
      change(c);
    });
  };
  CHECK(with_bf16([](LinearConfig&) {}) == "no error");
  const std::initializer_list<std::string> words = {
      "fp8 is false", "recipe, format, forward_accumulation and counters"};
  CHECK(missing(with_bf16([](LinearConfig& c) { c.recipe = Fp8Recipe::delayed; }), words) == "");
  CHECK(missing(with_bf16([](LinearConfig& c) { c.format = Fp8Format::hybrid; }), words) == "");
  CHECK(missing(with_bf16([&](LinearConfig& c) { c.counters = &counters; }), words) == "");
  CHECK(missing(with_bf16([](LinearConfig& c) { c.forward_accumulation = Accumulation::fast; }),
                words) == "");
  CHECK(missing(error_with([](LinearConfig& c) { c.forward_accumulation = Accumulation::exact; }),
                {"forward_accumulation is 2", "promoted or fast"}) == "");
}

}  // namespace octet::test
