// SPDX-License-Identifier: Apache-2.0
#include "octet/engine/engine.hpp"

#include <cmath>
#include <utility>

#include "engine/engine_impl.hpp"
#include "octet/ops/block_quantize.hpp"
#include "octet/ops/quantize.hpp"

namespace octet {
namespace {

Communicator& checked(Communicator& comm, const Context& ctx) {
  require(comm.context().device() == ctx.device(), "Engine: the communicator is on ",
          comm.context().device(), ", the engine on ", ctx.device(),
          "; both must be on one device");
  return comm;
}

void check_initial_values(const ParamSpec& spec, Device device) {
  if (spec.fill) {
    require(spec.init.empty(), "parameter \"", spec.name,
            "\" has both init and fill; its initial values come from one of them");
    return;
  }
  require(!spec.init.empty() || spec.shape.numel() == 0, "parameter \"", spec.name,
          "\" has no initial values; give init or fill");
  require(spec.init.shape == spec.shape, "parameter \"", spec.name, "\" has shape ", spec.shape,
          " but its initial values have ", spec.init.shape);
  require(!is_fp8(spec.init.dtype), "parameter \"", spec.name, "\" has initial values in ",
          name_of(spec.init.dtype), "; allowed are f32, bf16, f16");
  require(spec.init.device == device, "parameter \"", spec.name, "\" has initial values on ",
          spec.init.device, "; the engine is on ", device);
}

}  // namespace

Engine::Engine(const Context& ctx, Communicator& comm, const EngineConfig& config)
    : impl_(std::make_unique<Impl>(ctx, checked(comm, ctx), config)) {
  require(config.schedule != Schedule::overlap || impl_->streams.is_apart(),
          "Engine: schedule is overlap, but the communicator shares the engine's stream; make it "
          "with a Context of the same device that has a stream of its own");
  require(config.micro_batches > 0, "Engine: micro_batches is ", config.micro_batches,
          "; it must be positive");
  require(config.bucket_elements > 0, "Engine: bucket_elements is ", config.bucket_elements,
          "; it must be positive");
  require(config.fp8_min_elements >= 0, "Engine: fp8_min_elements is ", config.fp8_min_elements,
          "; it must not be negative");
  check_adamw(config.adamw);
  impl_->plan.level = config.level;
  impl_->plan.sharding = config.sharding.value_or(sharding_of(config.level));
  impl_->plan.formats = config.formats.value_or(formats_of(config.level));
  require(config.schedule != Schedule::fused ||
              (impl_->sharded() && impl_->plan.sharding == Sharding::optimizer),
          "Engine: schedule is fused and sharding is ", name_of(impl_->plan.sharding), " over ",
          comm.size(), comm.size() == 1 ? " rank" : " ranks",
          "; fused needs sharding = optimizer over more than one rank");
  check_gradient_format("Engine: formats", impl_->plan.formats.gradient);
  impl_->check_accumulator();
  impl_->plan.reduced_gradient = config.reduced_gradient.value_or(
      impl_->plan.sharding == Sharding::none ? impl_->plan.formats.gradient : DType::f32);
  impl_->check_reduced_gradient();
  const StateFormats& formats = impl_->plan.formats.state;
  check_formats("Engine: formats", formats, config.adamw.of());
  require(formats.weight != WeightFormat::none,
          "Engine: formats: weight is none; the engine hands out weights (AdamW alone can do "
          "without)");
  // What a panel's owner writes of these does not lie together, so it does not travel as it is.
  require(!impl_->sharded() || formats.weight != WeightFormat::e4m3_row_block,
          "Engine: formats: weight is ", name_of(formats.weight), " and sharding is ",
          name_of(impl_->plan.sharding), " over ", comm.size(),
          " ranks; with that the weight may be f32, bf16, e4m3 or e4m3_tile, or one of the last "
          "two with its transpose");
}

Engine::~Engine() = default;

ParamId Engine::add(const ParamSpec& spec) {
  Impl& e = *impl_;
  require(!e.frozen && !e.failed, "Engine::add(\"", spec.name, "\") after freeze()");
  require(!spec.name.empty(), "Engine::add: a parameter of shape ", spec.shape, " has no name");
  for (const Impl::Param& other : e.params) {
    require(other.spec.name != spec.name, "Engine::add: a parameter named \"", spec.name,
            "\" is registered already");
  }
  require(spec.shape.rank() > 0, "parameter \"", spec.name, "\" has no shape");
  check_initial_values(spec, e.ctx.device());
  const AdamwHyper hyper = e.config.adamw.of(spec.group);
  check_hyper("parameter \"" + spec.name + "\"", hyper);
  Impl::Param param;
  param.spec = spec;
  param.managed =
      spec.fp8 && spec.shape.rank() >= 2 && spec.shape.numel() >= e.config.fp8_min_elements;
  if (param.managed) param.formats = e.plan.formats;
  require(!needs_matrix(param.formats.state.weight) || spec.shape.rank() == 2, "parameter \"",
          spec.name, "\": formats.weight is ", name_of(param.formats.state.weight),
          ", but the shape ", spec.shape,
          " is not that of a matrix; register it as one, or with fp8 = false");
  check_formats("parameter \"" + spec.name + "\"", param.formats.state, hyper);
  require(spec.unit >= 0, "parameter \"", spec.name, "\": unit is ", spec.unit,
          "; it must not be negative");
  require(!e.sharded() || !is_transposed(param.formats.state.weight) ||
              padded_rows(spec.shape[0]) == spec.shape[0],
          "parameter \"", spec.name, "\": formats.weight is ", name_of(param.formats.state.weight),
          " and sharding is ", name_of(e.plan.sharding), " over ", e.comm.size(),
          " ranks, so rows must be a multiple of 16, but the shape is ", spec.shape);
  e.params.push_back(std::move(param));
  return {static_cast<int>(e.params.size()) - 1};
}

void Engine::freeze() {
  Impl& e = *impl_;
  require(!e.frozen, "Engine::freeze() was called already");
  require(!e.failed, "Engine::freeze() failed before; make a new engine");
  e.check_lists_agree();
  e.check_units();
  e.failed = true;  // until everything stands, on every rank
  e.build();
  e.failed = false;
  e.frozen = true;
}

const ParamSpec& Engine::spec(ParamId id) const { return impl_->param(id, "spec").spec; }

WeightFormat Engine::weight_format(ParamId id) const {
  return impl_->param(id, "weight_format").formats.state.weight;
}

ScaledView Engine::weight(ParamId id) const {
  const Impl& e = *impl_;
  const Impl::Param& p = e.frozen_param(id, "weight");
  const WeightFormat format = p.formats.state.weight;
  require(!has_block_scales(format), "Engine::weight: the weight of parameter \"", p.spec.name,
          "\" is ", name_of(format), ", which has no single scale; block_weight() hands it out");
  return {e.whole_weight(id, "weight"),
          is_e4m3(format) ? e.adamw->weight_scale(id.index) : nullptr};
}

TensorView Engine::weight_transposed(ParamId id) const {
  const Impl::Param& p = impl_->frozen_param(id, "weight_transposed");
  require(p.formats.state.weight == WeightFormat::e4m3_and_transpose,
          "Engine::weight_transposed: the weight of parameter \"", p.spec.name, "\" is ",
          name_of(p.formats.state.weight), "; only e4m3_and_transpose has this copy");
  return impl_->whole_transposed(id, "weight_transposed");
}

BlockScaledView Engine::block_weight(ParamId id) const {
  const Impl::Param& p = impl_->frozen_param(id, "block_weight");
  require(has_block_scales(p.formats.state.weight),
          "Engine::block_weight: the weight of parameter \"", p.spec.name, "\" is ",
          name_of(p.formats.state.weight), ", which has no scales of blocks");
  if (!impl_->shards_weights()) return impl_->stored_weight(id.index);
  return {.data = impl_->whole_weight(id, "block_weight"),
          .granularity = granularity_of(p.formats.state.weight),
          .scales = impl_->units->weight_scales(id.index)};
}

BlockScaledView Engine::block_weight_transposed(ParamId id) const {
  const Impl::Param& p = impl_->frozen_param(id, "block_weight_transposed");
  require(p.formats.state.weight == WeightFormat::e4m3_tile_and_transpose,
          "Engine::block_weight_transposed: the weight of parameter \"", p.spec.name, "\" is ",
          name_of(p.formats.state.weight), "; only e4m3_tile_and_transpose has this copy");
  if (!impl_->shards_weights()) return impl_->stored_transposed(id.index);
  return {.data = impl_->whole_transposed(id, "block_weight_transposed"),
          .granularity = granularity_of(p.formats.state.weight),
          .scales = impl_->units->transposed_scales(id.index)};
}

void Engine::weight_as(ParamId id, const TensorView& out) const {
  if (has_block_scales(impl_->frozen_param(id, "weight_as").formats.state.weight)) {
    return block_dequantize(impl_->ctx, block_weight(id), out);
  }
  convert(impl_->ctx, weight(id), out);
}

StepResult Engine::step(const StepOptions& options) {
  Impl& e = *impl_;
  e.require_frozen("step");
  require(options.lr_device != nullptr || (options.lr >= 0.0f && std::isfinite(options.lr)),
          "Engine::step: lr is ", options.lr, "; it must be finite and not negative");
  require(options.max_norm >= 0.0f && std::isfinite(options.max_norm), "Engine::step: max_norm is ",
          options.max_norm, "; it must be finite and positive, or 0 for no clipping");
  require(e.config.clipping || options.max_norm == 0.0f, "Engine::step: max_norm is ",
          options.max_norm,
          ", but EngineConfig::clipping is false; it must be true for steps that clip");
  if (e.units != nullptr) e.units->require_none_whole("Engine::step");
  e.comm.check();  // nothing is changed after a collective has failed
  const bool sums = e.fused() && options.max_norm == 0.0f;
  e.finish_gradients(sums);
  e.share_flag();
  if (options.max_norm > 0.0f) {
    e.adamw->measure();
    e.gather_sums();
  }
  e.adamw->step({.lr = options.lr,
                 .lr_device = options.lr_device,
                 .max_norm = options.max_norm,
                 .nonfinite = e.nonfinite(),
                 .from_contributions = sums});
  e.gather_weights();
  if (e.units != nullptr) e.units->invalidate();
  const AdamwScalars* s = e.adamw->scalars();
  return {.norm = {e.ctx, &s->norm}, .step = {e.ctx, &s->step}, .skipped = {e.ctx, &s->skipped}};
}

void Engine::Impl::share_flag() {
  if (comm.size() == 1) return;
  streams.fork();
  comm.all_gather(flag.data(), gathered_flags.data(), sizeof(TensorScale));
  max_amax(comm.context(), gathered_flags.as<const TensorScale>(), comm.size(), 1,
           flag.as<TensorScale>());
  streams.join();
}

void Engine::Impl::gather_sums() {
  if (sum_gather == nullptr) return;
  streams.fork();
  sum_gather->run();
  streams.join();
}

void Engine::Impl::gather_weights() {
  if (!sharded()) return;
  streams.fork();
  if (weight_gather != nullptr) {  // units are gathered when they are wanted
    if (window != nullptr) {
      comm.count_sent(Traffic::payload, weight_gather->payload_bytes());  // the update wrote them
    } else {
      weight_gather->run();
    }
  }
  // Over windows this is also where ranks wait until all have read and written.
  comm.all_gather(adamw->scales(), gathered_scales.data(),
                  static_cast<std::size_t>(adamw->scale_count()) * sizeof(TensorScale));
  max_amax(comm.context(), gathered_scales.as<const TensorScale>(), comm.size(),
           adamw->scale_count(), adamw->scales());
  streams.join();
  if (transposes_weights()) transpose_weights();
}

const Plan& Engine::plan() const {
  impl_->require_frozen("plan");
  return impl_->plan;
}

std::uint32_t* Engine::nonfinite_flag() const {
  impl_->require_frozen("nonfinite_flag");
  return impl_->nonfinite();
}

std::vector<NonfiniteGradient> Engine::nonfinite_gradients_sync() const {
  const Impl& e = *impl_;
  e.require_frozen("nonfinite_gradients_sync");
  const auto counts = read_sync<std::int64_t>(e.ctx, e.adamw->nonfinite_counts(), e.params.size());
  std::vector<NonfiniteGradient> list;
  for (std::size_t i = 0; i < counts.size(); ++i) {
    if (counts[i] > 0) list.push_back({e.params[i].spec.name, counts[i]});
  }
  return list;
}

const AdamW& Engine::optimizer() const {
  impl_->require_frozen("optimizer");
  return *impl_->adamw;
}

void Engine::Impl::require_frozen(const char* call) const {
  require(frozen, "Engine::", call, "() before freeze()");
}

const Engine::Impl::Param& Engine::Impl::frozen_param(ParamId id, const char* call) const {
  require_frozen(call);
  return param(id, call);
}

Engine::Impl::Param& Engine::Impl::param(ParamId id, const char* call) {
  return const_cast<Param&>(std::as_const(*this).param(id, call));
}

const Engine::Impl::Param& Engine::Impl::param(ParamId id, const char* call) const {
  require(id.index >= 0 && static_cast<std::size_t>(id.index) < params.size(), "Engine::", call,
          ": there is no parameter with id ", id.index, "; ids are 0 to ",
          static_cast<std::int64_t>(params.size()) - 1);
  return params[static_cast<std::size_t>(id.index)];
}

}  // namespace octet
