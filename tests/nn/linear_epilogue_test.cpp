// SPDX-License-Identifier: Apache-2.0
// Bias, its gradient and GELU of a Linear; what is done where no GEMM takes them.
#include "nn/linear_model.hpp"
#include "support/catch.hpp"
#include "support/compare.hpp"
#include "support/errors.hpp"

namespace octet::test {
namespace {

constexpr DType f32 = DType::f32, bf16 = DType::bf16;
constexpr std::int64_t kIn = 48, kOut = 80;

double gelu(double x) {
  return 0.5 * x * (1 + std::tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)));
}
double gelu_slope(double x) {
  const double t = std::tanh(0.7978845608028654 * (x + 0.044715 * x * x * x));
  return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * 0.7978845608028654 * (1 + 3 * 0.044715 * x * x);
}

template <class F>
Matrix mapped(Matrix m, const F& f) {
  for (double& value : m.values) value = f(value);
  return m;
}

Product with_bias(Product p, const Matrix& bias) {
  for (std::int64_t i = 0; i < p.sum.rows; ++i) {
    for (std::int64_t j = 0; j < p.sum.columns; ++j) {
      p.sum.at(i, j) += bias.at(0, j);
      p.size.at(i, j) += std::abs(bias.at(0, j));
    }
  }
  return p;
}

Matrix column_sums(const Matrix& m) {
  Matrix sums{1, m.columns};
  for (std::int64_t i = 0; i < m.rows; ++i) {
    for (std::int64_t j = 0; j < m.columns; ++j) sums.at(0, j) += m.at(i, j);
  }
  return sums;
}

/// A view of a matrix in device memory, which lives as long as this.
struct InMemory {
  Buffer memory;
  TensorView view;
  InMemory(const Context& ctx, const Matrix& m, DType dtype)
      : memory(upload_as(ctx, m, dtype)), view(view_of(ctx, memory, dtype, {m.rows, m.columns})) {}
};

TensorView flat(TensorView view) {
  view.shape = {view.numel()};
  return view;
}

/// Another backend in front of the reference one, which takes only what `takes` says.
class Picky final : public GemmBackend {
 public:
  using Takes = bool (*)(const GemmProblem&);
  Picky(Takes takes, GemmVerdict verdict, std::vector<GemmProblem>* ran)
      : takes_(takes), verdict_(verdict), ran_(ran) {}
  std::string name() const override { return "picky"; }
  GemmSupport query(const GemmProblem& p, const GemmDevice& device) const override {
    GemmSupport support = inner_->query(p, device);
    support.verdict = takes_(p) ? verdict_ : GemmVerdict::no;
    return support;
  }
  void run(const Context& ctx, const GemmProblem& p, const GemmArgs& args) override {
    ran_->push_back(p);
    inner_->run(ctx, p, args);
  }

 private:
  Takes takes_;
  GemmVerdict verdict_;
  std::vector<GemmProblem>* ran_;
  std::unique_ptr<GemmBackend> inner_ = make_reference_gemm();
};

struct Trained {
  Matrix y, dx, dw, dbias, pre_activation;
};

/// Two Linears one after the other, the first with bias and GELU; the gradient goes through GELU in
/// the second's GEMM (`fused`) or in the first's cast.
struct Pair {
  Context ctx;
  GemmRegistry& gemms;
  Linear first, second;
  std::int64_t tokens;
  Matrix x, dy, w1, w2, bias;

  Pair(GemmRegistry& registry, LinearConfig config, std::int64_t count)
      : ctx(registry.context()),
        gemms(registry),
        first(registry, shaped(config, kIn, kOut, count, true)),
        second(registry, shaped(config, kOut, kIn, count, false)),
        tokens(count),
        x(random_matrix(count, kIn, 1, 1.0, f32, 1000)),
        dy(random_matrix(count, kIn, 2, 1.0, f32, 1000)),
        w1(random_matrix(kOut, kIn, 3, 0.2, f32, 1000)),
        w2(random_matrix(kIn, kOut, 4, 0.2, f32, 1000)),
        bias(random_matrix(1, kOut, 5, 1.0, f32, 1000)) {}

