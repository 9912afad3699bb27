// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstring>

#include "octet/core/detail/block_scaling.hpp"
#include "ops/cpu_ops.hpp"

namespace octet::detail::cpu {
namespace {

/// Blocks are taken 128 rows at a time: tiles have as many, and read along its columns a matrix
/// stays in the cache.
constexpr std::int64_t kBandRows = 128;

/// What is cast: a matrix, or its transpose read where it lies.
template <class In>
struct Source {
  const typename In::Storage* data;
  std::int64_t rows, columns, row_step, column_step;

  float at(std::int64_t row, std::int64_t column) const {
    return In::decode(data[row * row_step + column * column_step]);
  }
};

struct Counts {
  std::uint64_t saturated = 0, flushed = 0;
};

ScaleLayout layout_of(const BlockScaledView& view) {
  return scale_layout(view.granularity, view.mx_layout, view.data.shape[0], view.data.shape[1]);
}

/// Writes the scale of a block and returns the factor that encodes it.
float set_scale(const BlockScaledView& view, std::int64_t index, float amax, float maximum) {
  if (view.granularity == Granularity::mx) {
    const std::uint8_t byte = e8m0_scale(amax, maximum);
    static_cast<std::uint8_t*>(view.scales)[index] = byte;
    return inverse_e8m0(byte);
  }
  const float scale = block_scale(amax, maximum);
  static_cast<float*>(view.scales)[index] = inverse_of_power_of_two(scale);
  return scale;
}

float scale_at(const BlockScaledView& view, std::int64_t index) {
  if (view.granularity == Granularity::mx) {
    return decode_e8m0(static_cast<const std::uint8_t*>(view.scales)[index]);
  }
  return static_cast<const float*>(view.scales)[index];
}

/// The block whose first element is given.
template <class In, class Out>
void cast_block(const Source<In>& in, const BlockScaledView& to, const ScaleLayout& layout,
                std::int64_t row0, std::int64_t column0, Counts& counts) {
  const std::int64_t end_row = std::min(row0 + layout.block_rows(), in.rows);
  const std::int64_t end_column = std::min(column0 + layout.block_columns(), in.columns);
  std::uint32_t amax = 0;
  for (std::int64_t r = row0; r < end_row; ++r) {
    for (std::int64_t c = column0; c < end_column; ++c) {
      amax = std::max(amax, magnitude_bits(in.at(r, c)));
    }
  }
  const float scale = set_scale(to, layout.at(row0, column0), bits_float(amax), Out::kMax);
  for (std::int64_t r = row0; r < end_row; ++r) {
    auto* line = to.data.as<std::uint8_t>() + r * layout.columns;
    for (std::int64_t c = column0; c < end_column; ++c) {
      const float value = in.at(r, c), scaled = value * scale;
      line[c] = Out::encode(scaled);
      counts.saturated += is_saturated(scaled, Out::kMax) ? 1 : 0;
      counts.flushed += is_flushed(value, line[c] & 0x7Fu) ? 1 : 0;
    }
  }
}

/// Rows and columns that `to` has beyond those of `in` become zero, and so does all padding of the
/// scales.
template <class In, class Out>
Counts cast(const Source<In>& in, const BlockScaledView& to) {
  const ScaleLayout layout = layout_of(to);
  const std::int64_t height = layout.block_rows(), width = layout.block_columns();
  std::memset(to.scales, 0,
              static_cast<std::size_t>(
                  scale_bytes(to.granularity, layout.rows, layout.columns, to.mx_layout)));
  std::uint64_t saturated = 0, flushed = 0;
#pragma omp parallel for reduction(+ : saturated, flushed) if (in.rows * in.columns > 65536)
  for (std::int64_t band = 0; band < layout.rows; band += kBandRows) {
    Counts counts;
    const std::int64_t end = std::min(band + kBandRows, in.rows);
    for (std::int64_t c = 0; c < in.columns; c += width) {
      for (std::int64_t r = band; r < end; r += height) {
        cast_block<In, Out>(in, to, layout, r, c, counts);
      }
    }
    for (std::int64_t r = band; r < std::min(band + kBandRows, layout.rows); ++r) {
      auto* line = to.data.as<std::uint8_t>() + r * layout.columns;
      const std::int64_t written = r < in.rows ? in.columns : 0;
      std::fill(line + written, line + layout.columns, std::uint8_t{0});
    }
    saturated += counts.saturated;
    flushed += counts.flushed;
  }
  return {saturated, flushed};
}

template <class In, class Out>
void cast_all(const BlockQuantizeArgs& args) {
  const auto* data = args.in.as<const typename In::Storage>();
  const std::int64_t rows = args.in.shape[0], columns = args.in.shape[1];
  const bool has_out = !args.out.data.empty();
  Counts counts;
  if (has_out) counts = cast<In, Out>({data, rows, columns, columns, 1}, args.out);
  if (!args.transposed.data.empty()) {
    const Counts turned = cast<In, Out>({data, columns, rows, 1, columns}, args.transposed);
    if (!has_out) counts = turned;
  }
  if (args.counters == nullptr) return;
  args.counters->saturated += counts.saturated;
  args.counters->flushed += counts.flushed;
}

}  // namespace

void block_quantize(const Context&, const BlockQuantizeArgs& args) {
  if (args.nonfinite != nullptr || args.amax != nullptr) {
    const float amax = amax_of(args.in);
    if (args.amax != nullptr) raise_amax(*args.amax, amax);
    if (args.nonfinite != nullptr && !is_finite_bits(magnitude_bits(amax))) *args.nonfinite = 1;
  }
  if (!args.column_sums.empty()) sum_tiles(args.in, args.column_sums);
  const BlockScaledView& to = args.out.data.empty() ? args.transposed : args.out;
  for_dtype(args.in.dtype, [&]<class In>(In) {
    if (to.data.dtype == DType::e4m3) {
      cast_all<In, Element<DType::e4m3>>(args);
    } else {
      cast_all<In, Element<DType::e5m2>>(args);
    }
  });
}

void block_dequantize(const Context&, const BlockScaledView& in, const TensorView& out) {
  const ScaleLayout layout = layout_of(in);
  for_dtype(in.data.dtype, [&]<class In>(In) {
    for_dtype(out.dtype, [&]<class Out>(Out) {
      const auto* from = in.data.as<const typename In::Storage>();
      auto* to = out.as<typename Out::Storage>();
#pragma omp parallel for if (layout.rows * layout.columns > 65536)
      for (std::int64_t r = 0; r < layout.rows; ++r) {
        for (std::int64_t c = 0; c < layout.columns; ++c) {
          const std::int64_t i = r * layout.columns + c;
          to[i] = Out::encode(unscaled(In::decode(from[i]), scale_at(in, layout.at(r, c))));
        }
      }
    });
  });
}

void broadcast_scale(const Context&, const TensorScale* scale, const BlockScaledView& out) {
  const ScaleLayout layout = layout_of(out);
  const std::int64_t bytes =
      scale_bytes(out.granularity, layout.rows, layout.columns, out.mx_layout);
  const bool is_mx = out.granularity == Granularity::mx;
  for (std::int64_t i = 0; i < (is_mx ? bytes : bytes / 4); ++i) {
    const float value = layout.is_inside(layout.element_of(i)) ? scale->scale_inv : 0.0f;
    if (is_mx) {
      static_cast<std::uint8_t*>(out.scales)[i] = encode_e8m0(value);
    } else {
      static_cast<float*>(out.scales)[i] = value;
    }
  }
}

void transpose_tile_scales(const Context&, const float* scales, std::int64_t rows,
                           std::int64_t columns, float* out) {
  const ScaleLayout from = scale_layout(Granularity::tile, MxLayout::compact, rows, columns);
  const ScaleLayout to = scale_layout(Granularity::tile, MxLayout::compact, columns, rows);
  const std::int64_t count = scale_bytes(Granularity::tile, columns, rows) / 4;
  for (std::int64_t i = 0; i < count; ++i) out[i] = transposed_tile_scale(scales, from, to, i);
}

void make_gemm_ready(const Context&, const void* compact, std::int64_t rows, std::int64_t columns,
                     void* gemm_ready) {
  const ScaleLayout from = scale_layout(Granularity::mx, MxLayout::compact, rows, columns);
  const ScaleLayout to = scale_layout(Granularity::mx, MxLayout::gemm_ready, rows, columns);
  const std::int64_t bytes = scale_bytes(Granularity::mx, rows, columns);
  for (std::int64_t i = 0; i < bytes; ++i) {
    const auto element = to.element_of(i);
    static_cast<std::uint8_t*>(gemm_ready)[i] =
        to.is_inside(element)
            ? static_cast<const std::uint8_t*>(compact)[from.at(element.row, element.column)]
            : std::uint8_t{0};
  }
}

}  // namespace octet::detail::cpu
