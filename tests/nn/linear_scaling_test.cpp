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
        linear_(gemms_, {.in_features = kIn,
                         .out_features = kOut,
                         .max_tokens = kTokens,
                         .gradient_dtype = gradient,
                         .scaling = scaling}),
        weight_(ctx, DType::e4m3, {kOut, kIn}),
        y_(ctx, DType::f32, {kTokens, kOut}),
        dx_(ctx, DType::f32, {kTokens, kIn}),
        dw_(ctx, DType::f32, {kOut, kIn}) {
    const Buffer w = upload(ctx, values_of(kOut, kIn, 1));
    quantize(ctx, {.in = view_of(ctx, w, DType::f32, {kOut, kIn}), .out = weight_.view()});
    ctx.synchronize();
  }

  /// y, dx and dw of one pass, one after the other.
  std::vector<std::uint8_t> pass(std::uint32_t seed, float size) {
    std::vector<float> x = values_of(kTokens, kIn, seed), dy = values_of(kTokens, kOut, seed + 1);
    for (float& value : x) value *= size;
    const Buffer in = upload(ctx_, x), gradient = upload(ctx_, dy);
    linear_.forward(view_of(ctx_, in, DType::f32, {kTokens, kIn}), weight_.view(), y_);
    linear_.backward(view_of(ctx_, gradient, DType::f32, {kTokens, kOut}), weight_.view(), dx_,
                     dw_);
    std::vector<std::uint8_t> all;
    for (const Tensor* tensor : {&y_, &dx_, &dw_}) {
      const auto part = download_bytes(ctx_, tensor->view());
      all.insert(all.end(), part.begin(), part.end());
    }
    return all;
  }
  TensorScale scale(int i) const {
    return download_one<TensorScale>(ctx_,
                                     linear_.delayed_entries()[static_cast<std::size_t>(i)].scale);
  }
  const Linear& linear() const { return linear_; }

 private:
  Context ctx_;
  GemmRegistry gemms_;
  Linear linear_;
  ScaledTensor weight_;
  Tensor y_, dx_, dw_;
};

}  // namespace

TEST_CASE("with delayed scaling the first pass measures and later ones take the scales they find") {
  for (const Context& ctx : test_contexts()) {
    for (DType gradient : {DType::e5m2, DType::e4m3}) {
      INFO(name_of(gradient) << " on " << to_string(ctx.device()));
      Layer current(ctx, Scaling::current, gradient), delayed(ctx, Scaling::given, gradient);
      DelayedScaling scaling(ctx, {.amax_history_len = 4}, delayed.linear().delayed_entries());
      CHECK(first_difference(delayed.pass(10, 1.0f), current.pass(10, 1.0f)) == "");
      scaling.update();
      // The same values have the scale that current scaling gives them.
      CHECK(first_difference(delayed.pass(10, 1.0f), current.pass(10, 1.0f)) == "");
      const TensorScale before = delayed.scale(0);
      // Sixteen times as large: saturated, with the scale of before; measured for the next step.
      CHECK(first_difference(delayed.pass(10, 16.0f), current.pass(10, 16.0f)) != "");
      CHECK(delayed.scale(0).scale == before.scale);
      CHECK(delayed.scale(0).amax == current.scale(0).amax);
      scaling.update();
      CHECK(delayed.scale(0).scale == current.scale(0).scale);
      CHECK(first_difference(delayed.pass(10, 16.0f), current.pass(10, 16.0f)) == "");
      // The largest stays in the history for four steps.
      for (int t = 0; t < 3; ++t) {
        scaling.update();
        delayed.pass(10, 0.25f);
        CHECK(delayed.scale(0).scale == current.scale(0).scale);
      }
      scaling.update();
      delayed.pass(10, 0.25f);
      scaling.update();
      current.pass(10, 0.25f);
      CHECK(delayed.scale(0).scale == current.scale(0).scale);
      CHECK(delayed.scale(1).scale == current.scale(1).scale);
    }
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

TEST_CASE("a format of gradients that FP8 GEMMs do not have is refused") {
  GemmRegistry gemms(Context::cpu());
  CHECK(missing(error_of([&] {
                  Linear(gemms, {.in_features = kIn,
                                 .out_features = kOut,
                                 .max_tokens = 1,
                                 .gradient_dtype = DType::bf16});
                }),
                {"gradient_dtype", "bf16", "e5m2"}) == "");
}

}  // namespace octet::test
