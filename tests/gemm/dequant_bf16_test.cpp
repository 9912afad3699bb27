// SPDX-License-Identifier: Apache-2.0
// What dequant_bf16 does beyond the cases of all backends: its answers, its workspace, the epilogue
// on its own, the rounding of operands.
#include "octet/gemm/dequant_bf16.hpp"

#include "gemm/cases.hpp"
#include "support/catch.hpp"
#include "support/compare.hpp"
#include "support/errors.hpp"

using namespace octet;
using namespace octet::test;

namespace {

/// The reference, but nothing except plain products to f32; takes notes.
class Plain final : public GemmBackend {
 public:
  std::string name() const override { return "plain"; }
  std::string version() const override { return "7"; }
  GemmSupport query(const GemmProblem& p, const GemmDevice& device) const override {
    if (p.d != DType::f32 || p.ldd != 0) return {GemmVerdict::no, "d is not plain"};
    if (p.accumulate || p.bias || p.activation != Activation::none) {
      return {GemmVerdict::no, "there is an epilogue"};
    }
    if (p.k == 13) return {GemmVerdict::no, "k is 13"};
    return {GemmVerdict::native, "plain", 1000, 10 + reference->query(p, device).converted_bytes};
  }
  void run(const Context& ctx, const GemmProblem& p, const GemmArgs& args) override {
    last = p;
    WorkspaceScope scope(ctx);
    scope.take(1000);
    reference->run(ctx, p, args);
  }
  std::vector<std::string> candidates(const Context&, const GemmProblem& p) override {
    return {"way of " + to_string(p.a)};
  }
  bool select(const Context&, const GemmProblem& p, const std::string& candidate) override {
    return p.a == DType::bf16 && candidate == "way of bf16";
  }
  static std::string to_string(DType dtype) { return std::string(name_of(dtype)); }

  std::unique_ptr<GemmBackend> reference = make_reference_gemm();
  GemmProblem last;
};

Result run_on(GemmBackend& backend, const Case& c) {
  Context ctx = Context::cpu();
  ctx.reserve_workspace(backend.query(c.p, {}).workspace_bytes);
  const GemmPlan plan = backend.plan(ctx, c.p);
  const Result planned = run_case(ctx, c, [&](const GemmArgs& args) { plan(ctx, args); });
  const Result result =
      run_case(ctx, c, [&](const GemmArgs& args) { backend.run(ctx, c.p, args); });
  REQUIRE(first_difference(planned.d, result.d) == "");
  return result;
}

}  // namespace

TEST_CASE("dequant_bf16: an inner backend without epilogues gets a plain product") {
  Plain plain;
  const auto backend = make_dequant_bf16_gemm(plain);
  for (DType d : {DType::f32, DType::bf16, DType::f16, DType::e4m3, DType::e5m2}) {
    for (int bits = 0; bits < 16; ++bits) {
      GemmProblem p{.m = 19, .n = 24, .k = 150, .d = d, .b_scales = Granularity::tile};
      if ((bits & 1) != 0) p.bias = true;
      if ((bits & 2) != 0) p.accumulate = d == DType::f32 || d == DType::bf16;
      if ((bits & 4) != 0) p.activation = Activation::gelu, p.aux = true;
      if ((bits & 8) != 0) p.ldd = 31;
      const Case c = make_case(p);
      REQUIRE(mistake(c, run_on(*backend, c), p.activation == Activation::none ? 0.0 : 1e-6) == "");
      CHECK(plain.last ==
            GemmProblem{.m = 19, .n = 24, .k = 150, .a = DType::bf16, .b = DType::bf16});
    }
  }
}

TEST_CASE("dequant_bf16: the workspace of its answer is enough and needed") {
  for (int which = 0; which < 3; ++which) {
    Plain plain;
    const auto make = [&] { return make_dequant_bf16_gemm(which == 0 ? *plain.reference : plain); };
    GemmProblem p{.m = 7, .n = 9, .k = 140, .b_scales = Granularity::mx};
    if (which == 2) p.bias = true;
    const std::size_t bytes = make()->query(p, {}).workspace_bytes;
    const Case c = make_case(p);
    for (std::size_t less : {std::size_t{0}, std::size_t{256}}) {
      Context ctx = Context::cpu();
      ctx.reserve_workspace(bytes - less);
      const auto backend = make();
      const std::string message = error_of(
          [&] { run_case(ctx, c, [&](const GemmArgs& args) { backend->run(ctx, p, args); }); });
      CHECK((message == "no error") == (less == 0));
    }
  }
}

