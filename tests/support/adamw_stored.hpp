// SPDX-License-Identifier: Apache-2.0
// What an optimizer stores, read back and decoded from the codes in double precision: the formats'
// definitions once more. Nothing here uses the library's decoding.
#pragma once

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "octet/optim/adamw.hpp"
#include "support/adamw_reference.hpp"
#include "support/devices.hpp"
#include "support/reference.hpp"

namespace octet::test {

/// Values as the codes of a dtype times a scale, encoded by the tables.
struct Encoded {
  std::vector<std::uint8_t> bytes;
  TensorScale scale;
  Doubles decoded;
};

inline Encoded encode_values(DType dtype, const std::vector<float>& values) {
  Encoded result;
  for (float value : values) result.scale.amax = std::max(result.scale.amax, std::abs(value));
  if (is_fp8(dtype)) {
    const double scale =
        reference_scale(static_cast<double>(result.scale.amax), table_of(dtype).max());
    result.scale.scale = static_cast<float>(scale);
    result.scale.scale_inv = static_cast<float>(1 / scale);
  }
  const auto append = [&result](const auto& code) {
    const auto* bytes = reinterpret_cast<const std::uint8_t*>(&code);
    result.bytes.insert(result.bytes.end(), bytes, bytes + sizeof(code));
  };
  for (float value : values) {
    if (dtype == DType::f32) {
      append(value);
      result.decoded.push_back(static_cast<double>(value));
      continue;
    }
    const double scaled = static_cast<double>(value * result.scale.scale);
    const std::uint32_t code = table_of(dtype).encode(scaled);
    if (is_fp8(dtype)) {
      append(static_cast<std::uint8_t>(code));
    } else {
      append(static_cast<std::uint16_t>(code));
    }
    result.decoded.push_back(table_of(dtype).decode(code) *
                             static_cast<double>(result.scale.scale_inv));
  }
  return result;
}

/// The fields of scales as bytes; a TensorScale itself has padding that nobody sets.
inline std::vector<std::uint8_t> bytes_of(const std::vector<TensorScale>& scales) {
  std::vector<std::uint8_t> bytes;
  for (const TensorScale& scale : scales) {
    for (float field : {scale.scale, scale.scale_inv, scale.amax}) {
      const std::uint32_t bits = bits_of(field);
      for (int byte = 0; byte < 4; ++byte) {
        bytes.push_back(static_cast<std::uint8_t>(bits >> (8 * byte)));
      }
    }
  }
  return bytes;
}

/// Dtype whose table a format's codes are in. Of `split` that of its upper part.
inline DType table_dtype(StateFormat format) {
  switch (format) {
    case StateFormat::f32: return DType::f32;
    case StateFormat::bf16: return DType::bf16;
    case StateFormat::f16: return DType::f16;
    default: return DType::e4m3;
  }
}

inline bool is_root(StateFormat format) { return format == StateFormat::sqrt_e4m3_block; }

/// Whether a format has one scale for the tensor.
inline bool is_scaled(StateFormat format) {
  return format == StateFormat::f16 || format == StateFormat::e4m3 || format == StateFormat::split;
}

/// A tensor read back: codes (of `split` the sign above the 15 bits M; of FP32 the bits) and what
/// they stand for.
struct Stored {
  StateFormat format = StateFormat::f32;
  std::vector<std::uint32_t> codes;
  Doubles values;
  std::vector<float> blocks;  ///< of block formats, to decode
  TensorScale scale;

  /// What a code of element i, or its root, is multiplied with.
  double inv(std::size_t i) const {
    if (!blocks.empty()) return static_cast<double>(blocks[i / 128]);
    return static_cast<double>(scale.scale_inv);
  }
  const FormatTable& table() const { return table_of(table_dtype(format)); }

  /// Distance between the neighbours that a value of element i lies between.
  double gap(std::size_t i, double value) const {
    if (format == StateFormat::f32) return 0;
    const double x = is_root(format) ? std::sqrt(value) : std::abs(value);
    const double width = table().gap_at(x / inv(i)) * inv(i);
    if (format == StateFormat::split) return width / 256;
    return is_root(format) ? width * (2 * x + width) : width;
  }

