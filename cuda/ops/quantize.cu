// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "cuda/check.hpp"
#include "cuda/device/pack.cuh"
#include "cuda/device/reduce.cuh"
#include "cuda/ops/cuda_ops.hpp"
#include "octet/core/detail/scaling_math.hpp"

namespace octet::detail::cuda {
namespace {

constexpr int kThreads = 256;
// Grid-stride kernels: enough blocks to fill the largest GPUs several times over.
constexpr std::int64_t kMaxBlocks = 2048;
// A tile of 64 x 64 bytes is written as 64 lines of 64 contiguous bytes each.
constexpr int kTile = 64;
constexpr int kTilePitch = kTile + 4;  // shifts each row by one bank

std::uint32_t* amax_word(TensorScale* scale) {
  return reinterpret_cast<std::uint32_t*>(&scale->amax);
}

template <class In>
__global__ void __launch_bounds__(kThreads)
    amax_kernel(const typename In::Storage* in, std::int64_t count, std::int64_t packs,
                std::uint32_t* amax) {
  using Pack = Pack16<typename In::Storage>;
  const std::int64_t thread = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const std::int64_t threads = std::int64_t{gridDim.x} * kThreads;
  std::uint32_t largest = 0;
  for (std::int64_t p = thread; p < packs; p += threads) {
    const Pack pack = reinterpret_cast<const Pack*>(in)[p];
#pragma unroll
    for (int i = 0; i < Pack::kCount; ++i) {
      largest = max(largest, magnitude_bits(In::decode(pack.values[i])));
    }
  }
  for (std::int64_t i = packs * Pack::kCount + thread; i < count; i += threads) {
    largest = max(largest, magnitude_bits(In::decode(in[i])));
  }
  block_atomic_max(largest, amax);
}

/// The scale that every block works out for itself from the measured amax. Where amax is not
/// finite nobody writes the old scale, so it can be read; else it is not needed.
__device__ TensorScale current_scale(const TensorScale* scale, DType dtype) {
  const float amax = scale->amax;
  TensorScale old;
  if (!is_finite_bits(magnitude_bits(amax))) old = *scale;
  return rescaled(old, amax, dtype);
}

__device__ void publish_scale(TensorScale* scale, const TensorScale& next,
                              std::uint32_t* nonfinite) {
  if (blockIdx.x != 0 || blockIdx.y != 0 || threadIdx.x != 0) return;
  if (is_finite_bits(magnitude_bits(next.amax))) {
    scale->scale = next.scale;
    scale->scale_inv = next.scale_inv;
  } else if (nonfinite != nullptr) {
    *nonfinite = 1;
  }
}

template <class In, class Out>
__global__ void __launch_bounds__(kThreads)
    cast_kernel(const typename In::Storage* in, std::uint8_t* out, std::int64_t count,
                TensorScale* scale, std::uint32_t* nonfinite) {
  const TensorScale next = current_scale(scale, Out::kDType);
  publish_scale(scale, next, nonfinite);
  const std::int64_t threads = std::int64_t{gridDim.x} * kThreads;
  for (std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count;
       i += threads) {
    out[i] = Out::encode(In::decode(in[i]) * next.scale);
  }
}

/// Writes a tile of codes, held as tile[row][column], as lines of the transposed matrix.
__device__ void store_transposed(const std::uint8_t (*tile)[kTilePitch], std::uint8_t* out,
                                 std::int64_t row0, std::int64_t column0, std::int64_t columns,
                                 std::int64_t pitch) {
  const int line = static_cast<int>(threadIdx.x) / (kTile / 16);
  const int part = static_cast<int>(threadIdx.x) % (kTile / 16) * 16;
  if (column0 + line >= columns || row0 + part >= pitch) return;
  Pack16<std::uint8_t> pack;
#pragma unroll
  for (int i = 0; i < 16; ++i) pack.values[i] = tile[part + i][line];
  std::uint8_t* at = out + (column0 + line) * pitch + row0 + part;
  if (reinterpret_cast<std::uintptr_t>(at) % 16 == 0) {
    *reinterpret_cast<Pack16<std::uint8_t>*>(at) = pack;
    return;
  }
  for (int i = 0; i < 16; ++i) at[i] = pack.values[i];
}

/// One tile per block: `code(row, column)` is stored row-major where `out` is given, and
/// transposed. Rows past the end, up to the padded pitch, are zero.
template <class Code>
__device__ void transpose_tile(std::int64_t rows, std::int64_t columns, std::uint8_t* out,
                               std::uint8_t* transposed, Code code) {
  __shared__ std::uint8_t tile[kTile][kTilePitch];
  const std::int64_t pitch = (rows + 15) / 16 * 16;
  const std::int64_t row0 = std::int64_t{blockIdx.x} * kTile;
  for (std::int64_t column0 = std::int64_t{blockIdx.y} * kTile; column0 < columns;
       column0 += std::int64_t{gridDim.y} * kTile) {
    for (int i = static_cast<int>(threadIdx.x); i < kTile * kTile; i += kThreads) {
      const std::int64_t r = row0 + i / kTile;
      const std::int64_t c = column0 + i % kTile;
      std::uint8_t byte = 0;
      if (r < rows && c < columns) {
        byte = code(r * columns + c);
        if (out != nullptr) out[r * columns + c] = byte;
      }
      tile[i / kTile][i % kTile] = byte;
    }
    __syncthreads();
    store_transposed(tile, transposed, row0, column0, columns, pitch);
    __syncthreads();
  }
}

template <class In, class Out>
__global__ void __launch_bounds__(kThreads)
    cast_transpose_kernel(const typename In::Storage* in, std::int64_t rows, std::int64_t columns,
                          std::uint8_t* out, std::uint8_t* transposed, TensorScale* scale,
                          std::uint32_t* nonfinite) {
  const TensorScale next = current_scale(scale, Out::kDType);
  publish_scale(scale, next, nonfinite);
  transpose_tile(rows, columns, out, transposed,
                 [&](std::int64_t i) { return Out::encode(In::decode(in[i]) * next.scale); });
}

__global__ void __launch_bounds__(kThreads)
    transpose_kernel(const std::uint8_t* in, std::int64_t rows, std::int64_t columns,
                     std::uint8_t* out) {
  transpose_tile(rows, columns, nullptr, out, [&](std::int64_t i) { return in[i]; });
}

template <class In, class Out>
__global__ void __launch_bounds__(kThreads)
    convert_kernel(const typename In::Storage* in, typename Out::Storage* out, std::int64_t count,
                   const TensorScale* scale) {
  const float scale_inv = scale != nullptr ? scale->scale_inv : 1.0f;
  const std::int64_t threads = std::int64_t{gridDim.x} * kThreads;
  for (std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count;
       i += threads) {
    out[i] = Out::encode(unscaled(In::decode(in[i]), scale_inv));
  }
}

unsigned blocks_for(std::int64_t threads) {
  return static_cast<unsigned>(
      std::clamp<std::int64_t>((threads + kThreads - 1) / kThreads, 1, kMaxBlocks));
}

dim3 tiles_for(std::int64_t rows, std::int64_t columns) {
  const std::int64_t y = std::min<std::int64_t>((columns + kTile - 1) / kTile, 65535);
  return dim3(static_cast<unsigned>((rows + kTile - 1) / kTile), static_cast<unsigned>(y));
}

template <class In, class Out>
void launch_cast(const Context& ctx, const QuantizeArgs& args) {
  const auto* in = args.in.as<const typename In::Storage>();
  auto* out = args.out.data.as<std::uint8_t>();
  const std::int64_t count = args.in.numel();
  if (args.transposed.empty() || count == 0) {
    cast_kernel<In, Out><<<blocks_for(count), kThreads, 0, ctx.stream()>>>(
        in, out, count, args.out.scale, args.nonfinite);
    return;
  }
  const std::int64_t rows = args.in.shape[0];
  const std::int64_t columns = args.in.shape[1];
  cast_transpose_kernel<In, Out><<<tiles_for(rows, columns), kThreads, 0, ctx.stream()>>>(
      in, rows, columns, out, args.transposed.as<std::uint8_t>(), args.out.scale, args.nonfinite);
}

/// The input of a cast: one of the three types that are not FP8.
template <class F>
void for_wide_dtype(DType dtype, F&& f) {
  if (dtype == DType::bf16) return f(Element<DType::bf16>{});
  if (dtype == DType::f16) return f(Element<DType::f16>{});
  f(Element<DType::f32>{});
}

}  // namespace

void measure_amax(const Context& ctx, const TensorView& in, TensorScale* scale) {
  set_device(ctx);
  OCTET_CUDA_CHECK(cudaMemsetAsync(amax_word(scale), 0, sizeof(std::uint32_t), ctx.stream()));
  const std::int64_t count = in.numel();
  if (count == 0) return;
  for_wide_dtype(in.dtype, [&]<class In>(In) {
    constexpr std::int64_t kPack = Pack16<typename In::Storage>::kCount;
    const std::int64_t packs = is_aligned16(in.data) ? count / kPack : 0;
    amax_kernel<In><<<blocks_for(packs > 0 ? packs : count), kThreads, 0, ctx.stream()>>>(
        in.as<const typename In::Storage>(), count, packs, amax_word(scale));
  });
  OCTET_CUDA_CHECK(cudaGetLastError());
}

void quantize(const Context& ctx, const QuantizeArgs& args) {
  cuda::measure_amax(ctx, args.in, args.out.scale);
  for_wide_dtype(args.in.dtype, [&]<class In>(In) {
    if (args.out.data.dtype == DType::e4m3) {
      launch_cast<In, Element<DType::e4m3>>(ctx, args);
    } else {
      launch_cast<In, Element<DType::e5m2>>(ctx, args);
    }
  });
  OCTET_CUDA_CHECK(cudaGetLastError());
}

void convert(const Context& ctx, const ScaledView& in, const TensorView& out) {
  set_device(ctx);
  const std::int64_t count = out.numel();
  for_dtype(in.data.dtype, [&]<class In>(In) {
    for_wide_dtype(out.dtype, [&]<class Out>(Out) {
      convert_kernel<In, Out><<<blocks_for(count), kThreads, 0, ctx.stream()>>>(
          in.data.as<const typename In::Storage>(), out.as<typename Out::Storage>(), count,
          in.scale);
    });
  });
  OCTET_CUDA_CHECK(cudaGetLastError());
}

void transpose(const Context& ctx, const TensorView& in, const TensorView& out) {
  set_device(ctx);
  const std::int64_t rows = in.shape[0];
  const std::int64_t columns = in.shape[1];
  transpose_kernel<<<tiles_for(rows, columns), kThreads, 0, ctx.stream()>>>(
      in.as<const std::uint8_t>(), rows, columns, out.as<std::uint8_t>());
  OCTET_CUDA_CHECK(cudaGetLastError());
}

}  // namespace octet::detail::cuda
