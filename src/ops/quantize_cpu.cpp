// SPDX-License-Identifier: Apache-2.0
#include <cstring>

#include "octet/core/detail/scaling_math.hpp"
#include "ops/cpu_ops.hpp"

namespace octet::detail::cpu {
namespace {

template <class In, class Out>
void cast(const QuantizeArgs& args, float scale) {
  const auto* in = args.in.as<const typename In::Storage>();
  auto* out = args.out.data.as<std::uint8_t>();
  const std::int64_t count = args.in.numel();
#pragma omp parallel for if (count > 65536)
  for (std::int64_t i = 0; i < count; ++i) out[i] = Out::encode(In::decode(in[i]) * scale);
}

template <class In, class Out>
void cast_transposed(const QuantizeArgs& args, float scale) {
  const auto* in = args.in.as<const typename In::Storage>();
  auto* out = args.transposed.as<std::uint8_t>();
  const std::int64_t rows = args.in.shape[0];
  const std::int64_t columns = args.in.shape[1];
  const std::int64_t pitch = padded_rows(rows);
#pragma omp parallel for if (rows * columns > 65536)
  for (std::int64_t c = 0; c < columns; ++c) {
    std::uint8_t* line = out + c * pitch;
    for (std::int64_t r = 0; r < rows; ++r) {
      line[r] = Out::encode(In::decode(in[r * columns + c]) * scale);
    }
    for (std::int64_t r = rows; r < pitch; ++r) line[r] = 0;
  }
}

template <class In, class Out>
void count(const QuantizeArgs& args, float scale) {
  const auto* in = args.in.as<const typename In::Storage>();
  const std::int64_t numel = args.in.numel();
  std::uint64_t saturated = 0, flushed = 0;
#pragma omp parallel for reduction(+ : saturated, flushed) if (numel > 65536)
  for (std::int64_t i = 0; i < numel; ++i) {
    const float value = In::decode(in[i]);
    const float scaled = value * scale;
    saturated += is_saturated(scaled, Out::kMax) ? 1 : 0;
    flushed += is_flushed(value, Out::encode(scaled) & 0x7Fu) ? 1 : 0;
  }
  args.counters->saturated += saturated;
  args.counters->flushed += flushed;
}

// A tile of rows at a time keeps the source lines in cache.
void transpose_bytes(const std::uint8_t* in, std::uint8_t* out, std::int64_t rows,
                     std::int64_t columns) {
  constexpr std::int64_t kTile = 64;
  const std::int64_t pitch = padded_rows(rows);
#pragma omp parallel for if (rows * columns > 65536)
  for (std::int64_t r0 = 0; r0 < pitch; r0 += kTile) {
    const std::int64_t end = r0 + kTile < pitch ? r0 + kTile : pitch;
    for (std::int64_t c = 0; c < columns; ++c) {
      for (std::int64_t r = r0; r < end; ++r) {
        out[c * pitch + r] = r < rows ? in[r * columns + c] : std::uint8_t{0};
      }
    }
  }
}

}  // namespace

float amax_of(const TensorView& in) {
  return for_dtype(in.dtype, [&]<class In>(In) {
    const auto* data = in.as<const typename In::Storage>();
    const std::int64_t count = in.numel();
    std::uint32_t largest = 0;
#pragma omp parallel for reduction(max : largest) if (count > 65536)
    for (std::int64_t i = 0; i < count; ++i) {
      const std::uint32_t bits = magnitude_bits(In::decode(data[i]));
      largest = bits > largest ? bits : largest;
    }
    return bits_float(largest);
  });
}

void raise_amax(float& recorded, float amax) {
  if (float_bits(amax) > float_bits(recorded)) recorded = amax;
}

void sum_tiles(const TensorView& in, const TensorView& sums) {
  constexpr std::int64_t kRows = 128, kLanes = 32;
  const std::int64_t rows = in.shape[0], columns = in.shape[1], panels = sums.shape[0];
  for_dtype(in.dtype, [&]<class In>(In) {
    const auto* data = in.as<const typename In::Storage>();
#pragma omp parallel for if (rows * columns > 65536)
    for (std::int64_t panel = 0; panel < panels; ++panel) {
      for (std::int64_t c = 0; c < columns; ++c) {
        float lanes[kLanes] = {};
        for (std::int64_t r = 0; r < kRows && panel * kRows + r < rows; ++r) {
          lanes[r % kLanes] += In::decode(data[(panel * kRows + r) * columns + c]);
        }
        for (std::int64_t width = kLanes / 2; width > 0; width /= 2) {
          for (std::int64_t l = 0; l < width; ++l) lanes[l] += lanes[l + width];
        }
        sums.as<float>()[panel * columns + c] = unscaled(lanes[0], 1.0f);
      }
    }
  });
}

void quantize(const Context&, const QuantizeArgs& args) {
  const float amax = amax_of(args.in);
  TensorScale& scale = *args.out.scale;
  if (args.scaling == Scaling::current) {
    scale = rescaled(scale, amax, args.out.data.dtype);
  } else {
    raise_amax(scale.amax, amax);
  }
  if (args.scale_copy != nullptr) {
    *args.scale_copy = {.scale_inv = scale.scale_inv, .scale = scale.scale};
  }
  if (args.nonfinite != nullptr && !is_finite_bits(magnitude_bits(amax))) *args.nonfinite = 1;
  if (!args.column_sums.empty()) sum_tiles(args.in, args.column_sums);
  for_dtype(args.in.dtype, [&]<class In>(In) {
    auto run = [&]<class Out>(Out) {
      if (args.counters != nullptr) count<In, Out>(args, scale.scale);
      if (!args.out.data.empty()) cast<In, Out>(args, scale.scale);
      if (args.transposed.empty()) return;
      if (args.out.data.empty()) {
        cast_transposed<In, Out>(args, scale.scale);
      } else {
        transpose_bytes(args.out.data.as<std::uint8_t>(), args.transposed.as<std::uint8_t>(),
                        args.in.shape[0], args.in.shape[1]);
      }
    };
    if (args.out.data.dtype == DType::e4m3) {
      run(Element<DType::e4m3>{});
    } else {
      run(Element<DType::e5m2>{});
    }
  });
}

void convert(const Context&, const ScaledView& in, const TensorView& out) {
  const float scale_inv = in.scale != nullptr ? in.scale->scale_inv : 1.0f;
  const std::int64_t count = out.numel();
  for_dtype(in.data.dtype, [&]<class In>(In) {
    for_dtype(out.dtype, [&]<class Out>(Out) {
      const auto* from = in.data.as<const typename In::Storage>();
      auto* to = out.as<typename Out::Storage>();
#pragma omp parallel for if (count > 65536)
      for (std::int64_t i = 0; i < count; ++i) {
        to[i] = Out::encode(unscaled(In::decode(from[i]), scale_inv));
      }
    });
  });
}

void transpose(const Context&, const TensorView& in, const TensorView& out) {
  transpose_bytes(in.as<const std::uint8_t>(), out.as<std::uint8_t>(), in.shape[0], in.shape[1]);
}

void sum_columns(const Context&, const TensorView& sums, const TensorView& out) {
  const auto* from = sums.as<const float>();
  const std::int64_t panels = sums.shape[0], columns = sums.shape[1];
  for_dtype(out.dtype, [&]<class Out>(Out) {
    for (std::int64_t c = 0; c < columns; ++c) {
      double sum = 0.0;
      for (std::int64_t p = 0; p < panels; ++p) sum += static_cast<double>(from[p * columns + c]);
      out.as<typename Out::Storage>()[c] = Out::encode(unscaled(static_cast<float>(sum), 1.0f));
    }
  });
}

void measure_amax(const Context&, const TensorView& in, TensorScale* scale) {
  scale->amax = amax_of(in);
}

}  // namespace octet::detail::cpu
