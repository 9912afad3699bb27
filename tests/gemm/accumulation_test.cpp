// SPDX-License-Identifier: Apache-2.0
// How long sums come out, and that they come out the same every time, on whatever backend a
// device's registry takes.
#include "gemm/cases.hpp"
#include "support/catch.hpp"
#include "support/compare.hpp"

using namespace octet;
using namespace octet::test;

namespace {

GemmProblem with(GemmProblem p, Accumulation how) {
  p.accumulation = how;
  return p;
}

Result run(GemmRegistry& gemms, const Case& c) {
  Context ctx = gemms.context();
  ctx.reserve_workspace(gemms.choose(c.p).support.workspace_bytes);
  return run_case(ctx, c, [&](const GemmArgs& args) { gemms.run(c.p, args); });
}

/// The largest error of D (f32) relative to the true sum.
double worst_error(const Bytes& d, const std::vector<double>& sums) {
  double worst = 0;
  for (std::size_t i = 0; i < sums.size(); ++i) {
    const double value = decode_at(d, DType::f32, static_cast<std::int64_t>(i));
    worst = std::max(worst, std::abs(value / sums[i] - 1));
  }
  return worst;
}

/// Whether a registry's device is one of compute capability 9.0, which alone has scales of rows.
bool is_hopper(const GemmRegistry& gemms) {
  const GemmProblem rows{
      .m = 16, .n = 16, .k = 16, .a_scales = Granularity::row, .b_scales = Granularity::row};
  const GemmRegistry::Choice choice = gemms.choose(rows);
  return choice.backend->name() == "cublaslt" && choice.support.verdict == GemmVerdict::native;
}

}  // namespace

TEST_CASE("GEMM: fast and promoted sums of 16384 positive values") {
  Case c = make_case({.m = 48, .n = 32, .k = 16384}, Values::normal, 5);
  // Without signs, so that sums grow all the way.
  for (Operand* x : {&c.a, &c.b}) {
    for (std::uint8_t& code : x->stored) code &= 0x7F;
    for (double& value : x->values) value = std::abs(value);
  }
  std::vector<double> sums;
  for (std::int64_t i = 0; i < c.p.m; ++i) {
    for (std::int64_t j = 0; j < c.p.n; ++j) sums.push_back(expected_at(c, i, j).sum);
  }
  for (const Context& ctx : test_contexts()) {
    GemmRegistry gemms(ctx);
    if (gemms.choose(c.p).support.verdict != GemmVerdict::native) {
      WARN("skipped: " << to_string(ctx.device()) << " has no FP8 products");
      continue;
    }
    c.p = with(c.p, Accumulation::promoted);
    const Bytes promoted = run(gemms, c).d;
    c.p = with(c.p, Accumulation::fast);
    const Bytes fast = run(gemms, c).d;
    const double promoted_error = worst_error(promoted, sums), fast_error = worst_error(fast, sums);
    CAPTURE(promoted_error, fast_error, to_string(ctx.device()));
    if (ctx.device().type == DeviceType::cpu) {
      CHECK(first_difference(fast, promoted) == "");
      CHECK(promoted_error <= (128.0 + 128.0) * std::ldexp(1.0, -24));
      continue;
    }
    // Partial sums of 128 with about 13 bits, cut and not rounded; without promotion all 512 steps.
    CHECK(promoted_error <= std::ldexp(1.0, -10));
    CHECK(fast_error <= 512 * std::ldexp(1.0, -13));
    if (is_hopper(gemms)) CHECK(10 * promoted_error <= fast_error);
  }
}

