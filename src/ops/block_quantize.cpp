// SPDX-License-Identifier: Apache-2.0
#include "octet/ops/block_quantize.hpp"

#include "backend.hpp"
#include "ops/cast_checks.hpp"

namespace octet {
namespace {

using namespace detail;

void check_granularity(Granularity granularity, const char* op, const char* what) {
  const bool of_blocks = granularity == Granularity::row_block ||
                         granularity == Granularity::tile || granularity == Granularity::mx;
  // A value outside of the enumeration has no name.
  require(of_blocks || granularity == Granularity::tensor || granularity == Granularity::row, op,
          ": the granularity of ", what, " is ", static_cast<int>(granularity),
          "; allowed are row_block, tile, mx");
  require(of_blocks, op, ": the granularity of ", what, " is ", name_of(granularity),
          "; allowed are row_block, tile, mx");
}

/// The scales of a view, whose data may be missing.
void check_scales(const BlockScaledView& view, const char* op, const char* what) {
  check_granularity(view.granularity, op, what);
  require(view.mx_layout == MxLayout::compact || view.mx_layout == MxLayout::gemm_ready, op,
          ": the mx layout of ", what, " is ", static_cast<int>(view.mx_layout),
          "; it must be compact or gemm_ready");
  require(view.data.shape.rank() == 2, op, ": ", what, " has shape ", view.data.shape,
          "; blocks need a matrix");
  const std::size_t bytes = scale_bytes_of(view);
  require(view.scales != nullptr || bytes == 0, op, ": ", what, " has no scales; it needs ", bytes,
          " bytes");
  require(reinterpret_cast<std::uintptr_t>(view.scales) % 16 == 0, op, ": the scales of ", what,
          " are at ", view.scales, "; they must be aligned to 16 bytes");
}

void check_blocks(const Context& ctx, const BlockScaledView& view, const char* op,
                  const char* what) {
  check_device(ctx, view.data, op, what);
  require(is_fp8(view.data.dtype), op, ": ", what, " is ", name_of(view.data.dtype),
          "; allowed are e4m3, e5m2");
  check_scales(view, op, what);
}

void check_output(const Context& ctx, const TensorView& in, const BlockScaledView& out) {
  if (out.data.empty()) return;
  check_blocks(ctx, out, "block_quantize", "the output");
  const Shape padded{padded_rows(in.shape[0]), in.shape[1]};
  require(out.data.shape == in.shape || out.data.shape == padded,
          "block_quantize: the output has shape ", out.data.shape, ", the input ", in.shape,
          "; allowed are the same and ", padded, " (rows padded to a multiple of 16)");
}

void check_transposed(const Context& ctx, const BlockQuantizeArgs& args) {
  const TensorView& data = args.transposed.data;
  if (data.empty()) return;
  check_blocks(ctx, args.transposed, "block_quantize", "the transposed output");
  const Shape expected{args.in.shape[1], padded_rows(args.in.shape[0])};
  require(data.shape == expected, "block_quantize: the transposed copy of ", args.in.shape,
          " has shape ", data.shape, "; it must be ", expected,
          " (rows padded to a multiple of 16)");
  if (args.out.data.empty()) return;
  require(data.dtype == args.out.data.dtype && args.transposed.granularity == args.out.granularity,
          "block_quantize: the transposed output is ", name_of(data.dtype), " with scales per ",
          name_of(args.transposed.granularity), ", the output ", name_of(args.out.data.dtype),
          " with scales per ", name_of(args.out.granularity), "; they must be the same");
}

}  // namespace

void block_quantize(const Context& ctx, const BlockQuantizeArgs& args) {
  check_device(ctx, args.in, "block_quantize", "the input");
  check_wide(args.in.dtype, "block_quantize", "the input");
  require(args.in.shape.rank() == 2, "block_quantize: the input has shape ", args.in.shape,
          "; blocks need a matrix");
  const std::int64_t numel = args.in.numel();
  require(!args.out.data.empty() || !args.transposed.data.empty() || numel == 0,
          "block_quantize: neither an output nor a transposed output is given");
  check_output(ctx, args.in, args.out);
  check_transposed(ctx, args);
  check_column_sums(ctx, args.in, args.column_sums, column_sum_rows(args.in.shape[0]),
                    "block_quantize");
  require(reinterpret_cast<std::uintptr_t>(args.amax) % alignof(float) == 0,
          "block_quantize: amax is at ", args.amax, "; it must be aligned to 4 bytes");
  check_apart("block_quantize", {named("the input", args.in),
                                 named("the output", args.out.data),
                                 scales_of("the output's scales", args.out),
                                 named("the transposed output", args.transposed.data),
                                 scales_of("the transposed output's scales", args.transposed),
                                 {"amax", args.amax, sizeof(float)},
                                 named("column_sums", args.column_sums)});
  // Without an element there is no byte of scales and no sum of columns either.
  if (numel != 0) backend_of(ctx).block_quantize(ctx, args);
}

void block_dequantize(const Context& ctx, const BlockScaledView& in, const TensorView& out) {
  check_blocks(ctx, in, "block_dequantize", "the input");
  check_device(ctx, out, "block_dequantize", "the output");
  check_wide(out.dtype, "block_dequantize", "the output");
  require(out.shape == in.data.shape, "block_dequantize: the input has shape ", in.data.shape,
          ", the output ", out.shape, "; they must be the same");
  check_apart("block_dequantize", {named("the input", in.data), scales_of("the input's scales", in),
                                   named("the output", out)});
  if (out.numel() != 0) backend_of(ctx).block_dequantize(ctx, in, out);
}

void broadcast_scale(const Context& ctx, const TensorScale* scale, const BlockScaledView& out) {
  require(scale != nullptr, "broadcast_scale: no scale is given");
  require(out.data.device == ctx.device(), "broadcast_scale: the output is on ", out.data.device,
          " but the context is on ", ctx.device());
  check_scales(out, "broadcast_scale", "the output");
  const std::size_t bytes = scale_bytes_of(out);
  check_apart("broadcast_scale",
              {{"the scale", scale, sizeof(TensorScale)}, {"the scales", out.scales, bytes}});
  if (bytes != 0) backend_of(ctx).broadcast_scale(ctx, scale, out);
}

void transpose_tiles(const Context& ctx, const BlockScaledView& in, const BlockScaledView& out) {
  check_blocks(ctx, in, "transpose_tiles", "the input");
  check_blocks(ctx, out, "transpose_tiles", "the output");
  require(in.granularity == Granularity::tile && out.granularity == Granularity::tile,
          "transpose_tiles: the input has scales per ", name_of(in.granularity),
          ", the output per ", name_of(out.granularity), "; both must have them per tile");
  check_apart("transpose_tiles",
              {named("the input", in.data), scales_of("the input's scales", in),
               named("the output", out.data), scales_of("the output's scales", out)});
  transpose(ctx, in.data, out.data);
  const Shape& shape = in.data.shape;
  if (in.data.numel() == 0) return;
  backend_of(ctx).transpose_tile_scales(ctx, static_cast<const float*>(in.scales), shape[0],
                                        shape[1], static_cast<float*>(out.scales));
}

void make_gemm_ready(const Context& ctx, const void* compact, std::int64_t rows,
                     std::int64_t columns, void* gemm_ready) {
  require(rows >= 0 && columns >= 0, "make_gemm_ready: the matrix has ", rows, " rows and ",
          columns, " columns; neither may be negative");
  const auto bytes_of = [&](MxLayout layout) {
    return static_cast<std::size_t>(scale_bytes(Granularity::mx, rows, columns, layout));
  };
  const std::size_t bytes = bytes_of(MxLayout::gemm_ready);
  if (bytes == 0) return;
  require(compact != nullptr, "make_gemm_ready: the compact scales are a null pointer");
  require(gemm_ready != nullptr, "make_gemm_ready: the gemm_ready scales are a null pointer");
  require(reinterpret_cast<std::uintptr_t>(gemm_ready) % 16 == 0,
          "make_gemm_ready: the gemm_ready scales are at ", gemm_ready,
          "; they must be aligned to 16 bytes");
  check_apart("make_gemm_ready", {{"the compact scales", compact, bytes_of(MxLayout::compact)},
                                  {"the gemm_ready scales", gemm_ready, bytes}});
  backend_of(ctx).make_gemm_ready(ctx, compact, rows, columns, gemm_ready);
}

}  // namespace octet
