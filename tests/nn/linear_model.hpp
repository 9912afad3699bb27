// SPDX-License-Identifier: Apache-2.0
// A Linear with calls that go through host memory, and what it must compute: operands by the
// definitions of the formats, products in double.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "octet/nn/linear.hpp"
#include "support/devices.hpp"
#include "support/gemm_error.hpp"
#include "support/guarded.hpp"
#include "support/random.hpp"
#include "support/reference.hpp"

namespace octet::test {

/// Row-major.
struct Matrix {
  std::int64_t rows = 0, columns = 0;
  std::vector<double> values = std::vector<double>(static_cast<std::size_t>(rows * columns));

  double& at(std::int64_t i, std::int64_t j) {
    return values[static_cast<std::size_t>(i * columns + j)];
  }
  double at(std::int64_t i, std::int64_t j) const {
    return values[static_cast<std::size_t>(i * columns + j)];
  }
};

inline Matrix transposed(const Matrix& m) {
  Matrix out{m.columns, m.rows};
  for (std::int64_t i = 0; i < m.rows; ++i) {
    for (std::int64_t j = 0; j < m.columns; ++j) out.at(j, i) = m.at(i, j);
  }
  return out;
}

inline Matrix rounded(Matrix m, DType dtype) {
  if (dtype == DType::f32) return m;
  for (double& value : m.values) value = table_of(dtype).round(value);
  return m;
}

/// Bell-shaped values, whose size changes from one run of `run` rows and columns to the next, so
/// much that in E4M3 with a scale for the whole tensor the smaller ones are lost.
inline Matrix random_matrix(std::int64_t rows, std::int64_t columns, std::uint32_t seed,
                            double sigma, DType dtype, std::int64_t run = 20) {
  const auto values = normal_values(static_cast<std::size_t>(rows * columns), seed);
  Matrix m{rows, columns};
  for (std::int64_t i = 0; i < rows; ++i) {
    for (std::int64_t j = 0; j < columns; ++j) {
      const int exponent = 4 * static_cast<int>((i / run * 5 + j / run * 3) % 7) - 12;
      const auto value = static_cast<double>(values[static_cast<std::size_t>(i * columns + j)]);
      m.at(i, j) = static_cast<double>(static_cast<float>(sigma * std::ldexp(value, exponent)));
    }
  }
  return rounded(m, dtype);
}

/// Whole numbers from -limit to limit.
inline Matrix integer_matrix(std::int64_t rows, std::int64_t columns, std::uint32_t seed,
                             int limit) {
  Draws draws(seed);
  Matrix m{rows, columns};
  for (double& value : m.values) {
    value = static_cast<double>(draws() % static_cast<unsigned>(2 * limit + 1)) - limit;
  }
  return m;
}

/// What decodes a block with this amax: a power of two.
inline double decoding_factor(double amax, DType dtype, Granularity granularity) {
  const double max = table_of(dtype).max();
  if (granularity != Granularity::mx) return 1 / reference_scale(amax, max);
  // The exponent of a quotient in FP32, rounded up.
  const float quotient = static_cast<float>(amax) * static_cast<float>(1 / max);
  int exponent = std::max(std::ilogb(quotient), -127);
  while (std::ldexp(1.0, exponent) < static_cast<double>(quotient)) ++exponent;
  return std::ldexp(1.0, exponent);
}

/// What a cast leaves of a matrix, decoded; blocks run along its rows.
inline Matrix cast(const Matrix& m, DType dtype, Granularity granularity) {
  const bool is_tensor = granularity == Granularity::tensor;
  const std::int64_t all = std::max<std::int64_t>({m.rows, m.columns, 1});
  const std::int64_t height = is_tensor ? all : granularity == Granularity::tile ? 128 : 1;
  const std::int64_t width = is_tensor ? all : granularity == Granularity::mx ? 32 : 128;
  Matrix out = m;
  for (std::int64_t i0 = 0; i0 < m.rows; i0 += height) {
    for (std::int64_t j0 = 0; j0 < m.columns; j0 += width) {
      const std::int64_t i1 = std::min(i0 + height, m.rows), j1 = std::min(j0 + width, m.columns);
      double amax = 0;
      for (std::int64_t i = i0; i < i1; ++i) {
        for (std::int64_t j = j0; j < j1; ++j) amax = std::max(amax, std::abs(m.at(i, j)));
      }
      const double factor = decoding_factor(amax, dtype, granularity);
      for (std::int64_t i = i0; i < i1; ++i) {
        for (std::int64_t j = j0; j < j1; ++j) {
          out.at(i, j) = table_of(dtype).round(m.at(i, j) / factor) * factor;
        }
      }
    }
  }
  return out;
}

/// A product and, as the measure of its errors, the sum of the magnitudes.
struct Product {
  Matrix sum, size;
};

/// a[m, k] b[n, k]^T.
inline Product product(const Matrix& a, const Matrix& b) {
  Product p{{a.rows, b.rows}, {a.rows, b.rows}};
  for (std::int64_t i = 0; i < a.rows; ++i) {
    const double* x = a.values.data() + i * a.columns;
    for (std::int64_t j = 0; j < b.rows; ++j) {
      const double* y = b.values.data() + j * b.columns;
      double sum = 0, size = 0;
      for (std::int64_t l = 0; l < a.columns; ++l) {
        sum += x[l] * y[l];
        size += std::abs(x[l] * y[l]);
      }
      p.sum.at(i, j) = sum, p.size.at(i, j) = size;
    }
  }
  return p;
}

/// Empty, or the first element that is further off than `tolerance` times its size and what
/// rounding to `dtype` makes of it.
inline std::string too_far(const Matrix& actual, const Product& expected, double tolerance,
                           DType dtype) {
  const double rounding = dtype == DType::bf16 ? 0x1p-8 : 0x1p-24;
  for (std::size_t i = 0; i < expected.sum.values.size(); ++i) {
    const double sum = expected.sum.values[i];
    const double limit = tolerance * expected.size.values[i] + rounding * std::abs(sum) * 1.001;
    if (std::abs(actual.values[i] - sum) <= limit) continue;
    std::ostringstream text;
    text << "element " << i << " of [" << actual.rows << ", " << actual.columns
         << "]: " << actual.values[i] << " instead of " << sum << " +- " << limit;
    return text.str();
  }
  return {};
}

inline std::string difference(const Matrix& actual, const Matrix& expected) {
  return too_far(actual, {expected, Matrix{expected.rows, expected.columns}}, 0, DType::f32);
}

/// Values as a dtype has them in device memory.
inline Buffer upload_as(const Context& ctx, const Matrix& m, DType dtype) {
  if (dtype == DType::f32) {
    return upload(ctx, std::vector<float>(m.values.begin(), m.values.end()));
  }
  std::vector<std::uint16_t> codes;
  for (double v : m.values) codes.push_back(static_cast<std::uint16_t>(table_of(dtype).encode(v)));
  return upload(ctx, codes);
}

inline Matrix values_of(const Guarded& memory, DType dtype, std::int64_t rows,
                        std::int64_t columns) {
  Matrix m{rows, columns};
  const auto bytes = memory.values<std::uint8_t>();
  for (std::size_t i = 0; i < m.values.size(); ++i) {
    if (dtype == DType::f32) {
      float value = 0;
      std::memcpy(&value, bytes.data() + 4 * i, 4);
      m.values[i] = static_cast<double>(value);
    } else {
      std::uint16_t code = 0;
      std::memcpy(&code, bytes.data() + 2 * i, 2);
      m.values[i] = table_of(dtype).decode(code);
    }
  }
  return m;
}

/// A weight in device memory, as e4m3 with a scale for the whole tensor where that is its dtype.
class WeightInMemory {
 public:
  WeightInMemory(const Context& ctx, const Matrix& w, DType dtype)
      : wide_(upload_as(ctx, w, dtype == DType::e4m3 ? DType::f32 : dtype)),
        view_{view_of(ctx, wide_, dtype == DType::e4m3 ? DType::f32 : dtype, {w.rows, w.columns})},
        values_(dtype == DType::e4m3 ? cast(w, dtype, Granularity::tensor) : rounded(w, dtype)) {
    if (dtype != DType::e4m3) return;
    codes_ = ScaledTensor(ctx, dtype, {w.rows, w.columns});
    if (w.rows * w.columns > 0) quantize(ctx, {.in = view_.data, .out = codes_.view()});
    view_ = codes_.view();
  }
  ScaledView view() const { return view_; }
  /// Decoded.
  const Matrix& values() const { return values_; }

