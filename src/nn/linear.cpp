// SPDX-License-Identifier: Apache-2.0
#include "octet/nn/linear.hpp"

#include <algorithm>
#include <array>
#include <span>

#include "octet/ops/quantize.hpp"

namespace octet {
namespace {

/// Scratch of one call, in the order in which it is taken; the constructor adds up the same list.
struct Scratch {
  std::int64_t forward_x = 0;
  std::int64_t dy = 0;
  std::int64_t dy_transposed = 0;
  std::int64_t weight_transposed = 0;

  std::size_t bytes() const {
    const auto padded = [](std::int64_t n) {
      return WorkspaceScope::padded(static_cast<std::size_t>(n));
    };
    return std::max(padded(forward_x),
                    padded(dy) + padded(dy_transposed) + padded(weight_transposed));
  }
};

Scratch scratch_of(const LinearConfig& c) {
  const std::int64_t tokens = c.max_tokens, k = c.in_features, n = c.out_features;
  if (c.weight_dtype == DType::bf16) return {0, tokens * n * 2, 0, 0};
  return {tokens * k, tokens * n, n * padded_rows(tokens), k * padded_rows(n)};
}

void check_config(const LinearConfig& c) {
  require(c.in_features > 0 && c.out_features > 0, "Linear: in_features is ", c.in_features,
          " and out_features ", c.out_features, "; both must be positive");
  require(c.max_tokens >= 0, "Linear: max_tokens is ", c.max_tokens, "; it must not be negative");
  require(c.weight_dtype == DType::e4m3 || c.weight_dtype == DType::bf16,
          "Linear: weight_dtype is ", name_of(c.weight_dtype), "; e4m3 and bf16 are allowed");
  require(is_fp8(c.gradient_dtype), "Linear: gradient_dtype is ", name_of(c.gradient_dtype),
          "; e5m2 and e4m3 are allowed");
  if (c.weight_dtype == DType::bf16) {
    require(
        c.gradient_dtype == DType::e5m2 && c.scaling == Scaling::current && c.counters == nullptr,
        "Linear: weight_dtype is bf16; gradient_dtype, scaling and counters are for FP8 GEMMs "
        "and must be left as they are");
    return;
  }
  const auto check_feature = [](const char* name, std::int64_t value) {
    require(value % 16 == 0, "Linear: ", name, " is ", value,
            "; with e4m3 weights it must be a multiple of 16, because FP8 GEMMs contract over it");
  };
  check_feature("in_features", c.in_features);
  check_feature("out_features", c.out_features);
}

}  // namespace

Linear::Linear(GemmRegistry& gemms, const LinearConfig& config) : gemms_(gemms), config_(config) {
  check_config(config);
  check_backends();
  Context ctx = gemms.context();
  ctx.reserve_workspace(scratch_of(config).bytes());
  if (fp8()) {
    saved_ = Tensor(ctx, DType::e4m3, {config.in_features, padded_rows(config.max_tokens)});
    const std::array<TensorScale, 3> ones{};
    scales_ = upload_sync<TensorScale>(ctx, ones);
  } else {
    saved_ = Tensor(ctx, DType::bf16, {config.max_tokens, config.in_features});
  }
}

/// Asks for each of the three products now, so that an unfit device is an error of set-up.
void Linear::check_backends() const {
  const std::int64_t tokens = std::max<std::int64_t>(config_.max_tokens, 1);
  const std::int64_t k = config_.in_features, n = config_.out_features;
  const bool transposes = !fp8();
  const DType w = config_.weight_dtype;
  const DType gradient = fp8() ? config_.gradient_dtype : w;
  const std::int64_t contracted = fp8() ? padded_rows(tokens) : tokens;
  const GemmProblem problems[] = {
      {.m = tokens, .n = n, .k = k, .a = w, .b = w},
      {.m = tokens, .n = k, .k = n, .a = gradient, .b = w, .b_transposed = transposes},
      {.m = n,
       .n = k,
       .k = contracted,
       .a = gradient,
       .b = w,
       .a_transposed = transposes,
       .b_transposed = transposes}};
  for (const GemmProblem& problem : problems) {
    const GemmRegistry::Choice choice = gemms_.choose(problem);
    require(choice.backend != nullptr, "Linear: no backend can run ", problem, "\n", choice.report);
  }
}

void Linear::check(const char* what, const TensorView& view, std::int64_t rows,
                   std::int64_t columns, DType allowed, DType also_allowed) const {
  const Shape shape{rows, columns};
  require(view.shape == shape, "Linear: ", what, " has shape ", view.shape, "; it must be ", shape);
  require(view.dtype == allowed || view.dtype == also_allowed, "Linear: ", what, " is ",
          name_of(view.dtype), "; ", name_of(allowed), allowed == also_allowed ? "" : " and ",
          allowed == also_allowed ? "" : name_of(also_allowed),
          allowed == also_allowed ? " is" : " are", " allowed");
  const Device device = gemms_.context().device();
  require(view.device == device, "Linear: ", what, " is on ", view.device, "; it must be on ",
          device);
  require(!view.empty() || view.numel() == 0, "Linear: ", what, " of shape ", shape,
          " has no memory");
}

void Linear::check_weight(const ScaledView& weight) const {
  check("the weight", weight.data, config_.out_features, config_.in_features, config_.weight_dtype,
        config_.weight_dtype);
  require(!fp8() || weight.scale != nullptr, "Linear: the weight is e4m3 and has no scale");
}

/// The part of the saved activation that belongs to the last forward.
TensorView Linear::saved() const {
  TensorView view = saved_.view();
  view.shape = fp8() ? Shape{config_.in_features, padded_rows(tokens_)}
                     : Shape{tokens_, config_.in_features};
  return view;
}

void Linear::forward(const TensorView& x, const ScaledView& weight, const TensorView& y) {
  const std::int64_t k = config_.in_features, n = config_.out_features;
  const std::int64_t tokens = x.shape.rank() == 2 ? x.shape[0] : 0;
  check("x", x, tokens, k, DType::f32, DType::bf16);
  require(tokens <= config_.max_tokens, "Linear: x has ", tokens, " tokens; at most ",
          config_.max_tokens, " (max_tokens) are allowed");
  check_weight(weight);
  check("y", y, tokens, n, DType::f32, DType::bf16);

  tokens_ = tokens;
  if (tokens == 0) return;
  const Context& ctx = gemms_.context();
  const DType dtype = config_.weight_dtype;
  const GemmProblem problem{.m = tokens, .n = n, .k = k, .a = dtype, .b = dtype, .d = y.dtype};
  if (!fp8()) {
    convert(ctx, {x, nullptr}, saved());
    gemms_.run(problem, {.a = saved().data, .b = weight.data.data, .d = y.data});
    return;
  }
  WorkspaceScope scope(ctx);
  TensorScale* scale = scales_.as<TensorScale>();
  const TensorView codes = scope.take(dtype, {tokens, k});
  quantize(
      ctx,
      {x, {codes, scale}, saved(), config_.nonfinite, scaling_of(x_has_scale_), config_.counters});
  x_has_scale_ = true;
  // The backward pass decodes with this one, whatever an update has made of the scale by then.
  if (is_delayed()) copy_bytes(ctx, scale + 2, scale, sizeof(TensorScale));
  gemms_.run(problem,
             {codes.data, &scale->scale_inv, weight.data.data, &weight.scale->scale_inv, y.data});
}

/// Of a cast whose scale may not be set yet.
Scaling Linear::scaling_of(bool has_scale) const {
  return has_scale ? config_.scaling : Scaling::current;
}

void Linear::keep_scales() {
  require(is_delayed(), "Linear: keep_scales() is for delayed scaling with e4m3 weights");
  x_has_scale_ = dy_has_scale_ = true;
}

std::vector<DelayedScaling::Entry> Linear::delayed_entries() const {
  if (!fp8()) return {};
  TensorScale* scale = scales_.as<TensorScale>();
  return {{scale, DType::e4m3}, {scale + 1, config_.gradient_dtype}};
}

void Linear::backward(const TensorView& dy, const ScaledView& weight, const TensorView& dx,
                      const TensorView& dw) {
  require(tokens_ >= 0, "Linear: backward was called before any forward");
  check("dy", dy, tokens_, config_.out_features, DType::f32, DType::bf16);
  check_weight(weight);
  if (!dx.empty()) check("dx", dx, tokens_, config_.in_features, DType::f32, DType::bf16);
  if (!dw.empty()) {
    check("dw", dw, config_.out_features, config_.in_features, DType::f32, DType::bf16);
  }
  if (dx.empty() && dw.empty()) return;
  fp8() ? backward_fp8(dy, weight, dx, dw) : backward_bf16(dy, weight, dx, dw);
}

void Linear::backward_fp8(const TensorView& dy, const ScaledView& weight, const TensorView& dx,
                          const TensorView& dw) {
  const std::int64_t k = config_.in_features, n = config_.out_features;
  const std::int64_t padded = padded_rows(tokens_);
  const Context& ctx = gemms_.context();
  WorkspaceScope scope(ctx);
  TensorScale* dy_scale = scales_.as<TensorScale>() + 1;
  const TensorScale* x_scale = scales_.as<TensorScale>() + (is_delayed() ? 2 : 0);
  const DType gradient = config_.gradient_dtype;
  TensorView codes{nullptr, gradient, dy.shape, ctx.device()};
  TensorView codes_transposed;
  if (!dx.empty()) codes = scope.take(gradient, dy.shape);
  if (!dw.empty()) codes_transposed = scope.take(gradient, {n, padded});
  if (tokens_ > 0) {
    quantize(ctx, {dy,
                   {codes, dy_scale},
                   codes_transposed,
                   config_.nonfinite,
                   scaling_of(dy_has_scale_),
                   config_.counters});
    dy_has_scale_ = true;
  }

  if (!dx.empty()) {
    const TensorView transposed = scope.take(DType::e4m3, {k, padded_rows(n)});
    transpose(ctx, weight.data, transposed);
    gemms_.run(
        {.m = tokens_, .n = k, .k = n, .a = gradient, .b = DType::e4m3, .d = dx.dtype},
        {codes.data, &dy_scale->scale_inv, transposed.data, &weight.scale->scale_inv, dx.data});
  }
  if (!dw.empty()) {
    gemms_.run(
        {.m = n, .n = k, .k = padded, .a = gradient, .b = DType::e4m3, .d = dw.dtype},
        {codes_transposed.data, &dy_scale->scale_inv, saved().data, &x_scale->scale_inv, dw.data});
  }
}

void Linear::backward_bf16(const TensorView& dy, const ScaledView& weight, const TensorView& dx,
                           const TensorView& dw) {
  const std::int64_t k = config_.in_features, n = config_.out_features;
  const Context& ctx = gemms_.context();
  WorkspaceScope scope(ctx);
  TensorView gradient = dy;
  if (dy.dtype != DType::bf16) {
    gradient = scope.take(DType::bf16, dy.shape);
    convert(ctx, {dy, nullptr}, gradient);
  }
  const DType bf16 = DType::bf16;
  if (!dx.empty()) {
    gemms_.run(
        {.m = tokens_, .n = k, .k = n, .a = bf16, .b = bf16, .d = dx.dtype, .b_transposed = true},
        {.a = gradient.data, .b = weight.data.data, .d = dx.data});
  }
  if (!dw.empty()) {
    gemms_.run({.m = n,
                .n = k,
                .k = tokens_,
                .a = bf16,
                .b = bf16,
                .d = dw.dtype,
                .a_transposed = true,
                .b_transposed = true},
               {.a = gradient.data, .b = saved().data, .d = dw.data});
  }
}

}  // namespace octet
