// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <functional>
#include <iosfwd>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "octet/core/block_scales.hpp"
#include "octet/runtime/context.hpp"

namespace octet {

/// How the products of FP8 elements are added up.
enum class Accumulation : std::uint8_t {
  promoted,  ///< partial sums of the tensor cores are added in FP32 after every 128 of k or fewer
  fast,      ///< all in the tensor cores' accumulators, which on Hopper keep about 13 bits
  exact      ///< in double, rounded once: what others are measured against
};

/// What happens to the sum before it is stored.
enum class Activation : std::uint8_t {
  none,
  gelu,  ///< D = gelu(sum), the tanh form; with `aux`, the sum itself is stored there too
  dgelu  ///< D = sum * gelu'(aux): the gradient for what a gelu was applied to
};

/// D[m, n] = activation(sum over k of A[m, k] * B[n, k] (+ D) (+ bias[n])), all row-major: both
/// operands contiguous along k, the layout every FP8 unit takes. A transposed operand is stored as
/// [k, m] or [k, n]; FP8 operands may be so only with a scale for the whole tensor. Scales multiply
/// the products of the elements they belong to.
struct GemmProblem {
  std::int64_t m = 0;
  std::int64_t n = 0;
  std::int64_t k = 0;
  DType a = DType::e4m3;
  DType b = DType::e4m3;
  DType d = DType::f32;
  bool a_transposed = false;
  bool b_transposed = false;
  /// Elements from one stored row to the next; 0 where rows follow each other without a gap.
  std::int64_t lda = 0, ldb = 0, ldd = 0;
  /// Of FP8 operands; others have none and leave them at tensor. mx scales are gemm_ready.
  Granularity a_scales = Granularity::tensor;
  Granularity b_scales = Granularity::tensor;
  Accumulation accumulation = Accumulation::promoted;
  /// D holds a summand already (beta = 1): a main gradient that collects micro-batches. f32, bf16.
  bool accumulate = false;
  bool bias = false;
  Activation activation = Activation::none;
  /// With gelu: the sum before the activation, bias included, is kept in `aux` [m, n]. dgelu reads
  /// it and needs it set.
  bool aux = false;
  /// Of bias and of aux.
  DType bias_type = DType::bf16, aux_type = DType::bf16;
  /// Only algorithms that give the same bits in every run.
  bool deterministic = false;
  bool operator==(const GemmProblem&) const = default;
};

/// Hash of all fields, for maps from problems to plans.
struct GemmProblemHash {
  std::size_t operator()(const GemmProblem& problem) const;
};

/// One line with every field that is not at its default: "gemm m=4 n=8 k=16 a=e4m3 b=e5m2^T d=f32".
std::string to_string(const GemmProblem& problem);
std::ostream& operator<<(std::ostream& out, const GemmProblem& problem);

/// Pointers of one call, in device memory, all aligned to 16 bytes, scales too; D apart from what
/// is read. k = 0 gives what an empty sum gives: zeros, or bias and D through the activation.
struct GemmArgs {
  const void* a = nullptr;
  const void* a_scales = nullptr;  ///< FP8 only, see Granularity: the factors that decode
  const void* b = nullptr;
  const void* b_scales = nullptr;
  void* d = nullptr;
  const void* bias = nullptr;      ///< [n] of bias_type
  void* aux = nullptr;             ///< [m, n] of aux_type, rows without a gap
  const float* d_scale = nullptr;  ///< FP8 D: stored = saturate(value * *d_scale)
  float* d_amax = nullptr;         ///< FP8 D, optional: becomes the largest |value| before d_scale
};

/// What a backend may know about a device before it says whether it can serve a problem.
struct GemmDevice {
  DeviceType type = DeviceType::cpu;
  int compute_capability = 0;  ///< 10 * major + minor; 0 on a CPU
  std::string name = "cpu";    ///< "NVIDIA H100 80GB HBM3"; rankings are kept by it
};

/// The description of a context's device; for set-up, since drivers take their time.
GemmDevice gemm_device(const Context& ctx);

enum class GemmVerdict : std::uint8_t {
  native,           ///< as asked, by the device's own means
  with_conversion,  ///< operands or results are converted on the way; see converted_bytes
  no
};

struct GemmSupport {
  GemmVerdict verdict = GemmVerdict::no;
  std::string reason;  ///< in words; names the field and the limit when the answer is no
  /// Scratch that run() takes from the context's workspace.
  std::size_t workspace_bytes = 0;
  /// Bytes that conversions read and write beside the product itself.
  std::size_t converted_bytes = 0;
};

/// A problem made ready to run: enqueues its product of these pointers on the context's stream.
using GemmPlan = std::function<void(const Context& ctx, const GemmArgs& args)>;

/// Something that multiplies matrices. Derive from it to bring your own: name(), query() and run()
/// are enough.
class GemmBackend {
 public:
  virtual ~GemmBackend() = default;
  virtual std::string name() const = 0;
  /// What a measured ranking depends on besides device and problem: a library's version, say.
  virtual std::string version() const { return "1"; }
  /// Whether it would run the problem on such a device. Pure: no device work, no pointers read, so
  /// it can be asked on a machine without a GPU.
  virtual GemmSupport query(const GemmProblem& problem, const GemmDevice& device) const = 0;
  /// Enqueues the product on the context's stream. Called only for problems it said yes to, with m,
  /// n and k above 0 and arguments that have been checked.
  virtual void run(const Context& ctx, const GemmProblem& problem, const GemmArgs& args) = 0;
  /// run() for one problem, with whatever there is to look up or to build done beforehand: the
  /// registry keeps it and calls it for every product. Valid as long as the backend; what select()
  /// says later counts for it too.
  virtual GemmPlan plan(const Context& ctx, const GemmProblem& problem) {
    static_cast<void>(ctx);
    return [this, problem](const Context& of_call, const GemmArgs& args) {
      run(of_call, problem, args);
    };
  }

