// SPDX-License-Identifier: Apache-2.0
#include "octet/nn/linear.hpp"

#include <cmath>

#include "support/catch.hpp"
#include "support/compare.hpp"
#include "support/devices.hpp"
#include "support/errors.hpp"
#include "support/guarded.hpp"
#include "support/random.hpp"
#include "support/reference.hpp"

using namespace octet;
using namespace octet::test;

namespace {

constexpr std::int64_t K = 48, N = 32, kMaxTokens = 130;
constexpr DType f32 = DType::f32, bf16 = DType::bf16, e4m3 = DType::e4m3, e5m2 = DType::e5m2;

std::size_t count(std::int64_t a, std::int64_t b) { return static_cast<std::size_t>(a * b); }

/// The values that a cast to FP8 with current scaling leaves, and its codes and scale.
struct Cast {
  std::vector<float> values;
  std::vector<std::uint8_t> codes;
  TensorScale scale;
};

Cast cast(const std::vector<float>& x, DType dtype) {
  const FormatTable& table = table_of(dtype);
  double amax = 0;
  for (float value : x) amax = std::max(amax, std::abs(static_cast<double>(value)));
  const double scale = reference_scale(amax, table.max());
  Cast result;
  result.scale = {static_cast<float>(1 / scale), static_cast<float>(scale),
                  static_cast<float>(amax)};
  for (float value : x) {
    const std::uint32_t code = table.encode(static_cast<double>(value) * scale);
    result.codes.push_back(static_cast<std::uint8_t>(code));
    result.values.push_back(static_cast<float>(table.decode(code) / scale));
  }
  return result;
}

std::vector<float> rounded(std::vector<float> x) {
  for (float& value : x) value = static_cast<float>(table_of(bf16).round(value));
  return x;
}

std::vector<std::uint16_t> bf16_codes(const std::vector<float>& x) {
  std::vector<std::uint16_t> codes;
  for (float value : x) codes.push_back(static_cast<std::uint16_t>(table_of(bf16).encode(value)));
  return codes;
}

std::vector<float> floats(const std::vector<std::uint8_t>& bytes, DType dtype) {
  std::vector<float> values(bytes.size() / size_of(dtype));
  for (std::size_t i = 0; i < values.size(); ++i) {
    std::uint16_t code = 0;
    if (dtype == f32) {
      std::memcpy(&values[i], bytes.data() + 4 * i, 4);
    } else {
      std::memcpy(&code, bytes.data() + 2 * i, 2);
      values[i] = static_cast<float>(table_of(bf16).decode(code));
    }
  }
  return values;
}

/// D[m, n] = A[m, k] B[n, k]^T by the reference backend on plain FP32 operands.
std::vector<float> product(const std::vector<float>& a, bool a_transposed,
                           const std::vector<float>& b, bool b_transposed, std::int64_t m,
                           std::int64_t n, std::int64_t k, DType d) {
  std::vector<std::uint8_t> out(count(m, n) * size_of(d));
  if (k > 0) {
    make_reference_gemm()->run(Context::cpu(),
                               {.m = m,
                                .n = n,
                                .k = k,
                                .a = f32,
                                .b = f32,
                                .d = d,
                                .a_transposed = a_transposed,
                                .b_transposed = b_transposed},
                               {.a = a.data(), .b = b.data(), .d = out.data()});
  }
  return floats(out, d);
}

/// Root mean square error relative to a product in double.
double relative_error(const std::vector<float>& actual, const std::vector<float>& a,
                      std::int64_t a_row, std::int64_t a_k, const std::vector<float>& b,
                      std::int64_t b_row, std::int64_t b_k, std::int64_t m, std::int64_t n,
                      std::int64_t k) {
  double error = 0, norm = 0;
  for (std::int64_t i = 0; i < m; ++i) {
    for (std::int64_t j = 0; j < n; ++j) {
      double sum = 0;
      for (std::int64_t l = 0; l < k; ++l) {
        sum += static_cast<double>(a[static_cast<std::size_t>(i * a_row + l * a_k)]) *
               static_cast<double>(b[static_cast<std::size_t>(j * b_row + l * b_k)]);
      }
      const double difference =
          static_cast<double>(actual[static_cast<std::size_t>(i * n + j)]) - sum;
      error += difference * difference;
      norm += sum * sum;
    }
  }
  return std::sqrt(error / norm);
}

struct Results {
  std::vector<float> y, dx, dw;
};

/// One Linear with its weight on a device, and calls that go through host memory.
struct Layer {
  Context ctx;
  GemmRegistry gemms;
  std::vector<float> w;
  Buffer weight, weight_scale, flag;
  Linear linear;

