// SPDX-License-Identifier: Apache-2.0
#include "bare_cublaslt.hpp"

#include <chrono>
#include <functional>
#include <limits>

namespace bench {
namespace {

constexpr std::size_t kWorkspaceBytes = std::size_t{64} << 20;
constexpr std::chrono::seconds kMostEnumeration{4}, kMostSearch{6};

void check(cublasStatus_t status, const char* what) {
  octet::require(status == CUBLAS_STATUS_SUCCESS, what, ": ", cublasLtGetStatusName(status));
}

template <class T>
std::vector<T> capability(const cublasLtMatmulAlgo_t& algorithm,
                          cublasLtMatmulAlgoCapAttributes_t attribute) {
  std::size_t bytes = 0;
  cublasLtMatmulAlgoCapGetAttribute(&algorithm, attribute, nullptr, 0, &bytes);
  std::vector<T> values(bytes / sizeof(T));
  if (!values.empty()) {
    cublasLtMatmulAlgoCapGetAttribute(&algorithm, attribute, values.data(), bytes, &bytes);
  }
  return values;
}

/// Tiles of 64 to 256 by 64 to 512 in powers of two and some between (and 128 by 32), and those of
/// 104 to 184 rows by 128: smaller ones do not win where a product is large, and where it is small
/// the heuristic's answers have them.
bool is_worth_a_try(std::uint32_t tile) {
  switch (tile) {
    case CUBLASLT_MATMUL_TILE_104x128:
    case CUBLASLT_MATMUL_TILE_112x128:
    case CUBLASLT_MATMUL_TILE_120x128:
    case CUBLASLT_MATMUL_TILE_136x128:
    case CUBLASLT_MATMUL_TILE_144x128:
    case CUBLASLT_MATMUL_TILE_152x128:
    case CUBLASLT_MATMUL_TILE_168x128:
    case CUBLASLT_MATMUL_TILE_176x128:
    case CUBLASLT_MATMUL_TILE_184x128: return true;
    default: break;
  }
  return tile >= CUBLASLT_MATMUL_TILE_64x64 && tile <= CUBLASLT_MATMUL_TILE_128x96;
}

}  // namespace

BareGemm::BareGemm(const octet::Context& ctx, const BareProblem& p, const BarePointers& pointers)
    : ctx_(ctx), problem_(p), pointers_(pointers), workspace_(ctx, kWorkspaceBytes) {
  check(cublasLtCreate(&handle_), "cublasLtCreate");
  check(cublasLtMatmulDescCreate(&operation_, CUBLAS_COMPUTE_32F, CUDA_R_32F), "DescCreate");
  const auto set = [&](cublasLtMatmulDescAttributes_t attribute, auto value) {
    check(cublasLtMatmulDescSetAttribute(operation_, attribute, &value, sizeof value),
          "DescSetAttribute");
  };
  // In the library's terms D^T[n, m] = B A^T, all of it column-major.
  set(CUBLASLT_MATMUL_DESC_TRANSA, p.b_transposed ? CUBLAS_OP_N : CUBLAS_OP_T);
  set(CUBLASLT_MATMUL_DESC_TRANSB, p.a_transposed ? CUBLAS_OP_T : CUBLAS_OP_N);
  set(CUBLASLT_MATMUL_DESC_FAST_ACCUM, static_cast<std::int8_t>(p.fast ? 1 : 0));
  set_scales();
  const auto layout = [](cudaDataType_t type, std::int64_t rows, std::int64_t columns) {
    cublasLtMatrixLayout_t made = nullptr;
    check(cublasLtMatrixLayoutCreate(&made, type, static_cast<std::uint64_t>(columns),
                                     static_cast<std::uint64_t>(rows), columns),
          "LayoutCreate");
    return made;
  };
  a_ = p.a_transposed ? layout(p.a, p.k, p.m) : layout(p.a, p.m, p.k);
  b_ = p.b_transposed ? layout(p.b, p.k, p.n) : layout(p.b, p.n, p.k);
  d_ = layout(p.d, p.m, p.n);
}

BareGemm::~BareGemm() {
  for (cublasLtMatrixLayout_t layout : {a_, b_, d_}) cublasLtMatrixLayoutDestroy(layout);
  cublasLtMatmulDescDestroy(operation_);
  cublasLtDestroy(handle_);
}

void BareGemm::set_scales() const {
  if (pointers_.a_scale == nullptr) return;
  check(cublasLtMatmulDescSetAttribute(operation_, CUBLASLT_MATMUL_DESC_A_SCALE_POINTER,
                                       &pointers_.b_scale, sizeof pointers_.b_scale),
        "DescSetAttribute");
  check(cublasLtMatmulDescSetAttribute(operation_, CUBLASLT_MATMUL_DESC_B_SCALE_POINTER,
                                       &pointers_.a_scale, sizeof pointers_.a_scale),
        "DescSetAttribute");
}

bool BareGemm::try_run(const cublasLtMatmulAlgo_t& algorithm) const {
  const float one = 1.0f, beta = problem_.accumulate ? 1.0f : 0.0f;
  return cublasLtMatmul(handle_, operation_, &one, pointers_.b, b_, pointers_.a, a_, &beta,
                        pointers_.d, d_, pointers_.d, d_, &algorithm, workspace_.data(),
                        kWorkspaceBytes, ctx_.stream()) == CUBLAS_STATUS_SUCCESS;
}

void BareGemm::run() const { octet::require(try_run(best_), "cublasLtMatmul failed"); }

void BareGemm::run_anew() const {
  set_scales();
  run();
}

double BareGemm::time_of(const cublasLtMatmulAlgo_t& algorithm, int runs) const {
  if (!try_run(algorithm)) return std::numeric_limits<double>::infinity();
  TimingEvent start, end;
  start.record(ctx_.stream());
  for (int i = 0; i < runs; ++i) try_run(algorithm);
  end.record(ctx_.stream());
  ctx_.synchronize();
  return end.ms_since(start) / runs;
}

/// The heuristic's answers for several workspaces, and of every algorithm id the tiles above
/// with clusters of at most two and of 4x1, and all options that the library says it can run.
std::vector<cublasLtMatmulAlgo_t> BareGemm::enumerate() const {
  std::vector<cublasLtMatmulAlgo_t> list;
  cublasLtMatmulHeuristicResult_t found[32];
  for (std::size_t workspace :
       {kWorkspaceBytes, kWorkspaceBytes / 2, kWorkspaceBytes / 16, std::size_t{0}}) {
    cublasLtMatmulPreference_t preference = nullptr;
    check(cublasLtMatmulPreferenceCreate(&preference), "PreferenceCreate");
    check(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                               &workspace, sizeof workspace),
          "PreferenceSetAttribute");
    int count = 0;
    cublasLtMatmulAlgoGetHeuristic(handle_, operation_, b_, a_, d_, d_, preference, 32, found,
                                   &count);
    cublasLtMatmulPreferenceDestroy(preference);
    for (int i = 0; i < count; ++i) list.push_back(found[i].algo);
  }
  int ids[64], id_count = 0;
  check(cublasLtMatmulAlgoGetIds(handle_, CUBLAS_COMPUTE_32F, CUDA_R_32F, problem_.b, problem_.a,
                                 problem_.d, problem_.d, 64, ids, &id_count),
        "AlgoGetIds");
  // The newest first: of BF16 there are so many that time runs out among the old ones.
  std::sort(ids, ids + id_count, std::greater<>());
  const auto deadline = std::chrono::steady_clock::now() + kMostEnumeration;
  for (int i = 0; i < id_count; ++i) {
    cublasLtMatmulAlgo_t base;
    if (cublasLtMatmulAlgoInit(handle_, CUBLAS_COMPUTE_32F, CUDA_R_32F, problem_.b, problem_.a,
                               problem_.d, problem_.d, ids[i], &base) != CUBLAS_STATUS_SUCCESS) {
      continue;
    }
    for (std::uint32_t tile : capability<std::uint32_t>(base, CUBLASLT_ALGO_CAP_TILE_IDS)) {
      if (std::chrono::steady_clock::now() > deadline) return list;
      if (is_worth_a_try(tile)) add_variants(base, tile, list);
    }
  }
  return list;
}

