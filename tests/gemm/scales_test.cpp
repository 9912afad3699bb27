// SPDX-License-Identifier: Apache-2.0
// Scales of every granularity, strides and layouts, on every backend that says yes.
#include "gemm/cases.hpp"
#include "support/catch.hpp"
#include "support/compare.hpp"
#include "support/errors.hpp"

using namespace octet;
using namespace octet::test;

namespace {

struct Size {
  std::int64_t m, n, k;
};
constexpr Size kSizes[] = {{1, 1, 1},     {15, 17, 16},   {16, 15, 17},  {17, 16, 127},
                           {127, 1, 129}, {1, 128, 128},  {129, 5, 33},  {5, 129, 300},
                           {33, 31, 520}, {130, 257, 31}, {12, 32, 128}, {128, 127, 1},
                           {32, 16, 272}};

/// Errors of FP32 sums over blocks of 128, and of scales that are not powers of two.
double fp32_error(std::int64_t k) {
  return (128.0 + static_cast<double>(k) / 128.0 + 4.0) * std::ldexp(1.0, -24);
}

Bytes stored_d(const Context& ctx, GemmBackend& backend, const Case& c) {
  return run_case(ctx, c, [&](const GemmArgs& args) { backend.run(ctx, c.p, args); }).d;
}

}  // namespace

TEST_CASE("GEMM scales: every pair of granularities, exact, on every backend") {
  for (const Context& ctx : test_contexts()) {
    Backends backends(ctx);
    int ran = 0;
    for (const Size& s : kSizes) {
      for (Granularity of_a : kGranularities) {
        for (Granularity of_b : kGranularities) {
          const DType b = s.n % 2 == 0 ? DType::e4m3 : DType::e5m2;
          for (Accumulation how : {Accumulation::promoted, Accumulation::exact}) {
            const Case c = make_case({.m = s.m,
                                      .n = s.n,
                                      .k = s.k,
                                      .b = b,
                                      .a_scales = of_a,
                                      .b_scales = of_b,
                                      .accumulation = how});
            std::string wrong;
            ran += backends.run(c, 0.0, wrong);
            REQUIRE(wrong == "");
          }
        }
      }
    }
    // On a CPU the reference takes all, dequant_bf16 all but the exact ones.
    if (ctx.device().type == DeviceType::cpu) CHECK(ran == 13 * 25 * 3);
    CHECK(ran > 0);
  }
}

TEST_CASE("GEMM scales: layouts, strides and mixtures of dtypes, exact, on every backend") {
  constexpr DType kTypes[] = {DType::f32, DType::bf16, DType::f16, DType::e4m3, DType::e5m2};
  for (const Context& ctx : test_contexts()) {
    Backends backends(ctx);
    for (const Size& s : {Size{13, 33, 130}, Size{31, 16, 48}, Size{129, 17, 16}}) {
      for (DType a : kTypes) {
        for (DType b : kTypes) {
          for (int bits = 0; bits < 8; ++bits) {
            GemmProblem p{.m = s.m, .n = s.n, .k = s.k, .a = a, .b = b};
            p.a_transposed = (bits & 1) != 0, p.b_transposed = (bits & 2) != 0;
            if ((bits & 4) != 0) {
              p.lda = (p.a_transposed ? p.m : p.k) + 16;
              p.ldb = (p.b_transposed ? p.n : p.k) + 32;
              p.ldd = p.n + 7;
            }
            p.accumulation = s.m == 31 ? Accumulation::exact : Accumulation::promoted;
            std::string wrong;
            backends.run(make_case(p), 0.0, wrong);
            REQUIRE(wrong == "");
          }
        }
      }
    }
  }
}

TEST_CASE("GEMM scales: blocks in rows with gaps, beside an operand without scales") {
  for (const Context& ctx : test_contexts()) {
    Backends backends(ctx);
    int ran = 0;
    for (Granularity g : kGranularities) {
      for (DType other : {DType::bf16, DType::e4m3}) {
        for (std::int64_t gap : {1, 8, 16}) {
          GemmProblem p{.m = 140, .n = 19, .k = 264, .b = other, .lda = 264 + gap, .a_scales = g};
          std::string wrong;
          ran += backends.run(make_case(p), 0.0, wrong);
          REQUIRE(wrong == "");
          std::swap(p.a, p.b), std::swap(p.lda, p.ldb), std::swap(p.a_scales, p.b_scales);
          std::swap(p.m, p.n);
          ran += backends.run(make_case(p), 0.0, wrong);
          REQUIRE(wrong == "");
        }
      }
    }
    CHECK(ran > 0);
  }
}

