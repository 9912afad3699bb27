// SPDX-License-Identifier: Apache-2.0
// What happens to the sum: D of every dtype, summands, bias, activations, aux, d_scale and d_amax.
#include "octet/gemm/epilogue.hpp"

#include "gemm/cases.hpp"
#include "octet/gemm/detail/epilogue_math.hpp"
#include "support/catch.hpp"
#include "support/compare.hpp"
#include "support/errors.hpp"

using namespace octet;
using namespace octet::test;

namespace {

constexpr DType kWide[] = {DType::f32, DType::bf16, DType::f16};
constexpr DType kAll[] = {DType::f32, DType::bf16, DType::f16, DType::e4m3, DType::e5m2};
constexpr Activation kActivations[] = {Activation::none, Activation::gelu, Activation::dgelu};

/// Every combination that makes sense, for products of this size.
std::vector<GemmProblem> problems(std::int64_t m, std::int64_t n, std::int64_t k) {
  std::vector<GemmProblem> list;
  for (DType d : kAll) {
    for (Activation activation : kActivations) {
      for (int bits = 0; bits < 16; ++bits) {
        GemmProblem p{.m = m, .n = n, .k = k, .d = d, .activation = activation};
        p.bias = (bits & 1) != 0, p.accumulate = (bits & 2) != 0, p.aux = (bits & 4) != 0;
        if ((bits & 8) != 0) p.ldd = n + 5;
        if (p.accumulate && d != DType::f32 && d != DType::bf16) continue;
        if (p.aux ? activation == Activation::none : activation == Activation::dgelu) continue;
        p.bias_type = kWide[list.size() % 3], p.aux_type = kWide[list.size() / 3 % 3];
        list.push_back(p);
      }
    }
  }
  return list;
}

/// Sums are exact in these cases; what FP32 loses in an activation.
double activation_error(const GemmProblem& p) {
  return p.activation == Activation::none ? 0.0 : 1e-6;
}

std::vector<float> sums_of(const Case& c) {
  std::vector<float> sums;
  Case plain = c;
  plain.p.bias = plain.p.accumulate = false;
  for (std::int64_t i = 0; i < c.p.m; ++i) {
    for (std::int64_t j = 0; j < c.p.n; ++j) {
      sums.push_back(static_cast<float>(expected_at(plain, i, j).sum));
    }
  }
  return sums;
}

float f32_at(const Guarded& d, std::size_t i) { return d.values<float>()[i]; }

}  // namespace

TEST_CASE("GEMM epilogue: every D, summand, bias and activation, on every backend") {
  for (const Context& ctx : test_contexts()) {
    Backends backends(ctx);
    int ran = 0;
    for (const auto& [m, n, k] :
         {std::array<std::int64_t, 3>{17, 40, 48}, {1, 1, 1}, {14, 33, 129}}) {
      for (GemmProblem p : problems(m, n, k)) {
        for (Accumulation how : {Accumulation::promoted, Accumulation::exact}) {
          p.accumulation = how;
          std::string wrong;
          ran += backends.run(make_case(p), activation_error(p), wrong);
          REQUIRE(wrong == "");
        }
      }
    }
    if (ctx.device().type == DeviceType::cpu) {
      CHECK(ran == 3 * 3 * static_cast<int>(problems(1, 1, 1).size()));
    }
    CHECK(ran > 0);
  }
}

TEST_CASE("apply_epilogue: as the end of a product, on every device, equal bits") {
  for (const auto& [m, n] :
       {std::pair<std::int64_t, std::int64_t>{1, 1}, {3, 7}, {9, 16}, {2, 2051}}) {
    for (const GemmProblem& p : problems(m, n, 4)) {
      const Case c = make_case(p, Values::normal);
      const std::vector<float> sums = sums_of(c);
      std::vector<Result> results;
      for (const Context& ctx : test_contexts()) {
        const Buffer buffer = upload(ctx, sums);
        results.push_back(run_case(ctx, c, [&](const GemmArgs& args) {
          apply_epilogue(ctx, p, buffer.as<float>(), args);
        }));
        INFO(to_string(ctx.device()));
        REQUIRE(mistake(c, results.back(), 1e-6) == "");
        REQUIRE(first_difference(results.back().d, results.front().d) == "");
        REQUIRE(first_difference(results.back().aux, results.front().aux) == "");
        REQUIRE(bits_of(results.back().amax) == bits_of(results.front().amax));
      }
    }
  }
}

TEST_CASE("apply_epilogue: without sums, as k = 0 has it") {
  for (const Context& ctx : test_contexts()) {
    for (const GemmProblem& p : problems(5, 19, 0)) {
      const Case c = make_case(p);
      const Result r =
          run_case(ctx, c, [&](const GemmArgs& args) { apply_epilogue(ctx, p, nullptr, args); });
      INFO(to_string(ctx.device()));
      REQUIRE(mistake(c, r, activation_error(p)) == "");
    }
    apply_epilogue(ctx, {.m = 0, .n = 3, .k = 0}, nullptr, {});  // nothing to do
  }
}