void BareGemm::add_variants(const cublasLtMatmulAlgo_t& base, std::uint32_t tile,
                            std::vector<cublasLtMatmulAlgo_t>& list) const {
  const auto options = capability<std::int32_t>(base, CUBLASLT_ALGO_CAP_CUSTOM_OPTION_MAX);
  const auto last_option =
      options.empty() ? 0u : static_cast<std::uint32_t>(std::min(options.front(), 7));
  for (std::uint32_t stage : capability<std::uint32_t>(base, CUBLASLT_ALGO_CAP_STAGES_IDS)) {
    for (std::uint16_t cluster = CUBLASLT_CLUSTER_SHAPE_1x1x1;
         cluster <= CUBLASLT_CLUSTER_SHAPE_1x2x1; ++cluster) {
      for (std::uint32_t option = 0; option <= last_option; ++option) {
        cublasLtMatmulAlgo_t algorithm = base;
        const auto set = [&](cublasLtMatmulAlgoConfigAttributes_t attribute, auto value) {
          cublasLtMatmulAlgoConfigSetAttribute(&algorithm, attribute, &value, sizeof value);
        };
        set(CUBLASLT_ALGO_CONFIG_TILE_ID, tile);
        set(CUBLASLT_ALGO_CONFIG_STAGES_ID, stage);
        set(CUBLASLT_ALGO_CONFIG_CLUSTER_SHAPE_ID, cluster);
        set(CUBLASLT_ALGO_CONFIG_CUSTOM_OPTION, option);
        cublasLtMatmulHeuristicResult_t result;
        if (cublasLtMatmulAlgoCheck(handle_, operation_, b_, a_, d_, d_, &algorithm, &result) ==
                CUBLAS_STATUS_SUCCESS &&
            result.workspaceSize <= kWorkspaceBytes) {
          list.push_back(algorithm);
        }
      }
    }
  }
}

int BareGemm::search() {
  constexpr std::size_t kFinalists = 8;
  const std::vector<cublasLtMatmulAlgo_t> list = enumerate();
  std::vector<std::pair<double, std::size_t>> times;
  // The heuristic's answers come first, so what a long list of slow ones loses is its end.
  const auto start = std::chrono::steady_clock::now();
  for (std::size_t i = 0; i < list.size(); ++i) {
    times.emplace_back(time_of(list[i], 1), i);
    if (std::chrono::steady_clock::now() - start > kMostSearch) break;
  }
  const std::size_t tried = times.size();
  std::sort(times.begin(), times.end());
  double best = std::numeric_limits<double>::infinity();
  for (int round = 0; round < 3; ++round) {
    for (std::size_t i = 0; i < std::min(times.size(), kFinalists); ++i) {
      const double time = time_of(list[times[i].second], 5);
      if (time < best) {
        best = time;
        best_ = list[times[i].second];
      }
    }
  }
  octet::require(best < std::numeric_limits<double>::infinity(), "no algorithm runs");
  return static_cast<int>(tried);
}

}  // namespace bench