  static LinearConfig shaped(LinearConfig config, std::int64_t in, std::int64_t out,
                             std::int64_t count, bool is_first) {
    config.in_features = in, config.out_features = out, config.max_tokens = count;
    config.weight_dtype = DType::f32;
    config.bias = config.gelu = is_first;
    return config;
  }

  Trained run(bool fused, DType out) {
    const InMemory x_in(ctx, x, f32), dy_in(ctx, dy, f32), w1_in(ctx, w1, f32), w2_in(ctx, w2, f32),
        bias_in(ctx, bias, f32);
    const Tensor dh(ctx, out, {tokens, kOut}), out2(ctx, f32, {tokens, kIn});
    const auto memory = [&](std::int64_t rows, std::int64_t columns) {
      return Guarded(ctx, static_cast<std::size_t>(rows * columns) * size_of(out));
    };
    const Guarded h = memory(tokens, kOut), dx = memory(tokens, kIn), dw = memory(kOut, kIn),
                  dbias = memory(1, kOut);
    first.forward({.x = x_in.view,
                   .weight = {w1_in.view},
                   .bias = flat(bias_in.view),
                   .y = h.view(out, {tokens, kOut})});
    second.forward({.x = h.view(out, {tokens, kOut}), .weight = {w2_in.view}, .y = out2});
    const TensorView pre = first.pre_activation();
    second.backward({.dy = dy_in.view,
                     .weight = {w2_in.view},
                     .dx = dh,
                     .input_pre_activation = fused ? pre : TensorView{}});
    first.backward({.dy = dh,
                    .weight = {w1_in.view},
                    .dx = dx.view(out, {tokens, kIn}),
                    .dy_of_pre_activation = fused,
                    .dw = {dw.view(out, {kOut, kIn}), nullptr},
                    .dbias = dbias.view(out, {kOut})});
    REQUIRE((h.intact() && dx.intact() && dw.intact() && dbias.intact()));
    Matrix pre_values{tokens, kOut};
    const auto codes = download<std::uint16_t>(ctx, pre.data, pre_values.values.size());
    for (std::size_t i = 0; i < codes.size(); ++i) {
      pre_values.values[i] = table_of(bf16).decode(codes[i]);
    }
    return {values_of(h, out, tokens, kOut), values_of(dx, out, tokens, kIn),
            values_of(dw, out, kOut, kIn), values_of(dbias, out, 1, kOut), pre_values};
  }
};

/// Root of the mean square of a difference, relative to what is expected.
double relative_error(const Matrix& actual, const Matrix& expected) {
  double error = 0, size = 0;
  for (std::size_t i = 0; i < expected.values.size(); ++i) {
    error += std::pow(actual.values[i] - expected.values[i], 2);
    size += std::pow(expected.values[i], 2);
  }
  return std::sqrt(error / size);
}

}  // namespace

