// SPDX-License-Identifier: Apache-2.0
#include "octet/optim/adamw.hpp"

#include <algorithm>
#include <cmath>
#include <span>

namespace octet {
namespace {

bool is_quantised(const StateFormats& f) {
  return f.m != StateFormat::f32 || f.v != StateFormat::f32 || f.master != StateFormat::f32 ||
         has_tensor_scale(f.weight);
}

template <class Format>
void check_field(const std::string& what, const char* field, Format format,
                 std::span<const Format> allowed) {
  if (std::find(allowed.begin(), allowed.end(), format) != allowed.end()) return;
  std::string names;
  for (Format f : allowed) names += (names.empty() ? "" : ", ") + std::string(name_of(f));
  fail(what, ": ", field, " is ", name_of(format), "; allowed are ", names);
}

void check_device(const std::string& what, const char* name, const TensorView& view,
                  Device device) {
  require(view.empty() || view.device == device, what, ": the ", name, " is on ", view.device,
          ", the optimizer on ", device);
}

/// Formats whose elements a panel's owner writes together: those of shards and of copies.
bool lies_in_panels(WeightFormat format) {
  return format == WeightFormat::e4m3 || format == WeightFormat::bf16 ||
         format == WeightFormat::f32 || format == WeightFormat::e4m3_tile;
}

void check_weight(const std::string& what, const AdamWParam& param, std::int64_t owned) {
  const WeightFormat format = param.formats.weight;
  require(!param.weight_is_shard || lies_in_panels(format), what,
          ": weight_is_shard is true and formats.weight is ", name_of(format),
          "; a shard may be f32, bf16, e4m3 or e4m3_tile");
  if (format == WeightFormat::none) {
    require(param.weight.empty(), what, ": a weight is given, but formats.weight is none");
  } else {
    const DType dtype = dtype_of(format);
    const Shape shape = param.weight_is_shard ? Shape{owned} : param.shape;
    require(param.weight.shape == shape && param.weight.dtype == dtype, what, ": the weight is ",
            name_of(param.weight.dtype), " ", param.weight.shape, "; it must be ", name_of(dtype),
            " ", shape, param.weight_is_shard ? ", the elements of its pieces" : "");
    require(!param.weight.empty() || shape.numel() == 0, what, ": the weight has a null pointer");
  }
  require(!needs_matrix(param.formats.weight) || param.shape.rank() == 2, what,
          ": formats.weight is ", name_of(param.formats.weight), ", but the shape ", param.shape,
          " is not that of a matrix");
  require(param.weight_blocks == nullptr || param.formats.weight == WeightFormat::e4m3_tile, what,
          ": weight_blocks is given, but formats.weight is ", name_of(param.formats.weight),
          "; only e4m3_tile takes it");
  const TensorView& transposed = param.weight_transposed;
  if (!is_transposed(param.formats.weight)) {
    require(transposed.empty(), what, ": a transposed weight is given, but formats.weight is ",
            name_of(param.formats.weight));
    return;
  }
  const Shape shape{param.shape[1], param.shape[0]};
  require(transposed.dtype == DType::e4m3 && transposed.shape == shape, what,
          ": the transposed weight is ", name_of(transposed.dtype), " ", transposed.shape,
          "; it must be e4m3 ", shape);
  require(!transposed.empty() || shape.numel() == 0, what,
          ": the transposed weight has a null pointer");
}

// Contributions may stand alone or beside the buffer of their means.
void check_contributions(const std::string& what, const AdamWParam& param, std::int64_t owned) {
  const RankGradients& from = *param.contributions;
  check_gradient_format(what + ": contributions", from.dtype);
  require(!from.ranks.empty(), what, ": contributions has no ranks; it must name every rank's");
  require(from.scales != nullptr, what, ": contributions.scales is null");
  require(from.scale_stride >= 0, what, ": contributions.scale_stride is ", from.scale_stride,
          "; it must not be negative");
  for (std::size_t r = 0; r < from.ranks.size(); ++r) {
    require(from.ranks[r].data != nullptr || owned == 0, what, ": the contribution of rank ", r,
            " has a null pointer");
  }
  require(
      param.gradient_scale != nullptr, what,
      ": the gradient comes as contributions and has no scale; give that of the mean, whose amax "
      "mean_scales() writes");
  require(!param.measure_amax, what,
          ": measure_amax is true, but the amax of a mean of contributions is its bound, which "
          "mean_scales() writes");
  require(param.gradient.dtype == DType::f32, what, ": the gradient beside contributions is ",
          name_of(param.gradient.dtype), "; it must be f32");
}

void check_weight_copies(const std::string& what, const AdamWParam& param) {
  const WeightFormat format = param.formats.weight;
  if (param.weight_copies.empty()) return;
  require(!param.weight_is_shard, what,
          ": the weight has copies, which are whole, and weight_is_shard is true");
  require(lies_in_panels(format), what, ": the weight has copies and formats.weight is ",
          name_of(format), "; with copies it may be f32, bf16, e4m3 or e4m3_tile");
  for (std::size_t c = 0; c < param.weight_copies.size(); ++c) {
    const WeightCopy& copy = param.weight_copies[c];
    require(copy.data != nullptr || param.shape.numel() == 0, what, ": copy ", c,
            " of the weight has a null pointer");
    require((copy.blocks != nullptr) == has_block_scales(format) || param.shape.numel() == 0, what,
            ": copy ", c, " of the weight has ", copy.blocks != nullptr ? "" : "no ",
            "blocks and formats.weight is ", name_of(format));
  }
}

void check_gradient(const std::string& what, const AdamWParam& param, bool whole,
                    std::int64_t owned) {
  check_gradient_format(what, param.gradient.dtype);
  if (param.contributions.has_value()) {
    check_contributions(what, param, owned);
    if (param.gradient.empty()) return;
  }
  const std::int64_t expected = param.gradient_is_shard ? owned : param.shape.numel();
  require(param.gradient.numel() == expected, what, ": the gradient has ", param.gradient.numel(),
          " elements; it must have ", expected);
  require(param.gradient_is_shard || param.gradient.shape == param.shape, what,
          ": the gradient is ", param.gradient.shape, "; it must be ", param.shape);
  require(!param.gradient.empty() || expected == 0, what, ": the gradient has a null pointer");
  require(param.gradient_scale != nullptr || !is_fp8(param.gradient.dtype), what,
          ": the gradient is ", name_of(param.gradient.dtype),
          " and has no scale; only f32 and bf16 may be without");
  require(param.gradient_scale != nullptr || whole, what,
          ": the gradient has no scale and not all of it is updated here; all ranks must know the "
          "amax of all of it, so give a scale and share what measure() finds");
}

}  // namespace

void check_hyper(const std::string& what, const AdamwHyper& group) {
  require(group.beta1 >= 0.0f && group.beta1 < 1.0f, what, ": beta1 is ", group.beta1,
          "; it must be in [0, 1)");
  require(group.beta2 >= 0.0f && group.beta2 < 1.0f, what, ": beta2 is ", group.beta2,
          "; it must be in [0, 1)");
  require(group.eps >= 0x1p-100f && group.eps <= 0x1p60f, what, ": eps is ", group.eps,
          "; it must be in [2^-100, 2^60] = [7.9e-31, 1.2e18]");
  require(group.weight_decay >= 0.0f && std::isfinite(group.weight_decay), what,
          ": weight_decay is ", group.weight_decay, "; it must be finite and not negative");
  require(group.lr_factor >= 0.0f && std::isfinite(group.lr_factor), what, ": lr_factor is ",
          group.lr_factor, "; it must be finite and not negative");
}

void check_adamw(const AdamWConfig& config) {
  check_hyper("AdamW", config.of());
  require(!config.amsgrad,
          "AdamW: amsgrad is true; it must be false, because its running maximum would be a fourth "
          "state and the bound that the scales rest on does not cover it");
}

void check_gradient_format(const std::string& what, DType dtype) {
  check_field<DType>(what, "gradient", dtype, kGradientFormats);
}

void check_formats(const std::string& what, const StateFormats& f, const AdamwHyper& group) {
  check_field<WeightFormat>(what, "weight", f.weight, kWeightFormats);
  check_field<StateFormat>(what, "master", f.master, kMasterFormats);
  check_field<StateFormat>(what, "m", f.m, kMFormats);
  check_field<StateFormat>(what, "v", f.v, kVFormats);
  require(f.weight != WeightFormat::f32 || f.master == StateFormat::f32, what,
          ": weight is f32, which is its own master, but master is ", name_of(f.master));
  require(f.master != StateFormat::split || has_tensor_scale(f.weight), what,
          ": master is split, so weight must be e4m3 or e4m3_and_transpose, but it is ",
          name_of(f.weight));
  require(!is_quantised(f) || group.beta1 * group.beta1 < group.beta2, what, ": beta1 ",
          group.beta1, " and beta2 ", group.beta2,
          " do not bound the update (beta1^2 >= beta2), which quantised states need; use a larger "
          "beta2 or FP32 formats");
}

AdamW::AdamW(const Context& ctx, const AdamWConfig& config, std::vector<AdamWParam> params,
             const std::optional<Context>& states)
    : ctx_(ctx),
      states_(states.value_or(ctx)),
      states_are_far_(states.has_value()),
      config_(config),
      params_(std::move(params)) {
  check_adamw(config_);
  require(states_.device() == ctx_.device(), "AdamW: the states are on ", states_.device(),
          ", the optimizer on ", ctx_.device());
  std::vector<Shape> shapes;
  std::vector<Piece> owned;
  for (std::size_t i = 0; i < params_.size(); ++i) {
    AdamWParam& param = params_[i];
    const std::string what = "parameter \"" + param.name + "\"";
    const AdamwHyper hyper = config_.of(param.group);
    check_hyper(what, hyper);
    check_formats(what, param.formats, hyper);
    const bool whole = !param.pieces.has_value();
    if (whole) param.pieces = std::vector<Piece>{{0, 0, param.shape.numel()}};
    for (Piece& piece : *param.pieces) piece.tensor = static_cast<std::int32_t>(i);
    check_gradient(what, param, whole, numel_of(*param.pieces));
    check_weight(what, param, numel_of(*param.pieces));
    check_weight_copies(what, param);
    check_device(what, "gradient", param.gradient, ctx_.device());
    check_device(what, "weight", param.weight, ctx_.device());
    check_device(what, "transposed weight", param.weight_transposed, ctx_.device());
    param.measure_amax = param.measure_amax || param.gradient_scale == nullptr;
    must_measure_ = must_measure_ || param.measure_amax;
    const auto note = [i](bool lacks, int& first) {
      if (lacks && first < 0) first = static_cast<int>(i);
    };
    note(!param.contributions.has_value(), without_contributions_);
    note(param.contributions.has_value() && param.gradient.empty() && numel_of(*param.pieces) > 0,
         without_gradient_);
    shapes.push_back(param.shape);
    owned.insert(owned.end(), param.pieces->begin(), param.pieces->end());
    total_segments_ += segment_count(param.shape);
  }
  segments_ = segments_of(shapes, owned);
  const std::size_t count = params_.size();
  scales_ = upload_sync<TensorScale>(ctx_, std::vector<TensorScale>(4 * count));
  gradient_scales_ = upload_sync<TensorScale>(
      ctx_, std::vector<TensorScale>(static_cast<std::size_t>(
                std::count_if(params_.begin(), params_.end(),
                              [](const AdamWParam& p) { return p.gradient_scale == nullptr; }))));
  TensorScale* own_scale = gradient_scales_.as<TensorScale>();
  for (AdamWParam& param : params_) {
    if (param.gradient_scale == nullptr) param.gradient_scale = own_scale++;
  }
  steps_ = Buffer(ctx_, count * sizeof(AdamwTensorStep));
  scratch_ = upload_sync<AdamwScratch>(ctx_, std::vector<AdamwScratch>(1));
  scalars_ = upload_sync<AdamwScalars>(ctx_, std::vector<AdamwScalars>(1));
  nonfinite_counts_ = upload_sync<std::int64_t>(ctx_, std::vector<std::int64_t>(count));
  sums_ = Buffer(ctx_, static_cast<std::size_t>(total_segments_) * sizeof(float));
  zero_bytes(ctx_, sums_.data(), sums_.bytes());
  std::uint64_t random_base = 0;
  for (std::size_t i = 0; i < count; ++i) {
    tensors_host_.push_back(make_tensor(static_cast<int>(i), random_base));
    random_base += (static_cast<std::uint64_t>(params_[i].shape.numel()) + 3) / 4 * 4;
  }
  make_exchanges();
  tensors_ = upload_sync<AdamwTensor>(ctx_, tensors_host_);
  segment_table_ = upload_sync<Segment>(ctx_, segments_);
  groups_ = upload_sync<AdamwHyper>(ctx_, groups_host_);
  group_scalars_ =
      upload_sync<AdamwGroupScalars>(ctx_, std::vector<AdamwGroupScalars>(groups_host_.size()));
}

std::size_t AdamW::grow(std::vector<State>& states, StateFormat format, std::int64_t count) {
  const std::size_t before = states_.memory_use().current;
  const auto blocks = static_cast<std::size_t>(block_count(format, count));
  states.push_back({Buffer(states_, static_cast<std::size_t>(count) * size_of(format)),
                    Buffer(states_, blocks * sizeof(float))});
  return states_.memory_use().current - before;
}

std::size_t AdamW::grow_weight_blocks(const AdamWParam& param) {
  const std::size_t before = ctx_.memory_use().current;
  const auto add = [&](std::vector<Buffer>& list, bool exists, int rows, int columns) {
    list.emplace_back(ctx_, exists ? static_cast<std::size_t>(
                                         scale_bytes(granularity_of(param.formats.weight),
                                                     param.shape[rows], param.shape[columns]))
                                   : 0);
  };
  const bool has_scales = has_block_scales(param.formats.weight);
  add(weight_blocks_, has_scales && param.weight_blocks == nullptr, 0, 1);
  add(transposed_blocks_, has_scales && is_transposed(param.formats.weight), 1, 0);
  return ctx_.memory_use().current - before;
}

std::int32_t AdamW::group_index(const AdamwHyper& hyper) {
  const auto found = std::find(groups_host_.begin(), groups_host_.end(), hyper);
  const auto index = found - groups_host_.begin();
  if (found == groups_host_.end()) groups_host_.push_back(hyper);
  return static_cast<std::int32_t>(index);
}

AdamwTensor AdamW::make_tensor(int i, std::uint64_t random_base) {
  const AdamWParam& param = params_[static_cast<std::size_t>(i)];
  const StateFormats& f = param.formats;
  const std::int64_t owned = numel_of(*param.pieces);
  const bool own_master = f.weight != WeightFormat::f32;
  bytes_.push_back({.master = grow(master_, f.master, own_master ? owned : 0),
                    .m = grow(m_, f.m, owned),
                    .v = grow(v_, f.v, owned),
                    .weight_blocks = grow_weight_blocks(param)});
  AdamwTensor tensor;
  tensor.gradient = param.gradient.data;
  tensor.gradient_dtype = param.gradient.dtype;
  tensor.gradient_scale = param.gradient_scale;
  tensor.gradient_is_shard = param.gradient_is_shard;
  tensor.measure_amax = param.measure_amax;
  tensor.formats = f;
  tensor.master = own_master ? master_.back().codes.data() : param.weight.data;
  tensor.master_scale = scale(kMaster, i);
  tensor.master_is_shard = own_master || param.weight_is_shard;
  tensor.weight_is_shard = param.weight_is_shard;
  tensor.states_are_far = states_are_far_;
  tensor.m = m_.back().codes.data();
  tensor.m_blocks = m_.back().blocks.as<float>();
  tensor.m_scale = scale(kM, i);
  tensor.v = v_.back().codes.data();
  tensor.v_blocks = v_.back().blocks.as<float>();
  tensor.v_scale = scale(kV, i);
  tensor.weight = own_master ? param.weight.data : nullptr;
  tensor.weight_scale = scale(kWeight, i);
  tensor.weight_blocks =
      param.weight_blocks != nullptr ? param.weight_blocks : weight_blocks_.back().as<float>();
  tensor.weight_transposed = param.weight_transposed.data;
  tensor.weight_transposed_blocks = transposed_blocks_.back().as<float>();
  tensor.rows = param.shape.rank() > 0 ? param.shape[0] : 1;
  tensor.columns = param.shape.row_numel();
  tensor.group = group_index(config_.of(param.group));
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
                          .pieces = param.pieces->data(),
                          .piece_count = static_cast<std::int64_t>(param.pieces->size())});
}

