// SPDX-License-Identifier: Apache-2.0
// What a Linear refuses, with names and values, and what raises its flag.
#include "nn/linear_model.hpp"
#include "support/catch.hpp"
#include "support/compare.hpp"
#include "support/errors.hpp"

namespace octet::test {
namespace {

constexpr DType f32 = DType::f32, bf16 = DType::bf16, e4m3 = DType::e4m3, e5m2 = DType::e5m2;
constexpr std::int64_t K = 48, N = 32, kMaxTokens = 130;

/// A Linear and arguments that are right, for tests to spoil one by one.
struct Layer {
  Context ctx = Context::cpu();
  GemmRegistry gemms{ctx};
  Linear linear;
  Buffer memory{ctx, 4 * (kMaxTokens + 1) * K + 64}, other{ctx, 4 * (kMaxTokens + 1) * K + 64};
  ScaledTensor weight{ctx, e4m3, {N, K}};

  explicit Layer(LinearConfig config = {}) : linear(gemms, shaped(config)) {
    zero_bytes(ctx, memory.data(), memory.bytes());
    zero_bytes(ctx, weight.view().data.data, K * N);
  }
  static LinearConfig shaped(LinearConfig config) {
    config.in_features = K, config.out_features = N, config.max_tokens = kMaxTokens;
    return config;
  }
  TensorView view(DType dtype, Shape shape) const { return view_of(ctx, memory, dtype, shape); }
  TensorView out(DType dtype, Shape shape) const { return view_of(ctx, other, dtype, shape); }
  LinearForward good_forward() const {
    return {.x = view(f32, {4, K}), .weight = weight.view(), .y = out(f32, {4, N})};
  }
  LinearBackward good_backward() const {
    return {.dy = view(f32, {4, N}), .weight = weight.view()};
  }
  template <class Change>
  std::string forward(const Change& change) {
    LinearForward args = good_forward();
    change(args);
    return error_of([&] { linear.forward(args); });
  }
  template <class Change>
  std::string backward(const Change& change) {
    LinearBackward args = good_backward();
    change(args);
    return error_of([&] { linear.backward(args); });
  }
};

using F = LinearForward;
using B = LinearBackward;

}  // namespace

TEST_CASE("a configuration that cannot work is refused with its name") {
  GemmRegistry gemms(Context::cpu());
  const auto message = [&](LinearConfig config) {
    return error_of([&] { Linear(gemms, config); });
  };
  CHECK(message({.in_features = 5, .out_features = 0, .max_tokens = 0}) == "no error");
  CHECK(missing(message({.in_features = -1}), {"in_features is -1", "negative"}) == "");
  CHECK(missing(message({.out_features = -2}), {"out_features is -2"}) == "");
  CHECK(missing(message({.max_tokens = -3}), {"max_tokens is -3"}) == "");
  CHECK(missing(message({.weight_dtype = e5m2}),
                {"weight_dtype is e5m2", "e4m3", "f32", "bf16", "f16"}) == "");
}

TEST_CASE("wrong arguments of forward are refused with their names") {
  Layer layer;
  const auto& view = [&](DType dtype, Shape shape) { return layer.view(dtype, shape); };
  CHECK(missing(layer.backward([](B&) {}), {"backward", "before any forward"}) == "");
  CHECK(missing(layer.forward([&](F& f) {
          f.x = view(f32, {4, N});
        }),
                {"x has shape [4, 32]", "[4, 48]"}) == "");
  CHECK(missing(layer.forward([&](F& f) { f.x = view(f32, {4 * K}); }), {"x has shape [192]"}) ==
        "");
  CHECK(missing(layer.forward([&](F& f) {
          f.x = view(e4m3, {4, K});
        }),
                {"x is e4m3", "f32, bf16, f16"}) == "");
  CHECK(missing(layer.forward([&](F& f) {
          f.x = view(f32, {131, K});
        }),
                {"131 tokens", "130", "max_tokens"}) == "");
  CHECK(missing(layer.forward([&](F& f) { f.x.data = nullptr; }), {"x of shape", "memory"}) == "");
  CHECK(missing(layer.forward([&](F& f) {
          f.x.device = {DeviceType::cuda, 1};
        }),
                {"x is on cuda:1", "cpu"}) == "");
  CHECK(missing(layer.forward([&](F& f) {
          f.y = view(f32, {5, N});
        }),
                {"y has shape [5, 32]", "[4, 32]"}) == "");
  CHECK(missing(layer.forward([&](F& f) {
          f.y = view(e4m3, {4, N});
        }),
                {"y is e4m3", "bf16"}) == "");
  CHECK(missing(layer.forward([&](F& f) { f.y.data = f.y.as<float>() + 1; }),
                {"y is at", "16 bytes"}) == "");
  CHECK(missing(layer.forward([&](F& f) { f.weight.scale = nullptr; }), {"weight", "no scale"}) ==
        "");
  CHECK(missing(layer.forward([&](F& f) {
          f.weight.data = view(e4m3, {K, N});
        }),
                {"weight has shape [48, 32]", "[32, 48]"}) == "");
  CHECK(missing(layer.forward([&](F& f) {
          f.weight.data = view(bf16, {N, K});
        }),
                {"weight is bf16", "e4m3 is allowed"}) == "");
  CHECK(missing(layer.forward([&](F& f) { f.bias = view(f32, {N}); }),
                {"bias is given", "configuration"}) == "");
  CHECK(missing(error_of([&] { layer.linear.pre_activation(); }), {"pre_activation", "gelu"}) ==
        "");
  Layer with_bias({.bias = true, .gelu = true});
  CHECK(missing(with_bias.forward([](F&) {}), {"bias has shape", "[32]"}) == "");
  CHECK(missing(with_bias.forward([&](F& f) { f.bias = view(e4m3, {N}); }), {"bias is e4m3"}) ==
        "");
  CHECK(missing(error_of([&] { with_bias.linear.pre_activation(); }), {"before any forward"}) ==
        "");
  // None of these was one.
  CHECK(missing(layer.backward([](B&) {}), {"before any forward"}) == "");
  CHECK(layer.gemms.counts().fp8 == 0);
}

TEST_CASE("wrong arguments of backward are refused with their names") {
  Layer layer;
  const auto& view = [&](DType dtype, Shape shape) { return layer.out(dtype, shape); };
  REQUIRE(layer.forward([](F& f) { f.save_for_backward = false; }) == "no error");
  CHECK(missing(layer.backward([](B&) {}), {"before any forward that saves"}) == "");
  REQUIRE(layer.forward([](F&) {}) == "no error");
  const auto gemms = layer.gemms.counts().fp8;
  CHECK(missing(layer.backward([&](B& b) {
          b.dy = view(f32, {5, N});
        }),
                {"dy has shape [5, 32]", "[4, 32]"}) == "");
  CHECK(missing(layer.backward([&](B& b) {
          b.dx = view(f32, {4, N});
        }),
                {"dx has shape [4, 32]", "[4, 48]"}) == "");
  CHECK(missing(layer.backward([&](B& b) {
          b.dx = view(DType::f16, {4, K});
        }),
                {"dx is f16", "f32, bf16 are allowed"}) == "");
  CHECK(missing(layer.backward([&](B& b) {
          b.dw.data = view(f32, {K, N});
        }),
                {"dw has shape [48, 32]"}) == "");
  CHECK(missing(layer.backward([&](B& b) {
          b.dw.data = view(e5m2, {N, K});
        }),
                {"dw is e5m2"}) == "");
  CHECK(missing(layer.backward([&](B& b) {
          b.dw.data = view(e4m3, {N, K});
        }),
                {"dw is e4m3", "no scale"}) == "");
  CHECK(missing(layer.backward([&](B& b) {
          b.dw = layer.weight.view();
          b.accumulate = true;
        }),
                {"dw is e4m3", "accumulate", "f32 or bf16"}) == "");
  CHECK(missing(layer.backward([&](B& b) { b.dbias = view(DType::f16, {N}); }),
                {"dbias is f16", "f32, bf16 are allowed"}) == "");
  CHECK(missing(layer.backward([&](B& b) { b.dbias = view(f32, {K}); }),
                {"dbias has shape [48]", "[32]"}) == "");
  CHECK(missing(layer.backward([&](B& b) {
          b.weight_transposed = view(e4m3, {N, K});
        }),
                {"weight_transposed has shape [32, 48]", "[48, 32]"}) == "");
  CHECK(missing(layer.backward([&](B& b) { b.dy_of_pre_activation = true; }),
                {"dy_of_pre_activation", "gelu"}) == "");
  CHECK(missing(layer.backward([&](B& b) {
          b.input_pre_activation = view(bf16, {4, K});
        }),
                {"input_pre_activation", "no dx"}) == "");
  CHECK(missing(layer.backward([&](B& b) {
          b.dx = view(f32, {4, K});
          b.input_pre_activation = layer.view(f32, {4, K});
        }),
                {"input_pre_activation is f32", "bf16 is allowed"}) == "");
  CHECK(layer.gemms.counts().fp8 == gemms);
}

TEST_CASE("a result that overlaps what is read or another result is refused by name") {
  for (bool fp8 : {true, false}) {
    Layer layer({.fp8 = fp8, .weight_dtype = fp8 ? e4m3 : bf16});
    const TensorView weight = fp8 ? layer.weight.view().data : layer.view(bf16, {N, K});
    TensorView over_weight = weight;
    over_weight.dtype = bf16;
    const auto forward = [&](const auto& change) {
      return layer.forward([&](F& f) {
        f.weight.data = weight;
        change(f);
      });
    };
    const auto backward = [&](const auto& change) {
      return layer.backward([&](B& b) {
        b.weight.data = weight;
        b.dx = layer.out(f32, {4, K});
        change(b);
      });
    };
    CHECK(missing(forward([&](F& f) {
                    f.y = layer.view(f32, {4, N});
                  }),
                  {"y (512 bytes", "overlaps", "x (768 bytes", "apart"}) == "");
    CHECK(missing(forward([&](F& f) {
                    f.x = layer.out(f32, {4, K}), f.y = over_weight;
                    f.y.shape = {4, N};
                  }),
                  {"y (256 bytes", "the weight ("}) == "");
    CHECK(missing(layer.backward([](B&) {}), {"before any forward"}) == "");
    REQUIRE(forward([](F&) {}) == "no error");
    CHECK(backward([](B&) {}) == "no error");
    CHECK(missing(backward([&](B& b) {
                    b.dx = layer.view(f32, {4, K});
                  }),
                  {"dx (768 bytes", "dy (512 bytes"}) == "");
    CHECK(missing(backward([&](B& b) {
                    b.dw.data = layer.out(bf16, {N, K});
                  }),
                  {"dw (3072 bytes", "dx (768 bytes"}) == "");
    CHECK(missing(backward([&](B& b) { b.dbias = layer.out(f32, {N}); }),
                  {"dbias (128 bytes", "dx (768 bytes"}) == "");
    CHECK(missing(backward([&](B& b) {
                    b.dw.data = over_weight;
                    b.dy = layer.out(f32, {4, N}), b.dx = {};
                  }),
                  {"dw (3072 bytes", "the weight ("}) == "");
    CHECK(missing(backward([&](B& b) {
                    b.input_pre_activation = layer.out(bf16, {4, K});
                  }),
                  {"dx (768 bytes", "input_pre_activation (384 bytes"}) == "");
  }
}

TEST_CASE("what is not finite raises the flag, in x, dy, a weight that is cast and dw") {
  for (const Context& ctx : test_contexts()) {
    for (LinearConfig config : all_recipes()) {
      if (!config.fp8) continue;
      INFO(to_text(config) << " on " << to_string(ctx.device()));
      const Buffer flag = upload(ctx, std::vector<std::uint32_t>{0});
      config.nonfinite = flag.as<std::uint32_t>();
      config.weight_dtype = f32;
      GemmRegistry gemms(ctx);
      Linear linear(gemms, Layer::shaped(config));
      const Tensor y(ctx, f32, {4, N}), dw(ctx, f32, {N, K});
      const ScaledTensor codes(ctx, e4m3, {N, K});
      const auto flag_after = [&](double x_value, double dy_value, double w_value,
                                  const ScaledView& gradient) {
        write_one(ctx, flag.data(), std::uint32_t{0});
        const auto with = [&](std::int64_t rows, std::int64_t columns, double value) {
          Matrix m = integer_matrix(rows, columns, 7, 3);
          m.values[5] = value;
          return upload(ctx, std::vector<float>(m.values.begin(), m.values.end()));
        };
        const Buffer x = with(4, K, x_value), dy = with(4, N, dy_value), w = with(N, K, w_value);
        const ScaledView weight{view_of(ctx, w, f32, {N, K}), nullptr};
        linear.forward({.x = view_of(ctx, x, f32, {4, K}), .weight = weight, .y = y});
        linear.backward({.dy = view_of(ctx, dy, f32, {4, N}), .weight = weight, .dw = gradient});
        return download_one<std::uint32_t>(ctx, flag.data());
      };
      const ScaledView wide{dw.view(), nullptr};
      CHECK(flag_after(1, 1, 1, wide) == 0);
      CHECK(flag_after(INFINITY, 1, 1, wide) == 1);
      CHECK(flag_after(1, NAN, 1, wide) == 1);
      CHECK(flag_after(1, 1, -INFINITY, wide) == 1);
      CHECK(flag_after(1, 1, 1, codes.view()) == 0);
      // Finite factors, but a product beyond BF16, which the cast of dw sees. (The scales of steps
      // before saturate such factors.)
      const bool is_delayed = config.recipe == Fp8Recipe::delayed;
      CHECK(flag_after(3e38, 3e38, 1, codes.view()) == (is_delayed ? 0 : 1));
      CHECK(flag_after(1, 1, 1, codes.view()) == 0);
    }
  }
}

TEST_CASE("calls take nothing from the allocator") {
  for (const Context& ctx : test_contexts()) {
    for (LinearConfig config : all_recipes()) {
      for (DType dtype : {e4m3, f32}) {
        for (std::int64_t tokens : {kMaxTokens, std::int64_t{17}}) {
          INFO(to_text(config) << ", " << name_of(dtype) << " weight, " << tokens << " tokens on "
                               << to_string(ctx.device()));
          config.weight_dtype = dtype;
          config.bias = config.gelu = true;
          GemmRegistry gemms(ctx);
          Linear linear(gemms, Layer::shaped(config));
          const WeightInMemory w(ctx, integer_matrix(N, K, 3, 3), dtype);
          const Buffer x = upload_as(ctx, integer_matrix(tokens, K, 1, 3), f32),
                       dy = upload_as(ctx, integer_matrix(tokens, N, 2, 3), f32);
          const Tensor y(ctx, bf16, {tokens, N}), dx(ctx, f32, {tokens, K}), bias(ctx, f32, {N}),
              dbias(ctx, f32, {N}), pre(ctx, bf16, {tokens, K});
          const ScaledTensor dw(ctx, e4m3, {N, K});
          zero_bytes(ctx, bias.view().data, bias.bytes());
          zero_bytes(ctx, pre.view().data, pre.bytes());
          Context counted = ctx;
          counted.reset_peak();
          const MemoryUse before = ctx.memory_use();
          linear.forward(
              {.x = view_of(ctx, x, f32, {tokens, K}), .weight = w.view(), .bias = bias, .y = y});
          linear.backward({.dy = view_of(ctx, dy, f32, {tokens, N}),
                           .weight = w.view(),
                           .dx = dx,
                           .input_pre_activation = pre,
                           .dw = dw.view(),
                           .dbias = dbias});
          ctx.synchronize();
          CHECK(ctx.memory_use().peak == before.peak);
          CHECK(ctx.memory_use().current == before.current);
        }
      }
    }
  }
}

TEST_CASE("prepare() changes no result and asks for what the calls ask for") {
  for (const Context& ctx : test_contexts()) {
    for (const LinearConfig& config : all_recipes()) {
      INFO(to_text(config) << " on " << to_string(ctx.device()));
      GemmRegistry gemms(ctx);
      Linear linear(gemms, Layer::shaped(config));
      const WeightInMemory w(ctx, integer_matrix(N, K, 3, 3), e4m3);
      const Buffer x = upload_as(ctx, integer_matrix(32, K, 1, 3), f32),
                   dy = upload_as(ctx, integer_matrix(32, N, 2, 3), f32);
      const Tensor y(ctx, f32, {32, N}), dx(ctx, f32, {32, K}), dw(ctx, f32, {N, K});
      const LinearForward forward{.x = view_of(ctx, x, f32, {32, K}), .weight = w.view(), .y = y};
      const LinearBackward backward{.dy = view_of(ctx, dy, f32, {32, N}),
                                    .weight = w.view(),
                                    .dx = dx,
                                    .dw = {dw.view(), nullptr}};
      linear.prepare(forward, backward);
      CHECK(missing(error_of([&] { linear.backward(backward); }), {"before any forward"}) == "");
      const LinearModel model{Layer::shaped(config)};
      linear.forward(forward);
      linear.backward(backward);
      const Matrix expected = model.y(integer_matrix(32, K, 1, 3), w.values()).sum;
      const auto values = download<float>(ctx, y.view().data, 32 * N);
      for (std::size_t i = 0; i < values.size(); ++i) {
        REQUIRE(static_cast<double>(values[i]) == expected.values[i]);
      }
      LinearBackward wrong = backward;
      wrong.dx.shape = {31, K};
      CHECK(missing(error_of([&] { linear.prepare(forward, wrong); }), {"dx has shape"}) == "");
    }
  }
}

}  // namespace octet::test