TEST_CASE("a bias is added in BF16 and its gradient is the sum of the columns of dy") {
  for (const Context& ctx : test_contexts()) {
    for (LinearConfig config : all_recipes()) {
      for (DType bias_dtype : {f32, bf16, DType::f16}) {
        for (std::int64_t tokens : {0, 1, 37, 144, 300}) {
          INFO(to_text(config) << ", bias " << name_of(bias_dtype) << ", " << tokens
                               << " tokens on " << to_string(ctx.device()));
          const DType out = bias_dtype == bf16 ? bf16 : f32;
          config.in_features = kIn, config.out_features = kOut, config.max_tokens = tokens;
          config.weight_dtype = f32, config.bias = true;
          GemmRegistry gemms(ctx);
          Linear linear(gemms, config);
          const Matrix x = random_matrix(tokens, kIn, 1, 1.0, f32);
          const Matrix dy = integer_matrix(tokens, kOut, 2, 8);
          const Matrix bias = random_matrix(1, kOut, 4, 1.0, bias_dtype);
          const WeightInMemory w(ctx, random_matrix(kOut, kIn, 3, 0.1, f32), f32);
          const InMemory x_in(ctx, x, f32), dy_in(ctx, dy, f32), bias_in(ctx, bias, bias_dtype);
          const Guarded y(ctx, static_cast<std::size_t>(tokens * kOut) * size_of(out));
          const Guarded dbias(ctx, kOut * size_of(out));
          linear.forward({.x = x_in.view,
                          .weight = w.view(),
                          .bias = flat(bias_in.view),
                          .y = y.view(out, {tokens, kOut})});
          const LinearModel model{config};
          const Product expected = with_bias(model.y(x, w.values()), rounded(bias, bf16));
          CHECK(too_far(values_of(y, out, tokens, kOut), expected, tolerance_of(ctx), out) == "");

          LinearBackward backward{
              .dy = dy_in.view, .weight = w.view(), .dbias = dbias.view(out, {kOut})};
          linear.backward(backward);
          const Matrix once = column_sums(dy);
          CHECK(difference(values_of(dbias, out, 1, kOut), rounded(once, out)) == "");
          backward.accumulate = true;
          linear.backward(backward);
          const Matrix twice = mapped(once, [](double v) { return 2 * v; });
          CHECK(difference(values_of(dbias, out, 1, kOut), rounded(twice, out)) == "");
          CHECK((y.intact() && dbias.intact()));
        }
      }
    }
  }
}

TEST_CASE("GELU: forward, and backward by either route") {
  for (const Context& ctx : test_contexts()) {
    for (const LinearConfig& config : all_recipes()) {
      for (DType out : {f32, bf16}) {
        for (std::int64_t tokens : {1, 32, 51}) {
          INFO(to_text(config) << ", " << name_of(out) << ", " << tokens << " tokens on "
                               << to_string(ctx.device()));
          GemmRegistry gemms(ctx);
          Pair pair(gemms, config, tokens);
          const Trained apart = pair.run(false, out);
          LinearModel model{config};
          model.config.weight_dtype = f32;
          const Product sums = with_bias(model.y(pair.x, pair.w1), rounded(pair.bias, bf16));
          const double tolerance = tolerance_of(ctx);
          CHECK(too_far(apart.pre_activation, sums, tolerance, bf16) == "");
          // |gelu'| stays below 1.13.
          CHECK(too_far(apart.y, {mapped(sums.sum, gelu), sums.size}, 1.2 * tolerance, out) == "");

          // Of the exact chain: what FP8 makes of every operand on the way.
          const auto chain = [&] {
            const Matrix dh = product(pair.dy, transposed(pair.w2)).sum;
            Matrix dpre = dh;
            const Matrix pre = with_bias(product(pair.x, pair.w1), pair.bias).sum;
            for (std::size_t i = 0; i < dpre.values.size(); ++i) {
              dpre.values[i] *= gelu_slope(pre.values[i]);
            }
            return dpre;
          }();
          const Trained fused = pair.run(true, out);
          for (const Trained* each : {&apart, &fused}) {
            const double limit = config.fp8 ? 0.12 : 0.02;
            CHECK(relative_error(each->dx, product(chain, transposed(pair.w1)).sum) < limit);
            CHECK(relative_error(each->dw, product(transposed(chain), transposed(pair.x)).sum) <
                  limit);
            CHECK(relative_error(each->dbias, column_sums(chain)) < limit);
          }
          // The same numbers but for one rounding of dh.
          CHECK(relative_error(fused.dx, apart.dx) < (out == f32 && !config.fp8 ? 1e-2 : 0.05));
        }
      }
    }
  }
}

