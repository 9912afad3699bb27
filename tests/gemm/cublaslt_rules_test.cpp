// SPDX-License-Identifier: Apache-2.0
// What cuBLASLt can do is known without a GPU: problems, devices and the expected answer.
#include "octet/gemm/cublaslt.hpp"
#include "support/catch.hpp"
#include "support/errors.hpp"

using namespace octet;
using namespace octet::test;

namespace {

constexpr DType f32 = DType::f32, bf16 = DType::bf16, f16 = DType::f16;
constexpr DType e4m3 = DType::e4m3, e5m2 = DType::e5m2;

std::string answer(const GemmProblem& p, int compute_capability) {
  const GemmSupport support = query_cublaslt(p, {DeviceType::cuda, compute_capability});
  switch (support.verdict) {
    case GemmVerdict::native: return "yes: " + support.reason;
    case GemmVerdict::with_conversion: return "converted: " + support.reason;
    case GemmVerdict::no: break;
  }
  return support.reason;
}

GemmProblem fp8(std::int64_t m, std::int64_t n, std::int64_t k, DType a, DType b, DType d) {
  return {.m = m, .n = n, .k = k, .a = a, .b = b, .d = d};
}

}  // namespace

TEST_CASE("cuBLASLt rules: FP8 needs a device that has it") {
  const GemmProblem p = fp8(64, 64, 64, e4m3, e4m3, bf16);
  for (int capability : {70, 75, 80, 86, 87}) {
    CHECK(missing(answer(p, capability),
                  {"compute capability " + std::to_string(capability), "89"}) == "");
  }
  for (int capability : {89, 90, 100, 120}) {
    CHECK(missing(answer(p, capability), {"yes: ", "promoted"}) == "");
  }
  GemmProblem fast = p;
  fast.accumulation = Accumulation::fast;
  CHECK(missing(answer(fast, 90), {"yes: ", "fast"}) == "");
  const GemmSupport cpu = query_cublaslt(p, {});
  CHECK(cpu.verdict == GemmVerdict::no);
  CHECK(missing(cpu.reason, {"CUDA"}) == "");
}

TEST_CASE("cuBLASLt rules: FP8 formats") {
  CHECK(missing(answer(fp8(64, 64, 64, e4m3, e5m2, bf16), 90), {"yes: "}) == "");
  CHECK(missing(answer(fp8(64, 64, 64, e5m2, e4m3, f32), 90), {"yes: "}) == "");
  CHECK(missing(answer(fp8(64, 64, 64, e5m2, e5m2, f32), 90), {"both e5m2", "e4m3"}) == "");
  CHECK(missing(answer(fp8(64, 64, 64, e4m3, bf16, f32), 90), {"a is e4m3", "b is bf16"}) == "");
  CHECK(missing(answer(fp8(64, 64, 64, f32, e5m2, f32), 90), {"a is f32", "b is e5m2"}) == "");
  CHECK(missing(answer(fp8(64, 64, 64, e4m3, e4m3, e4m3), 90), {"yes: "}) == "");
  CHECK(missing(answer(fp8(64, 64, 64, e4m3, e4m3, e4m3), 90), {"yes: "}) == "");
  CHECK(missing(answer(fp8(64, 64, 64, e4m3, e5m2, e5m2), 90), {"converted: ", "infinity"}) == "");
  CHECK(missing(answer(fp8(64, 64, 64, e4m3, e4m3, e5m2), 90),
                {"converted: ", "d is e5m2", "only e4m3", "second pass"}) == "");
  CHECK(missing(answer(fp8(64, 64, 64, e4m3, e4m3, f16), 90), {"converted: ", "d is f16"}) == "");
  GemmProblem p = fp8(64, 64, 64, e4m3, e4m3, f32);
  p.a_transposed = true;
  CHECK(missing(answer(p, 90), {"a is transposed", "k"}) == "");
  p.a_transposed = false;
  p.b_transposed = true;
  CHECK(missing(answer(p, 90), {"b is transposed", "k"}) == "");
}

