// SPDX-License-Identifier: Apache-2.0
#include "octet/nn/linear.hpp"

#include "linear_impl.hpp"

namespace octet {

Linear::Linear(GemmRegistry& gemms, const LinearConfig& config)
    : impl_(std::make_unique<Impl>(gemms, config)) {}
Linear::~Linear() = default;
Linear::Linear(Linear&&) noexcept = default;
Linear& Linear::operator=(Linear&&) noexcept = default;

Linear::Impl::Impl(GemmRegistry& registry, const LinearConfig& c)
    : gemms(registry),
      ctx(registry.context()),
      config(c),
      format(c.format.value_or(default_format(c.recipe))) {
  check_linear_config(c);
  allocate();
  choose_routes();
}

void Linear::forward(const LinearForward& args) {
  Impl& impl = *impl_;
  impl.check(args);
  impl.check_memory(args);
  if (args.save_for_backward) impl.tokens = args.x.shape[0];
  if (args.y.numel() == 0) return;
  WorkspaceScope scope(impl.ctx);
  const LinearOperand x = impl.cast_x(args, scope);
  LinearEpilogue epilogue{.accumulation = impl.config.forward_accumulation};
  if (impl.config.bias) {
    TensorView bias = args.bias;
    if (bias.dtype != DType::bf16) {
      bias = scope.take(DType::bf16, args.bias.shape);
      convert(impl.ctx, {args.bias, nullptr}, bias);
    }
    epilogue.bias = bias.data;
  }
  if (impl.config.gelu) {
    epilogue.activation = Activation::gelu;
    if (args.save_for_backward) epilogue.aux = impl.pre_activation.view().data;
  }
  impl.multiply(x, impl.weight_rows(args, scope), impl.config.in_features, args.y, epilogue);
}

void Linear::backward(const LinearBackward& args) {
  Impl& impl = *impl_;
  require(impl.tokens >= 0, "Linear: backward was called before any forward that saves");
  impl.check(args, impl.tokens);
  impl.check_memory(args);
  if (args.dx.empty() && args.dw.data.empty() && args.dbias.empty()) return;
  WorkspaceScope scope(impl.ctx);
  const bool needs_gelu = impl.config.gelu && !args.dy_of_pre_activation && args.dy.numel() > 0;
  const TensorView dy = needs_gelu ? impl.gradient_of_pre_activation(args.dy, scope) : args.dy;
  const Impl::Gradient gradient = impl.cast_dy(args, dy, scope);
  if (!args.dx.empty()) {
    LinearEpilogue epilogue;
    if (!args.input_pre_activation.empty()) {
      epilogue = {.activation = Activation::dgelu, .aux = args.input_pre_activation.data};
    }
    const LinearOperand w = impl.weight_columns(args, scope);
    impl.multiply(gradient.rows, w, impl.config.out_features, args.dx, epilogue);
  }
  if (!args.dw.data.empty()) impl.multiply_dw(gradient.columns, args.dw, args.accumulate, scope);
}

void Linear::prepare(const LinearForward& forward, const LinearBackward& backward) {
  impl_->check(forward);
  impl_->check(backward, forward.x.shape[0]);
  impl_->prepare(forward, backward);
}

std::string Linear::report(const LinearForward& forward, const LinearBackward& backward) {
  impl_->check(forward);
  impl_->check(backward, forward.x.shape[0]);
  return impl_->report(forward, backward);
}

TensorView Linear::pre_activation() const {
  const Impl& impl = *impl_;
  require(impl.config.gelu, "Linear: pre_activation() is for a configuration with gelu");
  require(impl.tokens >= 0, "Linear: pre_activation() was called before any forward that saves");
  TensorView view = impl.pre_activation.view();
  view.shape = {impl.tokens, impl.config.out_features};
  return view;
}

void Linear::weight_changed() { impl_->rows_kept = impl_->columns_kept = false; }

void Linear::keep_scales() {
  require(impl_->is_delayed(), "Linear: keep_scales() is for the recipe delayed");
  impl_->x_has_scale = impl_->dy_has_scale = true;
}

std::vector<DelayedScaling::Entry> Linear::delayed_entries() const {
  if (!impl_->is_delayed()) return {};
  return {{impl_->scale(Impl::kX), DType::e4m3}, {impl_->scale(Impl::kDy), impl_->dy_dtype()}};
}

}  // namespace octet
