// SPDX-License-Identifier: Apache-2.0
// Operands of a GEMM in every dtype and layout, and plain loops that multiply them.
#pragma once

#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "octet/gemm/gemm.hpp"
#include "support/devices.hpp"
#include "support/guarded.hpp"
#include "support/random.hpp"
#include "support/reference.hpp"

namespace octet::test {

using Bytes = std::vector<std::uint8_t>;

template <class T>
void append(Bytes& bytes, T value) {
  const std::size_t at = bytes.size();
  bytes.resize(at + sizeof(T));
  std::memcpy(bytes.data() + at, &value, sizeof(T));
}

/// One number as the dtype stores it.
inline void append_rounded(Bytes& bytes, DType dtype, float value) {
  if (dtype == DType::f32) return append(bytes, value);
  const std::uint32_t code = table_of(dtype).encode(value);
  size_of(dtype) == 2 ? append(bytes, static_cast<std::uint16_t>(code))
                      : append(bytes, static_cast<std::uint8_t>(code));
}

/// An operand [rows, k] of a product.
struct Matrix {
  DType dtype = DType::f32;
  bool transposed = false;
  float scale_inv = 1.0f;
  std::vector<float> values;  ///< [rows, k], as stored, without the scale
  Bytes stored;               ///< [k, rows] if transposed

