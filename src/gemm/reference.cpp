// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "gemm/reference_kernels.hpp"
#include "octet/core/detail/element.hpp"
#include "octet/gemm/gemm.hpp"

#ifdef _OPENMP
#include <omp.h>
#endif

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
constexpr std::int64_t kBlockA = kGemmRows * kGemmDepth;
constexpr std::int64_t kBlockB = kGemmColumns * kGemmDepth;

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

template <DType D>
constexpr std::array<float, 256> decode_table() {
  std::array<float, 256> table{};
  for (std::size_t i = 0; i < 256; ++i) table[i] = Element<D>::decode(static_cast<std::uint8_t>(i));
  return table;
}
constexpr std::array<float, 256> kE4M3 = decode_table<DType::e4m3>();
constexpr std::array<float, 256> kE5M2 = decode_table<DType::e5m2>();

/// Elements [begin, begin + count) of an operand, as floats.
void decode(const void* data, DType dtype, std::int64_t begin, std::int64_t count, float* out) {
  if (dtype == DType::f32) {
    std::memcpy(out, static_cast<const float*>(data) + begin,
                static_cast<std::size_t>(count) * sizeof(float));
  } else if (dtype == DType::bf16) {
    const std::uint16_t* codes = static_cast<const std::uint16_t*>(data) + begin;
    for (std::int64_t i = 0; i < count; ++i) out[i] = decode_bf16(codes[i]);
  } else {
    const std::uint8_t* codes = static_cast<const std::uint8_t*>(data) + begin;
    const float* table = dtype == DType::e4m3 ? kE4M3.data() : kE5M2.data();
    for (std::int64_t i = 0; i < count; ++i) out[i] = table[codes[i]];
  }
}

/// Rounds one row of accumulators to D. Every NaN becomes the same NaN: which one an fma gives
/// depends on the order of its operands.
void store_row(const float* acc, std::int64_t count, DType dtype, void* data, std::int64_t begin) {
  if (dtype == DType::bf16) {
    std::uint16_t* out = static_cast<std::uint16_t*>(data) + begin;
    for (std::int64_t c = 0; c < count; ++c) out[c] = encode_bf16(acc[c]);
    return;
  }
  float* out = static_cast<float*>(data) + begin;
  for (std::int64_t c = 0; c < count; ++c) {
    out[c] = acc[c] == acc[c] ? acc[c] : bits_float(0x7FFFFFFFu);
  }
}

/// Rows that a kernel computes for `rows` that are wanted: 4, 8 or 12.
constexpr std::int64_t kernel_rows(std::int64_t rows) { return ceil_div(rows, 4) * 4; }

struct Job {
  const GemmProblem& problem;
  const GemmArgs& args;
  const GemmKernel& kernel;
  float scale;
  std::int64_t k_blocks;
  std::int64_t tile_rows;

  std::int64_t depth(std::int64_t block) const {
    return std::min(kGemmDepth, problem.k - block * kGemmDepth);
  }
  PackedA layout() const { return problem.a_transposed ? PackedA::along_rows : PackedA::along_k; }

  void pack_b(std::int64_t column, float* packed) const;
  void pack_a(std::int64_t row, std::int64_t rows, float* packed) const;
  void run_tile(std::int64_t row, std::int64_t column, std::int64_t panels, const float* packed_b,
                float* packed_a) const;
};

/// One panel of B, kGemmColumns columns from `column` on, as [k][kGemmColumns] with zeros beyond n.
void Job::pack_b(std::int64_t column, float* packed) const {
  const std::int64_t columns = std::min(kGemmColumns, problem.n - column);
  if (columns < kGemmColumns) std::fill_n(packed, k_blocks * kBlockB, 0.0f);
  if (problem.b_transposed) {
    for (std::int64_t p = 0; p < problem.k; ++p) {
      decode(args.b, problem.b, p * problem.n + column, columns, packed + p * kGemmColumns);
    }
    return;
  }
  float rows[kGemmColumns][kGemmDepth];
  for (std::int64_t block = 0; block < k_blocks; ++block, packed += kBlockB) {
    for (std::int64_t c = 0; c < columns; ++c) {
      decode(args.b, problem.b, (column + c) * problem.k + block * kGemmDepth, depth(block),
             rows[c]);
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
      if (problem.a_transposed) {
        for (std::int64_t p = 0; p < depth(block); ++p) {
          decode(args.a, problem.a, (begin + p) * problem.m + row, count, packed + p * kGemmRows);
        }
      } else {
        for (std::int64_t r = 0; r < count; ++r) {
          decode(args.a, problem.a, (row + r) * problem.k + begin, depth(block),
                 packed + r * kGemmDepth);
        }
      }
    }
  }
}

