// SPDX-License-Identifier: Apache-2.0
#include <cstdlib>

#include "gemm/matrices.hpp"
#include "octet/gemm/gemm.hpp"
#include "support/catch.hpp"
#include "support/compare.hpp"
#include "support/errors.hpp"

using namespace octet;
using namespace octet::test;

namespace {

/// Runs only problems of one m; fills D with a byte and counts its calls.
class Stub final : public GemmBackend {
 public:
  Stub(std::string name, std::int64_t m, int* calls) : name_(name), m_(m), calls_(calls) {}
  std::string name() const override { return name_; }
  GemmSupport query(const GemmProblem& p, const GemmDevice&) const override {
    if (p.m == m_) return {GemmVerdict::native, "a stub"};
    return {GemmVerdict::no, "m is not " + std::to_string(m_)};
  }
  void run(const Context&, const GemmProblem&, const GemmArgs&) override { ++*calls_; }

 private:
  std::string name_;
  std::int64_t m_;
  int* calls_;
};

/// Counts its plans and what they run.
class Planner final : public GemmBackend {
 public:
  explicit Planner(int* plans, int* runs) : plans_(plans), runs_(runs) {}
  std::string name() const override { return "planner"; }
  GemmSupport query(const GemmProblem&, const GemmDevice&) const override {
    return {GemmVerdict::native, "a planner"};
  }
  void run(const Context&, const GemmProblem&, const GemmArgs&) override {
    fail("run() of a backend with plans");
  }
  GemmPlan plan(const Context&, const GemmProblem& problem) override {
    ++*plans_;
    return [this, m = problem.m](const Context&, const GemmArgs& args) {
      *runs_ += static_cast<int>(m);
      require(args.d != nullptr, "d is null");
    };
  }

 private:
  int *plans_, *runs_;
};

struct Fixture {
  Context ctx = Context::cpu();
  GemmRegistry gemms{ctx};
  Buffer operand{ctx, 4096};
  Buffer scale = upload(ctx, std::vector<float>{1.0f});
  Guarded d{ctx, 1024};

  Fixture() { zero_bytes(ctx, operand.data(), operand.bytes()); }
  GemmArgs args() const {
    return {operand.data(), scale.as<float>(), operand.data(), scale.as<float>(), d.data()};
  }
  bool untouched() const {
    return first_difference(d.values<std::uint8_t>(), Bytes(d.bytes(), Guarded::kFill)) == "";
  }
};

}  // namespace

TEST_CASE_METHOD(Fixture, "registry: the backend added last is asked first") {
  const GemmProblem p{.m = 7, .n = 2, .k = 3};
  CHECK(gemms.choose(p).backend->name() == "reference");
  gemms.run(p, args());
  CHECK_FALSE(untouched());
  int older = 0, newer = 0;
  gemms.add(std::make_unique<Stub>("older", 7, &older));
  gemms.run(p, args());
  CHECK(older == 1);
  gemms.add(std::make_unique<Stub>("newer", 7, &newer));
  gemms.run(p, args());
  CHECK((older == 1 && newer == 1));
  CHECK(gemms.choose(p).backend->name() == "newer");
  CHECK(missing(gemms.choose(p).report,
                {"newer: native, a stub\nolder: native, a stub\nreference: native, "}) == "");
  gemms.run({.m = 8, .n = 2, .k = 3}, args());
  CHECK((older == 1 && newer == 1));
}

TEST_CASE_METHOD(Fixture, "registry: a backend plans a problem once, and its plan is what runs") {
  int plans = 0, runs = 0;
  gemms.add(std::make_unique<Planner>(&plans, &runs));
  const GemmProblem p{.m = 7, .n = 2, .k = 3}, q{.m = 10, .n = 2, .k = 3};
  for (int i = 0; i < 3; ++i) gemms.run(p, args());
  CHECK((plans == 1 && runs == 21));
  gemms.run(q, args());
  CHECK((plans == 2 && runs == 31));
  gemms.run({.m = 7, .n = 2, .k = 0}, args());  // nothing to multiply, nothing to plan
  gemms.run({.m = 0, .n = 2, .k = 3}, args());
  CHECK((plans == 2 && runs == 31));
  gemms.force("reference");
  gemms.run(p, args());
  gemms.force("");
  gemms.run(p, args());
  CHECK((plans == 3 && runs == 38));
}

