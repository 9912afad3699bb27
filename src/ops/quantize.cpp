// SPDX-License-Identifier: Apache-2.0
#include "octet/ops/quantize.hpp"

#include <iterator>

#include "backend.hpp"
#include "overlap.hpp"

namespace octet {
namespace {

bool is_wide(DType dtype) { return !is_fp8(dtype); }

void check_device(const Context& ctx, const TensorView& view, const char* op, const char* what) {
  require(view.device == ctx.device(), op, ": ", what, " is on ", view.device,
          " but the context is on ", ctx.device());
  require(view.data != nullptr || view.numel() == 0, op, ": ", what, " of shape ", view.shape,
          " has a null pointer");
}

void check_apart(const char* op, const char* a_name, const TensorView& a, const char* b_name,
                 const TensorView& b) {
  require(!detail::overlap(a, b), op, ": ", a_name, " (", a.bytes(), " bytes at ", a.data,
          ") overlaps ", b_name, " (", b.bytes(), " bytes at ", b.data, "); they must be apart");
}

void check_transposed(const TensorView& in, const TensorView& out, const char* op) {
  require(in.shape.rank() == 2, op, ": a transposed copy needs a matrix, not shape ", in.shape);
  const Shape expected{in.shape[1], padded_rows(in.shape[0])};
  require(out.shape == expected, op, ": the transposed copy of ", in.shape, " has shape ",
          out.shape, "; it must be ", expected, " (rows padded to a multiple of 16)");
}

}  // namespace

void quantize(const Context& ctx, const QuantizeArgs& args) {
  check_device(ctx, args.in, "quantize", "the input");
  require(is_wide(args.in.dtype), "quantize: the input is ", name_of(args.in.dtype),
          "; allowed are f32, bf16, f16");
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
  if (!args.column_sums.empty()) {
    const TensorView& sums = args.column_sums;
    check_device(ctx, sums, "quantize", "column_sums");
    require(args.in.shape.rank() == 2, "quantize: column_sums need a matrix, not shape ",
            args.in.shape);
    const Shape expected{column_sum_rows(args.in.shape[0]), args.in.shape[1]};
    require(sums.dtype == DType::f32 && sums.shape == expected, "quantize: column_sums are ",
            name_of(sums.dtype), " ", sums.shape, "; they must be f32 ", expected);
  }
  const struct {
    const char* name;
    TensorView view;
  } all[] = {{"the input", args.in},
             {"the output", out},
             {"the transposed output", args.transposed},
             {"column_sums", args.column_sums},
             {"the scale", {args.out.scale, DType::f32, Shape{4}, ctx.device()}}};
  for (std::size_t i = 0; i < std::size(all); ++i) {
    for (std::size_t j = 0; j < i; ++j) {
      if (all[i].view.empty() || all[j].view.empty()) continue;
      check_apart("quantize", all[i].name, all[i].view, all[j].name, all[j].view);
    }
  }
  detail::backend_of(ctx).quantize(ctx, args);
}

void convert(const Context& ctx, const ScaledView& in, const TensorView& out) {
  check_device(ctx, in.data, "convert", "the input");
  check_device(ctx, out, "convert", "the output");
  require(is_wide(out.dtype), "convert: the output is ", name_of(out.dtype),
          "; allowed are f32, bf16, f16 (quantize() writes FP8)");
  require(in.data.shape == out.shape, "convert: the input has shape ", in.data.shape,
          ", the output ", out.shape);
  if (in.data.numel() != 0) detail::backend_of(ctx).convert(ctx, in, out);
}

void transpose(const Context& ctx, const TensorView& in, const TensorView& out) {
  check_device(ctx, in, "transpose", "the input");
  check_device(ctx, out, "transpose", "the output");
  require(is_fp8(in.dtype) && in.dtype == out.dtype, "transpose: the input is ", name_of(in.dtype),
          ", the output ", name_of(out.dtype), "; both must be the same of e4m3, e5m2");
  check_transposed(in, out, "transpose");
  check_apart("transpose", "the output", out, "the input", in);
  if (out.numel() != 0) detail::backend_of(ctx).transpose(ctx, in, out);
}

void sum_columns(const Context& ctx, const TensorView& sums, const TensorView& out) {
  check_device(ctx, sums, "sum_columns", "the input");
  check_device(ctx, out, "sum_columns", "the output");
  require(sums.dtype == DType::f32 && sums.shape.rank() == 2, "sum_columns: the input is ",
          name_of(sums.dtype), " ", sums.shape, "; it must be f32 and a matrix");
  require(is_wide(out.dtype), "sum_columns: the output is ", name_of(out.dtype),
          "; allowed are f32, bf16, f16");
  require(out.shape == Shape{sums.shape[1]}, "sum_columns: the output has shape ", out.shape,
          "; it must be ", Shape{sums.shape[1]});
  check_apart("sum_columns", "the output", out, "the input", sums);
  if (out.numel() != 0) detail::backend_of(ctx).sum_columns(ctx, sums, out);
}

void measure_amax(const Context& ctx, const TensorView& in, TensorScale* scale) {
  check_device(ctx, in, "measure_amax", "the input");
  require(is_wide(in.dtype), "measure_amax: the input is ", name_of(in.dtype),
          "; allowed are f32, bf16, f16");
  require(scale != nullptr, "measure_amax: no scale is given");
  detail::backend_of(ctx).measure_amax(ctx, in, scale);
}

}  // namespace octet
