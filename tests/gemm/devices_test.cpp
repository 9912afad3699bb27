// SPDX-License-Identifier: Apache-2.0
// One list of problems on every device: whatever a registry says yes to must be right.
#include "gemm/matrices.hpp"
#include "octet/gemm/gemm.hpp"
#include "support/catch.hpp"
#include "support/compare.hpp"
#include "support/gemm_error.hpp"

using namespace octet;
using namespace octet::test;

namespace {

std::vector<GemmProblem> problems() {
  const std::pair<DType, DType> kOperands[] = {{DType::e4m3, DType::e4m3},
                                               {DType::e4m3, DType::e5m2},
                                               {DType::e5m2, DType::e4m3},
                                               {DType::bf16, DType::bf16},
                                               {DType::f32, DType::f32}};
  const std::int64_t kSizes[][3] = {{1, 16, 16},   {17, 48, 80},  {5, 8, 32},
                                    {40, 64, 272}, {129, 32, 16}, {16, 12, 128}};
  std::vector<GemmProblem> list;
  for (const auto& [a, b] : kOperands) {
    for (const auto& s : kSizes) {
      for (DType d : {DType::f32, DType::bf16}) {
        // Fast accumulation says something about FP8 only.
        for (int bits = 0; bits < (is_fp8(a) ? 8 : 4); ++bits) {
          GemmProblem p{s[0], s[1], s[2], a, b, d, (bits & 1) != 0, (bits & 2) != 0};
          if ((bits & 4) != 0) p.accumulation = Accumulation::fast;
          list.push_back(p);
        }
      }
    }
  }
  return list;
}

Bytes run(GemmRegistry& gemms, const GemmProblem& p, const Matrix& a, const Matrix& b) {
  return multiply(gemms.context(), p, a, b, [&](const GemmArgs& args) { gemms.run(p, args); });
}

/// Relative to the sum of magnitudes; what is not FP8 on tensor cores is added in FP32.
double allowed_error(const GemmProblem& p, DeviceType type) {
  if (type == DeviceType::cuda && is_fp8(p.a))
    return p.accumulation == Accumulation::fast ? kFastError : kPromotedError;
  return static_cast<double>(p.k) * std::ldexp(1.0, -24);
}

}  // namespace

TEST_CASE("GEMM on every device: exact for small integers, bounded for others") {
  for (const Context& ctx : test_contexts()) {
    GemmRegistry gemms(ctx);
    std::int64_t fp8 = 0;
    for (const GemmProblem& p : problems()) {
      INFO(to_string(ctx.device()) << " " << to_string(p));
      const GemmRegistry::Choice choice = gemms.choose(p);
      if (choice.backend == nullptr) continue;
      Context(ctx).reserve_workspace(choice.support.workspace_bytes);
      const Matrix a = integer_matrix(p.a, p.a_transposed, 0.25f, p.m, p.k, 21);
      const Matrix b = integer_matrix(p.b, p.b_transposed, 8.0f, p.n, p.k, 22);
      REQUIRE(first_difference(run(gemms, p, a, b), exact_product(p, a, b)) == "");
      const Matrix x = normal_matrix(p.a, p.a_transposed, 0.25f, p.m, p.k, 23);
      const Matrix y = normal_matrix(p.b, p.b_transposed, 0.5f, p.n, p.k, 24);
      const Bytes d = run(gemms, p, x, y);
      REQUIRE(beyond_bound(p, x, y, d, allowed_error(p, ctx.device().type)) == "");
      REQUIRE(first_difference(run(gemms, p, x, y), d) == "");  // the cached plan, the same bits
      if (is_fp8(p.a)) fp8 += 3;
    }
    CHECK(gemms.counts().fp8 == fp8);
    CHECK(gemms.counts().bf16 > 0);
    CHECK(gemms.counts().f32 > 0);
    if (ctx.device().type == DeviceType::cpu) CHECK(fp8 > 0);
  }
}

TEST_CASE("GEMM on every device: pointers that change from call to call") {
  for (const Context& ctx : test_contexts()) {
    GemmRegistry gemms(ctx);
    const GemmProblem p{.m = 16, .n = 32, .k = 64, .d = DType::bf16, .bias = true};
    const GemmProblem q{.m = 16, .n = 32, .k = 64, .d = DType::e4m3};
    for (const GemmProblem& each : {p, q}) {
      Context(ctx).reserve_workspace(gemms.choose(each).support.workspace_bytes);
    }
    const Buffer ones = upload(ctx, Bytes(32 * 64, 0x38));  // of E4M3: every sum is 64
    Buffer scales[2], biases[2], amax = upload(ctx, std::vector<float>{1e9f});
    for (int i = 0; i < 2; ++i) {
      scales[i] = upload(ctx, std::vector<float>{i == 0 ? 1.0f : 0.25f, 0, 0, 0});
      biases[i] = upload(ctx, std::vector<std::uint16_t>(32, i == 0 ? 0x0000 : 0x4040));  // 3
    }
    const Guarded d(ctx, 16 * 32 * 2);
    const auto check_all = [&](DType dtype, double wanted) {
      const Bytes got = d.values<std::uint8_t>();
      for (std::int64_t i = 0; i < 16 * 32; ++i) {
        const double value = dtype == DType::bf16
                                 ? decode_at(got, dtype, i)
                                 : table_of(dtype).decode(got[static_cast<std::size_t>(i)]);
        REQUIRE(value == wanted);
      }
    };
    for (int bits : {0, 1, 2, 3, 0, 7, 4, 5, 1, 8, 15, 0, 8}) {
      INFO(to_string(ctx.device()) << ", pointers " << bits);
      const int of_a = bits & 1, of_b = bits >> 1 & 1, third = bits >> 2 & 1;
      const double sum = 64 * (of_a != 0 ? 0.25 : 1) * (of_b != 0 ? 0.25 : 1);
      GemmArgs args{.a = ones.data(),
                    .a_scales = scales[of_a].data(),
                    .b = ones.data(),
                    .b_scales = scales[of_b].data(),
                    .d = d.data()};
      args.bias = biases[third].data();
      gemms.run(p, args);
      check_all(p.d, sum + 3 * third);
      args.bias = nullptr;
      args.d_scale = scales[third].as<float>();
      const bool with_amax = (bits & 8) != 0;
      write_one(ctx, amax.data(), 1e9f);
      if (with_amax) args.d_amax = amax.as<float>();
      gemms.run(q, args);
      check_all(q.d, sum * (third != 0 ? 0.25 : 1));
      CHECK(static_cast<double>(download_one<float>(ctx, amax.data())) == (with_amax ? sum : 1e9));
    }
  }
}

TEST_CASE("GEMM on every device: products of contexts of their own run in turn") {
  for (const Context& ctx : test_contexts()) {
    GemmRegistry first(ctx), second(ctx);
    for (std::uint32_t seed : {1u, 2u}) {
      const Matrix a = integer_matrix(DType::bf16, false, 1.0f, 33, 64, seed);
      const Matrix b = integer_matrix(DType::bf16, true, 1.0f, 24, 64, seed + 10);
      const GemmProblem p = problem_of(33, 24, 64, a, b, DType::f32);
      CHECK(first_difference(run(first, p, a, b), exact_product(p, a, b)) == "");
      CHECK(first_difference(run(second, p, a, b), exact_product(p, a, b)) == "");
    }
  }
}