TEST_CASE("dequant_bf16: answers name bytes, the inner backend and what is in the way") {
  Plain plain;
  const auto backend = make_dequant_bf16_gemm(plain);
  CHECK(backend->name() == "dequant_bf16");
  CHECK(backend->version() == "plain 7");
  GemmProblem p{.m = 7, .n = 9, .k = 140, .a_scales = Granularity::row_block};
  GemmSupport support = backend->query(p, {});
  CHECK(support.verdict == GemmVerdict::with_conversion);
  CHECK(missing(support.reason, {"BF16", "plain"}) == "");
  // 7 x 140 and 9 x 140 in BF16, each padded to 256, and the inner backend's.
  CHECK(support.workspace_bytes == 2048 + 2560 + 1024);
  // FP8 in, BF16 out; 2 blocks of 16 padded rows of scales, one scale; the inner backend's.
  CHECK(support.converted_bytes == 3 * (7 + 9) * 140 + 2 * 16 * 4 + 4 + 10);
  p.bias = true;
  support = backend->query(p, {});
  CHECK(support.workspace_bytes == 2048 + 2560 + 256 + 1024);
  CHECK(support.converted_bytes == 3 * (7 + 9) * 140 + 2 * 16 * 4 + 4 + 10 + 2 * 4 * 7 * 9);
  p.a = DType::bf16, p.a_scales = Granularity::tensor;  // what is BF16 already moves nothing
  support = backend->query(p, {});
  CHECK(support.workspace_bytes == 2560 + 256 + 1024);
  CHECK(support.converted_bytes == 3 * 9 * 140 + 4 + 10 + 2 * 4 * 7 * 9);

  const auto refused = [&](const GemmProblem& problem) {
    const GemmSupport answer = backend->query(problem, {});
    return answer.verdict == GemmVerdict::no ? answer.reason : "yes";
  };
  CHECK(missing(refused({.m = 1, .n = 1, .k = 13}), {"as BF16 by plain", "k is 13"}) == "");
  CHECK(missing(refused({.m = 1, .n = 1, .k = 1, .a = DType::bf16, .b = DType::bf16}),
                {"a is bf16 and b is bf16", "FP8"}) == "");
  for (DType wide : {DType::f32, DType::f16}) {
    CHECK(missing(refused({.m = 1, .n = 1, .k = 1, .b = wide}),
                  {"b is " + std::string(name_of(wide)), "bf16"}) == "");
  }
  CHECK(missing(refused({.m = 1, .n = 1, .k = 1, .accumulation = Accumulation::exact}),
                {"exact"}) == "");
  CHECK(missing(refused({.m = 1, .n = 1, .k = 4, .lda = 3}), {"lda is 3"}) == "");
  const Context ctx = Context::cpu();
  CHECK(missing(error_of([&] { backend->run(ctx, {.m = 1, .n = 1, .k = 13}, {}); }),
                {"k=13", "k is 13"}) == "");
}

TEST_CASE("dequant_bf16: answers without a device") {
  GemmProblem p{.m = 5, .n = 16, .k = 32, .a = DType::e5m2, .b = DType::e5m2};
  p.b_scales = Granularity::mx;
  CHECK(query_dequant_bf16(p, {}).verdict == GemmVerdict::with_conversion);
  CHECK(missing(query_dequant_bf16(p, {}).reason, {"reference"}) == "");
  const GemmSupport cuda = query_dequant_bf16(p, {DeviceType::cuda, 90});
  CHECK(cuda.verdict == GemmVerdict::with_conversion);
  CHECK(missing(cuda.reason, {"cublaslt"}) == "");
  CHECK(query_dequant_bf16(p, {DeviceType::cuda, 70}).verdict == GemmVerdict::no);
}

TEST_CASE("dequant_bf16: ways to run are the inner backend's") {
  const Context ctx = Context::cpu();
  Plain plain;
  const auto backend = make_dequant_bf16_gemm(plain);
  const GemmProblem p{.m = 5, .n = 16, .k = 32};
  CHECK(backend->candidates(ctx, p) == std::vector<std::string>{"way of bf16"});
  CHECK(backend->select(ctx, p, "way of bf16"));
  CHECK_FALSE(backend->select(ctx, p, "another"));
}

TEST_CASE("dequant_bf16: an operand is scaled and rounded once, on every device") {
  // One column of B that is 1, so that D is the operand as BF16.
  for (const Context& ctx : test_contexts()) {
    for (DType dtype : {DType::e4m3, DType::e5m2}) {
      for (float scale : {0.7f, 3e-5f, 1.0f}) {
        Backends backends(ctx);
        Bytes codes;
        std::vector<double> values;
        for (std::uint32_t code = 0; code < 256; ++code) {
          const double value = table_of(dtype).decode(code);
          const bool finite = std::isfinite(value);
          codes.push_back(static_cast<std::uint8_t>(finite ? code : 0));
          values.push_back(finite ? value : 0.0);
        }
        // 256 rows of 16 elements, of which the first counts.
        Bytes a(256 * 16, 0), b(16, 0);
        for (std::size_t i = 0; i < 256; ++i) a[i * 16] = codes[i];
        b[0] = 0x38;
        const Buffer a_data = upload(ctx, a), b_data = upload(ctx, b);
        const Buffer scales = upload(ctx, std::vector<float>{scale, 0, 0, 0, 1});
        const Guarded d(ctx, 256 * 4);
        const GemmProblem p{.m = 256, .n = 1, .k = 16, .a = dtype};
        GemmBackend& backend = *backends.list.front();
        REQUIRE(backend.name() == "dequant_bf16");
        Context here = ctx;
        here.reserve_workspace(backend.query(p, backends.device).workspace_bytes);
        backend.run(here, p,
                    {.a = a_data.data(),
                     .a_scales = scales.as<float>(),
                     .b = b_data.data(),
                     .b_scales = scales.as<float>() + 4,
                     .d = d.data()});
        here.synchronize();
        const auto got = d.values<float>();
        for (std::size_t i = 0; i < 256; ++i) {
          const float product = static_cast<float>(values[i]) * scale;
          CHECK(static_cast<double>(got[i]) ==
                table_of(DType::bf16).round(static_cast<double>(product)));
        }
      }
    }
  }
}
