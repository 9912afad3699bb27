// SPDX-License-Identifier: Apache-2.0
// Products with every field of GemmProblem: operands with scales of any granularity, rows with
// gaps, epilogues. What is expected comes from plain loops in double and from the definitions of
// the layouts, not from the library.
#pragma once

#include <cmath>
#include <functional>

#include "gemm/matrices.hpp"
#include "octet/gemm/dequant_bf16.hpp"
#include "support/gemm_error.hpp"

namespace octet::test {

inline constexpr Granularity kGranularities[] = {Granularity::tensor, Granularity::row,
                                                 Granularity::row_block, Granularity::tile,
                                                 Granularity::mx};

/// Small whole numbers and scales of 2^-2 to 2^2: every sum is exact in FP32, in any order. Or
/// bell-shaped values.
enum class Values { whole, normal };

struct Operand {
  std::int64_t rows = 0, k = 0;
  std::vector<double> values;  ///< [rows, k], with their scales
  Bytes stored;                ///< gaps between rows are NaN in every dtype
  Bytes scales;                ///< what no element belongs to is NaN; empty without scales
  double at(std::int64_t row, std::int64_t p) const {
    return values[static_cast<std::size_t>(row * k + p)];
  }
};

/// Index of the scale of an element, by the text of Granularity and MxLayout.
inline std::int64_t scale_index(Granularity g, std::int64_t rows, std::int64_t k, std::int64_t row,
                                std::int64_t p) {
  const auto up = [](std::int64_t x, std::int64_t to) { return (x + to - 1) / to * to; };
  switch (g) {
    case Granularity::tensor: return 0;
    case Granularity::row: return row;
    case Granularity::row_block: return p / 128 * up(rows, 16) + row;
    case Granularity::tile: return row / 128 * up(up(k, 128) / 128, 4) + p / 128;
    case Granularity::mx: break;
  }
  const std::int64_t tile = row / 128 * (up(k, 128) / 128) + p / 128;
  const std::int64_t r = row % 128, b = p / 32 % 4;
  return tile * 512 + r % 32 * 16 + r / 32 * 4 + b;
}

inline double stored_value(DType dtype, double value) {
  return dtype == DType::f32 ? static_cast<double>(static_cast<float>(value))
                             : table_of(dtype).round(value);
}

inline void put(Bytes& bytes, DType dtype, std::int64_t index, double value) {
  Bytes one;
  append_rounded(one, dtype, static_cast<float>(value));
  std::copy(one.begin(), one.end(), bytes.begin() + index * static_cast<std::int64_t>(one.size()));
}

inline double get(const Bytes& bytes, DType dtype, std::int64_t index) {
  if (size_of(dtype) > 1) return decode_at(bytes, dtype, index);
  return table_of(dtype).decode(bytes[static_cast<std::size_t>(index)]);
}

/// Powers of two that hang on the index alone.
inline int scale_exponent(std::int64_t index, std::uint32_t seed) {
  return static_cast<int>((static_cast<std::uint64_t>(index) * 2654435761u + seed) >> 7) % 5 - 2;
}

inline Operand make_operand(DType dtype, bool transposed, Granularity g, std::int64_t rows,
                            std::int64_t k, std::int64_t stride, Values kind, std::uint32_t seed) {
  Operand x{rows, k, {}, {}, {}};
  const auto size = static_cast<std::int64_t>(size_of(dtype));
  if (stride == 0) stride = transposed ? rows : k;
  x.stored.assign(static_cast<std::size_t>((transposed ? k : rows) * stride * size), 0xFF);
  if (is_fp8(dtype)) {
    x.scales.assign(static_cast<std::size_t>(scale_bytes(g, rows, k)), 0xFF);
  }
  const std::vector<float> normal = normal_values(static_cast<std::size_t>(rows * k), seed);
  Draws draws(seed);
  for (std::int64_t row = 0; row < rows; ++row) {
    for (std::int64_t p = 0; p < k; ++p) {
      double value = static_cast<double>(static_cast<int>(draws() % 7) - 3);
      if (kind == Values::normal) {
        value = static_cast<double>(normal[static_cast<std::size_t>(row * k + p)]);
      }
      value = stored_value(dtype, value);
      put(x.stored, dtype, transposed ? p * stride + row : row * stride + p, value);
      if (is_fp8(dtype)) {
        const std::int64_t index = scale_index(g, rows, k, row, p);
        const int exponent = scale_exponent(index, seed);
        value = std::ldexp(value, exponent);
        if (g == Granularity::mx) {
          x.scales[static_cast<std::size_t>(index)] = static_cast<std::uint8_t>(127 + exponent);
        } else {
          put(x.scales, DType::f32, index, std::ldexp(1.0, exponent));
        }
      }
      x.values.push_back(value);
    }
  }
  return x;
}

/// A problem with its data. Of D only what a summand needs; d_scale is 2^-4.
struct Case {
  GemmProblem p;
  Operand a, b;
  std::vector<double> bias, aux, before;  ///< of their dtypes; empty without
  static constexpr float kScale = 0.0625f;
  std::int64_t ldd() const { return p.ldd == 0 ? p.n : p.ldd; }
};

inline Case make_case(const GemmProblem& p, Values kind = Values::whole, std::uint32_t seed = 1) {
  Case c{p, {}, {}, {}, {}, {}};
  c.a = make_operand(p.a, p.a_transposed, p.a_scales, p.m, p.k, p.lda, kind, seed);
  c.b = make_operand(p.b, p.b_transposed, p.b_scales, p.n, p.k, p.ldb, kind, seed + 1);
  const auto fill = [&](std::vector<double>& list, std::int64_t count, DType dtype, int spread) {
    Draws draws(seed + static_cast<std::uint32_t>(spread));
    for (std::int64_t i = 0; i < count; ++i) {
      const int draw = static_cast<int>(draws() % (2 * static_cast<unsigned>(spread) + 1)) - spread;
      list.push_back(stored_value(dtype, draw / 4.0));
    }
  };
  if (p.bias) fill(c.bias, p.n, p.bias_type, 40);
  if (p.activation == Activation::dgelu) fill(c.aux, p.m * p.n, p.aux_type, 24);
  if (p.accumulate) fill(c.before, p.m * p.n, p.d, 80);
  return c;
}

struct Element {
  double sum = 0;        ///< with D and bias: what aux holds
  double value = 0;      ///< after the activation, before d_scale
  double magnitude = 0;  ///< of everything that was added
  double slope = 1;      ///< how far an error of the sum can grow in value
};

inline double tanh_argument(double x) {
  return std::sqrt(2.0 / std::acos(-1.0)) * (x + 0.044715 * x * x * x);
}
inline double gelu_of(double x) { return 0.5 * x * (1.0 + std::tanh(tanh_argument(x))); }
inline double gelu_slope(double x) {
  const double t = std::tanh(tanh_argument(x));
  const double inner = std::sqrt(2.0 / std::acos(-1.0)) * (1.0 + 3 * 0.044715 * x * x);
  return 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * inner;
}

inline Element expected_at(const Case& c, std::int64_t i, std::int64_t j) {
  Element e;
  for (std::int64_t l = 0; l < c.p.k; ++l) {
    e.sum += c.a.at(i, l) * c.b.at(j, l);
    e.magnitude += std::abs(c.a.at(i, l) * c.b.at(j, l));
  }
  const auto at = static_cast<std::size_t>(i * c.p.n + j);
  if (c.p.accumulate) e.sum += c.before[at], e.magnitude += std::abs(c.before[at]);
  if (c.p.bias) {
    const double bias = c.bias[static_cast<std::size_t>(j)];
    e.sum += bias, e.magnitude += std::abs(bias);
  }
  e.value = e.sum;
  if (c.p.activation == Activation::gelu) e.value = gelu_of(e.sum), e.slope = 1.2;
  if (c.p.activation == Activation::dgelu) {
    e.slope = 1.2;
    e.value = e.sum * gelu_slope(c.aux[at]);
  }
  return e;
}

struct Result {
  Bytes d;    ///< [m, ldd]
  Bytes aux;  ///< [m, n]
  float amax = 0;
};

using RunCase = std::function<void(const GemmArgs& args)>;

/// Runs with guards around D and aux. D is NaN before unless it is a summand; gaps of it must stay
/// as they are.
inline Result run_case(const Context& ctx, const Case& c, const RunCase& run) {
  const GemmProblem& p = c.p;
  const auto upload_values = [&](const std::vector<double>& list, DType dtype) {
    Bytes bytes(list.size() * size_of(dtype));
    for (std::size_t i = 0; i < list.size(); ++i) {
      put(bytes, dtype, static_cast<std::int64_t>(i), list[i]);
    }
    return bytes;
  };
  const Buffer a = upload(ctx, c.a.stored), b = upload(ctx, c.b.stored);
  const Buffer a_scales = upload(ctx, c.a.scales), b_scales = upload(ctx, c.b.scales);
  const Buffer bias = upload(ctx, upload_values(c.bias, p.bias_type));
  const Buffer scale = upload(ctx, std::vector<float>{Case::kScale, 0, 0, 0});
  const Guarded amax(ctx, 4);
  const auto count = static_cast<std::size_t>(p.m * p.n);
  const Guarded aux(ctx, p.aux ? count * size_of(p.aux_type) : 0);
  if (!c.aux.empty()) write(ctx, aux.data(), upload_values(c.aux, p.aux_type));
  const Guarded d(ctx, static_cast<std::size_t>(p.m * c.ldd()) * size_of(p.d));
  Bytes before(d.bytes(), 0xFF);
  for (std::size_t i = 0; i < c.before.size(); ++i) {
    const auto at = static_cast<std::int64_t>(i);
    put(before, p.d, at / p.n * c.ldd() + at % p.n, c.before[i]);
  }
  write(ctx, d.data(), before);
  run({.a = a.data(),
       .a_scales = is_fp8(p.a) ? a_scales.data() : nullptr,
       .b = b.data(),
       .b_scales = is_fp8(p.b) ? b_scales.data() : nullptr,
       .d = d.data(),
       .bias = p.bias ? bias.data() : nullptr,
       .aux = p.aux ? aux.data() : nullptr,
       .d_scale = is_fp8(p.d) ? scale.as<float>() : nullptr,
       .d_amax = is_fp8(p.d) ? static_cast<float*>(amax.data()) : nullptr});
  ctx.synchronize();
  if (!d.intact() || !aux.intact() || !amax.intact()) return {};
  return {d.values<std::uint8_t>(), aux.values<std::uint8_t>(), amax.values<float>()[0]};
}

/// Where a stored value is further from the true one than its own rounding and `error` allow.
inline bool is_near(double actual, double wanted, DType dtype, double error) {
  if (std::abs(actual - wanted) <= error) return true;
  if (dtype == DType::f32)
    return std::abs(actual - wanted) <= error + std::ldexp(std::abs(wanted), -24);
  // Rounding is monotone: the result lies between those of the ends.
  const double low = stored_value(dtype, wanted - error),
               high = stored_value(dtype, wanted + error);
  return low <= actual && actual <= high;
}

/// Empty if D, aux, amax and the gaps are what they must be. `relative` is the error allowed as a
/// share of the sum of all magnitudes; 0 asks for the exact value rounded once.
inline std::string mistake(const Case& c, const Result& r, double relative) {
  const GemmProblem& p = c.p;
  const auto tell = [&](const char* what, std::int64_t i, std::int64_t j, double is, double want) {
    std::ostringstream text;
    text.precision(12);
    text << p << ": " << what << " at (" << i << ", " << j << ") is " << is << " instead of "
         << want;
    return text.str();
  };
  if (r.d.empty()) return to_string(p) + ": something was written beside an output";
  const double scale = is_fp8(p.d) ? static_cast<double>(Case::kScale) : 1.0;
  double largest = 0, largest_error = 0;
  for (std::int64_t i = 0; i < p.m; ++i) {
    for (std::int64_t j = 0; j < p.n; ++j) {
      const Element e = expected_at(c, i, j);
      const double error = relative * e.magnitude * e.slope;
      largest = std::max(largest, std::abs(e.value));
      largest_error = std::max(largest_error, error);
      const double d = get(r.d, p.d, i * c.ldd() + j);
      if (!is_near(d, e.value * scale, p.d, error * scale))
        return tell("d", i, j, d, e.value * scale);
      if (p.activation != Activation::gelu || !p.aux) continue;
      const double aux = get(r.aux, p.aux_type, i * p.n + j);
      if (!is_near(aux, e.sum, p.aux_type, error)) return tell("aux", i, j, aux, e.sum);
    }
    const auto row = r.d.begin() + i * c.ldd() * static_cast<std::int64_t>(size_of(p.d));
    const auto size = static_cast<std::int64_t>(size_of(p.d));
    if (!std::all_of(row + p.n * size, row + c.ldd() * size, [](auto x) { return x == 0xFF; })) {
      return to_string(p) + ": the gap behind row " + std::to_string(i) + " was written to";
    }
  }
  const auto amax = static_cast<double>(r.amax);
  if (is_fp8(p.d) && !is_near(amax, largest, DType::f32, largest_error)) {
    return tell("d_amax", 0, 0, amax, largest);
  }
  return {};
}

/// The library's backends for a device, with the description they are asked with.
class Backends {
 public:
  explicit Backends(const Context& ctx) : device(gemm_device(ctx)), ctx_(ctx), gemms_(ctx) {
    GemmProblem p{.m = 16, .n = 16, .k = 16};
    list.push_back(named("dequant_bf16", p));
    p.a = p.b = DType::bf16;
    list.push_back(named(device.type == DeviceType::cpu ? "reference" : "cublaslt", p));
  }

