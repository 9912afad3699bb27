// SPDX-License-Identifier: Apache-2.0
// What is done with scales of blocks once they exist: decode with them, fill them, lay them out.
#include "cuda/ops/cast_launch.cuh"
#include "cuda/ops/cuda_ops.hpp"
#include "octet/core/detail/block_scaling.hpp"

namespace octet::detail::cuda {
namespace {

using namespace casts;

struct Dequantize {
  const std::uint8_t* in;
  void* out;
  const void* scales;
  ScaleLayout layout;
  std::int64_t groups;  // vectors of a row
  bool in_aligned, out_aligned;
};

/// A vector of eight never crosses a block, so it has one scale.
template <class In, class Out>
__global__ void __launch_bounds__(kThreads)
    block_dequantize_kernel(const __grid_constant__ Dequantize args) {
  const ScaleLayout& layout = args.layout;
  const std::int64_t threads = std::int64_t{gridDim.x} * kThreads;
  const std::int64_t count = layout.rows * args.groups;
  for (std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count;
       i += threads) {
    const std::int64_t row = i / args.groups, column = i % args.groups * 8;
    const std::int64_t at = row * layout.columns + column, left = layout.columns - column;
    const std::int64_t index = layout.at(row, column);
    const float scale = layout.granularity == Granularity::mx
                            ? decode_e8m0(static_cast<const std::uint8_t*>(args.scales)[index])
                            : static_cast<const float*>(args.scales)[index];
    float x[8];
    decode8<In>(load8<In>(args.in + at, left, args.in_aligned), x);
#pragma unroll
    for (float& value : x) value = unscaled(value, scale);
    store8<Out>(static_cast<typename Out::Storage*>(args.out) + at, encode8<Out>(x), left,
                args.out_aligned);
  }
}

__global__ void __launch_bounds__(kThreads)
    broadcast_scale_kernel(const TensorScale* scale, void* scales, ScaleLayout layout,
                           std::int64_t count) {
  const float scale_inv = scale->scale_inv;
  const std::int64_t threads = std::int64_t{gridDim.x} * kThreads;
  for (std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count;
       i += threads) {
    const float value = layout.is_inside(layout.element_of(i)) ? scale_inv : 0.0f;
    if (layout.granularity == Granularity::mx) {
      static_cast<std::uint8_t*>(scales)[i] = encode_e8m0(value);
    } else {
      static_cast<float*>(scales)[i] = value;
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    transpose_tile_scales_kernel(const float* scales, ScaleLayout from, ScaleLayout to, float* out,
                                 std::int64_t count) {
  const std::int64_t threads = std::int64_t{gridDim.x} * kThreads;
  for (std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count;
       i += threads) {
    out[i] = transposed_tile_scale(scales, from, to, i);
  }
}

/// A thread makes the 16 bytes of one row in 32: four rows of four blocks.
__global__ void __launch_bounds__(kThreads)
    gemm_ready_kernel(const std::uint8_t* compact, ScaleLayout from, ScaleLayout to, uint4* out,
                      std::int64_t count) {
  const std::int64_t threads = std::int64_t{gridDim.x} * kThreads;
  for (std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count;
       i += threads) {
    const auto first = to.element_of(16 * i);
    std::uint32_t words[4] = {};
#pragma unroll
    for (int byte = 0; byte < 16; ++byte) {
      const std::int64_t row = first.row + byte / 4 * 32, column = first.column + byte % 4 * 32;
      if (!to.is_inside({row, column})) continue;
      words[byte / 4] |= std::uint32_t{compact[from.at(row, column)]} << (8 * (byte % 4));
    }
    out[i] = {words[0], words[1], words[2], words[3]};
  }
}

ScaleLayout layout_of(const BlockScaledView& view) {
  return scale_layout(view.granularity, view.mx_layout, view.data.shape[0], view.data.shape[1]);
}

}  // namespace

void block_dequantize(const Context& ctx, const BlockScaledView& in, const TensorView& out) {
  set_device(ctx);
  Dequantize args{};
  args.in = in.data.as<const std::uint8_t>();
  args.out = out.data;
  args.scales = in.scales;
  args.layout = layout_of(in);
  args.groups = (args.layout.columns + 7) / 8;
  const bool whole_vectors = args.layout.columns % 8 == 0;
  args.in_aligned = whole_vectors && is_aligned_to_vectors(in.data.data, 1);
  args.out_aligned = whole_vectors && is_aligned_to_vectors(out.data, size_of(out.dtype));
  const unsigned blocks = blocks_for(8 * args.layout.rows * args.groups);
  for_wide_dtype(out.dtype, [&]<class Out>(Out) {
    if (in.data.dtype == DType::e4m3) {
      block_dequantize_kernel<Element<DType::e4m3>, Out>
          <<<blocks, kThreads, 0, ctx.stream()>>>(args);
    } else {
      block_dequantize_kernel<Element<DType::e5m2>, Out>
          <<<blocks, kThreads, 0, ctx.stream()>>>(args);
    }
  });
  OCTET_CUDA_CHECK(cudaGetLastError());
}

void broadcast_scale(const Context& ctx, const TensorScale* scale, const BlockScaledView& out) {
  set_device(ctx);
  const ScaleLayout layout = layout_of(out);
  const std::int64_t bytes =
      scale_bytes(out.granularity, layout.rows, layout.columns, out.mx_layout);
  const std::int64_t count = out.granularity == Granularity::mx ? bytes : bytes / 4;
  broadcast_scale_kernel<<<blocks_for(count), kThreads, 0, ctx.stream()>>>(scale, out.scales,
                                                                           layout, count);
  OCTET_CUDA_CHECK(cudaGetLastError());
}

void transpose_tile_scales(const Context& ctx, const float* scales, std::int64_t rows,
                           std::int64_t columns, float* out) {
  set_device(ctx);
  const std::int64_t count = scale_bytes(Granularity::tile, columns, rows) / 4;
  transpose_tile_scales_kernel<<<blocks_for(8 * count), kThreads, 0, ctx.stream()>>>(
      scales, scale_layout(Granularity::tile, MxLayout::compact, rows, columns),
      scale_layout(Granularity::tile, MxLayout::compact, columns, rows), out, count);
  OCTET_CUDA_CHECK(cudaGetLastError());
}

void make_gemm_ready(const Context& ctx, const void* compact, std::int64_t rows,
                     std::int64_t columns, void* gemm_ready) {
  set_device(ctx);
  const std::int64_t count = scale_bytes(Granularity::mx, rows, columns) / 16;
  gemm_ready_kernel<<<blocks_for(8 * count), kThreads, 0, ctx.stream()>>>(
      static_cast<const std::uint8_t*>(compact),
      scale_layout(Granularity::mx, MxLayout::compact, rows, columns),
      scale_layout(Granularity::mx, MxLayout::gemm_ready, rows, columns),
      static_cast<uint4*>(gemm_ready), count);
  OCTET_CUDA_CHECK(cudaGetLastError());
}

}  // namespace octet::detail::cuda