  /// Distance that element i may have from the exact value: its gap, since either neighbour may
  /// have been drawn, on top of the FP32 errors of the value and of a block's quotient scale.
  double allowed(std::size_t i, double exact, double fp32_error) const {
    if (format == StateFormat::f32) return fp32_error;
    const double largest = std::max(std::abs(exact), std::abs(values[i]));
    const double quotient = blocks.empty() ? 0 : 1e-6 * largest;
    return fp32_error + quotient + gap(i, largest) * (1 + 1e-6);
  }
};

/// M of a split code, rounded to nearest, ties to even: 255 more codes in every gap of E4M3.
inline std::uint32_t nearest_split(double y) {
  const FormatTable& e4m3 = table_of(DType::e4m3);
  if (std::abs(y) >= e4m3.max()) return 0x7E00;
  const std::uint32_t low = e4m3.floor_code(y);
  const double part = (std::abs(y) - e4m3.values()[low]) / e4m3.gap_at(y) * 256;
  return 256 * low + static_cast<std::uint32_t>(std::nearbyint(part));
}

/// Value of a split code: the float whose bits are M << 12, times 2^120.
inline double split_value(std::uint32_t code) {
  const double bits = static_cast<double>(float_from_bits((code & 0x7FFFu) << 12));
  return ((code & 0x8000u) != 0 ? -1.0 : 1.0) * std::ldexp(bits, 120);
}

/// M = 256 code + remainder under the weight's sign. Halves that make no number give 0xFFFF0000.
inline std::uint32_t joined_split(std::uint8_t weight, std::int8_t remainder) {
  const int magnitude = 256 * (weight & 0x7F) + remainder;
  if (magnitude < 0 || magnitude > 0x7E00) return 0xFFFF0000u;
  return static_cast<std::uint32_t>(magnitude) | ((weight & 0x80u) << 8);
}

inline std::vector<std::uint32_t> download_codes(const Context& ctx, const void* data,
                                                 std::size_t width, std::size_t count) {
  const auto widened = [](const auto& codes) {
    return std::vector<std::uint32_t>(codes.begin(), codes.end());
  };
  if (width == 1) return widened(download<std::uint8_t>(ctx, data, count));
  if (width == 2) return widened(download<std::uint16_t>(ctx, data, count));
  return download<std::uint32_t>(ctx, data, count);
}

inline void decode(Stored& stored) {
  for (std::size_t i = 0; i < stored.codes.size(); ++i) {
    const std::uint32_t code = stored.codes[i];
    double value = 0;
    if (stored.format == StateFormat::f32) {
      value = static_cast<double>(float_from_bits(code));
    } else if (stored.format == StateFormat::split) {
      value = code > 0xFFFF ? NAN : split_value(code) * stored.inv(i);
    } else {
      value = stored.table().decode(code) * stored.inv(i);
      if (is_root(stored.format)) value *= value;
    }
    stored.values.push_back(value);
  }
}

/// Codes of a state, and the scales of its blocks, as bytes.
inline std::vector<std::uint8_t> download_state(const Context& ctx, const StateView& view) {
  const auto count = static_cast<std::size_t>(view.count);
  auto bytes = download<std::uint8_t>(ctx, view.data, count * size_of(view.format));
  if (view.blocks != nullptr) {
    const std::size_t blocks = (count + 127) / 128;
    const auto scales = download<std::uint8_t>(ctx, view.blocks, blocks * sizeof(float));
    bytes.insert(bytes.end(), scales.begin(), scales.end());
  }
  return bytes;
}

inline Stored read_state(const Context& ctx, const StateView& view) {
  const auto count = static_cast<std::size_t>(view.count);
  Stored stored;
  stored.format = view.format;
  stored.scale = download_one<TensorScale>(ctx, view.scale);
  stored.codes = download_codes(ctx, view.data, size_of(view.format), count);
  if (view.format == StateFormat::e4m3_block || view.format == StateFormat::sqrt_e4m3_block) {
    stored.blocks = download<float>(ctx, view.blocks, (count + 127) / 128);
  }
  if (view.format != StateFormat::split) decode(stored);
  return stored;
}

/// A split master of a whole parameter: its remainders and the weight's codes.
inline Stored read_split(const Context& ctx, const StateView& view, const TensorView& weight) {
  Stored stored = read_state(ctx, view);
  const auto codes = download<std::uint8_t>(ctx, weight.data, stored.codes.size());
  for (std::size_t i = 0; i < codes.size(); ++i) {
    stored.codes[i] = joined_split(codes[i], static_cast<std::int8_t>(stored.codes[i]));
  }
  decode(stored);
  return stored;
}

/// A weight, or any other tensor of one scale or none.
inline Stored read_tensor(const Context& ctx, const ScaledView& view) {
  Stored stored;
  switch (view.data.dtype) {
    case DType::bf16: stored.format = StateFormat::bf16; break;
    case DType::f16: stored.format = StateFormat::f16; break;
    case DType::e4m3: stored.format = StateFormat::e4m3; break;
    default: break;
  }
  if (view.scale != nullptr) stored.scale = download_one<TensorScale>(ctx, view.scale);
  stored.codes =
      download_codes(ctx, view.data.data, size_of(view.data.dtype),
                     view.data.empty() ? 0 : static_cast<std::size_t>(view.data.numel()));
  decode(stored);
  return stored;
}

}  // namespace octet::test
