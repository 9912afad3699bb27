// SPDX-License-Identifier: Apache-2.0
#include <cstring>

#include "octet/core/detail/scaling_math.hpp"
#include "ops/cpu_ops.hpp"

namespace octet::detail::cpu {
namespace {

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

void quantize(const Context&, const QuantizeArgs& args) {
  const float amax = amax_of(args.in);
  TensorScale& scale = *args.out.scale;
  scale = rescaled(scale, amax, args.out.data.dtype);
  if (args.nonfinite != nullptr && !is_finite_bits(magnitude_bits(amax))) *args.nonfinite = 1;
  for_dtype(args.in.dtype, [&]<class In>(In) {
    auto run = [&]<class Out>(Out) {
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

void measure_amax(const Context&, const TensorView& in, TensorScale* scale) {
  scale->amax = amax_of(in);
}

}  // namespace octet::detail::cpu