TEST_CASE("registry: its backends share one vendor library and that one's workspace") {
  for (const Context& ctx : test_contexts()) {
    const std::size_t before = ctx.memory_use().current;
    GemmRegistry gemms(ctx);
    const bool is_cpu = ctx.device().type == DeviceType::cpu;
    CHECK(ctx.memory_use().current - before == (is_cpu ? 0u : std::size_t{32} << 20));
  }
}

TEST_CASE_METHOD(Fixture, "registry: the report has a line for each backend asked") {
  int calls = 0;
  gemms.add(std::make_unique<Stub>("seven", 7, &calls));
  gemms.add(std::make_unique<Stub>("nine", 9, &calls));
  const GemmRegistry::Choice choice = gemms.choose({.m = 8, .n = 2, .k = 3});
  CHECK(choice.backend->name() == "reference");
  CHECK(missing(choice.report,
                {"nine: no, m is not 9\nseven: no, m is not 7\nreference: native, "}) == "");
  gemms.force("seven");
  const GemmProblem f16{.m = 8, .n = 2, .k = 3, .a = DType::f16};
  CHECK(gemms.choose(f16).backend == nullptr);
  CHECK(missing(error_of([&] { gemms.run(f16, args()); }),
                {"gemm m=8 n=2 k=3 a=f16 b=e4m3 d=f32", "nine: not asked", "seven: no, m is not 7",
                 "reference: not asked"}) == "");
  gemms.force("");
  CHECK(calls == 0);
  CHECK(untouched());
  CHECK(missing(error_of([&] { gemms.add(nullptr); }), {"null"}) == "");
}

TEST_CASE_METHOD(Fixture, "registry: counts by the type of the operands") {
  const auto run = [&](DType a, DType b) {
    gemms.run({.m = 2, .n = 2, .k = 2, .a = a, .b = b}, args());
  };
  run(DType::e4m3, DType::e4m3);
  run(DType::e5m2, DType::bf16);
  run(DType::f32, DType::e4m3);
  run(DType::bf16, DType::bf16);
  run(DType::f32, DType::bf16);
  run(DType::f32, DType::f32);
  CHECK(gemms.counts().fp8 == 3);
  CHECK(gemms.counts().bf16 == 2);
  CHECK(gemms.counts().f32 == 1);
  CHECK(gemms.counts().with_conversion == 0);
  gemms.force("dequant_bf16");
  gemms.prepare({.m = 2, .n = 2, .k = 2});
  run(DType::e4m3, DType::e4m3);
  gemms.force({});
  run(DType::e4m3, DType::e4m3);
  CHECK(gemms.counts().fp8 == 5);
  CHECK(gemms.counts().with_conversion == 1);
}