/// tile_rows rows of D from `row` on, for `panels` panels of packed B that start at `column`.
void Job::run_tile(std::int64_t row, std::int64_t column, std::int64_t panels,
                   const float* packed_b, float* packed_a) const {
  const std::int64_t rows = std::min(tile_rows, problem.m - row);
  pack_a(row, rows, packed_a);
  alignas(64) float acc[kMaxTileRows * kGemmColumns];
  for (std::int64_t panel = 0; panel < panels; ++panel, column += kGemmColumns) {
    for (std::int64_t block = 0; block < k_blocks; ++block) {
      const float* b = packed_b + (panel * k_blocks + block) * kBlockB;
      for (std::int64_t r = 0; r < rows; r += kGemmRows) {
        const float* a = packed_a + (r / kGemmRows * k_blocks + block) * kBlockA;
        const int count = static_cast<int>(kernel_rows(std::min(kGemmRows, rows - r)));
        kernel.run(
            {a, b, acc + r * kGemmColumns, depth(block), count, layout(), block == 0, scale});
      }
    }
    const std::int64_t columns = std::min(kGemmColumns, problem.n - column);
    for (std::int64_t r = 0; r < rows; ++r) {
      store_row(acc + r * kGemmColumns, columns, problem.d, args.d, (row + r) * problem.n + column);
    }
  }
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
#ifdef _OPENMP
  if (problem.m * problem.n * problem.k >= kMinParallelWork) return omp_get_max_threads();
#else
  static_cast<void>(problem);
#endif
  return 1;
}

int team_member() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
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
  for (const auto& [name, dtype] : {std::pair("a", problem.a), std::pair("b", problem.b)}) {
    if (dtype != DType::f16) continue;
    return {GemmVerdict::no, std::string(name) + " is f16; f32, bf16, e4m3 and e5m2 are allowed"};
  }
  if (problem.d != DType::f32 && problem.d != DType::bf16) {
    return {GemmVerdict::no,
            "d is " + std::string(name_of(problem.d)) + "; f32 and bf16 are allowed"};
  }
  return {GemmVerdict::native, std::string("FP32 sums over blocks of 128, kernel ") + kernel_.name};
}

void ReferenceGemm::run(const Context&, const GemmProblem& problem, const GemmArgs& args) {
  const int threads = team_size(problem);
  // As many tiles as threads, or a multiple, so that all threads end together.
  const std::int64_t tiles = ceil_div(ceil_div(problem.m, kMaxTileRows), threads) * threads;
  const float scale_a = is_fp8(problem.a) ? *static_cast<const float*>(args.a_scales) : 1.0f;
  const float scale_b = is_fp8(problem.b) ? *static_cast<const float*>(args.b_scales) : 1.0f;
  const Job job{problem,
                args,
                kernel_,
                scale_a * scale_b,
                ceil_div(problem.k, kGemmDepth),
                kernel_rows(ceil_div(problem.m, tiles))};
  const std::int64_t panels = ceil_div(problem.n, kGemmColumns);
  const std::int64_t panel_floats = job.k_blocks * kBlockB;
  const std::int64_t chunk =
      std::min(panels, std::max(kMinChunkPanels, kChunkFloats / panel_floats));
  const std::int64_t a_floats = ceil_div(job.tile_rows, kGemmRows) * job.k_blocks * kBlockA;
  float* const packed_b = packed_b_.get(chunk * panel_floats);
  float* const packed_a = packed_a_.get(threads * a_floats);
#pragma omp parallel num_threads(threads)
  for (std::int64_t first = 0; first < panels; first += chunk) {
    const std::int64_t count = std::min(chunk, panels - first);
#pragma omp for schedule(static)
    for (std::int64_t panel = 0; panel < count; ++panel) {
      job.pack_b((first + panel) * kGemmColumns, packed_b + panel * panel_floats);
    }
#pragma omp for schedule(static)
    for (std::int64_t row = 0; row < problem.m; row += job.tile_rows) {
      job.run_tile(row, first * kGemmColumns, count, packed_b, packed_a + team_member() * a_floats);
    }
  }
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