TEST_CASE("an epilogue that no GEMM takes is a step of its own, with the same results") {
  const Context ctx = Context::cpu();
  for (const LinearConfig& config : all_recipes()) {
    INFO(to_text(config));
    GemmRegistry plain(ctx), picky(ctx);
    std::vector<GemmProblem> ran;
    const auto no_epilogue = [](const GemmProblem& p) {
      return !p.bias && !p.aux && !p.accumulate && p.activation == Activation::none;
    };
    picky.add(std::make_unique<Picky>(no_epilogue, GemmVerdict::native, &ran));
    picky.force("picky");
    Pair one(plain, config, 37), other(picky, config, 37);
    for (bool fused : {false, true}) {
      const Trained expected = one.run(fused, bf16), actual = other.run(fused, bf16);
      CHECK(first_difference(actual.y.values, expected.y.values) == "");
      CHECK(first_difference(actual.dx.values, expected.dx.values) == "");
      CHECK(first_difference(actual.dw.values, expected.dw.values) == "");
      CHECK(first_difference(actual.dbias.values, expected.dbias.values) == "");
      CHECK(first_difference(actual.pre_activation.values, expected.pre_activation.values) == "");
    }
    CHECK(ran.size() >= 10);
  }
}

TEST_CASE("blocks get further rows where only multiples of 16 run without conversions") {
  const Context ctx = Context::cpu();
  for (Fp8Recipe recipe : {Fp8Recipe::blockwise, Fp8Recipe::mxfp8}) {
    for (std::int64_t tokens : {37, 48}) {
      INFO(name_of(recipe) << ", " << tokens << " tokens");
      GemmRegistry plain(ctx), picky(ctx);
      std::vector<GemmProblem> ran;
      const auto sixteens = [](const GemmProblem& p) {
        return p.m % 16 == 0 && p.activation == Activation::none;
      };
      picky.add(std::make_unique<Picky>(sixteens, GemmVerdict::native, &ran));
      picky.force("picky");
      Pair one(plain, {.recipe = recipe}, tokens), other(picky, {.recipe = recipe}, tokens);
      for (bool fused : {false, true}) {
        const Trained expected = one.run(fused, f32), actual = other.run(fused, f32);
        CHECK(first_difference(actual.y.values, expected.y.values) == "");
        CHECK(first_difference(actual.dx.values, expected.dx.values) == "");
        CHECK(first_difference(actual.dw.values, expected.dw.values) == "");
        CHECK(first_difference(actual.dbias.values, expected.dbias.values) == "");
      }
      for (const GemmProblem& p : ran) CHECK(p.m % 16 == 0);
    }
  }
}

TEST_CASE("a native GEMM with a step after it comes before one that converts") {
  const Context ctx = Context::cpu();
  std::vector<GemmProblem> native, converting;
  GemmRegistry gemms(ctx);
  gemms.add(std::make_unique<Picky>(
      [](const GemmProblem& p) { return p.activation == Activation::none && !p.accumulate; },
      GemmVerdict::native, &native));
  gemms.add(std::make_unique<Picky>([](const GemmProblem&) { return true; },
                                    GemmVerdict::with_conversion, &converting));
  gemms.force("picky");
  Pair pair(gemms, {}, 32);
  pair.run(true, f32);
  CHECK(native.size() == 5);
  CHECK(converting.empty());
}

