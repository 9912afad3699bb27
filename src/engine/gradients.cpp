// SPDX-License-Identifier: Apache-2.0
// From add_gradient() to the reduced gradient: stored, summed over micro-batches, reduced.
#include "engine/engine_impl.hpp"
#include "octet/ops/accumulate.hpp"
#include "octet/ops/quantize.hpp"

namespace octet {

void Engine::add_gradient(ParamId id, const TensorView& gradient) {
  Impl& e = *impl_;
  e.require_frozen("add_gradient");
  Impl::Param& p = e.param(id, "add_gradient");
  require(gradient.shape == p.spec.shape, "parameter \"", p.spec.name, "\" has shape ",
          p.spec.shape, " but its gradient has ", gradient.shape);
  require(!is_fp8(gradient.dtype), "parameter \"", p.spec.name, "\": the gradient is ",
          name_of(gradient.dtype), "; allowed are f32, bf16, f16");
  require(gradient.device == e.ctx.device(), "parameter \"", p.spec.name, "\": the gradient is on ",
          gradient.device, ", the engine on ", e.ctx.device());
  require(!gradient.empty() || gradient.numel() == 0, "parameter \"", p.spec.name,
          "\": the gradient has a null pointer");
  const int expected = e.config.micro_batches;
  require(p.gradients < expected, "parameter \"", p.spec.name, "\" has its ", p.gradients,
          expected == 1 ? " gradient" : " gradients", " of this step already; micro_batches is ",
          expected,
          ", and one per parameter and micro-batch is allowed (sum the uses of a shared "
          "parameter first)");
  e.require_open(id.index);
  e.comm.check();
  const bool is_last = p.gradients + 1 == expected;
  if (expected > 1) e.accumulate_gradient(p, gradient);
  if (is_last) e.open_gradient(id.index);
  if (expected == 1) e.store_gradient(p, gradient, p.gradient);
  ++p.gradients;
  if (!is_last) return;
  e.store_sum(p);
  e.reducer->ready(id.index);
}

void Engine::Impl::store_gradient(Param& p, const TensorView& gradient, const TensorView& to) {
  if (is_fp8(p.formats.gradient)) {
    quantize(ctx, {.in = gradient, .out = {to, p.gradient_scale}, .nonfinite = nonfinite()});
    return;
  }
  convert(ctx, {gradient, nullptr}, to);
  measure_amax(ctx, gradient, p.gradient_scale);
}

void Engine::Impl::accumulate_gradient(Param& p, const TensorView& gradient) {
  const bool is_first = p.gradients == 0;
  const bool apart = !p.accumulator.view().empty();
  const TensorView& sum = apart ? p.accumulator.view() : p.gradient.view();
  if (is_fp8(sum.dtype)) {
    if (is_first) return store_gradient(p, gradient, sum);
    return accumulate(ctx,
                      {.in = gradient, .sum = {sum, p.gradient_scale}, .nonfinite = nonfinite()});
  }
  if (is_first) return convert(ctx, {gradient, nullptr}, sum);
  accumulate(ctx, {.in = gradient, .sum = {sum, nullptr}});
}

void Engine::Impl::store_sum(Param& p) {
  if (config.micro_batches == 1) return;
  const TensorView& sum = p.accumulator;
  if (is_fp8(sum.dtype)) return copy_bytes(ctx, p.gradient.view().data, sum.data, sum.bytes());
  if (!sum.empty()) return store_gradient(p, sum, p.gradient);
  if (!is_fp8(p.formats.gradient)) measure_amax(ctx, p.gradient, p.gradient_scale);
}

void Engine::Impl::finish_gradients(bool sums_contributions) {
  for (const Bucket& bucket : buckets) store_sums_of(bucket);
  for (Param& p : params) p.gradients = 0;
  sums_contributions ? reducer->collect() : reducer->finish();
}

Schedule Engine::Impl::schedule() const {
  return config.schedule.value_or(streams.is_apart() ? Schedule::overlap
                                                     : Schedule::after_backward);
}

DType Engine::Impl::accumulator_of(DType gradient) const {
  return gradient == DType::f32 ? gradient : config.accumulator.value_or(DType::f32);
}

void Engine::Impl::check_reduced_gradient() const {
  const DType dtype = plan.reduced_gradient, gradient = plan.formats.gradient;
  require(dtype == DType::f32 || dtype == gradient, "Engine: reduced_gradient is ", name_of(dtype),
          " and formats.gradient is ", name_of(gradient), "; with that it may be ",
          gradient == DType::f32 ? "f32" : "f32 or " + std::string(name_of(gradient)));
  require(plan.sharding != Sharding::none || dtype == gradient,
          "Engine: reduced_gradient is f32 and sharding is none, where every rank gets the means "
          "as they travel; with that it must be formats.gradient, ",
          name_of(gradient));
  require(!fused() || dtype == DType::f32, "Engine: reduced_gradient is ", name_of(dtype),
          " and schedule is fused, whose means stay in registers; with that it must be f32");
}

void Engine::Impl::check_accumulator() const {
  if (!config.accumulator.has_value()) return;
  const DType dtype = *config.accumulator, gradient = plan.formats.gradient;
  const bool fits =
      dtype == DType::f32 || dtype == gradient || (dtype == DType::bf16 && gradient == DType::e4m3);
  require(fits, "Engine: accumulator is ", name_of(dtype), " and formats.gradient is ",
          name_of(gradient), "; with that it may be ",
          gradient == DType::e4m3   ? "f32, bf16 or e4m3"
          : gradient == DType::bf16 ? "f32 or bf16"
                                    : "f32");
}

}  // namespace octet
