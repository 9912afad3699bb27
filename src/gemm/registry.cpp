// SPDX-License-Identifier: Apache-2.0
#include <cstdlib>
#include <ostream>

#include "backend.hpp"
#include "octet/gemm/gemm.hpp"
#include "octet/runtime/tensor.hpp"
#include "overlap.hpp"

namespace octet {
namespace {

/// Vendor kernels read 16 bytes at a time; held on the CPU too, so that a program tested there does
/// not fail on a GPU.
constexpr std::uintptr_t kAlignment = 16;

void check_pointer(const GemmProblem& problem, const char* name, const void* pointer) {
  require(pointer != nullptr, problem, ": ", name, " is null");
  require(reinterpret_cast<std::uintptr_t>(pointer) % kAlignment == 0, problem, ": ", name,
          " is at ", pointer, "; it must be aligned to ", kAlignment, " bytes");
}

void check_scale(const GemmProblem& problem, const char* name, DType dtype, const void* scale) {
  if (is_fp8(dtype)) check_pointer(problem, name, scale);
}

/// D is written while the others are read.
void check_apart(const GemmProblem& problem, const GemmArgs& args, const char* name,
                 const void* data, std::int64_t bytes) {
  const auto d_bytes = static_cast<std::size_t>(problem.m * problem.n) * size_of(problem.d);
  require(!detail::overlap(args.d, d_bytes, data, static_cast<std::size_t>(bytes)), problem,
          ": d (", d_bytes, " bytes at ", args.d, ") overlaps ", name, " (", bytes, " bytes at ",
          data, "); they must be apart");
}

void check(const GemmProblem& problem, const GemmArgs& args) {
  require(problem.m >= 0 && problem.n >= 0 && problem.k >= 0, problem,
          ": m, n and k must not be negative");
  if (problem.m == 0 || problem.n == 0) return;
  check_pointer(problem, "d", args.d);
  if (problem.k == 0) return;
  check_pointer(problem, "a", args.a);
  check_pointer(problem, "b", args.b);
  check_scale(problem, "a_scales", problem.a, args.a_scales);
  check_scale(problem, "b_scales", problem.b, args.b_scales);
  const auto bytes = [&](std::int64_t rows, DType dtype) {
    return rows * problem.k * static_cast<std::int64_t>(size_of(dtype));
  };
  check_apart(problem, args, "a", args.a, bytes(problem.m, problem.a));
  check_apart(problem, args, "b", args.b, bytes(problem.n, problem.b));
  if (is_fp8(problem.a)) check_apart(problem, args, "a_scales", args.a_scales, sizeof(float));
  if (is_fp8(problem.b)) check_apart(problem, args, "b_scales", args.b_scales, sizeof(float));
}

GemmDevice describe(const Context& ctx) {
  const Device device = ctx.device();
  if (device.type == DeviceType::cpu) return {};
  return {DeviceType::cuda, detail::cuda_part().compute_capability(device.index)};
}

}  // namespace

std::string to_string(const GemmProblem& p) {
  std::ostringstream text;
  text << "gemm m=" << p.m << " n=" << p.n << " k=" << p.k << " a=" << name_of(p.a)
       << (p.a_transposed ? "^T" : "") << " b=" << name_of(p.b) << (p.b_transposed ? "^T" : "")
       << " d=" << name_of(p.d) << (p.accumulation == Accumulation::fast ? " fast" : "");
  return text.str();
}

std::ostream& operator<<(std::ostream& out, const GemmProblem& problem) {
  return out << to_string(problem);
}

std::size_t GemmProblemHash::operator()(const GemmProblem& p) const {
  const std::uint64_t flags =
      static_cast<std::uint64_t>(p.a) | static_cast<std::uint64_t>(p.b) << 3 |
      static_cast<std::uint64_t>(p.d) << 6 | static_cast<std::uint64_t>(p.a_transposed) << 9 |
      static_cast<std::uint64_t>(p.b_transposed) << 10 |
      static_cast<std::uint64_t>(p.accumulation) << 11;
  std::uint64_t hash = flags;
  for (std::int64_t dimension : {p.m, p.n, p.k}) {
    // The multiplier of a 64-bit Weyl sequence spreads small integers over all bits.
    hash = (hash ^ static_cast<std::uint64_t>(dimension)) * 0x9E3779B97F4A7C15u;
    hash ^= hash >> 32;
  }
  return static_cast<std::size_t>(hash);
}

GemmRegistry::GemmRegistry(const Context& ctx) : ctx_(ctx), device_(describe(ctx)) {
  if (device_.type == DeviceType::cpu) {
    add(make_reference_gemm());
  } else {
    add(detail::cuda_part().make_cublaslt(ctx));
  }
  if (const char* name = std::getenv("OCTET_GEMM")) force(name);
}

void GemmRegistry::add(std::unique_ptr<GemmBackend> backend) {
  require(backend != nullptr, "a GEMM backend that is to be added is null");
  backends_.push_back(std::move(backend));
  chosen_.clear();
}

void GemmRegistry::force(std::string name) {
  forced_ = std::move(name);
  chosen_.clear();
}

GemmRegistry::Choice GemmRegistry::choose(const GemmProblem& problem) const {
  Choice choice;
  bool has_forced = forced_.empty();
  for (auto backend = backends_.rbegin(); backend != backends_.rend(); ++backend) {
    if (!forced_.empty() && (*backend)->name() != forced_) {
      choice.report += (*backend)->name() + ": not asked, " + forced_ + " is forced\n";
      continue;
    }
    has_forced = true;
    const GemmSupport support = (*backend)->query(problem, device_);
    const bool yes = support.verdict == GemmVerdict::native;
    choice.report += (*backend)->name() + (yes ? ": native, " : ": no, ") + support.reason + "\n";
    if (!yes) continue;
    choice.backend = backend->get();
    choice.support = support;
    break;
  }
  if (!has_forced) choice.report += forced_ + ": forced, but there is no backend of that name\n";
  return choice;
}

void GemmRegistry::run(const GemmProblem& problem, const GemmArgs& args) {
  check(problem, args);
  if (problem.m == 0 || problem.n == 0) return;
  if (problem.k == 0) {
    zero_bytes(ctx_, args.d, static_cast<std::size_t>(problem.m * problem.n) * size_of(problem.d));
    return;
  }
  auto chosen = chosen_.find(problem);
  if (chosen == chosen_.end()) {
    const Choice choice = choose(problem);
    require(choice.backend != nullptr, problem, ": no backend can run it\n", choice.report);
    chosen = chosen_.emplace(problem, choice.backend).first;
  }
  chosen->second->run(ctx_, problem, args);
  const bool fp8 = is_fp8(problem.a) || is_fp8(problem.b);
  const bool bf16 = problem.a == DType::bf16 || problem.b == DType::bf16;
  ++(fp8 ? counts_.fp8 : bf16 ? counts_.bf16 : counts_.f32);
}

}  // namespace octet
