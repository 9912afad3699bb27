// SPDX-License-Identifier: Apache-2.0
// What every backend answers, for devices and problems, as a table that is kept: a change of an
// answer shows as a change of tests/gemm/query_table.txt.
#include <cstdlib>
#include <fstream>
#include <sstream>

#include "octet/gemm/cublaslt.hpp"
#include "support/catch.hpp"

namespace octet::test {
namespace {

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
  list.push_back({.m = 64, .n = 64, .k = 64, .accumulation = Accumulation::fast});
  list.push_back({.m = std::int64_t{1} << 31, .n = 16, .k = 16});
  return list;
}

std::string table() {
  std::ostringstream out;
  const auto line = [&out](const std::string& who, const GemmProblem& p, const GemmSupport& s) {
    out << who << " | " << p << " | " << (s.verdict == GemmVerdict::native ? "native" : "no")
        << " | " << s.reason << "\n";
  };
  const auto reference = make_reference_gemm("portable");
  for (const GemmProblem& p : problems()) line("reference", p, reference->query(p, {}));
  for (int capability : {75, 80, 90, 100}) {
    for (const GemmProblem& p : problems()) {
      line("cublaslt sm_" + std::to_string(capability), p,
           query_cublaslt(p, {DeviceType::cuda, capability}));
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
  CHECK(number > 800);
  CHECK_FALSE(std::getline(file, expected));
}

}  // namespace octet::test