TEST_CASE("cuBLASLt rules: FP8 sizes; the rows of A are free") {
  for (std::int64_t m : {1, 7, 16, 17, 5743}) {
    CHECK(missing(answer(fp8(m, 8, 16, e4m3, e4m3, bf16), 90), {"yes: "}) == "");
  }
  for (std::int64_t k : {1, 8, 15, 17, 24}) {
    CHECK(missing(answer(fp8(64, 64, k, e4m3, e4m3, bf16), 90),
                  {"k is " + std::to_string(k), "16"}) == "");
  }
  for (std::int64_t n : {1, 7, 17}) {
    CHECK(missing(answer(fp8(64, n, 64, e4m3, e4m3, bf16), 90),
                  {"n is " + std::to_string(n), "f32", std::to_string(4 * n) + " bytes", "16"}) ==
          "");
  }
  for (std::int64_t n : {4, 12}) {  // whole units in f32
    CHECK(missing(answer(fp8(64, n, 64, e4m3, e4m3, bf16), 90),
                  {"converted: ", "n is " + std::to_string(n), "second pass"}) == "");
  }
  CHECK(missing(answer(fp8(64, 12, 64, e4m3, e4m3, f32), 90), {"yes: "}) == "");
  CHECK(missing(answer(fp8(64, 14, 64, e4m3, e4m3, f32), 90), {"n is 14", "56 bytes"}) == "");
}

TEST_CASE("cuBLASLt rules: BF16 and FP32") {
  for (bool a_transposed : {false, true}) {
    for (bool b_transposed : {false, true}) {
      GemmProblem p = fp8(3, 5, 7, bf16, bf16, f32);
      p.a_transposed = a_transposed;
      p.b_transposed = b_transposed;
      CHECK(missing(answer(p, 80), {"yes: ", "BF16"}) == "");
      p.d = bf16;
      CHECK(missing(answer(p, 90), {"yes: ", "BF16"}) == "");
      p.a = p.b = p.d = f32;
      CHECK(missing(answer(p, 75), {"yes: ", "FP32"}) == "");
    }
  }
  CHECK(missing(answer(fp8(3, 5, 7, bf16, bf16, f32), 75), {"capability 75", "80"}) == "");
  CHECK(missing(answer(fp8(3, 5, 7, bf16, bf16, e4m3), 90), {"converted: ", "d is e4m3"}) == "");
  CHECK(missing(answer(fp8(3, 5, 7, f32, f32, bf16), 90), {"converted: ", "d is bf16", "f32"}) ==
        "");
  CHECK(missing(answer(fp8(3, 5, 7, f32, bf16, f32), 90), {"a is f32", "b is bf16"}) == "");
  CHECK(missing(answer(fp8(3, 5, 7, f16, f16, f32), 90), {"a is f16", "b is f16"}) == "");
}

TEST_CASE("cuBLASLt rules: dimensions of 32 bits") {
  const std::int64_t limit = 2147483647;
  CHECK(missing(answer(fp8(limit, 16, 16, bf16, bf16, f32), 90), {"yes: "}) == "");
  const std::string above = std::to_string(limit + 1);
  CHECK(missing(answer(fp8(limit + 1, 16, 16, bf16, bf16, f32), 90), {"m is " + above}) == "");
  CHECK(missing(answer(fp8(16, limit + 1, 16, bf16, bf16, f32), 90), {"n is " + above}) == "");
  CHECK(missing(answer(fp8(16, 16, limit + 1, e4m3, e4m3, f32), 90), {"k is " + above}) == "");
}

TEST_CASE("cuBLASLt rules: scales of rows and blocks, of which the library aborts on some pairs") {
  using enum Granularity;
  const auto with = [](Granularity a, Granularity b, int capability, DType d = bf16) {
    GemmProblem p = fp8(64, 64, 256, e4m3, e4m3, d);
    p.a_scales = a;
    p.b_scales = b;
    return answer(p, capability);
  };
  CHECK(missing(with(row, row, 90), {"yes: "}) == "");
  CHECK(missing(with(row_block, tile, 90), {"yes: ", "row_block and tile scales"}) == "");
  CHECK(missing(with(tile, row_block, 90), {"yes: "}) == "");
  CHECK(missing(with(row_block, row_block, 90), {"yes: "}) == "");
  CHECK(missing(with(mx, mx, 100), {"yes: ", "mx"}) == "");
  for (Granularity a : {tensor, row, row_block, tile, mx}) {
    for (Granularity b : {tensor, row, row_block, tile, mx}) {
      const bool is_pair =
          (a == b && a != tile) || (a == row_block && b == tile) || (a == tile && b == row_block);
      if (is_pair) continue;
      CHECK(missing(with(a, b, 90), {"a_scales are " + std::string(name_of(a)),
                                     "b_scales " + std::string(name_of(b)), "allowed"}) == "");
    }
  }
  for (int capability : {89, 100, 120}) {
    for (Granularity a : {row, row_block}) {
      CHECK(missing(with(a, a, capability),
                    {std::string(name_of(a)), "90", std::to_string(capability)}) == "");
    }
  }
  for (int capability : {89, 90, 120}) {
    CHECK(missing(with(mx, mx, capability), {"mx", "100", std::to_string(capability)}) == "");
  }
  CHECK(missing(with(row, row, 90, e4m3), {"converted: ", "d is e4m3", "tensor"}) == "");
  CHECK(missing(with(row_block, tile, 90, e4m3), {"converted: ", "d is e4m3", "row_block"}) == "");
}

