// SPDX-License-Identifier: Apache-2.0
#include "cuda/gemm/cublaslt_plan.hpp"

#include <algorithm>
#include <array>
#include <cstring>
#include <span>

#include "octet/gemm/detail/strides.hpp"

namespace octet::detail::cuda {
namespace {

/// What GemmArgs promises.
constexpr std::uint32_t kPointerAlignment = 16;
/// What the library assumes, and offers other algorithms for, unless it is told. Those of them that
/// do without are of use.
constexpr std::uint32_t kUsualAlignment = 256;
/// The heuristic hands out at most eight for FP8, whatever is asked for.
constexpr int kMostAnswers = 16;
/// Asked without workspace, the heuristic offers other algorithms, too.
constexpr std::size_t kWorkspaceLimits[] = {kGemmWorkspaceBytes, 0};

cudaDataType_t cuda_type(DType dtype) {
  switch (dtype) {
    case DType::bf16: return CUDA_R_16BF;
    case DType::f16: return CUDA_R_16F;
    case DType::e4m3: return CUDA_R_8F_E4M3;
    case DType::e5m2: return CUDA_R_8F_E5M2;
    case DType::f32: break;
  }
  return CUDA_R_32F;
}

std::int32_t scale_mode(Granularity granularity) {
  switch (granularity) {
    case Granularity::row: return CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F;
    case Granularity::row_block: return CUBLASLT_MATMUL_MATRIX_SCALE_VEC128_32F;
    case Granularity::tile: return CUBLASLT_MATMUL_MATRIX_SCALE_BLK128x128_32F;
    case Granularity::mx: return CUBLASLT_MATMUL_MATRIX_SCALE_VEC32_UE8M0;
    case Granularity::tensor: break;
  }
  return CUBLASLT_MATMUL_MATRIX_SCALE_SCALAR_32F;
}

std::int32_t epilogue_of(const GemmProblem& p) {
  if (p.activation == Activation::dgelu) return CUBLASLT_EPILOGUE_DGELU;
  if (p.activation == Activation::gelu) {
    if (p.aux) return p.bias ? CUBLASLT_EPILOGUE_GELU_AUX_BIAS : CUBLASLT_EPILOGUE_GELU_AUX;
    return p.bias ? CUBLASLT_EPILOGUE_GELU_BIAS : CUBLASLT_EPILOGUE_GELU;
  }
  return p.bias ? CUBLASLT_EPILOGUE_BIAS : CUBLASLT_EPILOGUE_DEFAULT;
}

/// A row-major matrix [rows, columns] is to cuBLASLt a column-major one [columns, rows].
OwnedCublas<cublasLtMatrixLayout_t> make_layout(const GemmProblem& problem, DType dtype,
                                                std::int64_t rows, std::int64_t columns,
                                                std::int64_t stride) {
  cublasLtMatrixLayout_t layout = nullptr;
  OCTET_CUBLAS_CHECK(
      cublasLtMatrixLayoutCreate(&layout, cuda_type(dtype), static_cast<std::uint64_t>(columns),
                                 static_cast<std::uint64_t>(rows), stride),
      problem);
  return OwnedCublas<cublasLtMatrixLayout_t>(layout);
}

template <class T>
void set(const LtPlan& plan, const GemmProblem& problem, cublasLtMatmulDescAttributes_t attribute,
         const T& value) {
  OCTET_CUBLAS_CHECK(
      cublasLtMatmulDescSetAttribute(plan.operation.get(), attribute, &value, sizeof(value)),
      problem);
}

template <class T>
void prefer(cublasLtMatmulPreference_t preference, const GemmProblem& problem,
            cublasLtMatmulPreferenceAttributes_t attribute, const T& value) {
  OCTET_CUBLAS_CHECK(
      cublasLtMatmulPreferenceSetAttribute(preference, attribute, &value, sizeof(value)), problem);
}

/// The ways to add up a product cut along k: in the workspace, in a fixed order, which gives the
/// same bits in every run (so GemmProblem::deterministic asks for nothing more). Parts rounded to D
/// are rounded once too often unless D is FP32. In place, parts wait for one another; never.
std::uint32_t reduction_schemes(const GemmProblem& problem) {
  if (problem.d != DType::f32) return CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
  return CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE | CUBLASLT_REDUCTION_SCHEME_OUTPUT_TYPE;
}

OwnedCublas<cublasLtMatmulPreference_t> make_preference(const GemmProblem& problem,
                                                        std::size_t workspace,
                                                        std::uint32_t alignment) {
  cublasLtMatmulPreference_t created = nullptr;
  OCTET_CUBLAS_CHECK(cublasLtMatmulPreferenceCreate(&created), problem);
  OwnedCublas<cublasLtMatmulPreference_t> preference(created);
  prefer(created, problem, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, workspace);
  prefer(created, problem, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, reduction_schemes(problem));
  for (auto attribute :
       {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES}) {
    prefer(created, problem, attribute, alignment);
  }
  return preference;
}

/// The heuristic's answers, best first; none where it has nothing within these limits.
std::vector<cublasLtMatmulAlgo_t> ask(cublasLtHandle_t handle, const GemmProblem& problem,
                                      const LtPlan& plan, std::size_t workspace,
                                      std::uint32_t alignment) {
  const auto preference = make_preference(problem, workspace, alignment);
  std::array<cublasLtMatmulHeuristicResult_t, kMostAnswers> found{};
  int count = 0;
  const cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(
      handle, plan.operation.get(), plan.b.get(), plan.a.get(), plan.c.get(), plan.d.get(),
      preference.get(), kMostAnswers, found.data(), &count);
  if (status == CUBLAS_STATUS_NOT_SUPPORTED) return {};
  check_cublas(status, "cublasLtMatmulAlgoGetHeuristic", problem);
  std::vector<cublasLtMatmulAlgo_t> algorithms;
  for (const auto& answer : std::span(found).first(static_cast<std::size_t>(count))) {
    if (answer.state == CUBLAS_STATUS_SUCCESS) algorithms.push_back(answer.algo);
  }
  return algorithms;
}

/// Whether pointers aligned as GemmArgs promises are enough for an algorithm.
bool takes_our_pointers(const cublasLtMatmulAlgo_t& algorithm) {
  for (auto attribute :
       {CUBLASLT_ALGO_CAP_MIN_ALIGNMENT_A_BYTES, CUBLASLT_ALGO_CAP_MIN_ALIGNMENT_B_BYTES,
        CUBLASLT_ALGO_CAP_MIN_ALIGNMENT_C_BYTES, CUBLASLT_ALGO_CAP_MIN_ALIGNMENT_D_BYTES}) {
    std::uint32_t needed = 0;
    std::size_t written = 0;
    if (cublasLtMatmulAlgoCapGetAttribute(&algorithm, attribute, &needed, sizeof(needed),
                                          &written) != CUBLAS_STATUS_SUCCESS ||
        needed > kPointerAlignment) {
      return false;
    }
  }
  return true;
}

bool is_same(const cublasLtMatmulAlgo_t& a, const cublasLtMatmulAlgo_t& b) {
  return std::memcmp(&a, &b, sizeof(a)) == 0;
}

/// An algorithm but for what variants() changes.
struct Family {
  std::int32_t id = 0;
  std::uint32_t stages = 0;
  std::uint16_t inner_shape = 0;
  bool operator==(const Family&) const = default;
};

Family family_of(const cublasLtMatmulAlgo_t& algorithm) {
  Family family;
  const auto read = [&](cublasLtMatmulAlgoConfigAttributes_t attribute, auto& value) {
    std::size_t written = 0;
    cublasLtMatmulAlgoConfigGetAttribute(&algorithm, attribute, &value, sizeof(value), &written);
  };
  read(CUBLASLT_ALGO_CONFIG_ID, family.id);
  read(CUBLASLT_ALGO_CONFIG_STAGES_ID, family.stages);
  read(CUBLASLT_ALGO_CONFIG_INNER_SHAPE_ID, family.inner_shape);
  return family;
}

/// The first algorithm of each of the first few families.
std::vector<cublasLtMatmulAlgo_t> heads(const std::vector<cublasLtMatmulAlgo_t>& list) {
  constexpr std::size_t kMostFamilies = 3;
  std::vector<cublasLtMatmulAlgo_t> firsts;
  for (const auto& algorithm : list) {
    const auto is_sibling = [&](const auto& first) {
      return family_of(first) == family_of(algorithm);
    };
    if (firsts.size() < kMostFamilies && std::none_of(firsts.begin(), firsts.end(), is_sibling)) {
      firsts.push_back(algorithm);
    }
  }
  return firsts;
}

/// Variants of an algorithm: tile shapes that won on Hopper, the clusters that go with them, and
/// all values of the option that the library does not document.
std::vector<cublasLtMatmulAlgo_t> variants(const cublasLtMatmulAlgo_t& base) {
  constexpr std::uint32_t kTiles[] = {
      CUBLASLT_MATMUL_TILE_128x96,  CUBLASLT_MATMUL_TILE_128x128, CUBLASLT_MATMUL_TILE_128x160,
      CUBLASLT_MATMUL_TILE_128x192, CUBLASLT_MATMUL_TILE_128x256, CUBLASLT_MATMUL_TILE_144x128,
      CUBLASLT_MATMUL_TILE_152x128, CUBLASLT_MATMUL_TILE_160x128, CUBLASLT_MATMUL_TILE_168x128,
      CUBLASLT_MATMUL_TILE_176x128, CUBLASLT_MATMUL_TILE_192x128, CUBLASLT_MATMUL_TILE_256x128};
  constexpr std::uint16_t kClusters[] = {CUBLASLT_CLUSTER_SHAPE_1x1x1, CUBLASLT_CLUSTER_SHAPE_2x1x1,
                                         CUBLASLT_CLUSTER_SHAPE_1x2x1};
  constexpr std::int32_t kMostOptions = 7;
  std::int32_t options = 0;
  std::size_t written = 0;
  cublasLtMatmulAlgoCapGetAttribute(&base, CUBLASLT_ALGO_CAP_CUSTOM_OPTION_MAX, &options,
                                    sizeof(options), &written);
  std::vector<cublasLtMatmulAlgo_t> list;
  for (std::uint32_t tile : kTiles) {
    for (std::uint16_t cluster : kClusters) {
      for (std::int32_t option = 0; option <= std::min(options, kMostOptions); ++option) {
        cublasLtMatmulAlgo_t algorithm = base;
        const auto configure = [&](cublasLtMatmulAlgoConfigAttributes_t attribute, auto value) {
          return cublasLtMatmulAlgoConfigSetAttribute(&algorithm, attribute, &value,
                                                      sizeof(value)) == CUBLAS_STATUS_SUCCESS;
        };
        if (configure(CUBLASLT_ALGO_CONFIG_TILE_ID, tile) &&
            configure(CUBLASLT_ALGO_CONFIG_CLUSTER_SHAPE_ID, cluster) &&
            configure(CUBLASLT_ALGO_CONFIG_CUSTOM_OPTION, static_cast<std::uint32_t>(option))) {
          list.push_back(algorithm);
        }
      }
    }
  }
  return list;
}

}  // namespace

void check_cublas(cublasStatus_t status, const char* statement, const GemmProblem& problem) {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  fail(problem, ": ", statement, " failed with ", cublasLtGetStatusName(status), " (",
       cublasLtGetStatusString(status), ")");
}

LtPlan make_plan(cublasLtHandle_t handle, const GemmProblem& p) {
  LtPlan plan;
  cublasLtMatmulDesc_t operation = nullptr;
  OCTET_CUBLAS_CHECK(cublasLtMatmulDescCreate(&operation, CUBLAS_COMPUTE_32F, CUDA_R_32F), p);
  plan.operation.reset(operation);
  set(plan, p, CUBLASLT_MATMUL_DESC_TRANSA, p.b_transposed ? CUBLAS_OP_N : CUBLAS_OP_T);
  set(plan, p, CUBLASLT_MATMUL_DESC_TRANSB, p.a_transposed ? CUBLAS_OP_T : CUBLAS_OP_N);
  set(plan, p, CUBLASLT_MATMUL_DESC_EPILOGUE, epilogue_of(p));
  if (is_fp8(p.a)) {
    // Block scales are promoted anyway; the library does not take them with fast accumulation.
    const bool fast = p.accumulation == Accumulation::fast &&
                      (p.a_scales == Granularity::tensor || p.a_scales == Granularity::row);
    set(plan, p, CUBLASLT_MATMUL_DESC_FAST_ACCUM, static_cast<std::int8_t>(fast ? 1 : 0));
    set(plan, p, CUBLASLT_MATMUL_DESC_A_SCALE_MODE, scale_mode(p.b_scales));
    set(plan, p, CUBLASLT_MATMUL_DESC_B_SCALE_MODE, scale_mode(p.a_scales));
  }
  if (p.bias) {
    set(plan, p, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE,
        static_cast<std::int32_t>(cuda_type(p.bias_type)));
  }
  if (p.aux) {
    set(plan, p, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, p.n);
    set(plan, p, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_DATA_TYPE,
        static_cast<std::int32_t>(cuda_type(p.aux_type)));
  }
  // Queries look at which pointers are set, not at where they point.
  alignas(16) static constexpr char kSomewhere[16] = {};
  GemmArgs made_up;
  made_up.a_scales = made_up.b_scales = made_up.bias = kSomewhere;
  made_up.aux = const_cast<char*>(kSomewhere);
  if (is_fp8(p.d)) made_up.d_scale = reinterpret_cast<const float*>(kSomewhere);
  set_pointers(plan, p, made_up);

  plan.a = p.a_transposed ? make_layout(p, p.a, p.k, p.m, row_stride_a(p))
                          : make_layout(p, p.a, p.m, p.k, row_stride_a(p));
  plan.b = p.b_transposed ? make_layout(p, p.b, p.k, p.n, row_stride_b(p))
                          : make_layout(p, p.b, p.n, p.k, row_stride_b(p));
  // C must have the type of the bias where D is FP8; it is not read.
  plan.c = make_layout(p, is_fp8(p.d) ? DType::bf16 : p.d, p.m, p.n, row_stride_d(p));
  plan.d = make_layout(p, p.d, p.m, p.n, row_stride_d(p));
  const auto answers = ask(handle, p, plan, kGemmWorkspaceBytes, kPointerAlignment);
  require(!answers.empty(), p, ": cublasLtMatmulAlgoGetHeuristic offers no algorithm");
  plan.algorithm = answers.front();
  return plan;
}

void set_pointers(LtPlan& plan, const GemmProblem& p, const GemmArgs& args) {
  const auto point = [&](cublasLtMatmulDescAttributes_t attribute, const void*& now,
                         const void* to) {
    if (now == to) return;
    set(plan, p, attribute, to);
    now = to;
  };
  auto& now = plan.pointers;
  if (is_fp8(p.a)) {
    point(CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, now.b_scales, args.b_scales);
    point(CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, now.a_scales, args.a_scales);
  }
  if (p.bias) point(CUBLASLT_MATMUL_DESC_BIAS_POINTER, now.bias, args.bias);
  if (p.aux) point(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, now.aux, args.aux);
  if (is_fp8(p.d)) {
    point(CUBLASLT_MATMUL_DESC_D_SCALE_POINTER, now.d_scale, args.d_scale);
    point(CUBLASLT_MATMUL_DESC_AMAX_D_POINTER, now.d_amax, args.d_amax);
  }
}

bool is_runnable(cublasLtHandle_t handle, const LtPlan& plan,
                 const cublasLtMatmulAlgo_t& algorithm) {
  cublasLtMatmulHeuristicResult_t result{};
  return cublasLtMatmulAlgoCheck(handle, plan.operation.get(), plan.b.get(), plan.a.get(),
                                 plan.c.get(), plan.d.get(), &algorithm,
                                 &result) == CUBLAS_STATUS_SUCCESS &&
         result.state == CUBLAS_STATUS_SUCCESS && result.workspaceSize <= kGemmWorkspaceBytes;
}

std::vector<cublasLtMatmulAlgo_t> find_algorithms(cublasLtHandle_t handle,
                                                  const GemmProblem& problem, const LtPlan& plan) {
  std::vector<cublasLtMatmulAlgo_t> list;
  const auto add = [&](const cublasLtMatmulAlgo_t& algorithm) {
    const auto is_known = [&](const auto& known) { return is_same(known, algorithm); };
    if (std::none_of(list.begin(), list.end(), is_known)) list.push_back(algorithm);
  };
  for (std::uint32_t alignment : {kPointerAlignment, kUsualAlignment}) {
    for (std::size_t workspace : kWorkspaceLimits) {
      for (const auto& algorithm : ask(handle, problem, plan, workspace, alignment)) {
        if (alignment == kPointerAlignment || takes_our_pointers(algorithm)) add(algorithm);
      }
    }
  }
  if (!is_fp8(problem.a)) return list;
  for (const auto& head : heads(list)) {
    for (const auto& algorithm : variants(head)) {
      if (is_runnable(handle, plan, algorithm)) add(algorithm);
    }
  }
  return list;
}

std::string to_text(const cublasLtMatmulAlgo_t& algorithm) {
  constexpr char kDigits[] = "0123456789abcdef";
  unsigned char bytes[sizeof(algorithm)];
  std::memcpy(bytes, &algorithm, sizeof(bytes));
  std::string text;
  for (unsigned char byte : bytes) {
    text += kDigits[byte / 16];
    text += kDigits[byte % 16];
  }
  return text;
}

bool from_text(const std::string& text, cublasLtMatmulAlgo_t& algorithm) {
  unsigned char bytes[sizeof(algorithm)];
  if (text.size() != 2 * sizeof(bytes)) return false;
  for (std::size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    const bool is_digit = c >= '0' && c <= '9';
    if (!is_digit && !(c >= 'a' && c <= 'f')) return false;
    const int value = is_digit ? c - '0' : c - 'a' + 10;
    unsigned char& byte = bytes[i / 2];
    byte = static_cast<unsigned char>(i % 2 == 0 ? value << 4 : byte | value);
  }
  std::memcpy(&algorithm, bytes, sizeof(bytes));
  return true;
}

}  // namespace octet::detail::cuda