TEST_CASE("the report of a Linear says what runs where, and what is done around it") {
  const Context ctx = Context::cpu();
  GemmRegistry gemms(ctx);
  std::vector<GemmProblem> ran;
  gemms.add(std::make_unique<Picky>(
      [](const GemmProblem& p) { return p.m % 16 == 0 && !p.bias && !p.accumulate; },
      GemmVerdict::native, &ran));
  gemms.force("picky");
  Linear linear(gemms, {.in_features = kIn,
                        .out_features = kOut,
                        .max_tokens = 48,
                        .recipe = Fp8Recipe::mxfp8,
                        .weight_dtype = f32,
                        .bias = true});
  const Tensor w(ctx, f32, {kOut, kIn}), bias(ctx, f32, {kOut});
  const auto report = [&](std::int64_t tokens) {
    const Tensor x(ctx, f32, {tokens, kIn}), y(ctx, f32, {tokens, kOut}),
        dx(ctx, f32, {tokens, kIn}), dw(ctx, f32, {kOut, kIn});
    return linear.report({.x = x, .weight = {w, nullptr}, .bias = bias, .y = y},
                         {.dy = y, .weight = {w, nullptr}, .dx = dx, .dw = {dw, nullptr}});
  };
  const std::string full = report(48), part = report(37);
  CHECK(missing(full, {"y: gemm m=48 n=80 k=48 a=e4m3/mx",
                       "bias=bf16, by picky, what follows the "
                       "sum as a step of its own\n",
                       "dx: gemm m=48 n=48 k=80", "dw: gemm m=80 n=48 k=48",
                       "reference: not asked, picky is forced"}) == "");
  CHECK(full.find("rows of zeros") == std::string::npos);
  CHECK(missing(part, {"y: gemm m=37", "by picky, with rows of zeros up to a multiple of 16, what",
                       "dx: gemm m=37 n=48 k=80 a=e4m3/mx b=e4m3/mx d=f32, by picky, with rows of "
                       "zeros up to a multiple of 16\n",
                       "dw: gemm m=80"}) == "");
  CHECK(report(0).empty());
  CHECK(ran.empty());
}

TEST_CASE("fast accumulation is for y alone, and reaches the backend") {
  const Context ctx = Context::cpu();
  GemmRegistry gemms(ctx);
  std::vector<GemmProblem> ran;
  gemms.add(
      std::make_unique<Picky>([](const GemmProblem&) { return true; }, GemmVerdict::native, &ran));
  Linear linear(gemms, {.in_features = kIn,
                        .out_features = kOut,
                        .max_tokens = 48,
                        .forward_accumulation = Accumulation::fast,
                        .weight_dtype = f32});
  const Tensor w(ctx, f32, {kOut, kIn}), x(ctx, f32, {48, kIn}), y(ctx, f32, {48, kOut});
  const Tensor dx(ctx, f32, {48, kIn}), dw(ctx, f32, {kOut, kIn});
  for (const Tensor* t : {&w, &x, &y}) zero_bytes(ctx, t->view().data, t->bytes());
  const LinearForward forward{.x = x, .weight = {w, nullptr}, .y = y};
  const LinearBackward backward{.dy = y, .weight = {w, nullptr}, .dx = dx, .dw = {dw, nullptr}};
  const std::string report = linear.report(forward, backward);
  CHECK(missing(report, {"y: gemm m=48 n=80 k=48 a=e4m3 b=e4m3 d=f32 fast"}) == "");
  CHECK(report.find("fast") == report.rfind("fast"));
  linear.forward(forward);
  linear.backward(backward);
  REQUIRE(ran.size() == 3);
  CHECK(ran[0].accumulation == Accumulation::fast);
  CHECK(ran[1].accumulation == Accumulation::promoted);
  CHECK(ran[2].accumulation == Accumulation::promoted);
}

TEST_CASE("what no backend runs is refused at set-up with the report of all that were asked") {
  GemmRegistry gemms(Context::cpu());
  std::vector<GemmProblem> ran;
  gemms.add(std::make_unique<Picky>([](const GemmProblem& p) { return p.n != kIn; },
                                    GemmVerdict::native, &ran));
  gemms.force("picky");
  LinearConfig config{.in_features = kIn, .out_features = kOut, .max_tokens = 16};
  CHECK(missing(error_of([&] { Linear(gemms, config); }),
                {"no backend can run gemm m=16 n=48 k=80", "picky", "forced"}) == "");
}

}  // namespace octet::test
