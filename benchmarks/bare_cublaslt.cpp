// SPDX-License-Identifier: Apache-2.0
#include "bare_cublaslt.hpp"

#include <limits>

namespace bench {
namespace {

constexpr std::size_t kWorkspaceBytes = std::size_t{64} << 20;

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

/// Tiles of 64 to 256 by 64 to 512 in powers of two and some between, and those of 104 to 184 rows
/// by 128: smaller ones do not win where a product is large.
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
  return tile >= CUBLASLT_MATMUL_TILE_64x128 && tile <= CUBLASLT_MATMUL_TILE_128x96;
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
  set(CUBLASLT_MATMUL_DESC_TRANSA, CUBLAS_OP_T);
  set(CUBLASLT_MATMUL_DESC_FAST_ACCUM, static_cast<std::int8_t>(p.fast ? 1 : 0));
  set(CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, pointers.b_scale);
  set(CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, pointers.a_scale);
  const auto u = [](std::int64_t x) { return static_cast<std::uint64_t>(x); };
  check(cublasLtMatrixLayoutCreate(&a_, p.a, u(p.k), u(p.m), p.k), "LayoutCreate");
  check(cublasLtMatrixLayoutCreate(&b_, p.b, u(p.k), u(p.n), p.k), "LayoutCreate");
  check(cublasLtMatrixLayoutCreate(&d_, p.d, u(p.n), u(p.m), p.n), "LayoutCreate");
}

BareGemm::~BareGemm() {
  for (cublasLtMatrixLayout_t layout : {a_, b_, d_}) cublasLtMatrixLayoutDestroy(layout);
  cublasLtMatmulDescDestroy(operation_);
  cublasLtDestroy(handle_);
}

bool BareGemm::try_run(const cublasLtMatmulAlgo_t& algorithm) const {
  const float one = 1.0f, beta = problem_.accumulate ? 1.0f : 0.0f;
  return cublasLtMatmul(handle_, operation_, &one, pointers_.b, b_, pointers_.a, a_, &beta,
                        pointers_.d, d_, pointers_.d, d_, &algorithm, workspace_.data(),
                        kWorkspaceBytes, ctx_.stream()) == CUBLAS_STATUS_SUCCESS;
}

void BareGemm::run() const { octet::require(try_run(best_), "cublasLtMatmul failed"); }

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
/// with all clusters of at most two and all options that the library says it can run.
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
  for (int i = 0; i < id_count; ++i) {
    cublasLtMatmulAlgo_t base;
    if (cublasLtMatmulAlgoInit(handle_, CUBLAS_COMPUTE_32F, CUDA_R_32F, problem_.b, problem_.a,
                               problem_.d, problem_.d, ids[i], &base) != CUBLAS_STATUS_SUCCESS) {
      continue;
    }
    const auto options = capability<std::int32_t>(base, CUBLASLT_ALGO_CAP_CUSTOM_OPTION_MAX);
    const auto stages = capability<std::uint32_t>(base, CUBLASLT_ALGO_CAP_STAGES_IDS);
    const std::uint32_t last_option =
        options.empty() ? 0u : static_cast<std::uint32_t>(std::min(options.front(), 7));
    for (std::uint32_t tile : capability<std::uint32_t>(base, CUBLASLT_ALGO_CAP_TILE_IDS)) {
      if (!is_worth_a_try(tile)) continue;
      for (std::uint32_t stage : stages) {
        for (std::uint16_t cluster = 2; cluster <= 5; ++cluster) {
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
  }
  return list;
}

int BareGemm::search() {
  constexpr std::size_t kFinalists = 8;
  const std::vector<cublasLtMatmulAlgo_t> list = enumerate();
  std::vector<std::pair<double, std::size_t>> times;
  for (std::size_t i = 0; i < list.size(); ++i) times.emplace_back(time_of(list[i], 1), i);
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
  return static_cast<int>(list.size());
}

}  // namespace bench
