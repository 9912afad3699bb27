// SPDX-License-Identifier: Apache-2.0
// What a GEMM problem says in words, and the checks that every backend may rely on.
#include "gemm/problem.hpp"

#include <ostream>
#include <sstream>

#include "gemm/problem_rules.hpp"
#include "octet/gemm/detail/strides.hpp"
#include "overlap.hpp"

namespace octet {
namespace detail {
namespace {

/// Vendor kernels read 16 bytes at a time; held on the CPU too, so that a program tested there does
/// not fail on a GPU.
constexpr std::uintptr_t kAlignment = 16;

void check_pointer(const GemmProblem& problem, const char* name, const void* pointer) {
  require(pointer != nullptr, problem, ": ", name, " is null");
  require(reinterpret_cast<std::uintptr_t>(pointer) % kAlignment == 0, problem, ": ", name,
          " is at ", pointer, "; it must be aligned to ", kAlignment, " bytes");
}

void check_absent(const GemmProblem& problem, const char* name, const void* pointer,
                  const char* why) {
  require(pointer == nullptr, problem, ": ", name, " is given, but ", why);
}

/// Bytes from the first element of a matrix to its last.
std::int64_t span_bytes(std::int64_t rows, std::int64_t columns, std::int64_t stride, DType dtype) {
  return ((rows - 1) * stride + columns) * static_cast<std::int64_t>(size_of(dtype));
}

struct Memory {
  const char* name;
  const void* data;
  std::int64_t bytes;
};

void check_apart(const GemmProblem& problem, const Memory& written, const Memory& other) {
  if (written.data == nullptr || other.data == nullptr) return;
  require(!overlap(written.data, static_cast<std::size_t>(written.bytes), other.data,
                   static_cast<std::size_t>(other.bytes)),
          problem, ": ", written.name, " (", written.bytes, " bytes at ", written.data,
          ") overlaps ", other.name, " (", other.bytes, " bytes at ", other.data,
          "); they must be apart");
}

void check_present(const GemmProblem& p, const GemmArgs& args) {
  check_pointer(p, "d", args.d);
  if (p.k != 0) {
    check_pointer(p, "a", args.a);
    check_pointer(p, "b", args.b);
    if (is_fp8(p.a)) check_pointer(p, "a_scales", args.a_scales);
    if (is_fp8(p.b)) check_pointer(p, "b_scales", args.b_scales);
  }
  if (p.bias) {
    check_pointer(p, "bias", args.bias);
  } else {
    check_absent(p, "bias", args.bias, "the problem has none");
  }
  if (p.aux) {
    check_pointer(p, "aux", args.aux);
  } else {
    check_absent(p, "aux", args.aux, "the problem has none");
  }
  if (is_fp8(p.d)) {
    check_pointer(p, "d_scale", args.d_scale);
    if (args.d_amax != nullptr) check_pointer(p, "d_amax", args.d_amax);
  } else {
    check_absent(p, "d_scale", args.d_scale, "d is not FP8");
    check_absent(p, "d_amax", args.d_amax, "d is not FP8");
  }
}

void check_all_apart(const GemmProblem& p, const GemmArgs& args) {
  const auto operand = [&](const char* name, const void* data, DType dtype, std::int64_t rows,
                           bool transposed, std::int64_t stride) {
    const std::int64_t bytes = p.k == 0     ? 0
                               : transposed ? span_bytes(p.k, rows, stride, dtype)
                                            : span_bytes(rows, p.k, stride, dtype);
    return Memory{name, p.k == 0 ? nullptr : data, bytes};
  };
  const auto scales = [&](const char* name, const void* data, DType dtype, Granularity granularity,
                          std::int64_t rows) {
    return Memory{name, is_fp8(dtype) && p.k != 0 ? data : nullptr,
                  scale_bytes(granularity, rows, p.k)};
  };
  const Memory d{"d", args.d, span_bytes(p.m, p.n, row_stride_d(p), p.d)};
  const Memory aux{"aux", args.aux, span_bytes(p.m, p.n, p.n, p.aux_type)};
  const Memory amax{"d_amax", args.d_amax, sizeof(float)};
  const Memory others[] = {operand("a", args.a, p.a, p.m, p.a_transposed, row_stride_a(p)),
                           operand("b", args.b, p.b, p.n, p.b_transposed, row_stride_b(p)),
                           scales("a_scales", args.a_scales, p.a, p.a_scales, p.m),
                           scales("b_scales", args.b_scales, p.b, p.b_scales, p.n),
                           {"bias", args.bias, span_bytes(1, p.n, p.n, p.bias_type)},
                           {"d_scale", args.d_scale, sizeof(float)}};
  check_apart(p, d, aux);
  check_apart(p, d, amax);
  check_apart(p, aux, amax);
  for (const Memory& other : others) {
    for (const Memory& written : {d, aux, amax}) check_apart(p, written, other);
  }
}

}  // namespace

void check_problem(const GemmProblem& p) {
  const std::string unknown = enumeration_refusal(p);
  require(unknown.empty(), "gemm: ", unknown);
  require(p.m >= 0 && p.n >= 0 && p.k >= 0, p, ": m, n and k must not be negative");
  const std::string refusal = problem_refusal(p);
  require(refusal.empty(), p, ": ", refusal);
}

void check_args(const GemmProblem& problem, const GemmArgs& args) {
  if (problem.m == 0 || problem.n == 0) return;
  check_present(problem, args);
  check_all_apart(problem, args);
}

}  // namespace detail

namespace {

std::string_view name_of(Accumulation accumulation) {
  constexpr std::string_view kNames[] = {"promoted", "fast", "exact"};
  return kNames[static_cast<int>(accumulation)];
}

std::string_view name_of(Activation activation) {
  constexpr std::string_view kNames[] = {"none", "gelu", "dgelu"};
  return kNames[static_cast<int>(activation)];
}

}  // namespace

std::string to_string(const GemmProblem& p) {
  std::ostringstream text;
  const auto operand = [&](const char* name, DType dtype, bool transposed, Granularity scales,
                           std::int64_t stride) {
    text << " " << name << "=" << octet::name_of(dtype) << (transposed ? "^T" : "");
    if (scales != Granularity::tensor) text << "/" << octet::name_of(scales);
    if (stride != 0) text << " ld" << name << "=" << stride;
  };
  text << "gemm m=" << p.m << " n=" << p.n << " k=" << p.k;
  operand("a", p.a, p.a_transposed, p.a_scales, p.lda);
  operand("b", p.b, p.b_transposed, p.b_scales, p.ldb);
  operand("d", p.d, false, Granularity::tensor, p.ldd);
  if (p.accumulation != Accumulation::promoted) text << " " << name_of(p.accumulation);
  if (p.accumulate) text << " accumulate";
  if (p.bias) text << " bias=" << octet::name_of(p.bias_type);
  if (p.activation != Activation::none) text << " " << name_of(p.activation);
  if (p.aux) text << " aux=" << octet::name_of(p.aux_type);
  if (p.deterministic) text << " deterministic";
  return text.str();
}

std::ostream& operator<<(std::ostream& out, const GemmProblem& problem) {
  return out << to_string(problem);
}

std::size_t GemmProblemHash::operator()(const GemmProblem& p) const {
  std::uint64_t flags = 0;
  const auto add = [&flags](auto value, int bits) {
    flags = flags << bits | static_cast<std::uint64_t>(value);
  };
  for (DType dtype : {p.a, p.b, p.d, p.bias_type, p.aux_type}) add(dtype, 3);
  for (Granularity granularity : {p.a_scales, p.b_scales}) add(granularity, 3);
  add(p.accumulation, 2);
  add(p.activation, 2);
  for (bool flag : {p.a_transposed, p.b_transposed, p.accumulate, p.bias, p.aux, p.deterministic}) {
    add(flag, 1);
  }
  std::uint64_t hash = flags;
  for (std::int64_t dimension : {p.m, p.n, p.k, p.lda, p.ldb, p.ldd}) {
    // The multiplier of a 64-bit Weyl sequence spreads small integers over all bits.
    hash = (hash ^ static_cast<std::uint64_t>(dimension)) * 0x9E3779B97F4A7C15u;
    hash ^= hash >> 32;
  }
  return static_cast<std::size_t>(hash);
}

}  // namespace octet