TEST_CASE("GEMM: the same bits in every run where the problem asks for it") {
  // Long sums and few elements of D: what is fastest in parts that are added up somehow.
  for (const Context& ctx : test_contexts()) {
    for (DType dtype : {DType::e4m3, DType::bf16, DType::f32}) {
      for (bool prepared : {false, true}) {
        GemmRegistry gemms(ctx);
        GemmProblem p{.m = 16, .n = 64, .k = 16384, .a = dtype, .b = dtype, .deterministic = true};
        if (prepared) gemms.prepare(p);
        const Case c = make_case(p, Values::normal, 9);
        const Bytes first = run(gemms, c).d;
        REQUIRE(!first.empty());
        for (int i = 0; i < (ctx.device().type == DeviceType::cpu ? 2 : 20); ++i) {
          INFO(to_string(p) << (prepared ? " prepared" : "") << ", run " << i);
          REQUIRE(first_difference(run(gemms, c).d, first) == "");
        }
      }
    }
  }
}

TEST_CASE("GEMM on every device: 8 and a prime number of rows, columns and summands") {
  for (const Context& ctx : test_contexts()) {
    GemmRegistry gemms(ctx);
    for (DType dtype : {DType::e4m3, DType::bf16}) {
      for (std::int64_t size : {8, 5743}) {
        for (int which = 0; which < 3; ++which) {
          const GemmProblem p{.m = which == 0 ? size : 16,
                              .n = which == 1 ? size : 16,
                              .k = which == 2 ? size : 32,
                              .a = dtype,
                              .b = dtype,
                              .d = which == 2 ? DType::f32 : DType::bf16};
          const Case c = make_case(p);
          REQUIRE(mistake(c, run(gemms, c), 0.0) == "");
        }
      }
    }
  }
}

TEST_CASE("GEMM on every device: without summands what is left is D, bias and activation") {
  for (const Context& ctx : test_contexts()) {
    GemmRegistry gemms(ctx);
    for (bool accumulate : {false, true}) {
      for (bool bias : {false, true}) {
        for (Granularity scales : {Granularity::tensor, Granularity::row_block}) {
          const GemmProblem p{.m = 5,
                              .n = 24,
                              .k = 0,
                              .d = accumulate ? DType::f32 : DType::e4m3,
                              .a_scales = scales,
                              .b_scales = scales,
                              .accumulate = accumulate,
                              .bias = bias,
                              .activation = Activation::gelu};
          const Case c = make_case(p);
          REQUIRE(mistake(c, run(gemms, c), 1e-6) == "");
        }
      }
    }
  }
}

TEST_CASE("dequant_bf16 on every device: mx scales at the ends of their range") {
  // 448 * 2^-127 is a normal BF16: a scale of byte 0 that is read as zero would lose it.
  struct Known {
    int byte;
    std::uint8_t code;
    double value;
  };
  const Known knowns[] = {{0, 0x7E, std::ldexp(448.0, -127)},
                          {1, 0x38, std::ldexp(1.0, -126)},
                          {127 + 119, 0x7E, std::ldexp(448.0, 119)},
                          {254, 0x38, std::ldexp(1.0, 127)},
                          {255, 0x38, NAN}};
  for (const Context& ctx : test_contexts()) {
    GemmRegistry gemms(ctx);
    gemms.force("dequant_bf16");
    const GemmProblem p{.m = 1, .n = 8, .k = 32, .b = DType::bf16, .a_scales = Granularity::mx};
    Context here = ctx;
    here.reserve_workspace(gemms.choose(p).support.workspace_bytes);
    for (const Known& known : knowns) {
      INFO("byte " << known.byte << " on " << to_string(ctx.device()));
      Bytes scales(512, 0xFF), a(32, 0), b;
      scales[0] = static_cast<std::uint8_t>(known.byte);
      a[0] = known.code;
      for (int i = 0; i < 8 * 32; ++i) append_rounded(b, DType::bf16, 1.0f);
      const Buffer a_data = upload(ctx, a), b_data = upload(ctx, b), decodes = upload(ctx, scales);
      const Guarded d(ctx, 8 * sizeof(float));
      gemms.run(
          p, {.a = a_data.data(), .a_scales = decodes.data(), .b = b_data.data(), .d = d.data()});
      const auto value = static_cast<double>(d.values<float>()[3]);
      CHECK((std::isnan(known.value) ? std::isnan(value) : value == known.value));
    }
  }
}
