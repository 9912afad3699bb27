// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "gemm/cpu_gemm.hpp"
#include "gemm/problem_rules.hpp"
#include "gemm/reference_kernels.hpp"
#include "gemm/team.hpp"
#include "octet/gemm/gemm.hpp"

namespace octet {
namespace detail {
namespace {

/// Rows of A that a thread packs at a time: six full tiles. Their accumulators (9 KiB) and one
/// block of B (16 KiB) stay in a first-level cache of 32 KiB while A streams past.
constexpr std::int64_t kMaxTileRows = 6 * kGemmRows;
/// Floats of B packed at a time (4 MiB), unless a chunk of kMinChunkPanels needs more.
constexpr std::int64_t kChunkFloats = std::int64_t{1} << 20;
constexpr std::int64_t kMinChunkPanels = 8;
/// Below this many multiplications, waking a team costs more than it saves.
constexpr std::int64_t kMinParallelWork = std::int64_t{1} << 18;
/// A packed block: its elements, then the scale of each of its rows or columns.
constexpr std::int64_t kElementsA = kGemmRows * kGemmDepth;
constexpr std::int64_t kElementsB = kGemmColumns * kGemmDepth;
constexpr std::int64_t kBlockA = kElementsA + 16;  // a multiple of a cache line
constexpr std::int64_t kBlockB = kElementsB + kGemmColumns;

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

/// `count` elements along k of a row of an operand that is not transposed. Scales of mx are finer
/// than a block: they are multiplied in here, being powers of two.
void decode_along_k(const GemmOperand& operand, std::int64_t row, std::int64_t begin,
                    std::int64_t count, float* out) {
  cpu::decode_run(operand, row, begin, count, out);
  if (!operand.has_mx()) return;
  for (std::int64_t i = 0; i < count; i += 32) {
    const float scale = operand.scale_at(row, begin + i);
    for (std::int64_t j = i; j < std::min(i + 32, count); ++j) out[j] *= scale;
  }
}

/// Factor of the 128 elements of a row from `begin` on.
float block_scale_of(const GemmOperand& operand, std::int64_t row, std::int64_t begin) {
  return operand.has_mx() ? 1.0f : operand.scale_at(row, begin);
}

/// Rows that a kernel computes for `rows` that are wanted: 4, 8 or 12.
constexpr std::int64_t kernel_rows(std::int64_t rows) { return ceil_div(rows, 4) * 4; }

struct Job {
  const GemmProblem& problem;
  const GemmArgs& args;
  const GemmKernel& kernel;
  GemmOperand a, b;
  std::int64_t k_blocks;
  std::int64_t tile_rows;

  std::int64_t depth(std::int64_t block) const {
    return std::min(kGemmDepth, problem.k - block * kGemmDepth);
  }
  PackedA layout() const { return problem.a_transposed ? PackedA::along_rows : PackedA::along_k; }