 private:
  Buffer wide_;
  ScaledTensor codes_;
  ScaledView view_;
  Matrix values_;
};

/// What a Linear of a configuration makes of its operands, in double.
struct LinearModel {
  LinearConfig config;

  /// TE's recipes: E5M2 gradients where a tensor has one scale, unless the format says otherwise.
  DType gradient() const {
    const bool has_tensor_scales = config.recipe <= Fp8Recipe::tensorwise;
    const Fp8Format usual = has_tensor_scales ? Fp8Format::hybrid : Fp8Format::e4m3;
    return config.format.value_or(usual) == Fp8Format::hybrid ? DType::e5m2 : DType::e4m3;
  }
  Granularity granularity(Granularity blockwise) const {
    if (config.recipe == Fp8Recipe::blockwise) return blockwise;
    return config.recipe == Fp8Recipe::mxfp8 ? Granularity::mx : Granularity::tensor;
  }
  Matrix operand(const Matrix& m, DType dtype, Granularity granularity) const {
    return config.fp8 ? cast(m, dtype, granularity) : rounded(m, DType::bf16);
  }
  Matrix x_like(const Matrix& m, DType dtype) const {
    return operand(m, dtype, granularity(Granularity::row_block));
  }
  /// `w`: as the caller's memory has it, decoded; an e4m3 weight is used as it is.
  Matrix weight(const Matrix& w) const {
    if (config.fp8 && config.weight_dtype == DType::e4m3) return w;
    return operand(w, DType::e4m3, granularity(Granularity::tile));
  }
  Product y(const Matrix& x, const Matrix& w) const {
    return product(x_like(x, DType::e4m3), weight(w));
  }
  Product dx(const Matrix& dy, const Matrix& w) const {
    const bool as_is = config.weight_dtype == DType::e4m3;
    const Matrix columns = as_is ? transposed(w) : weight(transposed(w));
    return product(x_like(dy, gradient()), columns);
  }
  Product dw(const Matrix& dy, const Matrix& x) const {
    return product(x_like(transposed(dy), gradient()), x_like(transposed(x), DType::e4m3));
  }
};

/// Of products of FP8 operands on this device, relative to the sum of the magnitudes.
inline double tolerance_of(const Context& ctx) {
  return ctx.device().type == DeviceType::cuda ? kPromotedError : 0x1p-19;  // a CPU adds in FP32
}

/// Every recipe and, last, BF16.
inline std::vector<LinearConfig> all_recipes() {
  std::vector<LinearConfig> list;
  for (Fp8Recipe recipe :
       {Fp8Recipe::tensorwise, Fp8Recipe::delayed, Fp8Recipe::blockwise, Fp8Recipe::mxfp8}) {
    list.push_back({.recipe = recipe});
  }
  list.push_back({.fp8 = false});
  return list;
}

inline std::string to_text(const LinearConfig& c) {
  return c.fp8 ? std::string(name_of(c.recipe)) : "bf16";
}

}  // namespace octet::test