AdamwArgs AdamW::args(const AdamWStep& step) const {
  AdamwArgs args;
  args.tensors = tensors_.as<const AdamwTensor>();
  args.tensor_count = static_cast<std::int64_t>(params_.size());
  args.segments = segment_table_.as<const Segment>();
  args.segment_count = static_cast<std::int64_t>(segments_.size());
  args.scalars = scalars_.as<AdamwScalars>();
  args.groups = groups_.as<const AdamwHyper>();
  args.group_scalars = group_scalars_.as<AdamwGroupScalars>();
  args.group_count = static_cast<std::int64_t>(groups_host_.size());
  args.steps = steps_.as<AdamwTensorStep>();
  args.scratch = scratch_.as<AdamwScratch>();
  args.exchanges = exchanges_.as<const AdamwExchange>();
  args.sums_contributions = step.from_contributions;
  args.config = config_;
  args.lr = step.lr;
  args.lr_device = step.lr_device;
  args.max_norm = step.max_norm;
  args.segment_sums = sums_.as<const float>();
  args.total_segments = total_segments_;
  args.nonfinite = step.nonfinite;
  args.nonfinite_counts = nonfinite_counts_.as<std::int64_t>();
  return args;
}

void AdamW::require_gradients(const char* call) const {
  if (without_gradient_ < 0) return;
  fail("AdamW::", call, ": parameter \"", params_[static_cast<std::size_t>(without_gradient_)].name,
       "\" has contributions and no gradient; clipping and steps without from_contributions need "
       "the "
       "f32 mean in AdamWParam::gradient");
}