  void pack_b(std::int64_t column, float* packed) const;
  void pack_a(std::int64_t row, std::int64_t rows, float* packed) const;
  std::uint32_t run_tile(std::int64_t row, std::int64_t column, std::int64_t panels,
                         const float* packed_b, float* packed_a) const;
};

/// One panel of B, kGemmColumns columns from `column` on, each block as [k][kGemmColumns] with
/// zeros beyond n.
void Job::pack_b(std::int64_t column, float* packed) const {
  const std::int64_t columns = std::min(kGemmColumns, problem.n - column);
  if (columns < kGemmColumns) std::fill_n(packed, k_blocks * kBlockB, 0.0f);
  float rows[kGemmColumns][kGemmDepth];
  for (std::int64_t block = 0; block < k_blocks; ++block, packed += kBlockB) {
    const std::int64_t begin = block * kGemmDepth;
    for (std::int64_t c = 0; c < columns; ++c) {
      packed[kElementsB + c] = block_scale_of(b, column + c, begin);
    }
    if (problem.b_transposed) {
      for (std::int64_t p = 0; p < depth(block); ++p) {
        cpu::decode_run(b, begin + p, column, columns, packed + p * kGemmColumns);
      }
      continue;
    }
    for (std::int64_t c = 0; c < columns; ++c) {
      decode_along_k(b, column + c, begin, depth(block), rows[c]);
    }
    for (std::int64_t p = 0; p < depth(block); ++p) {
      for (std::int64_t c = 0; c < columns; ++c) packed[p * kGemmColumns + c] = rows[c][p];
    }
  }
}

/// `rows` rows of A from `row` on, cut into panels of kGemmRows, each a run of blocks along k.
void Job::pack_a(std::int64_t row, std::int64_t rows, float* packed) const {
  for (; rows > 0; row += kGemmRows, rows -= kGemmRows) {
    const std::int64_t count = std::min(kGemmRows, rows);
    for (std::int64_t block = 0; block < k_blocks; ++block, packed += kBlockA) {
      const std::int64_t begin = block * kGemmDepth;
      if (count % 4 != 0) std::fill_n(packed, kBlockA, 0.0f);
      for (std::int64_t r = 0; r < count; ++r) {
        packed[kElementsA + r] = block_scale_of(a, row + r, begin);
      }
      if (problem.a_transposed) {
        for (std::int64_t p = 0; p < depth(block); ++p) {
          cpu::decode_run(a, begin + p, row, count, packed + p * kGemmRows);
        }
      } else {
        for (std::int64_t r = 0; r < count; ++r) {
          decode_along_k(a, row + r, begin, depth(block), packed + r * kGemmDepth);
        }
      }
    }
  }
}

/// tile_rows rows of D from `row` on, for `panels` panels of packed B that start at `column`.
/// Returns what finish_row() does.
std::uint32_t Job::run_tile(std::int64_t row, std::int64_t column, std::int64_t panels,
                            const float* packed_b, float* packed_a) const {
  const std::int64_t rows = std::min(tile_rows, problem.m - row);
  pack_a(row, rows, packed_a);
  alignas(64) float acc[kMaxTileRows * kGemmColumns];
  std::uint32_t largest = 0;
  for (std::int64_t panel = 0; panel < panels; ++panel, column += kGemmColumns) {
    for (std::int64_t block = 0; block < k_blocks; ++block) {
      const float* of_b = packed_b + (panel * k_blocks + block) * kBlockB;
      for (std::int64_t r = 0; r < rows; r += kGemmRows) {
        const float* of_a = packed_a + (r / kGemmRows * k_blocks + block) * kBlockA;
        kernel.run({.a = of_a,
                    .b = of_b,
                    .acc = acc + r * kGemmColumns,
                    .row_scales = of_a + kElementsA,
                    .column_scales = of_b + kElementsB,
                    .depth = depth(block),
                    .rows = static_cast<int>(kernel_rows(std::min(kGemmRows, rows - r))),
                    .layout = layout(),
                    .first = block == 0});
      }
    }
    const std::int64_t columns = std::min(kGemmColumns, problem.n - column);
    for (std::int64_t r = 0; r < rows; ++r) {
      largest = std::max(largest, cpu::finish_row(problem, args, acc + r * kGemmColumns, row + r,
                                                  column, columns));
    }
  }
  return largest;
}

/// Floats aligned to a cache line, kept between calls.
class Scratch {
 public:
  float* get(std::int64_t floats) {
    constexpr std::size_t kLine = 64 / sizeof(float);
    const std::size_t wanted = static_cast<std::size_t>(floats) + kLine;
    if (memory_.size() < wanted) memory_.resize(wanted);
    void* start = memory_.data();
    std::size_t space = memory_.size() * sizeof(float);
    return static_cast<float*>(
        std::align(64, static_cast<std::size_t>(floats) * sizeof(float), start, space));
  }

