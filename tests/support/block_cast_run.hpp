// SPDX-License-Identifier: Apache-2.0
// A cast with scales of blocks: what it left, and what it should have left by the definitions alone
// in double precision. Nothing here uses the library's conversions, scales or layouts.
#pragma once

#include <optional>

#include "octet/ops/block_quantize.hpp"
#include "support/cast_run.hpp"

namespace octet::test {

/// A granularity with the order of its scales.
struct BlockKind {
  Granularity granularity;
  MxLayout layout = MxLayout::gemm_ready;
};
inline constexpr BlockKind kKinds[] = {{Granularity::row_block},
                                       {Granularity::tile},
                                       {Granularity::mx, MxLayout::compact},
                                       {Granularity::mx, MxLayout::gemm_ready}};

inline std::string to_string(const BlockKind& kind) {
  std::string text(name_of(kind.granularity));
  if (kind.granularity != Granularity::mx) return text;
  return text + (kind.layout == MxLayout::compact ? " compact" : " gemm_ready");
}

inline std::int64_t rounded_up(std::int64_t count, std::int64_t unit) {
  return (count + unit - 1) / unit * unit;
}

/// FP8 codes and the bytes of their scales.
struct Blocks {
  Codes codes, scales;
};

/// Bytes of the scales of a matrix, and where that of an element starts.
struct ScalePlaces {
  BlockKind kind;
  std::int64_t rows, columns;

  std::int64_t width() const { return kind.granularity == Granularity::mx ? 1 : 4; }
  std::size_t bytes() const {
    std::int64_t count = 0;
    switch (kind.granularity) {
      case Granularity::row_block:
        count = rounded_up(columns, 128) / 128 * rounded_up(rows, 16);
        break;
      case Granularity::tile:
        count = rounded_up(rows, 128) / 128 * rounded_up(rounded_up(columns, 128) / 128, 4);
        break;
      default:
        count = kind.layout == MxLayout::compact
                    ? rows * (rounded_up(columns, 32) / 32)
                    : rounded_up(rows, 128) * rounded_up(columns, 128) / 32;
    }
    return static_cast<std::size_t>(count * width());
  }
  std::size_t of(std::int64_t row, std::int64_t column) const {
    const std::int64_t block = column / (kind.granularity == Granularity::mx ? 32 : 128);
    std::int64_t index = 0;
    switch (kind.granularity) {
      case Granularity::row_block: index = block * rounded_up(rows, 16) + row; break;
      case Granularity::tile:
        index = row / 128 * rounded_up(rounded_up(columns, 128) / 128, 4) + block;
        break;
      default:
        if (kind.layout == MxLayout::compact) {
          index = row * (rounded_up(columns, 32) / 32) + block;
        } else {
          const std::int64_t inside = row % 128,
                             tile = row / 128 * (rounded_up(columns, 128) / 128);
          index = (tile + block / 4) * 512 + inside % 32 * 16 + inside / 32 * 4 + block % 4;
        }
    }
    return static_cast<std::size_t>(index * width());
  }
};

/// E8M0 of an amax by a search for the smallest power of two that is enough.
inline std::uint8_t reference_e8m0(float amax, DType dtype) {
  const float product = amax * static_cast<float>(1.0 / table_of(dtype).max());
  if (std::isnan(product)) return 255;
  // From the power of two below it on.
  int byte = std::clamp(std::ilogb(product), -127, 127) + 127;
  while (byte < 254 && std::ldexp(1.0, byte - 127) < static_cast<double>(product)) ++byte;
  return static_cast<std::uint8_t>(byte);
}

/// Value of the scale whose bytes start here.
inline double scale_value(const BlockKind& kind, const std::uint8_t* at) {
  if (kind.granularity == Granularity::mx) return *at == 255 ? NAN : std::ldexp(1.0, *at - 127);
  float value = 0;
  std::memcpy(&value, at, sizeof(value));
  return static_cast<double>(value);
}

/// Writes the scale for an amax at `at`, and returns its value.
inline double put_scale(const BlockKind& kind, DType dtype, double amax, std::uint8_t* at) {
  if (kind.granularity == Granularity::mx) {
    *at = reference_e8m0(static_cast<float>(amax), dtype);
  } else {
    const double scale = std::isfinite(amax) ? reference_scale(amax, table_of(dtype).max()) : 1.0;
    const auto decodes = static_cast<float>(1 / scale);
    std::memcpy(at, &decodes, sizeof(decodes));
  }
  return scale_value(kind, at);
}

/// A cast of a matrix [rows, columns] into data of a shape with more rows or columns, which become
/// zero. Adds to the counters.
inline Blocks reference_blocks(const Doubles& values, const Shape& shape, const Shape& data,
                               const BlockKind& kind, DType dtype, CastCounters& counters) {
  const std::int64_t rows = shape[0], columns = shape[1];
  const std::int64_t height = kind.granularity == Granularity::tile ? 128 : 1;
  const std::int64_t width = kind.granularity == Granularity::mx ? 32 : 128;
  const ScalePlaces places{kind, data[0], data[1]};
  Blocks result{Codes(static_cast<std::size_t>(data.numel()), 0), Codes(places.bytes(), 0)};
  for (std::int64_t r0 = 0; r0 < rows; r0 += height) {
    for (std::int64_t c0 = 0; c0 < columns; c0 += width) {
      const auto for_each = [&](auto f) {
        for (std::int64_t r = r0; r < std::min(rows, r0 + height); ++r) {
          for (std::int64_t c = c0; c < std::min(columns, c0 + width); ++c) {
            f(values[static_cast<std::size_t>(r * columns + c)],
              result.codes[static_cast<std::size_t>(r * data[1] + c)]);
          }
        }
      };
      double amax = 0;
      for_each([&](double value, std::uint8_t&) {
        if (std::isnan(value) || std::abs(value) > amax) amax = std::abs(value);  // NaN stays
      });
      const double scale = put_scale(kind, dtype, amax, &result.scales[places.of(r0, c0)]);
      for_each([&](double value, std::uint8_t& code) {
        const auto scaled = static_cast<double>(static_cast<float>(value / scale));
        code = static_cast<std::uint8_t>(table_of(dtype).encode(scaled));
        counters.saturated += std::abs(scaled) > table_of(dtype).max();
        counters.flushed += value != 0 && !std::isnan(value) && (code & 0x7Fu) == 0;
      });
    }
  }
  return result;
}

inline Doubles turned(const Doubles& values, const Shape& shape) {
  Doubles result(values.size());
  const auto rows = static_cast<std::size_t>(shape[0]),
             columns = static_cast<std::size_t>(shape[1]);
  for (std::size_t r = 0; r < rows; ++r) {
    for (std::size_t c = 0; c < columns; ++c) result[c * rows + r] = values[r * columns + c];
  }
  return result;
}

struct BlockCase {
  DType in = DType::f32, out = DType::e4m3;
  Shape shape = {};
  BlockKind kind = kKinds[0];
  bool row_major = true, transposed = true, padded = false, sums = false, counts = false,
       flags = true;
  std::optional<float> amax = {};  ///< what is recorded before, if amax is wanted
  std::int64_t offset = 0;         ///< elements before the first in all buffers but those of scales

