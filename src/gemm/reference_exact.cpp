// SPDX-License-Identifier: Apache-2.0
// Accumulation::exact of the reference backend: plain loops in double.
#include <algorithm>
#include <vector>

#include "gemm/cpu_gemm.hpp"
#include "gemm/team.hpp"

namespace octet::detail::cpu {
namespace {

/// Columns of D at a time, so that a row of A is decoded once for so many.
constexpr std::int64_t kColumns = 16;

/// A row of an operand, decoded, to every `step`-th double of `out`.
void decode_row(const GemmOperand& operand, std::int64_t row, double* out, std::int64_t step) {
  constexpr std::int64_t kRun = 32;  // elements with one scale, whatever the granularity
  float run[kRun];
  for (std::int64_t begin = 0; begin < operand.k(); begin += kRun) {
    const std::int64_t count = std::min(kRun, operand.k() - begin);
    if (operand.transposed) {
      for (std::int64_t i = 0; i < count; ++i) decode_run(operand, begin + i, row, 1, run + i);
    } else {
      decode_run(operand, row, begin, count, run);
    }
    const double scale = static_cast<double>(operand.scale_at(row, begin));
    for (std::int64_t i = 0; i < count; ++i) {
      out[(begin + i) * step] = static_cast<double>(run[i]) * scale;
    }
  }
}

}  // namespace

void exact_product(const GemmProblem& p, const GemmArgs& args, int threads) {
  const GemmOperand a = operand_a(p, args), b = operand_b(p, args);
  std::vector<double> packed_b(static_cast<std::size_t>(p.k * kColumns));
  std::vector<double> rows_a(static_cast<std::size_t>(threads * p.k));
  std::uint32_t largest = 0;
#pragma omp parallel num_threads(threads) reduction(max : largest)
  for (std::int64_t first = 0; first < p.n; first += kColumns) {
    const std::int64_t count = std::min(kColumns, p.n - first);
#pragma omp for schedule(static)
    for (std::int64_t c = 0; c < count; ++c) {
      decode_row(b, first + c, packed_b.data() + c, kColumns);
    }
#pragma omp for schedule(static)
    for (std::int64_t row = 0; row < p.m; ++row) {
      double* const factors = rows_a.data() + team_member() * p.k;
      decode_row(a, row, factors, 1);
      double sums[kColumns] = {};
      for (std::int64_t l = 0; l < p.k; ++l) {
        const double* of_b = packed_b.data() + l * kColumns;
        for (std::int64_t c = 0; c < kColumns; ++c) sums[c] += factors[l] * of_b[c];
      }
      largest = std::max(largest, finish_row(p, args, sums, row, first, count));
    }
  }
  if (is_fp8(p.d) && args.d_amax != nullptr) *args.d_amax = bits_float(largest);
}

}  // namespace octet::detail::cpu