 private:
  std::vector<float> memory_;
};

int team_size(const GemmProblem& problem) {
  return problem.m * problem.n * problem.k >= kMinParallelWork ? cpu::team_limit() : 1;
}

class ReferenceGemm final : public GemmBackend {
 public:
  explicit ReferenceGemm(const GemmKernel& kernel) : kernel_(kernel) {}
  std::string name() const override { return "reference"; }
  GemmSupport query(const GemmProblem& problem, const GemmDevice& device) const override;
  void run(const Context& ctx, const GemmProblem& problem, const GemmArgs& args) override;

 private:
  GemmKernel kernel_;
  Scratch packed_a_;
  Scratch packed_b_;
};

GemmSupport ReferenceGemm::query(const GemmProblem& problem, const GemmDevice& device) const {
  if (device.type != DeviceType::cpu) {
    return {GemmVerdict::no, "the device is not a CPU"};
  }
  if (const std::string reason = problem_refusal(problem); !reason.empty()) {
    return {GemmVerdict::no, reason};
  }
  if (problem.accumulation == Accumulation::exact) {
    return {GemmVerdict::native, "sums in double, rounded once"};
  }
  return {GemmVerdict::native, std::string("FP32 sums over blocks of 128, kernel ") + kernel_.name};
}

void ReferenceGemm::run(const Context&, const GemmProblem& problem, const GemmArgs& args) {
  const int threads = team_size(problem);
  if (problem.accumulation == Accumulation::exact) {
    return cpu::exact_product(problem, args, threads);
  }
  // As many tiles as threads, or a multiple, so that all threads end together.
  const std::int64_t tiles = ceil_div(ceil_div(problem.m, kMaxTileRows), threads) * threads;
  const Job job{problem,
                args,
                kernel_,
                operand_a(problem, args),
                operand_b(problem, args),
                ceil_div(problem.k, kGemmDepth),
                kernel_rows(ceil_div(problem.m, tiles))};
  const std::int64_t panels = ceil_div(problem.n, kGemmColumns);
  const std::int64_t panel_floats = job.k_blocks * kBlockB;
  const std::int64_t chunk =
      std::min(panels, std::max(kMinChunkPanels, kChunkFloats / panel_floats));
  const std::int64_t a_floats = ceil_div(job.tile_rows, kGemmRows) * job.k_blocks * kBlockA;
  float* const packed_b = packed_b_.get(chunk * panel_floats);
  float* const packed_a = packed_a_.get(threads * a_floats);
  std::uint32_t largest = 0;
#pragma omp parallel num_threads(threads) reduction(max : largest)
  for (std::int64_t first = 0; first < panels; first += chunk) {
    const std::int64_t count = std::min(chunk, panels - first);
#pragma omp for schedule(static)
    for (std::int64_t panel = 0; panel < count; ++panel) {
      job.pack_b((first + panel) * kGemmColumns, packed_b + panel * panel_floats);
    }
#pragma omp for schedule(static)
    for (std::int64_t row = 0; row < problem.m; row += job.tile_rows) {
      float* const own = packed_a + cpu::team_member() * a_floats;
      largest = std::max(largest, job.run_tile(row, first * kGemmColumns, count, packed_b, own));
    }
  }
  if (is_fp8(problem.d) && args.d_amax != nullptr) *args.d_amax = bits_float(largest);
}

}  // namespace
}  // namespace detail

std::vector<std::string> reference_gemm_kernels() {
  std::vector<std::string> names;
  for (const detail::GemmKernel& kernel : detail::gemm_kernels()) names.emplace_back(kernel.name);
  return names;
}

std::unique_ptr<GemmBackend> make_reference_gemm(std::string_view kernel) {
  std::string allowed;
  for (const detail::GemmKernel& candidate : detail::gemm_kernels()) {
    if (kernel.empty() || kernel == candidate.name) {
      return std::make_unique<detail::ReferenceGemm>(candidate);
    }
    allowed += std::string(" ") + candidate.name;
  }
  fail("reference GEMM kernel \"", kernel, "\": this processor has", allowed);
}

}  // namespace octet