  Shape data() const { return {padded ? rounded_up(shape[0], 16) : shape[0], shape[1]}; }
  Shape turned_data() const { return {shape[1], rounded_up(shape[0], 16)}; }
};

inline std::string describe(const Context& ctx, const BlockCase& c) {
  std::ostringstream text;
  text << octet::to_string(ctx.device()) << ", " << name_of(c.in) << " -> " << name_of(c.out)
       << ", " << to_string(c.kind) << ", " << octet::to_string(c.shape) << ", row-major "
       << c.row_major << ", transposed " << c.transposed << ", padded " << c.padded << ", sums "
       << c.sums << ", counts " << c.counts << ", flags " << c.flags << ", amax "
       << (c.amax ? std::to_string(*c.amax) : "none") << ", offset " << c.offset;
  return text.str();
}

struct BlockResult {
  Blocks out, transposed;
  std::vector<float> sums;
  CastCounters counters;
  std::uint32_t flag = 0;
  float amax = 0;
};

/// Device memory of one output, guarded, and its view; nothing where it is not wanted.
class BlockOutput {
 public:
  BlockOutput(const Context& ctx, const BlockCase& c, const Shape& data, bool wanted)
      : wanted_(wanted),
        offset_(wanted ? static_cast<std::size_t>(c.offset) : 0),
        codes_(ctx, wanted ? offset_ + static_cast<std::size_t>(data.numel()) : 0),
        scales_(ctx, wanted ? ScalePlaces{c.kind, data[0], data[1]}.bytes() : 0) {
    view_.data = codes_.view(c.out, data);
    view_.data.data = wanted ? static_cast<char*>(codes_.data()) + offset_ : nullptr;
    view_.granularity = c.kind.granularity;
    view_.mx_layout = c.kind.layout;
    view_.scales = scales_.data();
  }
  const BlockScaledView& view() const { return view_; }
  /// Checks that nothing else was written.
  Blocks written() const {
    CHECK(codes_.intact());
    CHECK(scales_.intact());
    const Codes all = codes_.values<std::uint8_t>();
    const auto first = all.begin() + static_cast<std::ptrdiff_t>(offset_);
    CHECK(Codes(all.begin(), first) == Codes(offset_, Guarded::kFill));
    if (!wanted_) return {};
    return {Codes(first, all.end()), scales_.values<std::uint8_t>()};
  }