  double value(std::int64_t i) const {
    return static_cast<double>(values[static_cast<std::size_t>(i)]);
  }
};

inline Matrix make_matrix(DType dtype, bool transposed, float scale_inv, std::int64_t rows,
                          std::int64_t k, const std::vector<float>& wanted) {
  Matrix matrix{dtype, transposed, is_fp8(dtype) ? scale_inv : 1.0f, wanted, {}};
  if (dtype != DType::f32) {
    const FormatTable& table = table_of(dtype);
    for (float& value : matrix.values) value = static_cast<float>(table.round(value));
  }
  const std::int64_t outer = transposed ? k : rows;
  const std::int64_t inner = transposed ? rows : k;
  for (std::int64_t i = 0; i < outer; ++i) {
    for (std::int64_t j = 0; j < inner; ++j) {
      const std::int64_t at = transposed ? j * k + i : i * k + j;
      append_rounded(matrix.stored, dtype, matrix.values[static_cast<std::size_t>(at)]);
    }
  }
  return matrix;
}

/// Small integers: every sum of fewer than 2^18 products is exact in FP32, in any order.
inline Matrix integer_matrix(DType dtype, bool transposed, float scale_inv, std::int64_t rows,
                             std::int64_t k, std::uint32_t seed) {
  Draws draws(seed);
  std::vector<float> values(static_cast<std::size_t>(rows * k));
  for (float& value : values) value = static_cast<float>(static_cast<int>(draws() % 7) - 3);
  return make_matrix(dtype, transposed, scale_inv, rows, k, values);
}

inline Matrix normal_matrix(DType dtype, bool transposed, float scale_inv, std::int64_t rows,
                            std::int64_t k, std::uint32_t seed) {
  return make_matrix(dtype, transposed, scale_inv, rows, k,
                     normal_values(static_cast<std::size_t>(rows * k), seed));
}

/// The summation order that the reference backend promises, as a plain loop.
inline Bytes ordered_product(const GemmProblem& p, const Matrix& a, const Matrix& b) {
  const float scale = a.scale_inv * b.scale_inv;
  Bytes out;
  for (std::int64_t i = 0; i < p.m; ++i) {
    for (std::int64_t j = 0; j < p.n; ++j) {
      float acc = 0.0f;
      for (std::int64_t begin = 0; begin < p.k; begin += 128) {
        float partial = 0.0f;
        for (std::int64_t l = begin; l < std::min(begin + 128, p.k); ++l) {
          partial = std::fma(a.values[static_cast<std::size_t>(i * p.k + l)],
                             b.values[static_cast<std::size_t>(j * p.k + l)], partial);
        }
        acc = std::fma(scale, partial, acc);
      }
      append_rounded(out, p.d, acc);
    }
  }
  return out;
}

/// Sum and sum of magnitudes of one output element, in double.
struct Product {
  double sum = 0;
  double magnitude = 0;
};

inline Product product_at(const GemmProblem& p, const Matrix& a, const Matrix& b, std::int64_t i,
                          std::int64_t j) {
  const double scale = static_cast<double>(a.scale_inv) * static_cast<double>(b.scale_inv);
  Product product;
  for (std::int64_t l = 0; l < p.k; ++l) {
    const double term = a.value(i * p.k + l) * b.value(j * p.k + l) * scale;
    product.sum += term;
    product.magnitude += std::abs(term);
  }
  return product;
}

/// The exact product rounded once to D; for operands whose sums are exact.
inline Bytes exact_product(const GemmProblem& p, const Matrix& a, const Matrix& b) {
  Bytes out;
  for (std::int64_t i = 0; i < p.m; ++i) {
    for (std::int64_t j = 0; j < p.n; ++j) {
      append_rounded(out, p.d, static_cast<float>(product_at(p, a, b, i, j).sum));
    }
  }
  return out;
}

inline double decode_at(const Bytes& bytes, DType dtype, std::int64_t i) {
  if (dtype == DType::f32) {
    float value;
    std::memcpy(&value, bytes.data() + i * 4, 4);
    return static_cast<double>(value);
  }
  std::uint16_t code;
  std::memcpy(&code, bytes.data() + i * 2, 2);
  return table_of(dtype).decode(code);
}

/// Where an element is further from the true sum than `relative` times the sum of magnitudes and
/// the rounding to D allow; empty if none is.
inline std::string beyond_bound(const GemmProblem& p, const Matrix& a, const Matrix& b,
                                const Bytes& d, double relative) {
  const double rounding = p.d == DType::bf16 ? std::ldexp(1.0, -8) : std::ldexp(1.0, -24);
  for (std::int64_t i = 0; i < p.m; ++i) {
    for (std::int64_t j = 0; j < p.n; ++j) {
      const Product product = product_at(p, a, b, i, j);
      const double actual = decode_at(d, p.d, i * p.n + j);
      const double bound = relative * product.magnitude * (1 + rounding) +
                           rounding * std::abs(product.sum) + std::ldexp(1.0, -133);
      if (std::abs(actual - product.sum) <= bound) continue;
      return to_string(p) + " at (" + std::to_string(i) + ", " + std::to_string(j) +
             "): " + std::to_string(actual) + " instead of " + std::to_string(product.sum) +
             ", allowed is a distance of " + std::to_string(bound);
    }
  }
  return {};
}

/// Uploads the operands, runs `run(args)` and returns D; checks that nothing was written beside D.
template <class Run>
Bytes multiply(const Context& ctx, const GemmProblem& p, const Matrix& a, const Matrix& b,
               Run&& run) {
  const Buffer a_data = upload(ctx, a.stored);
  const Buffer b_data = upload(ctx, b.stored);
  // Four floats apart: scales are aligned like operands.
  const Buffer scales = upload(ctx, std::vector<float>{a.scale_inv, 0, 0, 0, b.scale_inv});
  const Guarded d(ctx, static_cast<std::size_t>(p.m * p.n) * size_of(p.d));
  const float* scale = scales.as<float>();
  run(GemmArgs{a_data.data(), is_fp8(a.dtype) ? scale : nullptr, b_data.data(),
               is_fp8(b.dtype) ? scale + 4 : nullptr, d.data()});
  ctx.synchronize();
  if (!d.intact()) return {};
  return d.values<std::uint8_t>();
}

inline GemmProblem problem_of(std::int64_t m, std::int64_t n, std::int64_t k, const Matrix& a,
                              const Matrix& b, DType d) {
  return {m, n, k, a.dtype, b.dtype, d, a.transposed, b.transposed};
}

}  // namespace octet::test