void AdamW::measure(std::uint32_t* nonfinite) {
  require_gradients("measure");
  adamw_measure(ctx_, args({.nonfinite = nonfinite}), sums_.as<float>());
  measured_ = true;
}

void AdamW::step(const AdamWStep& step) {
  require(!must_measure_ || measured_,
          "AdamW::step: the amax of a gradient is not known; call measure() before every step");
  require(!(step.max_norm > 0.0f) || measured_, "AdamW::step: max_norm is ", step.max_norm,
          ", but the norm is not known; call measure() before every step that clips");
  if (step.from_contributions) {
    require(step.max_norm == 0.0f, "AdamW::step: max_norm is ", step.max_norm,
            " and from_contributions is true; clipping needs the means in AdamWParam::gradient");
    if (without_contributions_ >= 0) {
      fail("AdamW::step: from_contributions is true, but parameter \"",
           params_[static_cast<std::size_t>(without_contributions_)].name,
           "\" has no contributions");
    }
  } else {
    require_gradients("step");
  }
  measured_ = false;
  const AdamwArgs prepared = args(step);
  adamw_prepare(ctx_, prepared);
  adamw_update(ctx_, prepared);
}

TensorScale* AdamW::scale(Slot slot, int i) const {
  return scales() + static_cast<std::size_t>(slot) * params_.size() + static_cast<std::size_t>(i);
}