  Layer(const Context& context, DType dtype)
      : ctx(context),
        gemms(ctx),
        w(normal_values(count(N, K), 31, 0.05f)),
        weight(dtype == e4m3 ? upload(ctx, cast(w, e4m3).codes) : upload(ctx, bf16_codes(w))),
        weight_scale(upload(ctx, std::vector<TensorScale>{cast(w, e4m3).scale})),
        flag(upload(ctx, std::vector<std::uint32_t>{0})),
        linear(gemms, {.in_features = K,
                       .out_features = N,
                       .max_tokens = kMaxTokens,
                       .fp8 = dtype == e4m3,
                       .weight_dtype = dtype,
                       .nonfinite = flag.as<std::uint32_t>()}),
        dtype_(dtype) {}

  ScaledView weight_view() const {
    return {view_of(ctx, weight, dtype_, {N, K}),
            dtype_ == e4m3 ? weight_scale.as<TensorScale>() : nullptr};
  }
  /// The weight as the GEMMs see it.
  std::vector<float> weight_values() const {
    return dtype_ == e4m3 ? cast(w, e4m3).values : rounded(w);
  }
  Buffer input(const std::vector<float>& values, DType dtype) const {
    return dtype == f32 ? upload(ctx, values) : upload(ctx, bf16_codes(values));
  }

  Results run(const std::vector<float>& x, const std::vector<float>& dy, std::int64_t tokens,
              DType in, DType out) {
    const Buffer x_data = input(x, in);
    const Buffer dy_data = input(dy, in);
    const Guarded y(ctx, count(tokens, N) * size_of(out));
    const Guarded dx(ctx, count(tokens, K) * size_of(out));
    const Guarded dw(ctx, count(N, K) * size_of(out));
    linear.forward({.x = view_of(ctx, x_data, in, {tokens, K}),
                    .weight = weight_view(),
                    .y = y.view(out, {tokens, N})});
    linear.backward({.dy = view_of(ctx, dy_data, in, {tokens, N}),
                     .weight = weight_view(),
                     .dx = dx.view(out, {tokens, K}),
                     .dw = {dw.view(out, {N, K}), nullptr}});
    REQUIRE((y.intact() && dx.intact() && dw.intact()));
    return {floats(y.values<std::uint8_t>(), out), floats(dx.values<std::uint8_t>(), out),
            floats(dw.values<std::uint8_t>(), out)};
  }

 private:
  DType dtype_;
};

const std::int64_t kTokens[] = {17, 1, 130, 16, 5, 33, 128};

}  // namespace

