// SPDX-License-Identifier: Apache-2.0
#include "octet/optim/adamw.hpp"

#include <algorithm>
#include <cmath>
#include <span>

namespace octet {
namespace {

bool is_quantised(const StateFormats& f) {
  return f.m != DType::f32 || f.v != DType::f32 || f.master != DType::f32 || is_fp8(f.weight);
}

std::int64_t numel_of(const std::vector<Piece>& pieces) {
  std::int64_t count = 0;
  for (const Piece& piece : pieces) count += piece.count;
  return count;
}

void check_decay(const std::string& what, float weight_decay) {
  require(weight_decay >= 0.0f && std::isfinite(weight_decay), what, ": weight_decay is ",
          weight_decay, "; it must be finite and not negative");
}

void check_views(const AdamWParam& param, std::int64_t owned) {
  require(param.weight.shape == param.shape && param.weight.dtype == param.formats.weight,
          "parameter \"", param.name, "\": the weight is ", name_of(param.weight.dtype), " ",
          param.weight.shape, "; it must be ", name_of(param.formats.weight), " ", param.shape);
  const std::int64_t expected = param.gradient_is_shard ? owned : param.shape.numel();
  require(param.gradient.numel() == expected, "parameter \"", param.name, "\": the gradient has ",
          param.gradient.numel(), " elements; it must have ", expected);
  require(param.gradient_scale != nullptr, "parameter \"", param.name,
          "\": the gradient has no scale");
}

void check_field(const std::string& what, const char* field, DType dtype,
                 std::span<const DType> allowed) {
  if (std::find(allowed.begin(), allowed.end(), dtype) != allowed.end()) return;
  std::string names;
  for (DType d : allowed) names += (names.empty() ? "" : ", ") + std::string(name_of(d));
  fail(what, ": ", field, " is ", name_of(dtype), "; allowed are ", names);
}

}  // namespace

void check_adamw(const AdamWConfig& config) {
  require(config.beta1 >= 0.0f && config.beta1 < 1.0f, "AdamW: beta1 is ", config.beta1,
          "; it must be in [0, 1)");
  require(config.beta2 >= 0.0f && config.beta2 < 1.0f, "AdamW: beta2 is ", config.beta2,
          "; it must be in [0, 1)");
  require(config.eps > 0.0f && std::isfinite(config.eps), "AdamW: eps is ", config.eps,
          "; it must be positive");
  check_decay("AdamW", config.weight_decay);
  require(!config.amsgrad,
          "AdamW: amsgrad is true; it must be false, because its running maximum would be a fourth "
          "state and the bound that the scales rest on does not cover it");
}

void check_gradient_format(const std::string& what, DType dtype) {
  check_field(what, "gradient", dtype, kGradientFormats);
}

void check_formats(const std::string& what, const StateFormats& f, const AdamWConfig& config) {
  check_field(what, "weight", f.weight, kWeightFormats);
  check_field(what, "master", f.master, kMasterFormats);
  check_field(what, "m", f.m, kMFormats);
  check_field(what, "v", f.v, kVFormats);
  require(f.weight != DType::f32 || f.master == DType::f32, what,
          ": weight is f32, which is its own master, but master is ", name_of(f.master));
  require(!is_quantised(f) || config.beta1 * config.beta1 < config.beta2, what, ": beta1 ",
          config.beta1, " and beta2 ", config.beta2,
          " do not bound the update (beta1^2 >= beta2), which quantised states need; use a larger "
          "beta2 or FP32 formats");
}

AdamW::AdamW(const Context& ctx, const AdamWConfig& config, std::vector<AdamWParam> params)
    : ctx_(ctx), config_(config), params_(std::move(params)) {
  check_adamw(config_);
  std::vector<Shape> shapes;
  std::vector<Piece> owned;
  for (std::size_t i = 0; i < params_.size(); ++i) {
    AdamWParam& param = params_[i];
    const std::string what = "parameter \"" + param.name + "\"";
    check_formats(what, param.formats, config_);
    check_gradient_format(what, param.gradient.dtype);
    check_decay(what, param.weight_decay);
    if (param.whole) param.pieces = {{0, 0, param.shape.numel()}};
    for (Piece& piece : param.pieces) piece.tensor = static_cast<std::int32_t>(i);
    check_views(param, numel_of(param.pieces));
    shapes.push_back(param.shape);
    owned.insert(owned.end(), param.pieces.begin(), param.pieces.end());
    total_segments_ += segment_count(param.shape);
  }
  segments_ = segments_of(shapes, owned);
  const std::size_t count = params_.size();
  scales_ = upload_sync<TensorScale>(ctx_, std::vector<TensorScale>(4 * count));
  step_scales_ = Buffer(ctx_, count * sizeof(AdamwScales));
  scalars_ = upload_sync<AdamwScalars>(ctx_, std::vector<AdamwScalars>(1));
  sums_ = Buffer(ctx_, static_cast<std::size_t>(total_segments_) * sizeof(float));
  zero_bytes(ctx_, sums_.data(), sums_.bytes());
  std::uint64_t random_base = 0;
  for (std::size_t i = 0; i < count; ++i) {
    tensors_host_.push_back(make_tensor(static_cast<int>(i), random_base));
    random_base += (static_cast<std::uint64_t>(params_[i].shape.numel()) + 3) / 4 * 4;
  }
  tensors_ = upload_sync<AdamwTensor>(ctx_, tensors_host_);
  segment_table_ = upload_sync<Segment>(ctx_, segments_);
}

std::size_t AdamW::grow(std::vector<Tensor>& states, DType dtype, std::int64_t numel) {
  const std::size_t before = ctx_.memory_use().current;
  states.emplace_back(ctx_, dtype, Shape{numel});
  return ctx_.memory_use().current - before;
}

AdamwTensor AdamW::make_tensor(int i, std::uint64_t random_base) {
  const AdamWParam& param = params_[static_cast<std::size_t>(i)];
  const StateFormats& f = param.formats;
  const std::int64_t owned = numel_of(param.pieces);
  const bool own_master = f.weight != DType::f32;
  bytes_.push_back({.master = grow(master_, f.master, own_master ? owned : 0),
                    .m = grow(m_, f.m, owned),
                    .v = grow(v_, f.v, owned)});
  AdamwTensor tensor;
  tensor.gradient = param.gradient.data;
  tensor.gradient_dtype = param.gradient.dtype;
  tensor.gradient_scale = param.gradient_scale;
  tensor.gradient_is_shard = param.gradient_is_shard;
  tensor.master = own_master ? master_.back().view().data : param.weight.data;
  tensor.master_dtype = f.master;
  tensor.master_scale = scale(kMaster, i);
  tensor.master_is_shard = own_master;
  tensor.m = m_.back().view().data;
  tensor.m_dtype = f.m;
  tensor.m_scale = scale(kM, i);
  tensor.v = v_.back().view().data;
  tensor.v_dtype = f.v;
  tensor.v_scale = scale(kV, i);
  tensor.weight = own_master ? param.weight.data : nullptr;
  tensor.weight_dtype = f.weight;
  tensor.weight_scale = scale(kWeight, i);
  tensor.weight_decay = param.weight_decay;
  tensor.random_base = random_base;
  return tensor;
}

void AdamW::initialise(int i, const TensorView& values) {
  check_index(i);
  const AdamWParam& param = params_[static_cast<std::size_t>(i)];
  require(values.shape == param.shape, "parameter \"", param.name, "\": the initial values have ",
          "shape ", to_string(values.shape), "; it must be ", to_string(param.shape));
  adamw_initialise(ctx_, {.tensor = tensors_host_[static_cast<std::size_t>(i)],
                          .values = values,
                          .pieces = param.pieces.data(),
                          .piece_count = static_cast<std::int64_t>(param.pieces.size())});
}

AdamwArgs AdamW::args(const AdamWStep& step) const {
  AdamwArgs args;
  args.tensors = tensors_.as<const AdamwTensor>();
  args.tensor_count = static_cast<std::int64_t>(params_.size());
  args.segments = segment_table_.as<const Segment>();
  args.segment_count = static_cast<std::int64_t>(segments_.size());
  args.scalars = scalars_.as<AdamwScalars>();
  args.scales = step_scales_.as<AdamwScales>();
  args.config = config_;
  args.lr = step.lr;
  args.lr_device = step.lr_device;
  args.max_norm = step.max_norm;
  args.segment_sums = sums_.as<const float>();
  args.total_segments = total_segments_;
  args.nonfinite = step.nonfinite;
  return args;
}

void AdamW::sum_squares() { adamw_sum_squares(ctx_, args({}), sums_.as<float>()); }

void AdamW::step(const AdamWStep& step) {
  const AdamwArgs prepared = args(step);
  adamw_prepare(ctx_, prepared);
  adamw_update(ctx_, prepared);
}

TensorScale* AdamW::scale(Slot slot, int i) const {
  return scales() + static_cast<std::size_t>(slot) * params_.size() + static_cast<std::size_t>(i);
}

void AdamW::check_index(int i) const {
  require(i >= 0 && static_cast<std::size_t>(i) < params_.size(), "AdamW: parameter ", i,
          " is asked for; there are ", params_.size());
}

ScaledView AdamW::m(int i) const {
  check_index(i);
  return {m_[static_cast<std::size_t>(i)].view(), scale(kM, i)};
}

ScaledView AdamW::v(int i) const {
  check_index(i);
  return {v_[static_cast<std::size_t>(i)].view(), scale(kV, i)};
}

ScaledView AdamW::master(int i) const {
  check_index(i);
  const Tensor& own = master_[static_cast<std::size_t>(i)];
  const TensorView& view =
      own.view().empty() && params_[static_cast<std::size_t>(i)].formats.weight == DType::f32
          ? params_[static_cast<std::size_t>(i)].weight
          : own.view();
  return {view, scale(kMaster, i)};
}

}  // namespace octet