TEST_CASE("cuBLASLt rules: sizes with block scales") {
  using enum Granularity;
  const auto with = [](std::int64_t m, std::int64_t n, std::int64_t k, Granularity b) {
    GemmProblem p = fp8(m, n, k, e4m3, e4m3, bf16);
    p.a_scales = row_block;
    p.b_scales = b;
    return answer(p, 90);
  };
  for (std::int64_t m : {1, 4, 8, 17}) {
    CHECK(missing(with(m, 64, 128, tile), {"m is " + std::to_string(m), "16"}) == "");
  }
  CHECK(missing(with(16, 8, 16, tile), {"yes: "}) == "");
  CHECK(missing(with(16, 12, 16, tile), {"n is 12", "8"}) == "");
  CHECK(missing(with(16, 8, 16, row_block), {"n is 8", "16"}) == "");
  CHECK(missing(with(16, 16, 24, tile), {"k is 24", "16"}) == "");
}

TEST_CASE("cuBLASLt rules: what is fused and what takes a second pass") {
  const auto with = [](auto change) {
    GemmProblem p = fp8(64, 64, 128, e4m3, e4m3, bf16);
    change(p);
    return answer(p, 90);
  };
  using P = GemmProblem;
  CHECK(missing(with([](P& p) { p.bias = true; }), {"yes: "}) == "");
  CHECK(missing(with([](P& p) { p.bias = true, p.d = f32; }), {"yes: "}) == "");
  CHECK(missing(with([](P& p) { p.bias = true, p.bias_type = f32; }),
                {"converted: ", "bias is f32", "bf16", "second pass"}) == "");
  CHECK(missing(with([](P& p) { p.accumulate = true, p.d = f32; }), {"yes: "}) == "");
  CHECK(missing(with([](P& p) { p.accumulate = true, p.activation = Activation::gelu; }),
                {"converted: ", "accumulate"}) == "");
  CHECK(missing(with([](P& p) { p.activation = Activation::gelu, p.aux = p.bias = true; }),
                {"yes: "}) == "");
  CHECK(missing(with([](P& p) { p.activation = Activation::dgelu, p.aux = true; }), {"yes: "}) ==
        "");
  CHECK(missing(with([](P& p) { p.activation = Activation::dgelu, p.aux = p.bias = true; }),
                {"converted: ", "bias", "dgelu"}) == "");
  CHECK(missing(with([](P& p) { p.activation = Activation::gelu, p.aux = true, p.d = f32; }),
                {"converted: ", "aux is bf16", "f32"}) == "");
  CHECK(missing(with([](P& p) {
                  p.activation = Activation::gelu, p.aux = true;
                  p.a_scales = Granularity::row_block, p.b_scales = Granularity::tile;
                }),
                {"converted: ", "aux", "row_block"}) == "");
  CHECK(missing(with([](P& p) { p.accumulation = Accumulation::exact; }), {"exact"}) == "");
  CHECK(missing(with([](P& p) { p.lda = 136; }), {"lda is 136", "16"}) == "");
  CHECK(missing(with([](P& p) { p.ldd = 68; }), {"converted: ", "ldd is 68"}) == "");
  GemmProblem p = fp8(64, 64, 128, e4m3, e4m3, f16);
  const GemmSupport support = query_cublaslt(p, {DeviceType::cuda, 90});
  CHECK(support.workspace_bytes == 64 * 64 * 4);
  CHECK(support.converted_bytes == 2 * 64 * 64 * 4);
}
