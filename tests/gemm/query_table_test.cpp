// SPDX-License-Identifier: Apache-2.0
// What every backend answers, for devices and problems, as a table that is kept: a change of an
// answer shows as a change of tests/gemm/query_table.txt.
#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <sstream>

#include "octet/gemm/cublaslt.hpp"
#include "octet/gemm/dequant_bf16.hpp"
#include "support/catch.hpp"

namespace octet::test {
namespace {

/// Every pair of granularities.
void add_scales(std::vector<GemmProblem>& list) {
  using enum Granularity;
  for (Granularity a : {tensor, row, row_block, tile, mx}) {
    for (Granularity b : {tensor, row, row_block, tile, mx}) {
      for (DType d : {DType::f32, DType::bf16, DType::e4m3}) {
        list.push_back({.m = 64, .n = 64, .k = 256, .d = d, .a_scales = a, .b_scales = b});
      }
    }
  }
}

/// Whatever can come after the sum, with operands of three types and two kinds of scales.
void add_epilogues(std::vector<GemmProblem>& list) {
  for (DType d : {DType::f32, DType::bf16, DType::e4m3}) {
    for (int kind = 0; kind < 3; ++kind) {
      GemmProblem p{.m = 64, .n = 64, .k = 256, .d = d};
      if (kind == 1) p.a_scales = Granularity::row_block, p.b_scales = Granularity::tile;
      if (kind == 2) p.a = p.b = DType::bf16;
      for (int bits = 1; bits < 24; ++bits) {
        GemmProblem q = p;
        q.bias = (bits & 1) != 0;
        q.accumulate = (bits & 2) != 0 && d != DType::e4m3;
        q.aux = (bits & 4) != 0 && bits >= 8;
        q.activation = static_cast<Activation>(bits / 8);
        if (q.activation == Activation::dgelu) q.aux = true;
        if (std::find(list.begin(), list.end(), q) == list.end()) list.push_back(q);
      }
    }
  }
  GemmProblem p{.m = 64, .n = 64, .k = 256, .d = DType::bf16, .bias = true};
  for (DType bias : {DType::f32, DType::f16}) {
    p.bias_type = bias;
    list.push_back(p);
  }
}

/// Every mixture of operands and result in every layout, then sizes around the limits.
std::vector<GemmProblem> problems() {
  constexpr DType kAll[] = {DType::f32, DType::bf16, DType::f16, DType::e4m3, DType::e5m2};
  std::vector<GemmProblem> list;
  for (DType a : kAll) {
    for (DType b : kAll) {
      for (DType d : kAll) list.push_back({.m = 64, .n = 64, .k = 64, .a = a, .b = b, .d = d});
    }
  }
  for (DType a : {DType::f32, DType::bf16, DType::e4m3}) {
    for (int layout = 1; layout < 4; ++layout) {
      list.push_back({.m = 64,
                      .n = 64,
                      .k = 64,
                      .a = a,
                      .b = a,
                      .a_transposed = layout % 2 == 1,
                      .b_transposed = layout >= 2});
    }
  }
  for (std::int64_t size : {1, 8, 15, 16, 17, 127, 128, 5743}) {
    for (DType d : {DType::f32, DType::bf16}) {
      list.push_back({.m = size, .n = 64, .k = 64, .d = d});
      list.push_back({.m = 64, .n = size, .k = 64, .d = d});
      list.push_back({.m = 64, .n = 64, .k = size, .d = d});
    }
  }
  for (Accumulation accumulation : {Accumulation::fast, Accumulation::exact}) {
    list.push_back({.m = 64, .n = 64, .k = 64, .accumulation = accumulation});
  }
  add_scales(list);
  add_epilogues(list);
  list.push_back({.m = std::int64_t{1} << 31, .n = 16, .k = 16});
  return list;
}

std::string table() {
  std::ostringstream out;
  const auto line = [&out](const std::string& who, const GemmProblem& p, const GemmSupport& s) {
    constexpr const char* kVerdicts[] = {"native", "with conversion", "no"};
    out << who << " | " << p << " | " << kVerdicts[static_cast<int>(s.verdict)] << " | "
        << s.reason;
    if (s.workspace_bytes != 0) out << " | " << s.workspace_bytes << " bytes of workspace";
    if (s.converted_bytes != 0) out << ", " << s.converted_bytes << " converted";
    out << "\n";
  };
  // The kernel of the reference that dequant_bf16 multiplies with is the machine's.
  const std::string fastest = "kernel " + reference_gemm_kernels().front();
  const auto reference = make_reference_gemm("portable");
  for (const GemmProblem& p : problems()) line("reference", p, reference->query(p, {}));
  for (int capability : {75, 80, 89, 90, 100, 120}) {
    for (const GemmProblem& p : problems()) {
      line("cublaslt sm_" + std::to_string(capability), p,
           query_cublaslt(p, {DeviceType::cuda, capability}));
    }
  }
  for (const GemmProblem& p : problems()) {
    GemmSupport support = query_dequant_bf16(p, {});
    if (const std::size_t at = support.reason.find(fastest); at != std::string::npos) {
      support.reason.replace(at, fastest.size(), "kernel portable");
    }
    line("dequant_bf16 cpu", p, support);
  }
  // The architecture matters to its BF16 product alone.
  for (int capability : {75, 90}) {
    for (const GemmProblem& p : problems()) {
      line("dequant_bf16 sm_" + std::to_string(capability), p,
           query_dequant_bf16(p, {DeviceType::cuda, capability}));
    }
  }
  return out.str();
}

}  // namespace

TEST_CASE("the answers of the backends are those of the table") {
  const char* const path = QUERY_TABLE;
  const std::string actual = table();
  // OCTET_UPDATE_QUERY_TABLE=1 writes the table anew; look at the difference before keeping it.
  if (std::getenv("OCTET_UPDATE_QUERY_TABLE") != nullptr) std::ofstream(path) << actual;
  std::ifstream file(path);
  REQUIRE(file.good());
  std::istringstream lines(actual);
  std::string expected, got;
  int number = 0;
  while (std::getline(lines, got)) {
    ++number;
    INFO("line " << number << " of " << path);
    REQUIRE(std::getline(file, expected));
    REQUIRE(got == expected);
  }
  CHECK(number > 3000);
  CHECK_FALSE(std::getline(file, expected));
}

}  // namespace octet::test