TEST_CASE_METHOD(Fixture, "registry: wrong arguments are named before anything runs") {
  const GemmProblem p{.m = 2, .n = 3, .k = 4};
  const auto message = [&](const GemmProblem& problem, const GemmArgs& wrong) {
    return error_of([&] { gemms.run(problem, wrong); });
  };
  const auto with = [&](auto change) {
    GemmArgs changed = args();
    change(changed);
    return message(p, changed);
  };
  CHECK(missing(message({.m = -1, .n = 3, .k = 4}, args()), {"m=-1", "negative"}) == "");
  CHECK(missing(message({.m = 2, .n = -3, .k = 4}, args()), {"n=-3", "negative"}) == "");
  CHECK(missing(message({.m = 2, .n = 3, .k = -4}, args()), {"k=-4", "negative"}) == "");
  CHECK(missing(with([](GemmArgs& x) { x.a = nullptr; }), {"m=2 n=3 k=4", "a is null"}) == "");
  CHECK(missing(with([](GemmArgs& x) { x.b = nullptr; }), {"b is null"}) == "");
  CHECK(missing(with([](GemmArgs& x) { x.d = nullptr; }), {"d is null"}) == "");
  CHECK(missing(with([](GemmArgs& x) { x.a_scales = nullptr; }), {"a_scales", "null"}) == "");
  CHECK(missing(with([](GemmArgs& x) { x.b_scales = nullptr; }), {"b_scales", "null"}) == "");
  const auto off = [](const void* pointer) { return static_cast<const char*>(pointer) + 8; };
  CHECK(missing(with([&](GemmArgs& x) { x.b = off(x.b); }), {"b is at", "16 bytes"}) == "");
  CHECK(untouched());
  CHECK(gemms.counts().fp8 == 0);
  // Only FP8 operands need a scale.
  CHECK(message({.m = 2, .n = 3, .k = 4, .a = DType::f32, .b = DType::bf16},
                {.a = operand.data(), .b = operand.data(), .d = d.data()}) == "no error");
}

TEST_CASE_METHOD(Fixture, "registry: pointers off by 1, 4 and 8 bytes are refused by name") {
  const GemmProblem p{.m = 4,
                      .n = 8,
                      .k = 16,
                      .d = DType::e4m3,
                      .bias = true,
                      .activation = Activation::gelu,
                      .aux = true};
  Buffer memory(ctx, 4096);
  zero_bytes(ctx, memory.data(), memory.bytes());
  char* base = memory.as<char>();
  const auto word = [&](int at) { return reinterpret_cast<float*>(base + at); };
  const GemmArgs good{.a = base,
                      .a_scales = word(1024),
                      .b = base + 256,
                      .b_scales = word(1040),
                      .d = d.data(),
                      .bias = base + 2048,
                      .aux = base + 3072,
                      .d_scale = word(1056),
                      .d_amax = word(1072)};
  CHECK(error_of([&] { gemms.run(p, good); }) == "no error");
  const Bytes before = d.values<std::uint8_t>();
  const auto message = [&](auto GemmArgs::*pointer, int bytes) {
    GemmArgs args = good;
    auto& moved = args.*pointer;
    moved = reinterpret_cast<std::remove_reference_t<decltype(moved)>>(
        reinterpret_cast<std::uintptr_t>(moved) + static_cast<std::uintptr_t>(bytes));
    return error_of([&] { gemms.run(p, args); });
  };
  for (int bytes : {1, 4, 8}) {
    CHECK(missing(message(&GemmArgs::a, bytes), {": a is at", "16 bytes"}) == "");
    CHECK(missing(message(&GemmArgs::a_scales, bytes), {": a_scales is at", "16 bytes"}) == "");
    CHECK(missing(message(&GemmArgs::b, bytes), {": b is at", "16 bytes"}) == "");
    CHECK(missing(message(&GemmArgs::b_scales, bytes), {": b_scales is at", "16 bytes"}) == "");
    CHECK(missing(message(&GemmArgs::d, bytes), {": d is at", "16 bytes"}) == "");
    CHECK(missing(message(&GemmArgs::bias, bytes), {": bias is at", "16 bytes"}) == "");
    CHECK(missing(message(&GemmArgs::aux, bytes), {": aux is at", "16 bytes"}) == "");
    CHECK(missing(message(&GemmArgs::d_scale, bytes), {": d_scale is at", "16 bytes"}) == "");
    CHECK(missing(message(&GemmArgs::d_amax, bytes), {": d_amax is at", "16 bytes"}) == "");
  }
  CHECK(first_difference(d.values<std::uint8_t>(), before) == "");
}

