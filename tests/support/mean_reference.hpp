// SPDX-License-Identifier: Apache-2.0
// The mean over ranks once more, as plain loops on the independent format tables.
#pragma once

#include <cmath>
#include <cstring>
#include <vector>

#include "octet/core/tensor_view.hpp"
#include "support/reference.hpp"

namespace octet::test {

/// One rank's gradient of one tensor, as stored.
struct Contribution {
  std::vector<std::uint8_t> bytes;
  TensorScale scale;
};

inline float reference_decode(DType dtype, const std::vector<std::uint8_t>& bytes, std::size_t i) {
  if (dtype == DType::e4m3) return static_cast<float>(table_of(dtype).decode(bytes[i]));
  std::uint32_t word = 0;
  std::memcpy(&word, bytes.data() + i * size_of(dtype), size_of(dtype));
  return float_from_bits(dtype == DType::bf16 ? word << 16 : word);
}

inline void reference_encode(DType dtype, double value, std::uint8_t* to) {
  std::uint32_t word = 0;
  if (dtype == DType::f32) {
    word = bits_of(static_cast<float>(value));
  } else {
    word = table_of(dtype).encode(value);
  }
  std::memcpy(to, &word, size_of(dtype));
}

/// Stores values with current scaling; f32 and bf16 have scale 1.
inline Contribution contribute(DType dtype, const std::vector<float>& values) {
  Contribution result;
  double amax = 0;
  for (float value : values) amax = std::max(amax, std::abs(static_cast<double>(value)));
  const double scale = dtype == DType::e4m3 ? reference_scale(amax, 448.0) : 1.0;
  result.scale = {static_cast<float>(1.0 / scale), static_cast<float>(scale),
                  static_cast<float>(amax)};
  result.bytes.resize(values.size() * size_of(dtype));
  for (std::size_t i = 0; i < values.size(); ++i) {
    reference_encode(dtype, values[i] * scale, result.bytes.data() + i * size_of(dtype));
  }
  return result;
}

/// FP8 and BF16 are added in FP32, f32 in double; then one division.
inline float reference_mean(DType dtype, const std::vector<float>& terms) {
  if (dtype == DType::f32) {
    double sum = terms[0];
    for (std::size_t r = 1; r < terms.size(); ++r) sum += terms[r];
    return static_cast<float>(sum / static_cast<double>(terms.size()));
  }
  float sum = terms[0];
  for (std::size_t r = 1; r < terms.size(); ++r) sum = sum + terms[r];
  return sum / static_cast<float>(terms.size());
}

/// The means of one tensor, decoded.
inline std::vector<float> reference_means(DType dtype, const std::vector<Contribution>& ranks) {
  std::vector<float> means(ranks[0].bytes.size() / size_of(dtype));
  std::vector<float> terms(ranks.size());
  for (std::size_t i = 0; i < means.size(); ++i) {
    for (std::size_t r = 0; r < ranks.size(); ++r) {
      const float inv = dtype == DType::e4m3 ? ranks[r].scale.scale_inv : 1.0f;
      terms[r] = reference_decode(dtype, ranks[r].bytes, i) * inv;
    }
    means[i] = reference_mean(dtype, terms);
  }
  return means;
}

/// The bound A: the mean of the largest magnitudes that the ranks can have stored.
inline float reference_bound(DType dtype, const std::vector<Contribution>& ranks) {
  std::vector<float> terms;
  for (const Contribution& rank : ranks) {
    double stored = rank.scale.amax;
    if (dtype == DType::bf16) stored = table_of(dtype).round(stored);
    if (dtype == DType::e4m3) {
      stored = table_of(dtype).round(stored * rank.scale.scale) * rank.scale.scale_inv;
    }
    terms.push_back(static_cast<float>(stored));
  }
  return reference_mean(dtype, terms);
}

/// The common scale of the means when they are stored as `out`.
inline TensorScale reference_mean_scale(DType out, float bound) {
  const double scale = out == DType::e4m3 ? reference_scale(bound, 448.0) : 1.0;
  return {static_cast<float>(1.0 / scale), static_cast<float>(scale), bound};
}

/// The means as two_shot stores them.
inline std::vector<std::uint8_t> reference_rounded(DType dtype, const std::vector<float>& means,
                                                   float scale) {
  std::vector<std::uint8_t> bytes(means.size() * size_of(dtype));
  for (std::size_t i = 0; i < means.size(); ++i) {
    reference_encode(dtype, static_cast<double>(means[i]) * scale,
                     bytes.data() + i * size_of(dtype));
  }
  return bytes;
}

}  // namespace octet::test