TEST_CASE("apply_epilogue: sums that are D itself, and pointers that are not aligned") {
  for (const Context& ctx : test_contexts()) {
    const std::vector<float> sums = {1.5f, -2, 0.25f, 8, 1, 2, 3, 4, 5, 6, 7, -8};
    const std::vector<float> bias = {0, 1, -1, 0.5f};
    const Buffer d = upload(ctx, sums), b = upload(ctx, bias);
    const GemmProblem p{.m = 1,
                        .n = 3,
                        .k = 1,
                        .bias = true,
                        .activation = Activation::gelu,
                        .bias_type = DType::f32};
    // Everything one float off the 16 bytes.
    float* const at = d.as<float>() + 1;
    apply_epilogue(ctx, p, at, {.d = at, .bias = b.as<float>() + 1});
    const auto got = download<float>(ctx, d.data(), sums.size());
    for (std::size_t i = 0; i < sums.size(); ++i) {
      const double wanted = i >= 1 && i < 4 ? gelu_of(static_cast<double>(sums[i] + bias[i]))
                                            : static_cast<double>(sums[i]);
      CHECK(std::abs(static_cast<double>(got[i]) - wanted) <= 1e-6 * std::abs(wanted));
    }
  }
}

TEST_CASE("exp(-y) is within 2 units in the last place, subnormals included") {
  for (int i = 0; i <= 110 * 512; ++i) {
    const float y = static_cast<float>(i) / 512.0f;
    const double wanted = std::exp(-static_cast<double>(y));
    const double unit = std::max(std::ldexp(1.0, std::ilogb(wanted) - 23), std::ldexp(1.0, -149));
    INFO("y = " << y);
    REQUIRE(std::abs(static_cast<double>(detail::exp_minus(y)) - wanted) <= 2 * unit);
  }
  CHECK(detail::exp_minus(INFINITY) == 0.0f);
  CHECK(std::isnan(detail::exp_minus(NAN)));
}

TEST_CASE("apply_epilogue: gelu and its derivative over their whole range") {
  std::vector<float> x = wide_values(4000, 3, -30, 12);
  for (int i = -4000; i <= 4000; ++i) x.push_back(static_cast<float>(i) / 200.0f);
  for (float extreme : {0.0f, -0.0f, INFINITY, -1e19f, 1e30f, -3e38f}) x.push_back(extreme);
  const auto n = static_cast<std::int64_t>(x.size());
  for (const Context& ctx : test_contexts()) {
    const Buffer sums = upload(ctx, x), ones = upload(ctx, std::vector<float>(x.size(), 1.0f));
    const Guarded d(ctx, x.size() * 4);
    GemmProblem p{.m = 1, .n = n, .k = 1, .activation = Activation::gelu, .aux_type = DType::f32};
    apply_epilogue(ctx, p, sums.as<float>(), {.d = d.data()});
    const auto value = d.values<float>();
    p.activation = Activation::dgelu, p.aux = true;
    apply_epilogue(ctx, p, ones.as<float>(), {.d = d.data(), .aux = sums.data()});
    const auto slope = d.values<float>();
    for (std::size_t i = 0; i < x.size(); ++i) {
      const auto v = static_cast<double>(x[i]);
      INFO("x = " << v << " on " << to_string(ctx.device()));
      if (std::abs(v) > 1e18) {
        REQUIRE(static_cast<double>(value[i]) == (v > 0 ? v : 0.0));
        REQUIRE(slope[i] == (v > 0 ? 1.0f : 0.0f));
        continue;
      }
      // An error in the argument of exp grows with it where the result is tiny.
      const double error = std::ldexp(4.0, -24);
      REQUIRE(std::abs(static_cast<double>(value[i]) - gelu_of(v)) <= error * std::abs(v));
      REQUIRE(std::abs(static_cast<double>(slope[i]) - gelu_slope(v)) <= 2 * error);
    }
  }
}