TEST_CASE_METHOD(Fixture, "registry: a D that overlaps what is read is refused") {
  const GemmProblem p{.m = 4, .n = 8, .k = 16};
  Buffer memory(ctx, 4096);
  zero_bytes(ctx, memory.data(), memory.bytes());
  char* base = memory.as<char>();
  // D has 128 bytes, A 64, B 128, a scale 4.
  const GemmArgs good{base + 128, reinterpret_cast<float*>(base + 1024), base + 256,
                      reinterpret_cast<float*>(base + 1040), base};
  const auto message = [&](auto change) {
    GemmArgs changed = good;
    change(changed);
    return error_of([&] { gemms.run(p, changed); });
  };
  CHECK(message([](GemmArgs&) {}) == "no error");
  CHECK(missing(message([&](GemmArgs& x) { x.a = base + 112; }),
                {"d (128 bytes", "overlaps a (64 bytes", "apart"}) == "");
  CHECK(missing(message([&](GemmArgs& x) { x.d = base + 176; }), {"overlaps a"}) == "");
  CHECK(missing(message([&](GemmArgs& x) { x.d = base + 368; }), {"overlaps b (128"}) == "");
  CHECK(missing(message([&](GemmArgs& x) { x.d = base + 1024; }), {"a_scales"}) == "");
  CHECK(missing(message([&](GemmArgs& x) { x.d = base + 928; }), {"a_scales (4"}) == "");
  CHECK(missing(message([&](GemmArgs& x) {
                  x.a_scales = reinterpret_cast<float*>(base + 2048);
                  x.d = base + 928;
                }),
                {"b_scales (4"}) == "");
  CHECK(message([&](GemmArgs& x) { x.d = base + 384; }) == "no error");
  CHECK(message([&](GemmArgs& x) { x.b = x.a; }) == "no error");
}

TEST_CASE_METHOD(Fixture, "registry: aux and the amax of D are kept apart from the rest too") {
  Buffer memory(ctx, 8192);
  zero_bytes(ctx, memory.data(), memory.bytes());
  char* base = memory.as<char>();
  const GemmProblem p{.m = 4,
                      .n = 8,
                      .k = 16,
                      .d = DType::e4m3,
                      .ldd = 32,
                      .bias = true,
                      .activation = Activation::gelu,
                      .aux = true};
  GemmArgs good{base, base + 1024, base + 256, base + 1040, base + 2048, base + 1056};
  good.aux = base + 4096;
  good.d_scale = reinterpret_cast<float*>(base + 1072);
  good.d_amax = reinterpret_cast<float*>(base + 1088);
  const auto message = [&](auto change) {
    GemmArgs changed = good;
    change(changed);
    return error_of([&] { gemms.run(p, changed); });
  };
  CHECK(message([](GemmArgs&) {}) == "no error");
  // Three rows of 32 and one of 8.
  CHECK(missing(message([&](GemmArgs& x) { x.d = base + 1072 - 96; }),
                {"d (104 bytes", "overlaps"}) == "");
  CHECK(missing(message([&](GemmArgs& x) { x.aux = base + 2128; }), {"d (104", "aux (64"}) == "");
  CHECK(missing(message([&](GemmArgs& x) { x.aux = base + 256; }), {"aux (64", "b (128"}) == "");
  CHECK(missing(message([&](GemmArgs& x) { x.bias = base + 4112; }), {"aux", "bias (16"}) == "");
  CHECK(missing(message([&](GemmArgs& x) { x.d_amax = reinterpret_cast<float*>(base + 2064); }),
                {"d (104", "d_amax (4"}) == "");
  CHECK(missing(message([&](GemmArgs& x) { x.d_amax = reinterpret_cast<float*>(base + 16); }),
                {"d_amax", "a (64"}) == "");
}