TEST_CASE("GEMM scales: bell-shaped values within the error of FP32 sums") {
  for (const Context& ctx : test_contexts()) {
    Backends backends(ctx);
    for (Granularity of_a : kGranularities) {
      for (Granularity of_b : kGranularities) {
        for (DType d : {DType::f32, DType::bf16, DType::f16}) {
          const Case c = make_case({.m = 35,
                                    .n = 40,
                                    .k = 704,
                                    .a = DType::e5m2,
                                    .d = d,
                                    .a_scales = of_a,
                                    .b_scales = of_b},
                                   Values::normal, 7);
          std::string wrong;
          // Tensor cores add a few products at a time and cut, not round, what they align.
          const double slack = ctx.device().type == DeviceType::cpu ? 1.0 : 4.0;
          backends.run(c, slack * fp32_error(c.p.k), wrong);
          REQUIRE(wrong == "");
        }
      }
    }
  }
}

TEST_CASE("reference GEMM: exact sums are rounded once, to every dtype") {
  const Context ctx = Context::cpu();
  const auto backend = make_reference_gemm();
  for (DType d : {DType::f32, DType::bf16, DType::f16, DType::e4m3, DType::e5m2}) {
    for (Granularity g : kGranularities) {
      const GemmProblem p{.m = 21,
                          .n = 34,
                          .k = 275,
                          .b = DType::e5m2,
                          .d = d,
                          .a_scales = g,
                          .b_scales = Granularity::row_block,
                          .accumulation = Accumulation::exact,
                          .bias = true,
                          .bias_type = DType::f32};
      const Case c = make_case(p, Values::normal, 3);
      const Bytes got = stored_d(ctx, *backend, c);
      Bytes expected;
      for (std::int64_t i = 0; i < p.m; ++i) {
        for (std::int64_t j = 0; j < p.n; ++j) {
          const double scale = is_fp8(d) ? static_cast<double>(Case::kScale) : 1.0;
          const double value = expected_at(c, i, j).value * scale;
          if (d == DType::f32) {
            append(expected, static_cast<float>(value));
          } else if (size_of(d) == 2) {
            append(expected, static_cast<std::uint16_t>(table_of(d).encode(value)));
          } else {
            append(expected, static_cast<std::uint8_t>(table_of(d).encode(value)));
          }
        }
      }
      INFO(to_string(p));
      CHECK(first_difference(got, expected) == "");
    }
  }
}

TEST_CASE("reference GEMM: a sum just beside a tie of BF16 is rounded once when exact") {
  // 1 + 2^-8 is the tie between 1 and 1 + 2^-7; what comes on top is lost by a float.
  const Context ctx = Context::cpu();
  const auto backend = make_reference_gemm();
  for (float sign : {1.0f, -1.0f}) {
    const Buffer a = upload(ctx, std::vector<float>{1.0f, std::ldexp(1.0f, -8), sign, 0});
    const Buffer b = upload(ctx, std::vector<float>{1.0f, 1.0f, std::ldexp(1.0f, -40), 0});
    const Guarded d(ctx, 2);
    GemmProblem p{.m = 1, .n = 1, .k = 3, .a = DType::f32, .b = DType::f32, .d = DType::bf16};
    p.accumulation = Accumulation::exact;
    backend->run(ctx, p, {.a = a.data(), .b = b.data(), .d = d.data()});
    const double wanted = sign > 0 ? 1.0 + std::ldexp(1.0, -7) : 1.0;
    CHECK(decode_at(d.values<std::uint8_t>(), DType::bf16, 0) == wanted);
    p.accumulation = Accumulation::promoted;  // the tie, to even
    backend->run(ctx, p, {.a = a.data(), .b = b.data(), .d = d.data()});
    CHECK(decode_at(d.values<std::uint8_t>(), DType::bf16, 0) == 1.0);
  }
}