  /// The ways it has to run a problem, the likeliest first, as texts that can be kept in a file: a
  /// line without tabs each. The registry times them for a second or so. Without ways there is just
  /// the one.
  virtual std::vector<std::string> candidates(const Context& ctx, const GemmProblem& problem) {
    static_cast<void>(ctx), static_cast<void>(problem);
    return {};
  }
  /// From now on run() takes this way for the problem. False, and nothing changes, if it cannot.
  virtual bool select(const Context& ctx, const GemmProblem& problem,
                      const std::string& candidate) {
    static_cast<void>(ctx), static_cast<void>(problem), static_cast<void>(candidate);
    return false;
  }
};

/// The library's CPU backend, which serves every problem whose fields do not exclude each other:
/// operands of any dtypes and granularities in any mixture, every D, every epilogue.
/// promoted and fast: FP32 sums in a fixed order (sequential within 128 of k by fma, then
/// acc = fma(scale_a * scale_b, partial, acc) with the scales of the row, the column and these
/// 128), then what apply_epilogue() does, one rounding to D. mx scales are powers of two and belong
/// to 32 of k: they multiply the elements before the sum, which is exact but for what a float
/// cannot hold, from 2^128 on. exact: operands, scales, sum and epilogue in double, rounded once to
/// D and to aux. Deterministic: the bits do not depend on the number of threads or the width of
/// vectors. Keeps some megabytes of host memory as scratch between calls. `kernel` is one of
/// reference_gemm_kernels(), or empty for the first of them.
std::unique_ptr<GemmBackend> make_reference_gemm(std::string_view kernel = {});

/// The inner loops that this processor can run, fastest first, of "avx512", "avx2", "portable". All
/// give the same bits.
std::vector<std::string> reference_gemm_kernels();

/// GEMMs that ran, by the type of their operands.
struct GemmCounts {
  std::int64_t fp8 = 0;
  std::int64_t bf16 = 0;
  std::int64_t f32 = 0;
  /// Of all these the ones whose backend said with_conversion: FP8 operands that were multiplied as
  /// BF16, say.
  std::int64_t with_conversion = 0;
};

/// The backends of one context. Not copied, not global: whoever makes it decides what is in it.
class GemmRegistry {
 public:
  /// The standard ones for the context's device: reference on a CPU, cuBLASLt on CUDA, and
  /// dequant_bf16 for what those cannot run. Two environment variables are read here: OCTET_GEMM is
  /// a name for force(), OCTET_GEMM_RANKING a file for keep_ranking().
  explicit GemmRegistry(const Context& ctx);
  ~GemmRegistry();
  GemmRegistry(const GemmRegistry&) = delete;
  GemmRegistry& operator=(const GemmRegistry&) = delete;
  /// Adds a backend, which until something has been measured is asked before all that are there.
  void add(std::unique_ptr<GemmBackend> backend);