TEST_CASE("Linear FP8: bit for bit the reference GEMM of what the casts leave") {
  Layer layer(Context::cpu(), e4m3);
  const std::vector<float> w = layer.weight_values();
  const DType in = GENERATE(f32, bf16), out = GENERATE(f32, bf16);
  for (std::int64_t tokens : kTokens) {
    INFO(tokens << " tokens");
    std::vector<float> x = normal_values(count(tokens, K), 32, 3.0f);
    std::vector<float> dy = normal_values(count(tokens, N), 33, 1e-4f);
    if (in == bf16) x = rounded(x), dy = rounded(dy);
    const Results actual = layer.run(x, dy, tokens, in, out);
    const std::vector<float> x8 = cast(x, e4m3).values, dy8 = cast(dy, e5m2).values;
    CHECK(first_difference(actual.y, product(x8, false, w, false, tokens, N, K, out)) == "");
    CHECK(first_difference(actual.dx, product(dy8, false, w, true, tokens, K, N, out)) == "");
    CHECK(first_difference(actual.dw, product(dy8, true, x8, true, N, K, tokens, out)) == "");
  }
  CHECK(layer.gemms.counts().fp8 == 3 * static_cast<std::int64_t>(std::size(kTokens)));
  CHECK(layer.gemms.counts().bf16 + layer.gemms.counts().f32 == 0);
  CHECK(download_one<std::uint32_t>(layer.ctx, layer.flag.data()) == 0);
}

TEST_CASE("Linear BF16: bit for bit the reference GEMM of rounded operands") {
  Layer layer(Context::cpu(), bf16);
  const std::vector<float> w = layer.weight_values();
  const DType in = GENERATE(f32, bf16), out = GENERATE(f32, bf16);
  for (std::int64_t tokens : kTokens) {
    INFO(tokens << " tokens");
    const std::vector<float> x = normal_values(count(tokens, K), 34);
    const std::vector<float> dy = normal_values(count(tokens, N), 35);
    const Results actual = layer.run(x, dy, tokens, in, out);
    const std::vector<float> xr = rounded(x), dyr = rounded(dy);
    CHECK(first_difference(actual.y, product(xr, false, w, false, tokens, N, K, out)) == "");
    CHECK(first_difference(actual.dx, product(dyr, false, w, true, tokens, K, N, out)) == "");
    CHECK(first_difference(actual.dw, product(dyr, true, xr, true, N, K, tokens, out)) == "");
  }
  CHECK(layer.gemms.counts().bf16 == 3 * static_cast<std::int64_t>(std::size(kTokens)));
  CHECK(layer.gemms.counts().fp8 == 0);
}

TEST_CASE("Linear on every device: near the true product, as far off as its formats are") {
  for (const Context& ctx : test_contexts()) {
    for (DType dtype : {e4m3, bf16}) {
      Layer layer(ctx, dtype);
      const std::vector<float>& w = layer.w;
      for (std::int64_t tokens : {37, 130}) {
        const std::vector<float> x = normal_values(count(tokens, K), 36);
        const std::vector<float> dy = normal_values(count(tokens, N), 37, 1e-3f);
        const Results r = layer.run(x, dy, tokens, f32, f32);
        // Relative steps of 2^-3 (E4M3), 2^-2 (E5M2), 2^-7 (BF16) give these deviations; two
        // independent roundings per product.
        const double low = dtype == e4m3 ? 0.015 : 0.0005;
        const double high = dtype == e4m3 ? 0.08 : 0.005;
        INFO(to_string(ctx.device()) << " " << name_of(dtype) << " " << tokens << " tokens");
        const double y = relative_error(r.y, x, K, 1, w, K, 1, tokens, N, K);
        const double dx = relative_error(r.dx, dy, N, 1, w, 1, K, tokens, K, N);
        const double dw = relative_error(r.dw, dy, 1, N, x, 1, K, N, K, tokens);
        CHECK((low < y && y < high));
        CHECK((low < dx && dx < high));
        CHECK((low < dw && dw < high));
      }
    }
  }
}