 private:
  bool wanted_;
  std::size_t offset_;
  Guarded codes_, scales_;
  BlockScaledView view_;
};

inline BlockResult run_blocks(const Context& ctx, const BlockCase& c,
                              const std::vector<float>& values) {
  std::vector<float> moved(static_cast<std::size_t>(c.offset), 0.0f);
  moved.insert(moved.end(), values.begin(), values.end());
  const Buffer in = upload(ctx, encode_values(c.in, moved).bytes);
  const Shape summed{rounded_up(c.shape[0], 128) / 128, c.shape[1]};
  const BlockOutput out(ctx, c, c.data(), c.row_major);
  const BlockOutput transposed(ctx, c, c.turned_data(), c.transposed);
  const Guarded sums(ctx, static_cast<std::size_t>(summed.numel()) * sizeof(float));
  const Buffer counters = upload<CastCounters>(ctx, {{1000, 2000}});
  const Buffer flag = upload<std::uint32_t>(ctx, {0});
  const Guarded amax(ctx, sizeof(float));
  write_one(ctx, amax.data(), c.amax.value_or(0.0f));
  BlockQuantizeArgs args;
  args.in = view_of(ctx, in, c.in, c.shape);
  if (args.in.data != nullptr) {
    args.in.data =
        static_cast<char*>(args.in.data) + static_cast<std::size_t>(c.offset) * size_of(c.in);
  }
  args.out = out.view();
  args.transposed = transposed.view();
  if (c.flags) args.nonfinite = flag.as<std::uint32_t>();
  if (c.amax) args.amax = static_cast<float*>(amax.data());
  if (c.sums) args.column_sums = sums.view(DType::f32, summed);
  if (c.counts) args.counters = counters.as<CastCounters>();
  block_quantize(ctx, args);
  BlockResult result;
  result.out = out.written();
  result.transposed = transposed.written();
  result.sums = sums.values<float>();
  CHECK(sums.intact());
  result.counters = download_one<CastCounters>(ctx, counters.data());
  result.flag = download_one<std::uint32_t>(ctx, flag.data());
  result.amax = amax.values<float>().front();
  CHECK(amax.intact());
  return result;
}

inline void check_equal(const Blocks& a, const Blocks& b) {
  CHECK(first_difference(a.codes, b.codes) == "");
  CHECK(first_difference(a.scales, b.scales) == "");
}

inline void check_equal(const BlockResult& a, const BlockResult& b) {
  check_equal(a.out, b.out);
  check_equal(a.transposed, b.transposed);
  CHECK(first_difference(bytes_of_floats(a.sums), bytes_of_floats(b.sums)) == "");
  CHECK(a.counters.saturated == b.counters.saturated);
  CHECK(a.counters.flushed == b.counters.flushed);
  CHECK(a.flag == b.flag);
  // Which NaN it is the tables of the formats do not say.
  CHECK((bits_of(a.amax) == bits_of(b.amax) || (std::isnan(a.amax) && std::isnan(b.amax))));
}

/// All that a cast should leave.
inline BlockResult expected_blocks(const BlockCase& c, const std::vector<float>& values) {
  const Doubles stored = encode_values(c.in, values).decoded;
  const Shape across{c.shape[1], c.shape[0]};
  BlockResult result;
  CastCounters unused, counters{1000, 2000};
  if (c.row_major) {
    result.out = reference_blocks(stored, c.shape, c.data(), c.kind, c.out, counters);
  }
  if (c.transposed) {
    result.transposed = reference_blocks(turned(stored, c.shape), across, c.turned_data(), c.kind,
                                         c.out, c.row_major ? unused : counters);
  }
  result.counters = c.counts ? counters : CastCounters{1000, 2000};
  const auto rows = static_cast<std::size_t>(c.shape[0]);
  const auto columns = static_cast<std::size_t>(c.shape[1]);
  for (std::size_t first = 0; first < rows; first += 128) {
    for (std::size_t column = 0; column < columns; ++column) {
      const float sum = lane_sum(stored, columns, first, std::min(rows, first + 128), column);
      const float untouched = float_from_bits(Guarded::kFill * 0x01010101u);
      result.sums.push_back(c.sums ? sum : untouched);
    }
  }
  const auto is_bad = [](double value) { return !std::isfinite(value); };
  result.flag = c.flags && std::any_of(stored.begin(), stored.end(), is_bad) ? 1 : 0;
  if (c.amax) {
    result.amax = *c.amax;
    for (double value : stored) {
      const auto magnitude = static_cast<float>(std::abs(value));
      if (std::isnan(result.amax)) break;
      if (std::isnan(magnitude) || magnitude > result.amax) result.amax = magnitude;
    }
  }
  return result;
}

}  // namespace octet::test