void AdamW::check_index(int i) const {
  require(i >= 0 && static_cast<std::size_t>(i) < params_.size(), "AdamW: parameter ", i,
          " is asked for; there are ", params_.size(), ", counted from 0");
}

TensorScale* AdamW::weight_scale(int i) const {
  check_index(i);
  return scale(kWeight, i);
}

BlockScaledView AdamW::block_weight(int i) const {
  check_index(i);
  const AdamWParam& param = params_[static_cast<std::size_t>(i)];
  require(has_block_scales(param.formats.weight), "AdamW::block_weight: the weight of parameter \"",
          param.name, "\" is ", name_of(param.formats.weight), ", which has no scales of blocks");
  require(!param.weight_is_shard, "AdamW::block_weight: the weight of parameter \"", param.name,
          "\" is a shard; a view wants all of it");
  return {.data = param.weight,
          .granularity = granularity_of(param.formats.weight),
          .scales = tensors_host_[static_cast<std::size_t>(i)].weight_blocks};
}

BlockScaledView AdamW::block_weight_transposed(int i) const {
  BlockScaledView view = block_weight(i);
  const AdamWParam& param = params_[static_cast<std::size_t>(i)];
  require(is_transposed(param.formats.weight),
          "AdamW::block_weight_transposed: the weight of parameter \"", param.name, "\" is ",
          name_of(param.formats.weight), ", which has no transposed copy");
  view.data = param.weight_transposed;
  view.scales = transposed_blocks_[static_cast<std::size_t>(i)].data();
  return view;
}

