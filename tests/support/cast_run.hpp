// SPDX-License-Identifier: Apache-2.0
// A cast to FP8 with everything that it can be asked for, and what it left.
#pragma once

#include <cstring>
#include <sstream>
#include <string>
#include <vector>

#include "octet/ops/quantize.hpp"
#include "support/adamw_stored.hpp"
#include "support/catch.hpp"
#include "support/compare.hpp"
#include "support/devices.hpp"
#include "support/guarded.hpp"
#include "support/random.hpp"
#include "support/reference.hpp"

namespace octet::test {

using Codes = std::vector<std::uint8_t>;

inline constexpr DType kInputs[] = {DType::f32, DType::bf16, DType::f16};
inline constexpr DType kOutputs[] = {DType::e4m3, DType::e5m2};

struct CastCase {
  DType in = DType::f32, out = DType::e4m3;
  Shape shape = {};
  bool row_major = true, transposed = false, sums = false, counts = false;
  Scaling scaling = Scaling::current;
  TensorScale scale = {};
  std::int64_t offset = 0;  ///< elements before the first in every buffer
};

struct CastResult {
  Codes codes, transposed;
  std::vector<float> sums;
  TensorScale scale;
  CastCounters counters;
  std::uint32_t flag = 0;
};

/// What a cast leaves. Checks that it wrote nothing else.
inline CastResult run_cast(const Context& ctx, const CastCase& c,
                           const std::vector<float>& values) {
  const auto offset = static_cast<std::size_t>(c.offset);
  std::vector<float> moved(offset, 0.0f);
  moved.insert(moved.end(), values.begin(), values.end());
  const Buffer in = upload(ctx, encode_values(c.in, moved).bytes);
  const std::int64_t rows = c.shape[0], columns = c.shape.rank() == 2 ? c.shape[1] : 0;
  const Shape turned{columns, padded_rows(rows)}, summed{column_sum_rows(rows), columns};
  const Guarded out(ctx, offset + values.size());
  const Guarded transposed(ctx, offset + static_cast<std::size_t>(turned.numel()));
  const Guarded sums(ctx, static_cast<std::size_t>(summed.numel()) * sizeof(float));
  const Buffer scale = upload<TensorScale>(ctx, {c.scale});
  const Buffer copy = upload<TensorScale>(ctx, {{3.0f, 5.0f, 7.0f}});
  const Buffer counters = upload<CastCounters>(ctx, {{1000, 2000}});
  const Buffer flag = upload<std::uint32_t>(ctx, {0});
  const auto shifted = [&](TensorView view) {
    view.data =
        static_cast<char*>(view.data) + c.offset * static_cast<std::int64_t>(size_of(view.dtype));
    return view;
  };
  QuantizeArgs args;
  args.in = shifted(view_of(ctx, in, c.in, c.shape));
  args.out = {shifted(out.view(c.out, c.shape)), scale.as<TensorScale>()};
  if (!c.row_major) args.out.data.data = nullptr;
  if (c.transposed) args.transposed = shifted(transposed.view(c.out, turned));
  if (c.sums) args.column_sums = sums.view(DType::f32, summed);
  if (c.counts) args.counters = counters.as<CastCounters>();
  args.nonfinite = flag.as<std::uint32_t>();
  args.scaling = c.scaling;
  args.scale_copy = copy.as<TensorScale>();
  quantize(ctx, args);
  CastResult result;
  const auto written = [offset](const Guarded& guarded) {
    CHECK(guarded.intact());
    const Codes all = guarded.values<std::uint8_t>();
    CHECK(Codes(all.begin(), all.begin() + static_cast<std::ptrdiff_t>(offset)) ==
          Codes(offset, Guarded::kFill));
    return Codes(all.begin() + static_cast<std::ptrdiff_t>(offset), all.end());
  };
  result.codes = written(out);
  result.transposed = written(transposed);
  result.sums = sums.values<float>();
  CHECK(sums.intact());
  result.scale = download_one<TensorScale>(ctx, scale.data());
  const auto copied = download_one<TensorScale>(ctx, copy.data());
  CHECK(copied.scale == result.scale.scale);
  CHECK(copied.scale_inv == result.scale.scale_inv);
  CHECK((copied.amax == 0.0f && copied.padding == 0.0f));
  result.counters = download_one<CastCounters>(ctx, counters.data());
  result.flag = download_one<std::uint32_t>(ctx, flag.data());
  return result;
}

/// Codes of decoded values times a scale, from the table of the format.
inline Codes expected_codes(const Doubles& values, DType dtype, float scale) {
  Codes codes;
  for (double value : values) {
    const float scaled = static_cast<float>(value) * scale;
    codes.push_back(static_cast<std::uint8_t>(table_of(dtype).encode(static_cast<double>(scaled))));
  }
  return codes;
}

inline Codes transpose_of(const Codes& codes, const Shape& shape) {
  const auto rows = static_cast<std::size_t>(shape[0]),
             columns = static_cast<std::size_t>(shape[1]);
  const auto pitch = static_cast<std::size_t>(padded_rows(shape[0]));
  Codes result(columns * pitch, 0);
  for (std::size_t i = 0; i < codes.size(); ++i) {
    result[i % columns * pitch + i / columns] = codes[i];
  }
  CHECK(codes.size() == rows * columns);
  return result;
}

/// The sum of one column of 128 rows as defined: 32 lanes that take rows in turn, then a tree.
inline float lane_sum(const Doubles& values, std::size_t columns, std::size_t first_row,
                      std::size_t end_row, std::size_t column) {
  std::vector<float> lanes(32, 0.0f);
  for (std::size_t row = first_row; row < end_row; ++row) {
    lanes[(row - first_row) % 32] += static_cast<float>(values[row * columns + column]);
  }
  for (std::size_t width = 16; width > 0; width /= 2) {
    for (std::size_t l = 0; l < width; ++l) lanes[l] += lanes[l + width];
  }
  return lanes[0];
}

inline std::string describe(const Context& ctx, const CastCase& c) {
  std::ostringstream text;
  text << to_string(ctx.device()) << ", " << name_of(c.in) << " -> " << name_of(c.out) << " "
       << to_string(c.shape) << ", row-major " << c.row_major << ", transposed " << c.transposed
       << ", sums " << c.sums << ", given " << (c.scaling == Scaling::given) << ", offset "
       << c.offset;
  return text.str();
}

inline Codes bytes_of_floats(const std::vector<float>& values) {
  Codes bytes(values.size() * sizeof(float));
  if (!values.empty()) std::memcpy(bytes.data(), values.data(), bytes.size());
  return bytes;
}

/// All of a result, NaN amax and sums by their bits.
inline void check_equal(const CastResult& a, const CastResult& b) {
  CHECK(first_difference(a.codes, b.codes) == "");
  CHECK(first_difference(a.transposed, b.transposed) == "");
  CHECK(first_difference(bytes_of_floats(a.sums), bytes_of_floats(b.sums)) == "");
  CHECK(first_difference(bytes_of({a.scale}), bytes_of({b.scale})) == "");
  CHECK(a.counters.saturated == b.counters.saturated);
  CHECK(a.counters.flushed == b.counters.flushed);
  CHECK(a.flag == b.flag);
}

inline std::vector<float> values_for(const Shape& shape, std::uint32_t seed) {
  return wide_values(static_cast<std::size_t>(shape.numel()), seed, -14, 6);
}

}  // namespace octet::test
