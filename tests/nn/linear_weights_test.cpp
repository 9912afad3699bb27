// SPDX-License-Identifier: Apache-2.0
// What a Linear keeps of a weight between micro-batches, and where it leaves the weight's gradient.
#include "nn/linear_model.hpp"
#include "support/catch.hpp"
#include "support/compare.hpp"

namespace octet::test {
namespace {

constexpr DType f32 = DType::f32, bf16 = DType::bf16, e4m3 = DType::e4m3;
constexpr std::int64_t kTokens = 40, kIn = 144, kOut = 48;
constexpr DType kWeights[] = {e4m3, f32, bf16, DType::f16};

/// A Linear over a weight in memory that the test may change behind its back.
struct Layer {
  Context ctx;
  GemmRegistry gemms;
  LinearConfig config;
  Linear linear;
  WeightInMemory w;
  Tensor y, dx, dw;

  Layer(const Context& context, LinearConfig c, double size = 0.1)
      : ctx(context),
        gemms(context),
        config(shaped(c)),
        linear(gemms, config),
        w(context, random_matrix(kOut, kIn, 3, size, f32), c.weight_dtype),
        y(context, f32, {kTokens, kOut}),
        dx(context, f32, {kTokens, kIn}),
        dw(context, f32, {kOut, kIn}) {}

  static LinearConfig shaped(LinearConfig c) {
    c.in_features = kIn, c.out_features = kOut, c.max_tokens = kTokens;
    return c;
  }

  /// y and dx of a micro-batch; its dw as `dw_view` says.
  std::vector<std::uint8_t> run(std::uint32_t seed, const TensorView& w_transposed = {}) {
    return run(seed, {dw.view(), nullptr}, false, w_transposed);
  }
  std::vector<std::uint8_t> run(std::uint32_t seed, const ScaledView& dw_view, bool accumulate,
                                const TensorView& w_transposed = {}) {
    const Buffer x = upload_as(ctx, x_of(seed), f32), dy = upload_as(ctx, dy_of(seed), f32);
    linear.forward({.x = view_of(ctx, x, f32, {kTokens, kIn}), .weight = w.view(), .y = y.view()});
    linear.backward({.dy = view_of(ctx, dy, f32, {kTokens, kOut}),
                     .weight = w.view(),
                     .weight_transposed = w_transposed,
                     .dx = dx,
                     .dw = dw_view,
                     .accumulate = accumulate});
    std::vector<std::uint8_t> all = download_bytes(ctx, y.view());
    const auto part = download_bytes(ctx, dx.view());
    all.insert(all.end(), part.begin(), part.end());
    return all;
  }
  static Matrix x_of(std::uint32_t seed) {
    return random_matrix(kTokens, kIn, 10 * seed, 1.0, f32);
  }
  static Matrix dy_of(std::uint32_t seed) {
    return random_matrix(kTokens, kOut, 10 * seed + 1, 0.01, f32);
  }

