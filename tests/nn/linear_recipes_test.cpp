// SPDX-License-Identifier: Apache-2.0
// Every recipe, any shape, every dtype of the weight, against products in double of operands that
// are cast by the definitions.
#include "nn/linear_model.hpp"
#include "support/catch.hpp"
#include "support/compare.hpp"

namespace octet::test {
namespace {

constexpr DType f32 = DType::f32, bf16 = DType::bf16;

struct Case {
  LinearConfig config;  ///< without shapes
  std::int64_t tokens, k, n;
  DType in = f32, out = f32;
  bool integers = false;
};

/// One forward and backward of a fresh Linear against the model.
void check_case(const Context& ctx, const Case& c) {
  LinearConfig config = c.config;
  config.in_features = c.k, config.out_features = c.n, config.max_tokens = c.tokens;
  INFO(to_text(config) << ", " << c.tokens << " tokens, " << c.k << " in, " << c.n << " out, "
                       << name_of(config.weight_dtype) << " weight, " << name_of(c.in) << " in, "
                       << name_of(c.out) << " out, on " << to_string(ctx.device()));
  const auto matrix = [&](std::int64_t rows, std::int64_t columns, std::uint32_t seed, double sigma,
                          DType dtype) {
    return c.integers ? integer_matrix(rows, columns, seed, 3)
                      : random_matrix(rows, columns, seed, sigma, dtype);
  };
  const Matrix x = matrix(c.tokens, c.k, 1, 3.0, c.in), dy = matrix(c.tokens, c.n, 2, 1e-3, c.in);
  const WeightInMemory w(ctx, matrix(c.n, c.k, 3, 0.05, f32), config.weight_dtype);
  const Buffer x_memory = upload_as(ctx, x, c.in), dy_memory = upload_as(ctx, dy, c.in);
  const auto memory_of = [&](std::int64_t rows, std::int64_t columns) {
    return Guarded(ctx, static_cast<std::size_t>(rows * columns) * size_of(c.out));
  };
  const Guarded y = memory_of(c.tokens, c.n), dx = memory_of(c.tokens, c.k),
                dw = memory_of(c.n, c.k);
  GemmRegistry gemms(ctx);
  Linear linear(gemms, config);
  linear.forward({.x = view_of(ctx, x_memory, c.in, {c.tokens, c.k}),
                  .weight = w.view(),
                  .y = y.view(c.out, {c.tokens, c.n})});
  linear.backward({.dy = view_of(ctx, dy_memory, c.in, {c.tokens, c.n}),
                   .weight = w.view(),
                   .dx = dx.view(c.out, {c.tokens, c.k}),
                   .dw = {dw.view(c.out, {c.n, c.k}), nullptr}});
  REQUIRE((y.intact() && dx.intact() && dw.intact()));
  const LinearModel model{config};
  const double tolerance = c.integers ? 0 : tolerance_of(ctx);
  const auto compare = [&](const Guarded& memory, const Product& expected) {
    const Matrix& sum = expected.sum;
    return too_far(values_of(memory, c.out, sum.rows, sum.columns), expected, tolerance, c.out);
  };
  REQUIRE(compare(y, model.y(x, w.values())) == "");
  REQUIRE(compare(dx, model.dx(dy, w.values())) == "");
  REQUIRE(compare(dw, model.dw(dy, x)) == "");
}

constexpr std::int64_t kSizes[] = {0, 1, 8, 15, 16, 17, 127, 128, 129};
constexpr DType kWeights[] = {DType::e4m3, f32, bf16, DType::f16};

}  // namespace

TEST_CASE("every recipe, any shape: the product of what the casts leave") {
  for (const Context& ctx : test_contexts()) {
    for (LinearConfig config : all_recipes()) {
      for (std::size_t i = 0; i < 9; ++i) {
        for (std::size_t j = 0; j < 9; ++j) {
          for (std::size_t l = 0; l < 9; ++l) {
            // Every pair of two sizes, and so every dtype with every size.
            if ((i + 2 * j + 5 * l) % 9 != 0) continue;
            config.weight_dtype = kWeights[(i + j) % 4];
            check_case(ctx, {.config = config,
                             .tokens = kSizes[i],
                             .k = kSizes[j],
                             .n = kSizes[l],
                             .in = (i + l) % 2 == 0 ? f32 : bf16,
                             .out = (i / 2 + l) % 2 == 0 ? f32 : bf16});
          }
        }
      }
    }
  }
}

TEST_CASE("every recipe, a prime number of tokens") {
  for (const Context& ctx : test_contexts()) {
    for (LinearConfig config : all_recipes()) {
      check_case(ctx, {.config = config, .tokens = 5743, .k = 32, .n = 16});
      config.weight_dtype = bf16;
      check_case(ctx, {.config = config, .tokens = 5743, .k = 17, .n = 15});
    }
  }
}

TEST_CASE("every recipe and format, whole numbers: exact") {
  for (const Context& ctx : test_contexts()) {
    for (LinearConfig config : all_recipes()) {
      for (Fp8Format format : {Fp8Format::hybrid, Fp8Format::e4m3}) {
        if (config.fp8) config.format = format;
        for (DType dtype : kWeights) {
          config.weight_dtype = dtype;
          for (std::int64_t tokens : {160, 37}) {
            check_case(ctx, {.config = config,
                             .tokens = tokens,
                             .k = 144,
                             .n = 48,
                             .in = DType::f16,
                             .integers = true});
          }
        }
      }
    }
  }
}

TEST_CASE("what TE and Megatron-LM users expect of names and defaults") {
  for (Fp8Recipe recipe :
       {Fp8Recipe::delayed, Fp8Recipe::tensorwise, Fp8Recipe::blockwise, Fp8Recipe::mxfp8}) {
    CHECK(parse_fp8_recipe(name_of(recipe)) == recipe);
    const bool per_tensor = recipe == Fp8Recipe::delayed || recipe == Fp8Recipe::tensorwise;
    CHECK(default_format(recipe) == (per_tensor ? Fp8Format::hybrid : Fp8Format::e4m3));
  }
  CHECK(name_of(Fp8Recipe::blockwise) == "blockwise");
  CHECK(name_of(Fp8Recipe::mxfp8) == "mxfp8");
  CHECK(!parse_fp8_recipe("mx"));
  CHECK(parse_fp8_format("hybrid") == Fp8Format::hybrid);
  CHECK(parse_fp8_format("e4m3") == Fp8Format::e4m3);
  CHECK(!parse_fp8_format("e5m2"));
}

TEST_CASE("three GEMMs of FP8 operands with every recipe, three of BF16 ones without") {
  const Context ctx = Context::cpu();
  for (const LinearConfig& config : all_recipes()) {
    GemmRegistry gemms(ctx);
    LinearConfig shaped = config;
    shaped.in_features = 32, shaped.out_features = 16, shaped.max_tokens = 16;
    Linear linear(gemms, shaped);
    const Matrix x = integer_matrix(16, 32, 1, 3), dy = integer_matrix(16, 16, 2, 3);
    const WeightInMemory w(ctx, integer_matrix(16, 32, 3, 3), shaped.weight_dtype);
    const Buffer x_memory = upload_as(ctx, x, f32), dy_memory = upload_as(ctx, dy, f32);
    const Tensor y(ctx, f32, {16, 16}), dx(ctx, f32, {16, 32}), dw(ctx, f32, {16, 32});
    linear.forward({.x = view_of(ctx, x_memory, f32, {16, 32}), .weight = w.view(), .y = y.view()});
    linear.backward({.dy = view_of(ctx, dy_memory, f32, {16, 16}),
                     .weight = w.view(),
                     .dx = dx,
                     .dw = {dw.view(), nullptr}});
    CHECK(gemms.counts().fp8 == (config.fp8 ? 3 : 0));
    CHECK(gemms.counts().bf16 == (config.fp8 ? 0 : 3));
  }
}

}  // namespace octet::test
