// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <iosfwd>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "octet/runtime/context.hpp"

namespace octet {

/// D[m, n] = sum over k of A[m, k] * B[n, k], all row-major: both operands contiguous along k, the
/// layout every FP8 unit takes. A transposed operand is stored as [k, m] or [k, n]. FP8 operands
/// carry one scale_inv per tensor, which multiplies the product.
struct GemmProblem {
  std::int64_t m = 0;
  std::int64_t n = 0;
  std::int64_t k = 0;
  DType a = DType::e4m3;
  DType b = DType::e4m3;
  DType d = DType::f32;
  bool a_transposed = false;
  bool b_transposed = false;
  /// Faster accumulation of FP8 products at lower precision, where a device has it (Hopper).
  bool fast_accumulation = false;
  bool operator==(const GemmProblem&) const = default;
};

/// Hash of all fields, for maps from problems to plans.
struct GemmProblemHash {
  std::size_t operator()(const GemmProblem& problem) const;
};

/// "gemm m=4 n=8 k=16 a=e4m3 b=e5m2^T d=f32".
std::string to_string(const GemmProblem& problem);
std::ostream& operator<<(std::ostream& out, const GemmProblem& problem);

/// Pointers of one call, in device memory, all aligned to 16 bytes, scales too; D apart from what
/// is read. k = 0 gives zeros.
struct GemmArgs {
  const void* a = nullptr;
  const float* a_scale_inv = nullptr;  ///< FP8 only
  const void* b = nullptr;
  const float* b_scale_inv = nullptr;  ///< FP8 only
  void* d = nullptr;
};

/// What a backend may know about a device before it says whether it can serve a problem.
struct GemmDevice {
  DeviceType type = DeviceType::cpu;
  int compute_capability = 0;  ///< 10 * major + minor; 0 on a CPU
};

enum class GemmVerdict : std::uint8_t { native, no };

struct GemmSupport {
  GemmVerdict verdict = GemmVerdict::no;
  std::string reason;  ///< in words; names the field and the limit when the answer is no
};

/// Something that multiplies matrices. Derive from it to bring your own.
class GemmBackend {
 public:
  virtual ~GemmBackend() = default;
  virtual std::string name() const = 0;
  /// Whether it would run the problem on such a device. Pure: no device work, no pointers read, so
  /// it can be asked on a machine without a GPU.
  virtual GemmSupport query(const GemmProblem& problem, const GemmDevice& device) const = 0;
  /// Enqueues the product on the context's stream. Called only for problems it said yes to.
  virtual void run(const Context& ctx, const GemmProblem& problem, const GemmArgs& args) = 0;
};

/// The library's CPU backend: FP32 sums in a fixed order (sequential within 128 of k by fma, then
/// acc = fma(scale_a * scale_b, partial, acc)), one rounding to D. Deterministic: the bits do not
/// depend on the number of threads or the width of vectors. f32, bf16 and FP8 operands in any
/// mixture and layout; D f32 or bf16. Keeps some megabytes of host memory as scratch between calls.
/// `kernel` is one of reference_gemm_kernels(), or empty for the first of them.
std::unique_ptr<GemmBackend> make_reference_gemm(std::string_view kernel = {});

/// The inner loops that this processor can run, fastest first, of "avx512", "avx2", "portable". All
/// give the same bits.
std::vector<std::string> reference_gemm_kernels();

/// GEMMs that ran, by the type of their operands.
struct GemmCounts {
  std::int64_t fp8 = 0;
  std::int64_t bf16 = 0;
  std::int64_t f32 = 0;
};

/// The backends of one context. Not copied, not global: whoever makes it decides what is in it.
class GemmRegistry {
 public:
  /// The standard ones for the context's device: reference on a CPU, cuBLASLt on CUDA. The
  /// environment variable OCTET_GEMM, read here, is a name for force().
  explicit GemmRegistry(const Context& ctx);
  /// Adds a backend, which is asked before all that are there already.
  void add(std::unique_ptr<GemmBackend> backend);

  /// From now on only the backend of this name is asked, and what it cannot run nobody runs; an
  /// empty name lifts that. One that is not there yet may be added later.
  void force(std::string name);

  struct Choice {
    GemmBackend* backend = nullptr;  ///< null when nobody can
    std::string report;              ///< one line per backend asked: name, verdict, reason
  };
  Choice choose(const GemmProblem& problem) const;

  /// Runs the product on the first backend that can; throws octet::Error with the report if none
  /// can, or naming the argument that is wrong: null, not aligned, or a D that overlaps an operand
  /// or a scale. Nothing happens when m or n is 0; k = 0 zeroes D. Stream-ordered. Determinism is
  /// the backend's.
  void run(const GemmProblem& problem, const GemmArgs& args);

  /// GEMMs run so far; those with m, n or k of 0 are none.
  GemmCounts counts() const { return counts_; }
  const Context& context() const { return ctx_; }

 private:
  Context ctx_;
  GemmDevice device_;
  std::vector<std::unique_ptr<GemmBackend>> backends_;
  std::string forced_;  ///< empty: none
  /// Answers of choose(), so that a query and its texts are not made anew in every step.
  std::unordered_map<GemmProblem, GemmBackend*, GemmProblemHash> chosen_;
  GemmCounts counts_;
};

}  // namespace octet