TEST_CASE("registry: problems that contradict themselves are refused by everybody") {
  GemmRegistry gemms(Context::cpu());
  const GemmProblem good{.m = 16, .n = 16, .k = 128};
  const auto message = [&](auto change) {
    GemmProblem changed = good;
    change(changed);
    return error_of([&] { gemms.choose(changed); });
  };
  CHECK(message([](GemmProblem&) {}) == "no error");
  CHECK(missing(message([](GemmProblem& p) { p.lda = 127; }), {"lda is 127", "128"}) == "");
  CHECK(missing(message([](GemmProblem& p) { p.b_transposed = true, p.ldb = 15; }),
                {"ldb is 15", "16"}) == "");
  CHECK(missing(message([](GemmProblem& p) { p.ldd = -16; }), {"ldd is -16"}) == "");
  CHECK(missing(message([](GemmProblem& p) { p.a = DType::bf16, p.a_scales = Granularity::tile; }),
                {"a_scales are tile", "a is bf16"}) == "");
  CHECK(
      missing(message([](GemmProblem& p) { p.b_transposed = true, p.b_scales = Granularity::mx; }),
              {"b is transposed", "mx"}) == "");
  CHECK(missing(message([](GemmProblem& p) { p.accumulate = true, p.d = DType::e4m3; }),
                {"accumulate", "e4m3", "f32 and bf16"}) == "");
  CHECK(missing(message([](GemmProblem& p) { p.aux = true; }),
                {"aux is set", "activation is none"}) == "");
  CHECK(missing(message([](GemmProblem& p) { p.activation = Activation::dgelu; }),
                {"dgelu", "aux is not set"}) == "");
  CHECK(missing(message([](GemmProblem& p) { p.bias = true, p.bias_type = DType::e5m2; }),
                {"bias_type is e5m2"}) == "");
  // What is no value of an enumeration has no name that could be printed.
  CHECK(missing(message([](GemmProblem& p) { p.a = DType(9); }), {"a is 9", "e5m2"}) == "");
  CHECK(missing(message([](GemmProblem& p) { p.aux_type = DType(5); }), {"aux_type is 5"}) == "");
  CHECK(missing(message([](GemmProblem& p) { p.b_scales = Granularity(5); }),
                {"b_scales is 5", "row_block"}) == "");
  CHECK(missing(message([](GemmProblem& p) { p.accumulation = Accumulation(3); }),
                {"accumulation is 3", "promoted, fast and exact"}) == "");
  CHECK(missing(message([](GemmProblem& p) { p.activation = Activation(7); }),
                {"activation is 7", "gelu"}) == "");
}

TEST_CASE_METHOD(Fixture, "registry: arguments that the problem does not have are refused") {
  const GemmProblem p{.m = 2, .n = 3, .k = 4};
  const auto with = [&](auto change) {
    GemmArgs changed = args();
    change(changed);
    return error_of([&] { gemms.run(p, changed); });
  };
  CHECK(missing(with([&](GemmArgs& x) { x.bias = operand.data(); }), {"bias is given"}) == "");
  CHECK(missing(with([&](GemmArgs& x) { x.aux = operand.data(); }), {"aux is given"}) == "");
  CHECK(missing(with([&](GemmArgs& x) { x.d_scale = scale.as<float>(); }),
                {"d_scale is given", "not FP8"}) == "");
  CHECK(missing(with([&](GemmArgs& x) { x.d_amax = scale.as<float>(); }),
                {"d_amax is given", "not FP8"}) == "");
  CHECK(untouched());
}

TEST_CASE_METHOD(Fixture, "registry: a forced backend runs alone or nobody does") {
  int calls = 0;
  gemms.add(std::make_unique<Stub>("seven", 7, &calls));
  const GemmProblem seven{.m = 7, .n = 2, .k = 3}, eight{.m = 8, .n = 2, .k = 3};
  gemms.run(seven, args());
  CHECK(calls == 1);
  gemms.force("reference");
  CHECK(gemms.choose(seven).backend->name() == "reference");
  CHECK(missing(gemms.choose(seven).report, {"seven: not asked, reference is forced"}) == "");
  gemms.run(seven, args());
  CHECK(calls == 1);
  gemms.force("seven");
  gemms.run(seven, args());
  CHECK(calls == 2);
  CHECK(missing(error_of([&] { gemms.run(eight, args()); }),
                {"seven: no, m is not 7", "reference: not asked, seven is forced"}) == "");
  gemms.force("nine");
  CHECK(missing(error_of([&] { gemms.run(seven, args()); }),
                {"nine: forced, but there is no backend of that name"}) == "");
  gemms.force("");
  gemms.run(eight, args());
  CHECK(calls == 2);
}