  /// The optimizer's turn: half the weight.
  void halve_weight() {
    const TensorView data = w.view().data;
    if (data.dtype == e4m3) {
      TensorScale scale = download_one<TensorScale>(ctx, w.view().scale);
      scale.scale *= 2, scale.scale_inv /= 2;
      return write_one(ctx, w.view().scale, scale);
    }
    Matrix values = w.values();
    for (double& value : values.values) value /= 2;
    const Buffer halves = upload_as(ctx, values, data.dtype);
    copy_bytes(ctx, data.data, halves.data(), data.bytes());
    ctx.synchronize();
  }
};

std::vector<LinearConfig> all_weights() {
  std::vector<LinearConfig> list;
  for (LinearConfig config : all_recipes()) {
    for (DType dtype : kWeights) {
      config.weight_dtype = dtype;
      list.push_back(config);
    }
  }
  return list;
}

}  // namespace

TEST_CASE("a kept weight is that of the first call until it is said to have changed") {
  for (const Context& ctx : test_contexts()) {
    for (LinearConfig config : all_weights()) {
      INFO(to_text(config) << ", " << name_of(config.weight_dtype) << " weight on "
                           << to_string(ctx.device()));
      // There is nothing to keep where the GEMM reads the caller's weight as it is.
      if (!config.fp8 && config.weight_dtype == bf16) continue;
      Layer anew(ctx, config);
      config.cache_weight = true;
      Layer kept(ctx, config);
      const auto first = anew.run(1), second = anew.run(2);
      CHECK(first_difference(kept.run(1), first) == "");
      for (Layer* layer : {&anew, &kept}) layer->halve_weight();
      CHECK(first_difference(kept.run(2), second) == "");
      const auto changed = anew.run(2);
      CHECK(first_difference(changed, second) != "");
      kept.linear.weight_changed();
      CHECK(first_difference(kept.run(2), changed) == "");
      CHECK(first_difference(kept.run(1), anew.run(1)) == "");
    }
  }
}

TEST_CASE("a kept weight costs what the documentation says") {
  const Context ctx = Context::cpu();
  for (LinearConfig config : all_weights()) {
    INFO(to_text(config) << ", " << name_of(config.weight_dtype));
    const auto bytes_of = [&](bool cache) {
      config.cache_weight = cache;
      Layer layer(ctx, config);
      return static_cast<double>(layer.ctx.memory_use().current);
    };
    const double per_element = (bytes_of(true) - bytes_of(false)) / double(kIn * kOut);
    const bool has_codes = config.fp8 && config.weight_dtype == e4m3;
    const double data = !config.fp8 ? (config.weight_dtype == bf16 ? 0 : 2) : has_codes ? 1 : 2;
    CHECK(per_element >= data);
    // Scales of blocks; of so small a matrix most is padding.
    CHECK(per_element <= data + (config.fp8 && !is_per_tensor(config.recipe) ? 0.75 : 0));
  }
}

TEST_CASE("a transposed weight from the optimizer is used as it is") {
  for (const Context& ctx : test_contexts()) {
    for (LinearConfig config : all_recipes()) {
      if (!config.fp8) continue;
      for (bool cache : {false, true}) {
        INFO(to_text(config) << (cache ? ", kept" : "") << " on " << to_string(ctx.device()));
        config.cache_weight = cache;
        Layer layer(ctx, config);
        const Tensor columns(ctx, e4m3, {kIn, kOut});
        transpose(ctx, layer.w.view().data, columns);
        const auto expected = layer.run(1);
        CHECK(first_difference(layer.run(1, columns), expected) == "");
        // Calls with and without may take turns.
        layer.linear.weight_changed();
        CHECK(first_difference(layer.run(1, columns), expected) == "");
        CHECK(first_difference(layer.run(1), expected) == "");
        zero_bytes(ctx, columns.view().data, columns.bytes());
        layer.run(1, columns);
        const auto dx = download<float>(ctx, layer.dx.view().data, kTokens * kIn);
        CHECK(first_difference(dx, std::vector<float>(kTokens * kIn, 0.0f)) == "");
      }
    }
  }
}

TEST_CASE("a main gradient collects micro-batches") {
  for (const Context& ctx : test_contexts()) {
    for (const LinearConfig& config : all_recipes()) {
      for (DType dtype : {f32, bf16}) {
        INFO(to_text(config) << ", " << name_of(dtype) << " on " << to_string(ctx.device()));
        Layer layer(ctx, config);
        const Guarded main(ctx, static_cast<std::size_t>(kIn * kOut) * size_of(dtype));
        const ScaledView view{main.view(dtype, {kOut, kIn}), nullptr};
        // 0xA5 bytes are there before: the first overwrites them.
        Matrix expected{kOut, kIn}, size{kOut, kIn};
        const LinearModel model{layer.config};
        for (std::uint32_t batch = 1; batch <= 4; ++batch) {
          // With delayed scaling the later ones would be cast with the first one's scales.
          const std::uint32_t seed = config.recipe == Fp8Recipe::delayed ? 1 : batch;
          layer.run(seed, view, batch > 1);
          const Product dw = model.dw(Layer::dy_of(seed), Layer::x_of(seed));
          for (std::size_t i = 0; i < expected.values.size(); ++i) {
            expected.values[i] += dw.sum.values[i];
            size.values[i] += dw.size.values[i];
          }
        }
        // bf16 rounds the sum after every micro-batch.
        const double rounding = dtype == bf16 ? 4 * 0x1p-8 : 0x1p-22;
        const double tolerance = tolerance_of(ctx) + rounding;
        CHECK(too_far(values_of(main, dtype, kOut, kIn), {expected, size}, tolerance, dtype) == "");
        CHECK(main.intact());
      }
    }
  }
}

TEST_CASE("without tokens a gradient is zero, and an accumulated one stays") {
  for (const Context& ctx : test_contexts()) {
    for (LinearConfig config : all_recipes()) {
      INFO(to_text(config) << " on " << to_string(ctx.device()));
      config.in_features = kIn, config.out_features = kOut, config.max_tokens = 16;
      GemmRegistry gemms(ctx);
      Linear linear(gemms, config);
      const WeightInMemory w(ctx, integer_matrix(kOut, kIn, 1, 3), e4m3);
      const Tensor dw(ctx, f32, {kOut, kIn}), dbias(ctx, f32, {kOut});
      const TensorView x{nullptr, f32, {0, kIn}, ctx.device()};
      const TensorView y{nullptr, f32, {0, kOut}, ctx.device()};
      linear.forward({.x = x, .weight = w.view(), .y = y});
      LinearBackward args{
          .dy = y, .weight = w.view(), .dw = {dw.view(), nullptr}, .dbias = dbias.view()};
      const auto values = [&](const Tensor& tensor) {
        return download<float>(ctx, tensor.view().data, tensor.bytes() / 4);
      };
      linear.backward(args);
      CHECK(first_difference(values(dw), std::vector<float>(kOut * kIn, 0.0f)) == "");
      CHECK(first_difference(values(dbias), std::vector<float>(kOut, 0.0f)) == "");
      write(ctx, dw.view().data, std::vector<float>(kOut * kIn, 7.0f));
      write(ctx, dbias.view().data, std::vector<float>(kOut, 7.0f));
      args.accumulate = true;
      linear.backward(args);
      CHECK(first_difference(values(dw), std::vector<float>(kOut * kIn, 7.0f)) == "");
      CHECK(first_difference(values(dbias), std::vector<float>(kOut, 7.0f)) == "");
    }
  }
}

TEST_CASE("a weight gradient in E4M3 is the product in BF16, cast by its own amax") {
  for (const Context& ctx : test_contexts()) {
    for (const LinearConfig& config : all_recipes()) {
      INFO(to_text(config) << " on " << to_string(ctx.device()));
      Layer layer(ctx, config);
      const ScaledTensor codes(ctx, e4m3, {kOut, kIn});
      layer.run(1, codes.view(), false);
      const Guarded product(ctx, static_cast<std::size_t>(kIn * kOut) * 2);
      layer.run(1, {product.view(bf16, {kOut, kIn}), nullptr}, false);
      const Matrix expected = cast(values_of(product, bf16, kOut, kIn), e4m3, Granularity::tensor);
      Matrix actual{kOut, kIn};
      const auto bytes = download_bytes(ctx, codes.view().data);
      const auto scale = download_one<TensorScale>(ctx, codes.view().scale);
      for (std::size_t i = 0; i < bytes.size(); ++i) {
        actual.values[i] = table_of(e4m3).decode(bytes[i]) * static_cast<double>(scale.scale_inv);
      }
      CHECK(difference(actual, expected) == "");
      CHECK(scale.amax > 0);
    }
  }
}

}  // namespace octet::test
