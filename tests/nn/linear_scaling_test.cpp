// SPDX-License-Identifier: Apache-2.0
// Linear with scales from earlier steps, and with gradients of activations in E4M3.
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
  Layer(const Context& ctx, Scaling scaling, DType gradient)
      : ctx_(ctx),
        gemms_(ctx),
        counters_(upload<CastCounters>(ctx, {{}})),
        linear_(gemms_, {.in_features = kIn,
                         .out_features = kOut,
                         .max_tokens = kTokens,
                         .gradient_dtype = gradient,
                         .scaling = scaling,
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
    const Buffer in = upload(ctx_, x), gradient = upload(ctx_, dy);
    linear_.forward(view_of(ctx_, in, DType::f32, {kTokens, kIn}), weight_.view(), y_);
    between();
    linear_.backward(view_of(ctx_, gradient, DType::f32, {kTokens, kOut}), weight_.view(), dx_,
                     dw_);
    std::vector<std::uint8_t> all;
    for (const Tensor* tensor : {&y_, &dx_, &dw_}) {
      const auto part = download_bytes(ctx_, tensor->view());
      all.insert(all.end(), part.begin(), part.end());
    }
    return all;
  }
  std::vector<std::uint8_t> pass(std::uint32_t seed, float size, float gradient_size = 1.0f) {
    return pass(seed, size, gradient_size, [] {});
  }
  TensorScale scale(int i) const {
    return download_one<TensorScale>(ctx_,
                                     linear_.delayed_entries()[static_cast<std::size_t>(i)].scale);
  }
  Linear& linear() { return linear_; }
  CastCounters counters() const { return download_one<CastCounters>(ctx_, counters_.data()); }

 private:
  Context ctx_;
  GemmRegistry gemms_;
  Buffer counters_;
  Linear linear_;
  ScaledTensor weight_;
  Tensor y_, dx_, dw_;
};

}  // namespace

TEST_CASE("with delayed scaling the first pass measures and later ones take the scales they find") {
  for (const Context& ctx : test_contexts()) {
    for (DType gradient : {DType::e5m2, DType::e4m3}) {
      // Of activations (0) and of their gradients (1).
      for (int which : {0, 1}) {
        INFO(name_of(gradient) << ", " << which << " on " << to_string(ctx.device()));
        Layer current(ctx, Scaling::current, gradient), delayed(ctx, Scaling::given, gradient);
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
        CHECK(delayed.scale(which).amax == current.scale(which).amax);
        scaling.update();
        CHECK(delayed.scale(which).scale == current.scale(which).scale);
        const auto saturated = delayed.counters().saturated;
        CHECK(first_difference(pass(delayed, 16.0f), pass(current, 16.0f)) == "");
        CHECK(delayed.counters().saturated == saturated);
        // The largest stays in the history for four steps.
        for (int t = 0; t < 3; ++t) {
          scaling.update();
          pass(delayed, 0.25f);
          CHECK(delayed.scale(which).scale == current.scale(which).scale);
        }
        scaling.update();
        pass(delayed, 0.25f);
        scaling.update();
        pass(current, 0.25f);
        CHECK(delayed.scale(which).scale == current.scale(which).scale);
      }
    }
  }
}

TEST_CASE("an update between a forward and its backward does not reach the saved activation") {
  for (const Context& ctx : test_contexts()) {
    Layer plain(ctx, Scaling::given, DType::e5m2), updated(ctx, Scaling::given, DType::e5m2);
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
    Layer layer(ctx, Scaling::given, DType::e5m2);
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
    Layer first(ctx, Scaling::given, DType::e5m2), resumed(ctx, Scaling::given, DType::e5m2);
    first.pass(10, 16.0f);
    const auto from = first.linear().delayed_entries(), to = resumed.linear().delayed_entries();
    for (std::size_t i = 0; i < 2; ++i) {
      write_one(ctx, to[i].scale, download_one<TensorScale>(ctx, from[i].scale));
    }
    resumed.linear().keep_scales();
    CHECK(first_difference(resumed.pass(20, 1.0f), first.pass(20, 1.0f)) == "");
    CHECK(resumed.scale(0).scale == first.scale(0).scale);
    Layer measured(ctx, Scaling::current, DType::e5m2);
    measured.pass(20, 1.0f);
    CHECK(measured.scale(0).scale != first.scale(0).scale);
    CHECK(missing(error_of([&] { measured.linear().keep_scales(); }), {"keep_scales", "delayed"}) ==
          "");
  }
}

TEST_CASE("gradients of activations in E4M3 are nearer to the exact product than in E5M2") {
  for (const Context& ctx : test_contexts()) {
    double error[2] = {};
    for (DType gradient : {DType::e4m3, DType::e5m2}) {
      Layer layer(ctx, Scaling::current, gradient);
      const auto bytes = layer.pass(20, 1.0f);
      std::vector<float> dx(static_cast<std::size_t>(kTokens * kIn));
      std::memcpy(dx.data(), bytes.data() + kTokens * kOut * 4, dx.size() * sizeof(float));
      const std::vector<float> w = values_of(kOut, kIn, 1), dy = values_of(kTokens, kOut, 21);
      double& sum = error[gradient == DType::e5m2 ? 1 : 0];
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

TEST_CASE("what FP8 GEMMs do not have, and BF16 GEMMs do not take, is refused") {
  GemmRegistry gemms(Context::cpu());
  CastCounters counters;
  const auto error_with = [&](auto change) {
    LinearConfig config{.in_features = kIn, .out_features = kOut, .max_tokens = 1};
    change(config);
    return error_of([&] { Linear(gemms, config); });
  };
  CHECK(error_with([](LinearConfig&) {}) == "no error");
  CHECK(missing(error_with([](LinearConfig& c) { c.gradient_dtype = DType::bf16; }),
                {"gradient_dtype", "bf16", "e5m2"}) == "");
  const auto with_bf16 = [&](auto change) {
    return error_with([&](LinearConfig& c) {
      c.weight_dtype = DType::bf16;
      change(c);
    });
  };
  CHECK(with_bf16([](LinearConfig&) {}) == "no error");
  const std::initializer_list<std::string> words = {"weight_dtype is bf16", "FP8"};
  CHECK(missing(with_bf16([](LinearConfig& c) { c.scaling = Scaling::given; }), words) == "");
  CHECK(missing(with_bf16([](LinearConfig& c) { c.gradient_dtype = DType::e4m3; }), words) == "");
  CHECK(missing(with_bf16([&](LinearConfig& c) { c.counters = &counters; }), words) == "");
}

}  // namespace octet::test