TEST_CASE("Linear: either gradient may be left out") {
  for (DType dtype : {e4m3, bf16}) {
    Layer layer(Context::cpu(), dtype);
    const std::int64_t tokens = 19;
    const std::vector<float> x = normal_values(count(tokens, K), 38);
    const std::vector<float> dy = normal_values(count(tokens, N), 39);
    const Results both = layer.run(x, dy, tokens, f32, f32);
    const Buffer dy_data = upload(layer.ctx, dy);
    const TensorView dy_view = view_of(layer.ctx, dy_data, f32, {tokens, N});
    const Guarded dx(layer.ctx, count(tokens, K) * 4), dw(layer.ctx, count(N, K) * 4);
    layer.linear.backward(
        {.dy = dy_view, .weight = layer.weight_view(), .dx = dx.view(f32, {tokens, K})});
    CHECK(first_difference(dx.values<float>(), both.dx) == "");
    layer.linear.backward(
        {.dy = dy_view, .weight = layer.weight_view(), .dw = {dw.view(f32, {N, K}), nullptr}});
    CHECK(first_difference(dw.values<float>(), both.dw) == "");
    const GemmCounts before = layer.gemms.counts();
    layer.linear.backward({.dy = dy_view, .weight = layer.weight_view()});
    CHECK(layer.gemms.counts().fp8 + layer.gemms.counts().bf16 == before.fp8 + before.bf16);
  }
}

TEST_CASE("Linear: no tokens give a weight gradient of zeros") {
  for (const Context& ctx : test_contexts()) {
    for (DType dtype : {e4m3, bf16}) {
      Layer layer(ctx, dtype);
      const Results r = layer.run({}, {}, 0, f32, f32);
      CHECK(first_difference(r.dw, std::vector<float>(count(N, K), 0.0f)) == "");
    }
  }
}

TEST_CASE("Linear FP8: what is not finite raises the flag and keeps the scale") {
  for (const Context& ctx : test_contexts()) {
    Layer layer(ctx, e4m3);
    const std::int64_t tokens = 4;
    const std::vector<float> x = normal_values(count(tokens, K), 40);
    const std::vector<float> dy = normal_values(count(tokens, N), 41);
    std::vector<float> bad_x = x, bad_dy = dy;
    bad_x[5] = INFINITY;
    bad_dy[6] = NAN;
    const auto flag_after = [&](const std::vector<float>& in, const std::vector<float>& gradient) {
      write_one(ctx, layer.flag.data(), std::uint32_t{0});
      const Results r = layer.run(in, gradient, tokens, f32, f32);
      CHECK(std::isfinite(r.y[0]));
      return download_one<std::uint32_t>(ctx, layer.flag.data());
    };
    CHECK(flag_after(x, dy) == 0);
    CHECK(flag_after(bad_x, dy) == 1);
    CHECK(flag_after(x, bad_dy) == 1);
    CHECK(flag_after(x, dy) == 0);
  }
}

TEST_CASE("Linear: calls allocate nothing from the context") {
  for (const Context& ctx : test_contexts()) {
    for (DType dtype : {e4m3, bf16}) {
      Layer layer(ctx, dtype);
      const Buffer x = upload(ctx, normal_values(count(kMaxTokens, K), 42));
      const Buffer dy = upload(ctx, normal_values(count(kMaxTokens, N), 43));
      const Buffer y(ctx, count(kMaxTokens, N) * 4), dx(ctx, count(kMaxTokens, K) * 4),
          dw(ctx, count(N, K) * 4);
      layer.ctx.reset_peak();
      const MemoryUse before = ctx.memory_use();
      layer.linear.forward({.x = view_of(ctx, x, f32, {kMaxTokens, K}),
                            .weight = layer.weight_view(),
                            .y = view_of(ctx, y, f32, {kMaxTokens, N})});
      layer.linear.backward({.dy = view_of(ctx, dy, f32, {kMaxTokens, N}),
                             .weight = layer.weight_view(),
                             .dx = view_of(ctx, dx, f32, {kMaxTokens, K}),
                             .dw = {view_of(ctx, dw, f32, {N, K}), nullptr}});
      ctx.synchronize();
      CHECK(ctx.memory_use().peak == before.peak);
      CHECK(ctx.memory_use().current == before.current);
    }
  }
}
