// SPDX-License-Identifier: Apache-2.0
// The number formats once more, from their definitions alone and in double precision: values by
// ldexp, rounding by a search in the sorted table. Nothing here uses the library's conversions.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "octet/core/dtype.hpp"

namespace octet::test {

/// A format given by its fields: sign, exponent, mantissa.
struct FormatDefinition {
  int exponent_bits;
  int mantissa_bits;
  int bias;
  /// Codes from here on (without the sign) are not finite.
  std::uint32_t first_special;
  /// Whether first_special itself is infinity (else it is NaN).
  bool has_infinity;
  /// Whether a conversion to it clamps to the largest finite value.
  bool saturates;
};

inline FormatDefinition definition_of(DType dtype) {
  switch (dtype) {
    case DType::e4m3: return {4, 3, 7, 0x7F, false, true};
    case DType::e5m2: return {5, 2, 15, 0x7C, true, true};
    case DType::f16: return {5, 10, 15, 0x7C00, true, false};
    default: return {8, 7, 127, 0x7F80, true, false};  // bf16
  }
}

class FormatTable {
 public:
  explicit FormatTable(DType dtype) : definition_(definition_of(dtype)) {
    const std::uint32_t mantissas = 1u << definition_.mantissa_bits;
    for (std::uint32_t code = 0; code < definition_.first_special; ++code) {
      const int exponent = static_cast<int>(code / mantissas);
      const double fraction = static_cast<double>(code % mantissas) / mantissas;
      values_.push_back(exponent == 0 ? std::ldexp(fraction, 1 - definition_.bias)
                                      : std::ldexp(1.0 + fraction, exponent - definition_.bias));
    }
  }

  std::uint32_t sign_bit() const {
    return 1u << (definition_.exponent_bits + definition_.mantissa_bits);
  }
  std::uint32_t code_count() const { return 2 * sign_bit(); }
  std::uint32_t first_special() const { return definition_.first_special; }
  std::uint32_t max_code() const { return definition_.first_special - 1; }
  double max() const { return values_.back(); }
  /// Finite magnitudes in the order of their codes.
  const std::vector<double>& values() const { return values_; }

  double decode(std::uint32_t code) const {
    const std::uint32_t magnitude = code & (sign_bit() - 1);
    double value = std::numeric_limits<double>::quiet_NaN();
    if (magnitude < definition_.first_special) value = values_[magnitude];
    if (definition_.has_infinity && magnitude == definition_.first_special) value = INFINITY;
    return (code & sign_bit()) != 0 ? -value : value;
  }

  /// Code of the largest magnitude not above |x| (finite).
  std::uint32_t floor_code(double x) const {
    // Of the table only the codes with x's exponent: most of the tests' time goes into this search.
    const double magnitude = std::min(max(), std::abs(x));
    const std::ptrdiff_t length = std::ptrdiff_t{1} << definition_.mantissa_bits;
    const bool subnormal = magnitude < values_[static_cast<std::size_t>(length)];
    const auto first =
        values_.begin() + (subnormal ? 0 : std::ilogb(magnitude) + definition_.bias) * length;
    const auto last = std::min(length, values_.end() - first) + first;
    return static_cast<std::uint32_t>(std::upper_bound(first, last, magnitude) - values_.begin()) -
           1;
  }

  /// Width of the gap of the table that |x| lies in; of the topmost one beyond the maximum.
  double gap_at(double x) const {
    const std::uint32_t low = std::min(floor_code(x), max_code() - 1);
    return values_[low + 1] - values_[low];
  }

  /// Nearest, ties to even. NaN gives 0x7F.. without a sign, as the hardware conversion does.
  std::uint32_t encode(double x) const {
    if (std::isnan(x)) return sign_bit() - 1;
    const std::uint32_t sign = std::signbit(x) ? sign_bit() : 0;
    const double magnitude = std::abs(x);
    if (magnitude >= max()) {
      const double gap = values_[max_code()] - values_[max_code() - 1];
      // An IEEE format overflows from the middle of the gap that would follow its maximum.
      const bool overflows = magnitude >= max() + gap / 2 && !definition_.saturates;
      return sign | (overflows ? definition_.first_special : max_code());
    }
    const std::uint32_t low = floor_code(magnitude);
    const double middle = (values_[low] + values_[low + 1]) / 2;
    const bool up = magnitude > middle || (magnitude == middle && (low & 1u) != 0);
    return sign | (low + (up ? 1 : 0));
  }

  /// |encode| value with its sign, in one go.
  double round(double x) const { return decode(encode(x)); }

 private:
  FormatDefinition definition_;
  std::vector<double> values_;
};

/// Shared tables: built once per test program.
inline const FormatTable& table_of(DType dtype) {
  static const FormatTable e4m3(DType::e4m3), e5m2(DType::e5m2), f16(DType::f16), bf16(DType::bf16);
  switch (dtype) {
    case DType::e4m3: return e4m3;
    case DType::e5m2: return e5m2;
    case DType::f16: return f16;
    default: return bf16;
  }
}

inline float float_from_bits(std::uint32_t bits) { return __builtin_bit_cast(float, bits); }
inline std::uint32_t bits_of(float x) { return __builtin_bit_cast(std::uint32_t, x); }
inline float next_up(float x) { return std::nextafter(x, INFINITY); }
inline float next_down(float x) { return std::nextafter(x, -INFINITY); }

/// Power-of-two scale of numerics section 2 by a search for the exponent, from one that is too
/// large.
inline double reference_scale(double amax, double maximum) {
  if (amax == 0) return 1.0;
  int exponent = std::clamp(std::ilogb(maximum / amax) + 1, -126, 126);
  while (exponent > -126 && amax * std::ldexp(1.0, exponent) > maximum) --exponent;
  return std::ldexp(1.0, exponent);
}

}  // namespace octet::test
