// SPDX-License-Identifier: Apache-2.0
// The operands of a Linear's products: activations, their gradients, and what of the weight.
#include <algorithm>
#include <array>
#include <span>

#include "linear_impl.hpp"
#include "octet/gemm/epilogue.hpp"

namespace octet {
namespace {

std::size_t bytes_of(std::int64_t rows, std::int64_t columns, DType dtype) {
  return WorkspaceScope::padded(static_cast<std::size_t>(rows * columns) * size_of(dtype));
}

/// Of the scales of blocks; a scale for a whole tensor is kept elsewhere.
std::size_t block_scale_bytes(Granularity granularity, const Shape& shape) {
  if (granularity == Granularity::tensor) return 0;
  return static_cast<std::size_t>(scale_bytes(granularity, shape[0], shape[1]));
}

std::size_t cut_bytes(const Shape& shape, Granularity granularity) {
  return bytes_of(shape[0], shape[1], DType::e4m3) +
         WorkspaceScope::padded(block_scale_bytes(granularity, shape));
}

/// Memory for an FP8 matrix and the scales of its blocks.
BlockScaledView take_cut(WorkspaceScope& scope, DType dtype, Shape shape, Granularity granularity) {
  BlockScaledView cut{scope.take(dtype, shape), granularity};
  const std::size_t bytes = block_scale_bytes(granularity, shape);
  if (bytes > 0) cut.scales = scope.take(bytes);
  return cut;
}

LinearOperand operand_of(const BlockScaledView& cut, const TensorScale* tensor_scale) {
  const bool is_tensor = cut.granularity == Granularity::tensor;
  return {cut.data, is_tensor ? &tensor_scale->scale_inv : cut.scales, cut.granularity};
}

}  // namespace

// --- Memory ---

std::size_t Linear::Impl::forward_bytes() const {
  const std::int64_t t = config.max_tokens, k = config.in_features, n = config.out_features;
  const std::size_t bias = config.bias ? bytes_of(1, n, DType::bf16) : 0;
  if (!config.fp8) return bytes_of(t, k, DType::bf16) + bytes_of(n, k, DType::bf16) + bias;
  return cut_bytes({cut_rows(t), k}, x_granularity()) + cut_bytes({n, k}, w_granularity()) + bias;
}

std::size_t Linear::Impl::backward_bytes() const {
  const std::int64_t t = config.max_tokens, k = config.in_features, n = config.out_features;
  // dy in FP32 and times gelu', and the product that becomes a dw in e4m3.
  const std::size_t wide =
      (config.gelu ? 2 * bytes_of(t, n, DType::f32) : 0) + bytes_of(n, k, DType::bf16);
  if (!config.fp8) return wide + bytes_of(t, n, DType::bf16) + bytes_of(n, k, DType::bf16);
  return wide + bytes_of(column_sum_rows(t) + 1, n, DType::f32) +
         cut_bytes({cut_rows(t), n}, x_granularity()) +
         cut_bytes({n, padded_rows(t)}, x_granularity()) +
         cut_bytes({k, padded_rows(n)}, w_granularity());
}

void Linear::Impl::allocate() {
  const std::int64_t t = config.max_tokens, k = config.in_features, n = config.out_features;
  const std::array<TensorScale, kScales> fresh{};
  scales = upload_sync<TensorScale>(ctx, fresh);
  const Shape x_columns{k, padded_rows(t)};
  if (config.fp8) {
    saved_x = Tensor(ctx, DType::e4m3, x_columns);
    saved_x_scales = Buffer(ctx, block_scale_bytes(x_granularity(), x_columns));
  } else {
    saved_x = Tensor(ctx, DType::bf16, {t, k});
    const std::vector<std::uint16_t> values(static_cast<std::size_t>(t), 0x3F80);  // 1 in BF16
    ones = upload_sync<std::uint16_t>(ctx, values);
  }
  if (config.gelu) pre_activation = Tensor(ctx, DType::bf16, {t, n});
  if (!config.cache_weight) return;
  const bool has_codes = config.fp8 && config.weight_dtype == DType::e4m3;
  if (!has_codes && config.weight_dtype != operand_dtype()) {
    kept_rows = Tensor(ctx, operand_dtype(), {n, k});
  }
  if (!config.fp8) return;
  const Shape w_columns{k, padded_rows(n)};
  kept_columns = Tensor(ctx, DType::e4m3, w_columns);
  kept_row_scales = Buffer(ctx, block_scale_bytes(w_granularity(), {n, k}));
  kept_column_scales = Buffer(ctx, block_scale_bytes(w_granularity(), w_columns));
}

// --- Activations and their gradients ---

/// Into one orientation or both, whichever views are not empty.
void Linear::Impl::cut(const TensorView& in, const BlockScaledView& rows,
                       const BlockScaledView& columns, const CutOptions& options) const {
  if (in.numel() == 0) return;
  if (rows.granularity != Granularity::tensor) {
    return block_quantize(ctx, {.in = in,
                                .out = rows,
                                .transposed = columns,
                                .nonfinite = config.nonfinite,
                                .counters = options.counters,
                                .column_sums = options.column_sums});
  }
  quantize(ctx, {.in = in,
                 .out = {rows.data, options.scale},
                 .transposed = columns.data,
                 .nonfinite = config.nonfinite,
                 .scaling = options.scaling,
                 .counters = options.counters,
                 .scale_copy = options.scale_copy,
                 .column_sums = options.column_sums});
}

LinearOperand Linear::Impl::cast_x(const LinearForward& args, WorkspaceScope& scope) {
  const std::int64_t count = args.x.shape[0], k = config.in_features;
  const bool saves = args.save_for_backward;
  if (!config.fp8) {
    if (!saves && args.x.dtype == DType::bf16) return {args.x};
    TensorView out = saves ? saved_x.view() : scope.take(DType::bf16, args.x.shape);
    out.shape = args.x.shape;
    convert(ctx, {args.x, nullptr}, out);
    return {out};
  }
  // What a step or another forward does to the scale of this cast must not reach what is saved.
  TensorScale* own = scale(saves ? kSavedX : kPassedX);
  CutOptions options{.scale = own, .counters = config.counters};
  if (is_delayed()) {
    options.scaling = x_has_scale ? Scaling::given : Scaling::current;
    if (args.record_amax) {
      options.scale = scale(kX);
      options.scale_copy = own;
      x_has_scale = x_has_scale || args.x.numel() > 0;
    } else {
      copy_bytes(ctx, own, scale(kX), sizeof(TensorScale));
    }
  }
  const BlockScaledView rows = take_cut(scope, DType::e4m3, {cut_rows(count), k}, x_granularity());
  cut(args.x, rows, saves ? saved_cut(count) : BlockScaledView{.granularity = x_granularity()},
      options);
  return operand_of(rows, own);
}

/// The part of the saved activation that belongs to so many tokens.
BlockScaledView Linear::Impl::saved_cut(std::int64_t count) const {
  BlockScaledView view{saved_x.view(), x_granularity()};
  view.data.shape = {config.in_features, padded_rows(count)};
  view.scales = saved_x_scales.data();
  return view;
}

LinearOperand Linear::Impl::saved() const {
  if (config.fp8) return operand_of(saved_cut(tokens), scale(kSavedX));
  LinearOperand operand{saved_x.view()};
  operand.data.shape = {tokens, config.in_features};
  operand.transposed = true;
  return operand;
}

/// dy times gelu' of what gelu was applied to.
TensorView Linear::Impl::gradient_of_pre_activation(const TensorView& dy,
                                                    WorkspaceScope& scope) const {
  TensorView sums = dy;
  if (dy.dtype != DType::f32) {
    sums = scope.take(DType::f32, dy.shape);
    convert(ctx, {dy, nullptr}, sums);
  }
  const TensorView out = scope.take(DType::f32, dy.shape);
  const GemmProblem problem{.m = dy.shape[0],
                            .n = dy.shape[1],
                            .d = out.dtype,
                            .activation = Activation::dgelu,
                            .aux = true};
  apply_epilogue(ctx, problem, sums.as<const float>(),
                 {.d = out.data, .aux = pre_activation.view().data});
  return out;
}

Linear::Impl::Gradient Linear::Impl::cast_dy(const LinearBackward& args, const TensorView& dy,
                                             WorkspaceScope& scope) {
  const std::int64_t n = config.out_features;
  if (!config.fp8) {
    TensorView values = dy;
    if (dy.dtype != DType::bf16) {
      values = scope.take(DType::bf16, dy.shape);
      convert(ctx, {dy, nullptr}, values);
    }
    const Gradient gradient{{values}, {.data = values, .transposed = true}};
    if (!args.dbias.empty()) multiply_dbias(gradient.columns, args.dbias, args.accumulate);
    return gradient;
  }
  CutOptions options{.scale = scale(kDy), .counters = config.counters};
  if (is_delayed()) options.scaling = dy_has_scale ? Scaling::given : Scaling::current;
  // One row more than the cast writes, for what dbias holds already.
  TensorView sums;
  if (!args.dbias.empty()) {
    sums = scope.take(DType::f32, {column_sum_rows(tokens) + 1, n});
    options.column_sums = sums;
    options.column_sums.shape = {column_sum_rows(tokens), n};
  }
  BlockScaledView rows{{nullptr, dy_dtype(), {}, ctx.device()}, x_granularity()}, columns = rows;
  // A cast that is for dbias alone still is one.
  if (!args.dx.empty() || args.dw.data.empty()) {
    rows = take_cut(scope, dy_dtype(), {cut_rows(tokens), n}, x_granularity());
  }
  if (!args.dw.data.empty()) {
    columns = take_cut(scope, dy_dtype(), {n, padded_rows(tokens)}, x_granularity());
  }
  cut(dy, rows, columns, options);
  dy_has_scale = dy_has_scale || dy.numel() > 0;
  if (!args.dbias.empty()) sum_dbias(args, sums);
  return {operand_of(rows, scale(kDy)), operand_of(columns, scale(kDy))};
}

void Linear::Impl::sum_dbias(const LinearBackward& args, const TensorView& sums) const {
  const std::int64_t rows = sums.shape[0] - 1, n = config.out_features;
  TensorView added = sums;
  if (args.accumulate) {
    const TensorView before{sums.as<float>() + rows * n, DType::f32, {n}, ctx.device()};
    convert(ctx, {args.dbias, nullptr}, before);
  } else {
    added.shape = {rows, n};
  }
  sum_columns(ctx, added, args.dbias);
}

// --- The weight ---

/// Memory that keeps the weight, or null where the configuration does not.
BlockScaledView Linear::Impl::kept_cut(bool columns) const {
  const Tensor& data = columns ? kept_columns : kept_rows;
  const Buffer& of_blocks = columns ? kept_column_scales : kept_row_scales;
  return {.data = data.view(), .granularity = w_granularity(), .scales = of_blocks.data()};
}

/// The scale to decode the caller's codes with: with cache_weight as it was when the weight was
/// first seen, so that no update of it in between reaches codes that were made before.
const TensorScale* Linear::Impl::weight_scale(const ScaledView& weight) const {
  if (!config.cache_weight) return weight.scale;
  if (!rows_kept && !columns_kept) {
    copy_bytes(ctx, scale(kWeight), weight.scale, sizeof(TensorScale));
  }
  return scale(kWeight);
}

/// Casts a weight that is not FP8 yet. With cache_weight into both orientations in one read.
void Linear::Impl::cast_weight(const TensorView& weight, const BlockScaledView& rows,
                               const BlockScaledView& columns) {
  cut(weight, rows, columns, {.scale = scale(kWeight)});
  rows_kept = columns_kept = config.cache_weight;
}

LinearOperand Linear::Impl::weight_as_bf16(const ScaledView& weight, WorkspaceScope& scope) {
  if (weight.data.dtype == DType::bf16) return {weight.data};
  const TensorView out =
      config.cache_weight ? kept_rows.view() : scope.take(DType::bf16, weight.data.shape);
  if (!rows_kept) convert(ctx, weight, out);
  rows_kept = config.cache_weight;
  return {out};
}

LinearOperand Linear::Impl::weight_rows(const LinearForward& args, WorkspaceScope& scope) {
  if (!args.block_weight.data.empty()) return operand_of(args.block_weight, nullptr);
  const ScaledView& weight = args.weight;
  const Shape shape = weight.data.shape;
  if (!config.fp8) return weight_as_bf16(weight, scope);
  if (weight.data.dtype != DType::e4m3) {
    const bool keeps = config.cache_weight;
    const BlockScaledView rows =
        keeps ? kept_cut(false) : take_cut(scope, DType::e4m3, shape, w_granularity());
    const BlockScaledView columns =
        keeps ? kept_cut(true) : BlockScaledView{.granularity = w_granularity()};
    if (!rows_kept) cast_weight(weight.data, rows, columns);
    return operand_of(rows, scale(kWeight));
  }
  const TensorScale* w_scale = weight_scale(weight);
  BlockScaledView rows{weight.data, w_granularity()};
  if (rows.granularity != Granularity::tensor) {
    rows.scales = config.cache_weight ? kept_row_scales.data()
                                      : scope.take(block_scale_bytes(rows.granularity, shape));
    if (!rows_kept && weight.data.numel() > 0) broadcast_scale(ctx, w_scale, rows);
  }
  rows_kept = config.cache_weight;
  return operand_of(rows, w_scale);
}

/// Of a weight with scales of tiles, into `columns` where the caller has no transposed copy.
LinearOperand Linear::Impl::block_weight_columns(const LinearBackward& args,
                                                 const BlockScaledView& columns) {
  const BlockScaledView& given = args.block_weight_transposed;
  if (!given.data.empty()) return operand_of(given, nullptr);
  if (!columns_kept) transpose_tiles(ctx, args.block_weight, columns);
  columns_kept = config.cache_weight;
  return operand_of(columns, nullptr);
}

/// The weight with rows along N, for dx.
LinearOperand Linear::Impl::weight_columns(const LinearBackward& args, WorkspaceScope& scope) {
  const ScaledView& weight = args.weight;
  const TensorView& given = args.weight_transposed;
  if (!config.fp8) {
    LinearOperand operand = weight_as_bf16(weight, scope);
    operand.transposed = true;
    return operand;
  }
  BlockScaledView columns =
      config.cache_weight
          ? kept_cut(true)
          : take_cut(scope, DType::e4m3, {config.in_features, padded_rows(config.out_features)},
                     w_granularity());
  if (!args.block_weight.data.empty()) return block_weight_columns(args, columns);
  if (weight.data.dtype != DType::e4m3) {
    BlockScaledView rows = config.cache_weight ? kept_cut(false) : BlockScaledView{};
    rows.data.dtype = DType::e4m3;
    rows.granularity = w_granularity();
    if (!columns_kept) cast_weight(weight.data, rows, columns);
    return operand_of(columns, scale(kWeight));
  }
  const TensorScale* w_scale = weight_scale(weight);
  if (!columns_kept && weight.data.numel() > 0) {
    if (given.empty()) transpose(ctx, weight.data, columns.data);
    if (columns.scales != nullptr) broadcast_scale(ctx, w_scale, columns);
  }
  // A later call may come without `given`, and then needs codes of its own.
  columns_kept = columns_kept || (config.cache_weight && given.empty());
  if (!given.empty()) columns.data = given;
  return operand_of(columns, w_scale);
}

}  // namespace octet