TEST_CASE("registry: OCTET_GEMM forces a backend") {
  REQUIRE(setenv("OCTET_GEMM", "nine", 1) == 0);
  const GemmRegistry gemms(Context::cpu());
  REQUIRE(unsetenv("OCTET_GEMM") == 0);
  CHECK(missing(gemms.choose({.m = 7, .n = 2, .k = 3}).report, {"nine: forced"}) == "");
  CHECK(GemmRegistry(Context::cpu()).choose({.m = 7, .n = 2, .k = 3}).backend != nullptr);
}

TEST_CASE("registry: empty products") {
  for (const Context& ctx : test_contexts()) {
    GemmRegistry gemms(ctx);
    const Guarded d(ctx, 5 * 7 * 2);
    gemms.run({.m = 0, .n = 7, .k = 3}, {});
    gemms.run({.m = 5, .n = 0, .k = 3}, {});
    const Bytes fill(d.bytes(), Guarded::kFill);
    CHECK(first_difference(d.values<std::uint8_t>(), fill) == "");
    gemms.run({.m = 5, .n = 7, .k = 0, .d = DType::bf16}, {.d = d.data()});
    CHECK(first_difference(d.values<std::uint8_t>(), Bytes(d.bytes(), 0)) == "");
    CHECK(d.intact());
    CHECK(gemms.counts().fp8 == 0);
  }
}

TEST_CASE("registry: a problem as text and as a key") {
  const GemmProblem p{.m = 4, .n = 8, .k = 16, .b = DType::e5m2, .b_transposed = true};
  CHECK(to_string(p) == "gemm m=4 n=8 k=16 a=e4m3 b=e5m2^T d=f32");
  const auto hash = [](GemmProblem problem) { return GemmProblemHash{}(problem); };
  CHECK(hash(p) == hash(GemmProblem(p)));
  const std::vector<GemmProblem> others = {
      {.m = 8, .n = 4, .k = 16, .b = DType::e5m2, .b_transposed = true},
      {.m = 4, .n = 16, .k = 8, .b = DType::e5m2, .b_transposed = true},
      {.m = 4, .n = 8, .k = 16, .b = DType::e4m3, .b_transposed = true},
      {.m = 4, .n = 8, .k = 16, .b = DType::e5m2, .a_transposed = true},
      {.m = 4, .n = 8, .k = 16, .b = DType::e5m2, .d = DType::bf16, .b_transposed = true},
      {.m = 4,
       .n = 8,
       .k = 16,
       .b = DType::e5m2,
       .b_transposed = true,
       .accumulation = Accumulation::fast}};
  const GemmProblem all{.m = 4,
                        .n = 8,
                        .k = 16,
                        .lda = 32,
                        .ldb = 48,
                        .ldd = 64,
                        .a_scales = Granularity::row_block,
                        .b_scales = Granularity::tile,
                        .accumulation = Accumulation::exact,
                        .accumulate = true,
                        .bias = true,
                        .activation = Activation::gelu,
                        .aux = true,
                        .deterministic = true};
  CHECK(to_string(all) ==
        "gemm m=4 n=8 k=16 a=e4m3/row_block lda=32 b=e4m3/tile ldb=48 d=f32 ldd=64 exact "
        "accumulate bias=bf16 gelu aux=bf16 deterministic");
  for (const GemmProblem& other : others) {
    CHECK_FALSE(other == p);
    CHECK(hash(other) != hash(p));
  }
}