TEST_CASE("GEMM epilogue: NaN and infinity of operands stay visible in D and d_amax") {
  for (const Context& ctx : test_contexts()) {
    Backends backends(ctx);
    for (GemmBackend* backend : backends.list) {
      for (DType d : kAll) {
        for (const std::uint8_t special : {std::uint8_t{0x7F}, std::uint8_t{0x7C}}) {
          const bool is_nan = special == 0x7F;
          Case c = make_case({.m = 5, .n = 16, .k = 64, .a = DType::e5m2, .d = d});
          c.a.stored[2 * 64 + 40] = special;  // row 2 of A
          for (std::int64_t j = 0; j < 16; ++j) {
            c.b.stored[static_cast<std::size_t>(j * 64 + 40)] = 0x38;  // times 1
          }
          if (backend->query(c.p, backends.device).verdict == GemmVerdict::no) continue;
          Context here = ctx;
          here.reserve_workspace(backend->query(c.p, backends.device).workspace_bytes);
          const Result r =
              run_case(here, c, [&](const GemmArgs& args) { backend->run(here, c.p, args); });
          INFO(backend->name() << " " << to_string(c.p) << (is_nan ? " NaN" : " infinity"));
          for (std::int64_t i = 0; i < 5; ++i) {
            for (std::int64_t j = 0; j < 16; ++j) {
              const double value = get(r.d, d, i * 16 + j);
              if (i != 2) {
                REQUIRE(std::isfinite(value));
              } else if (is_nan) {
                REQUIRE(std::isnan(value));
              } else if (is_fp8(d)) {
                REQUIRE(value == table_of(d).max());  // saturates
              } else {
                REQUIRE(std::isinf(value));
              }
            }
          }
          if (is_fp8(d)) CHECK((is_nan ? std::isnan(r.amax) : std::isinf(r.amax)));
        }
      }
    }
  }
}

TEST_CASE("apply_epilogue: d_amax becomes what D holds now, and is optional") {
  for (const Context& ctx : test_contexts()) {
    const Buffer sums = upload(ctx, std::vector<float>{1, -6, 3, 2});
    const Buffer scale = upload(ctx, std::vector<float>{64.0f}),
                 amax = upload(ctx, std::vector{9.0f});
    const Guarded d(ctx, 4);
    const GemmProblem p{.m = 2, .n = 2, .k = 1, .d = DType::e4m3};
    GemmArgs args{.d = d.data(), .d_scale = scale.as<float>(), .d_amax = amax.as<float>()};
    apply_epilogue(ctx, p, sums.as<float>(), args);
    CHECK(download_one<float>(ctx, amax.data()) == 6.0f);
    const Bytes stored = d.values<std::uint8_t>();
    CHECK(get(stored, p.d, 1) == -384.0);
    CHECK(get(stored, p.d, 2) == 192.0);
    args.d_amax = nullptr;
    apply_epilogue(ctx, p, nullptr, args);
    CHECK(first_difference(d.values<std::uint8_t>(), Bytes(4, 0)) == "");
    CHECK(download_one<float>(ctx, amax.data()) == 6.0f);
    // A NaN alone, among larger bit patterns of sign.
    const Buffer nan = upload(ctx, std::vector<float>{-5, NAN, 0, -INFINITY});
    args.d_amax = amax.as<float>();
    apply_epilogue(ctx, p, nan.as<float>(), args);
    CHECK(std::isnan(download_one<float>(ctx, amax.data())));
  }
}

TEST_CASE("apply_epilogue: wrong arguments are named") {
  const Context ctx = Context::cpu();
  const Guarded d(ctx, 64);
  const auto message = [&](const GemmProblem& p, const GemmArgs& args) {
    return error_of([&] { apply_epilogue(ctx, p, nullptr, args); });
  };
  const GemmProblem p{.m = 2, .n = 3, .k = 0};
  const auto with = [&](auto change) {
    GemmProblem changed = p;
    change(changed);
    return message(changed, {.d = d.data()});
  };
  CHECK(message(p, {.d = d.data()}) == "no error");
  CHECK(f32_at(d, 5) == 0.0f);
  CHECK(missing(message(p, {}), {"m=2 n=3", "d is null"}) == "");
  CHECK(missing(with([](auto& x) { x.m = -1; }), {"m=-1", "negative"}) == "");
  CHECK(missing(with([](auto& x) { x.bias = true; }), {"bias is null"}) == "");
  CHECK(missing(with([](auto& x) { x.activation = Activation::gelu, x.aux = true; }),
                {"aux is null"}) == "");
  CHECK(missing(with([](auto& x) { x.d = DType::e4m3; }), {"d_scale is null"}) == "");
  CHECK(missing(message(p, {.d = d.data(), .d_scale = static_cast<float*>(d.data())}),
                {"d_scale or d_amax is given", "not FP8"}) == "");
  CHECK(missing(message(p, {.d = d.data(), .d_amax = static_cast<float*>(d.data())}),
                {"d_scale or d_amax is given", "not FP8"}) == "");
  CHECK(missing(with([](auto& x) { x.d = DType(5); }), {"d is 5", "e5m2"}) == "");
  CHECK(missing(with([](auto& x) { x.ldd = 2; }), {"ldd is 2", "3"}) == "");
  CHECK(missing(with([](auto& x) { x.activation = Activation::dgelu; }), {"aux is not set"}) == "");
}
