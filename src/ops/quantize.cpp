// SPDX-License-Identifier: Apache-2.0
#include "octet/ops/quantize.hpp"

#include "backend.hpp"
#include "ops/cast_checks.hpp"

namespace octet {
namespace {

using namespace detail;

void check_transposed(const TensorView& in, const TensorView& out, const char* op) {
  require(in.shape.rank() == 2, op, ": a transposed copy needs a matrix, not shape ", in.shape);
  const Shape expected{in.shape[1], padded_rows(in.shape[0])};
  require(out.shape == expected, op, ": the transposed copy of ", in.shape, " has shape ",
          out.shape, "; it must be ", expected, " (rows padded to a multiple of 16)");
}

}  // namespace

void quantize(const Context& ctx, const QuantizeArgs& args) {
  check_device(ctx, args.in, "quantize", "the input");
  check_wide(args.in.dtype, "quantize", "the input");
  const TensorView& out = args.out.data;
  require(is_fp8(out.dtype), "quantize: the output is ", name_of(out.dtype),
          "; allowed are e4m3, e5m2");
  require(args.out.scale != nullptr, "quantize: the output has no scale");
  require(!out.empty() || !args.transposed.empty() || args.in.numel() == 0,
          "quantize: neither an output nor a transposed output is given");
  require(args.scaling == Scaling::current || args.scaling == Scaling::given,
          "quantize: scaling is ", static_cast<int>(args.scaling), "; it must be current or given");
  if (!out.empty()) {
    check_device(ctx, out, "quantize", "the output");
    require(out.shape == args.in.shape, "quantize: the output has shape ", out.shape,
            ", the input ", args.in.shape);
  }
  if (!args.transposed.empty()) {
    check_device(ctx, args.transposed, "quantize", "the transposed output");
    require(args.transposed.dtype == out.dtype, "quantize: the transposed output is ",
            name_of(args.transposed.dtype), ", the output ", name_of(out.dtype));
    check_transposed(args.in, args.transposed, "quantize");
  }
  check_column_sums(ctx, args.in, args.column_sums, column_sum_rows(args.in.shape[0]), "quantize");
  check_apart("quantize", {named("the input", args.in),
                           named("the output", out),
                           named("the transposed output", args.transposed),
                           named("column_sums", args.column_sums),
                           {"the scale", args.out.scale, sizeof(TensorScale)},
                           {"scale_copy", args.scale_copy, sizeof(TensorScale)}});
  backend_of(ctx).quantize(ctx, args);
}

void convert(const Context& ctx, const ScaledView& in, const TensorView& out) {
  check_device(ctx, in.data, "convert", "the input");
  check_device(ctx, out, "convert", "the output");
  require(is_wide(out.dtype), "convert: the output is ", name_of(out.dtype),
          "; allowed are f32, bf16, f16 (quantize() writes FP8)");
  require(in.data.shape == out.shape, "convert: the input has shape ", in.data.shape,
          ", the output ", out.shape);
  const bool is_in_place = in.data.data == out.data && size_of(in.data.dtype) == size_of(out.dtype);
  if (!is_in_place) {
    check_apart("convert", {named("the input", in.data), named("the output", out)});
  }
  if (in.data.numel() != 0) backend_of(ctx).convert(ctx, in, out);
}

void transpose(const Context& ctx, const TensorView& in, const TensorView& out) {
  check_device(ctx, in, "transpose", "the input");
  check_device(ctx, out, "transpose", "the output");
  require(is_fp8(in.dtype) && in.dtype == out.dtype, "transpose: the input is ", name_of(in.dtype),
          ", the output ", name_of(out.dtype), "; both must be the same of e4m3, e5m2");
  check_transposed(in, out, "transpose");
  check_apart("transpose", {named("the input", in), named("the output", out)});
  if (out.numel() != 0) backend_of(ctx).transpose(ctx, in, out);
}

void sum_columns(const Context& ctx, const TensorView& sums, const TensorView& out) {
  check_device(ctx, sums, "sum_columns", "the input");
  check_device(ctx, out, "sum_columns", "the output");
  require(sums.dtype == DType::f32 && sums.shape.rank() == 2, "sum_columns: the input is ",
          name_of(sums.dtype), " ", sums.shape, "; it must be f32 and a matrix");
  check_wide(out.dtype, "sum_columns", "the output");
  require(out.shape == Shape{sums.shape[1]}, "sum_columns: the output has shape ", out.shape,
          "; it must be ", Shape{sums.shape[1]});
  check_apart("sum_columns", {named("the input", sums), named("the output", out)});
  if (out.numel() != 0) backend_of(ctx).sum_columns(ctx, sums, out);
}

void measure_amax(const Context& ctx, const TensorView& in, TensorScale* scale) {
  check_device(ctx, in, "measure_amax", "the input");
  check_wide(in.dtype, "measure_amax", "the input");
  require(scale != nullptr, "measure_amax: no scale is given");
  backend_of(ctx).measure_amax(ctx, in, scale);
}

}  // namespace octet