TEST_CASE("reference GEMM: every kernel gives the same bits with scales of blocks") {
  const Context ctx = Context::cpu();
  for (Granularity of_a : kGranularities) {
    for (Granularity of_b : kGranularities) {
      const Case c =
          make_case({.m = 77, .n = 45, .k = 300, .ldd = 50, .a_scales = of_a, .b_scales = of_b},
                    Values::normal, 11);
      const Bytes first = stored_d(ctx, *make_reference_gemm("portable"), c);
      for (const std::string& kernel : reference_gemm_kernels()) {
        INFO(to_string(c.p) << " kernel " << kernel);
        CHECK(first_difference(stored_d(ctx, *make_reference_gemm(kernel), c), first) == "");
      }
    }
  }
}

TEST_CASE("reference GEMM: mx scales at the ends of their range") {
  const Context ctx = Context::cpu();
  const auto backend = make_reference_gemm();
  // Two rows of A, one element each, e4m3 448 and 2^-9, times 1 of B and its power of two.
  const auto product = [&](std::uint8_t code, int byte, float b_value, Accumulation how) {
    Bytes scales(512, 0xFF);
    scales[0] = static_cast<std::uint8_t>(byte);
    const Buffer a = upload(ctx, Bytes{code}), a_scales = upload(ctx, scales);
    const Buffer b = upload(ctx, std::vector<float>{b_value});
    const Guarded d(ctx, 4);
    const GemmProblem p{
        .m = 1, .n = 1, .k = 1, .b = DType::f32, .a_scales = Granularity::mx, .accumulation = how};
    backend->run(ctx, p,
                 {.a = a.data(), .a_scales = a_scales.data(), .b = b.data(), .d = d.data()});
    return decode_at(d.values<std::uint8_t>(), DType::f32, 0);
  };
  const auto promoted = Accumulation::promoted, exact = Accumulation::exact;
  for (Accumulation how : {promoted, exact}) {
    CHECK(product(0x01, 0, std::ldexp(1.0f, 100), how) == std::ldexp(1.0, -36));
    CHECK(product(0x7E, 127 + 119, 1.0f, how) == std::ldexp(448.0, 119));
    CHECK(product(0x38, 254, 1.0f, how) == std::ldexp(1.0, 127));
    CHECK(std::isnan(product(0x38, 255, 1.0f, how)));
  }
  CHECK(product(0x7E, 254, std::ldexp(1.0f, -20), exact) == std::ldexp(448.0, 107));
  CHECK(std::isinf(product(0x7E, 254, std::ldexp(1.0f, -20), promoted)));  // beyond a float
}

TEST_CASE("reference GEMM: promoted sums of many positive values are near exact ones") {
  const Context ctx = Context::cpu();
  const auto backend = make_reference_gemm();
  GemmProblem p{.m = 3, .n = 8, .k = 16384, .a_scales = Granularity::row_block};
  Case c = make_case(p, Values::normal, 5);
  // Without signs, so that sums grow all the way.
  for (Operand* x : {&c.a, &c.b}) {
    for (std::uint8_t& code : x->stored) code &= 0x7F;
    for (double& value : x->values) value = std::abs(value);
  }
  const Bytes promoted = stored_d(ctx, *backend, c);
  c.p.accumulation = Accumulation::exact;
  const Bytes exact = stored_d(ctx, *backend, c);
  double worst = 0, worst_plain = 0;
  for (std::int64_t i = 0; i < p.m; ++i) {
    for (std::int64_t j = 0; j < p.n; ++j) {
      const double sum = expected_at(c, i, j).sum;
      const std::int64_t at = i * p.n + j;
      CHECK(decode_at(exact, DType::f32, at) == static_cast<double>(static_cast<float>(sum)));
      worst = std::max(worst, std::abs(decode_at(promoted, DType::f32, at) / sum - 1));
      float plain = 0;
      for (std::int64_t l = 0; l < p.k; ++l) {
        plain = std::fma(static_cast<float>(c.a.at(i, l)), static_cast<float>(c.b.at(j, l)), plain);
      }
      worst_plain = std::max(worst_plain, std::abs(static_cast<double>(plain) / sum - 1));
    }
  }
  CAPTURE(worst, worst_plain);
  CHECK(worst <= (128.0 + 128.0) * std::ldexp(1.0, -24));
  CHECK(worst * 3 < worst_plain);  // adding one after the other loses more
}