  GemmDevice device;
  std::vector<GemmBackend*> list;

  /// Runs a case on every backend that says yes; returns how many did. `relative` as for mistake(),
  /// more for sums of FP8 units, unless it is 0, and for an activation of the vendor's.
  int run(const Case& c, double relative, std::string& wrong) {
    int count = 0;
    for (GemmBackend* backend : list) {
      const GemmSupport support = backend->query(c.p, device);
      if (support.verdict == GemmVerdict::no) continue;
      ++count;
      ctx_.reserve_workspace(support.workspace_bytes);
      const Result r =
          run_case(ctx_, c, [&](const GemmArgs& args) { backend->run(ctx_, c.p, args); });
      double allowed = relative;
      if (says(support, "FP8 tensor cores") && c.p.activation == Activation::none && relative > 0) {
        allowed = std::max(allowed, kPromotedError);
      }
      if (is_fused_by_vendor(support)) {
        allowed = std::max(
            {allowed, vendor_activation_error(c.p.activation), vendor_accumulate_error(c.p)});
      }
      wrong = mistake(c, r, allowed);
      if (!wrong.empty()) {
        wrong = to_string(ctx_.device()) + " " + backend->name() + " " + wrong;
        break;
      }
    }
    return count;
  }

 private:
  /// Whether all that comes after the sum happens in a kernel of cuBLASLt.
  bool is_fused_by_vendor(const GemmSupport& support) const {
    return device.type == DeviceType::cuda && !says(support, "then the epilogue") &&
           !says(support, "second pass");
  }
  static bool says(const GemmSupport& support, const char* text) {
    return support.reason.find(text) != std::string::npos;
  }
  /// The registry's backend of this name, which must run the problem.
  GemmBackend* named(const std::string& name, const GemmProblem& problem) {
    gemms_.force(name);
    const GemmRegistry::Choice choice = gemms_.choose(problem);
    require(choice.backend != nullptr, choice.report);
    return choice.backend;
  }

  Context ctx_;
  GemmRegistry gemms_;
};

}  // namespace octet::test