AdamW::StateBytes AdamW::state_bytes(int i) const {
  check_index(i);
  return bytes_[static_cast<std::size_t>(i)];
}

const AdamwGroupScalars* AdamW::group_scalars(int i) const {
  check_index(i);
  return group_scalars_.as<AdamwGroupScalars>() + tensors_host_[static_cast<std::size_t>(i)].group;
}

std::string AdamW::general_code_reason(int i) const {
  check_index(i);
  const AdamwTensor& tensor = tensors_host_[static_cast<std::size_t>(i)];
  return reason_for_general_code(
      tensor, config_, groups_host_[static_cast<std::size_t>(tensor.group)],
      exchanges_host_.empty() ? nullptr : &exchanges_host_[static_cast<std::size_t>(i)]);
}

const AdamwTensorStep* AdamW::tensor_step(int i) const {
  check_index(i);
  return steps_.as<AdamwTensorStep>() + i;
}

StateView AdamW::m(int i) const {
  check_index(i);
  const AdamwTensor& t = tensors_host_[static_cast<std::size_t>(i)];
  return {t.formats.m, numel_of(*params_[static_cast<std::size_t>(i)].pieces), t.m, t.m_blocks,
          t.m_scale};
}

StateView AdamW::v(int i) const {
  check_index(i);
  const AdamwTensor& t = tensors_host_[static_cast<std::size_t>(i)];
  return {t.formats.v, numel_of(*params_[static_cast<std::size_t>(i)].pieces), t.v, t.v_blocks,
          t.v_scale};
}

StateView AdamW::master(int i) const {
  check_index(i);
  const AdamWParam& param = params_[static_cast<std::size_t>(i)];
  const AdamwTensor& t = tensors_host_[static_cast<std::size_t>(i)];
  return {t.formats.master, t.master_is_shard ? numel_of(*param.pieces) : param.shape.numel(),
          t.master, nullptr, t.master_scale};
}

}  // namespace octet