  /// From now on only the backend of this name is asked, and what it cannot run nobody runs; an
  /// empty name lifts that. One that is not there yet may be added later.
  void force(std::string name);

  /// What prepare() measures is read from this file and added to it, a line per backend, version,
  /// device and problem; a file that does not exist yet is made. Throws octet::Error naming the
  /// line of a file that is not such a list, or a file that cannot be written. Ranks that are to
  /// compute with the same algorithms are given the same file, filled by an earlier run.
  void keep_ranking(std::string file);

  struct Choice {
    GemmBackend* backend = nullptr;  ///< null when nobody can
    std::string report;              ///< one line per backend: name, verdict, reason, time
    GemmSupport support;             ///< its answer
  };
  /// Of the backends that run the problem natively the one that prepare() found fastest; without a
  /// measurement the one added last. Only where there is none, the same among those that convert.
  Choice choose(const GemmProblem& problem) const;

  /// For set-up: reserves the workspace that the problem's backend needs and, where several
  /// backends or ways come into question, times each on made-up operands (0.1 to 2 seconds on a
  /// GPU, unless the ranking file knows) and keeps the fastest. Allocates and synchronises. Throws
  /// octet::Error with the report if nobody can run it.
  void prepare(const GemmProblem& problem);

  /// Runs the product on the backend of choose(); throws octet::Error with the report if none can,
  /// or naming the argument that is wrong: null, not aligned, or a D that overlaps what is read.
  /// Nothing happens when m or n is 0. Takes no device memory and does not synchronise; a
  /// problem that was not prepared runs with what the backend takes for fastest, and needs the
  /// workspace that its query() names. Stream-ordered. Determinism is the backend's.
  void run(const GemmProblem& problem, const GemmArgs& args);

  /// GEMMs run so far; those with m, n or k of 0 are none.
  GemmCounts counts() const { return counts_; }
  const Context& context() const { return ctx_; }

 private:
  struct Candidate;
  struct Ranking;
  /// What a problem comes to: a query and its texts are not made anew in every step.
  struct Ready {
    GemmPlan plan;                  ///< empty where there is nothing to multiply
    std::int64_t* count = nullptr;  ///< of counts_, which it adds to
    bool converts = false;          ///< and to with_conversion too
  };
  Ready& ready(const GemmProblem& problem);
  std::vector<Candidate> candidates(const GemmProblem& problem) const;
  void measure(const GemmProblem& problem, const std::vector<Candidate>& rivals);

  Context ctx_;
  GemmDevice device_;
  std::vector<std::unique_ptr<GemmBackend>> backends_;
  std::string forced_;  ///< empty: none
  std::unique_ptr<Ranking> ranking_;
  std::unordered_map<GemmProblem, Ready, GemmProblemHash> ready_;
  GemmCounts counts_;
};

}  // namespace octet
