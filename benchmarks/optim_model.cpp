// SPDX-License-Identifier: Apache-2.0
#include "optim_model.hpp"

#include <algorithm>
#include <random>
#include <utility>

namespace bench {
namespace {

using octet::DType;
using octet::Shape;
using octet::StateFormat;
using octet::StateFormats;
using octet::WeightFormat;

constexpr float kLearningRate = 1e-4f;
constexpr float kMaxNorm = 1.0f;  ///< less than the gradients' norm
/// Random values that are made on the host; a tensor holds copies of them, from its own start.
constexpr std::int64_t kBlock = std::int64_t{1} << 22;

}  // namespace

/// Random f32 values on the device, enough for the largest tensor from any start in the block.
class RandomValues {
 public:
  RandomValues(const octet::Context& ctx, std::int64_t largest)
      : ctx_(ctx), buffer_(ctx, static_cast<std::size_t>(largest + kBlock) * sizeof(float)) {
    std::mt19937 generator(1);
    std::normal_distribution<float> normal(0.0f, 0.02f);
    std::vector<float> block(static_cast<std::size_t>(kBlock));
    for (float& value : block) value = normal(generator);
    const octet::Buffer source = octet::upload_sync<float>(ctx, block);
    for (std::size_t done = 0; done < buffer_.bytes(); done += source.bytes()) {
      octet::copy_bytes(ctx, buffer_.as<char>() + done, source.data(),
                        std::min(source.bytes(), buffer_.bytes() - done));
    }
    ctx.synchronize();
  }

  /// Another start, aligned to 256 bytes, in every call.
  octet::TensorView next(const Shape& shape) {
    start_ = (start_ + 64 * 10007) % kBlock;
    return {buffer_.as<float>() + start_, DType::f32, shape, ctx_.device()};
  }

 private:
  octet::Context ctx_;
  octet::Buffer buffer_;
  std::int64_t start_ = 0;
};

namespace {

void fill_gradient(const octet::Context& ctx, const octet::TensorView& values,
                   const octet::ScaledView& gradient) {
  if (octet::is_fp8(gradient.data.dtype)) {
    octet::quantize(ctx, {.in = values, .out = gradient});
  } else {
    octet::convert(ctx, {values, nullptr}, gradient.data);
    octet::measure_amax(ctx, gradient.data, gradient.scale);
  }
}

/// Bytes of the weights of one tensor that a step moves beside its states.
std::size_t weight_bytes(const StateFormats& f, std::int64_t elements) {
  // An f32 weight is its own master.
  if (f.weight == WeightFormat::none || f.weight == WeightFormat::f32) return 0;
  const int written = octet::is_transposed(f.weight) ? 2 : 1;
  const int read = f.master == StateFormat::split ? 1 : 0;
  return static_cast<std::size_t>(written + read) * static_cast<std::size_t>(elements) *
         octet::size_of(octet::dtype_of(f.weight));
}

}  // namespace

std::vector<Shape> gpt_shapes(int layers) {
  constexpr std::int64_t kWidth = 2048, kVocabulary = 50304;
  std::vector<Shape> shapes{{kVocabulary, kWidth}};
  for (int layer = 0; layer < layers; ++layer) {
    shapes.insert(
        shapes.end(),
        {{3 * kWidth, kWidth}, {kWidth, kWidth}, {4 * kWidth, kWidth}, {kWidth, 4 * kWidth}});
  }
  return shapes;
}

std::int64_t numel_of(const std::vector<Shape>& shapes) {
  std::int64_t count = 0;
  for (const Shape& shape : shapes) count += shape.numel();
  return count;
}

std::size_t bytes_moved(const Case& c, const std::vector<Shape>& shapes) {
  const StateFormats& f = c.formats.state;
  std::size_t bytes = 0;
  for (const Shape& shape : shapes) {
    const std::int64_t n = shape.numel();
    const std::size_t gradient = static_cast<std::size_t>(n) * octet::size_of(c.formats.gradient) *
                                 static_cast<std::size_t>(std::max(c.contributions, 1));
    const std::size_t copies = static_cast<std::size_t>(n) * octet::size_of(dtype_of(f.weight)) *
                               static_cast<std::size_t>(c.weight_copies);
    if (c.work == Work::norm || c.work == Work::clipped_replay) bytes += gradient;
    if (c.work == Work::norm) continue;
    bytes += gradient + weight_bytes(f, n) + copies;
    for (StateFormat state : {f.master, f.m, f.v}) bytes += 2 * octet::state_bytes(state, n);
  }
  return bytes;
}

std::size_t link_bytes(const Case& c, const std::vector<Shape>& shapes) {
  const StateFormats& f = c.formats.state;
  std::size_t bytes = 0;
  for (const Shape& shape : shapes) {
    for (StateFormat state : {f.m, f.v}) bytes += 2 * octet::state_bytes(state, shape.numel());
    if (f.weight == WeightFormat::f32) continue;  // its own master, on the device
    bytes += 2 * octet::state_bytes(f.master, shape.numel());
  }
  return bytes;
}

// Whole tensors, as in peers' memory.
void Model::add_contributions(RandomValues& random, const Case& c, octet::AdamWParam& param,
                              std::size_t i, std::size_t count) {
  octet::RankGradients from;
  from.dtype = c.formats.gradient;
  from.scales = scales_.as<octet::TensorScale>() + i;
  from.scale_stride = static_cast<std::int64_t>(count);
  for (int r = 0; r < c.contributions; ++r) {
    gradients_.emplace_back(ctx_, from.dtype, param.shape);
    const octet::ScaledView gradient = gradients_.back().view();
    fill_gradient(ctx_, random.next(param.shape), gradient);
    octet::copy_bytes(ctx_,
                      scales_.as<octet::TensorScale>() + static_cast<std::size_t>(r) * count + i,
                      gradient.scale, sizeof(octet::TensorScale));
    from.ranks.push_back({gradient.data.data, false});
  }
  param.contributions = std::move(from);
  param.gradient_scale =
      scales_.as<octet::TensorScale>() + static_cast<std::size_t>(c.contributions) * count + i;
}

Model::Model(const octet::Context& ctx, const Case& c, const std::vector<Shape>& shapes)
    : ctx_(ctx),
      name_(c.name),
      work_(c.work),
      sums_(c.contributions > 0),
      flag_(octet::upload_sync<std::uint32_t>(ctx, std::vector<std::uint32_t>{0})),
      lr_(octet::upload_sync<float>(ctx, std::vector<float>{kLearningRate})),
      scales_(ctx, static_cast<std::size_t>(c.contributions + 1) * shapes.size() *
                       sizeof(octet::TensorScale)) {
  const WeightFormat weight = c.formats.state.weight;
  std::int64_t largest = 0;
  for (const Shape& shape : shapes) largest = std::max(largest, shape.numel());
  RandomValues random(ctx, largest);
  std::vector<octet::AdamWParam> params;
  for (const Shape& shape : shapes) {
    weights_.emplace_back(ctx, octet::dtype_of(weight), shape);
    octet::AdamWParam param{.name = "p" + std::to_string(params.size()),
                            .shape = shape,
                            .formats = c.formats.state,
                            .gradient_is_shard = c.gradient_is_shard,
                            .weight = weights_.back().view(),
                            .group = octet::AdamWGroup{.weight_decay = 0.1f}};
    if (octet::is_transposed(weight)) {
      transposed_.emplace_back(ctx, DType::e4m3, Shape{shape[1], shape[0]});
      param.weight_transposed = transposed_.back().view();
    }
    if (sums_) {
      add_contributions(random, c, param, params.size(), shapes.size());
    } else {
      gradients_.emplace_back(ctx, c.formats.gradient, shape);
      param.gradient = gradients_.back().view().data;
      param.gradient_scale = gradients_.back().view().scale;
      fill_gradient(ctx, random.next(shape), gradients_.back().view());
    }
    for (int k = 0; k < c.weight_copies; ++k) {
      copies_.emplace_back(ctx, octet::dtype_of(weight), shape);
      param.weight_copies.push_back({copies_.back().view().data, nullptr});
    }
    params.push_back(std::move(param));
  }
  if (sums_) {
    const auto count = static_cast<std::int64_t>(shapes.size());
    octet::mean_scales(ctx,
                       {.ranks = c.contributions,
                        .dtype = c.formats.gradient,
                        .scales = scales_.as<octet::TensorScale>(),
                        .mean_scales = scales_.as<octet::TensorScale>() + c.contributions * count,
                        .tensor_count = count,
                        .nonfinite = flag_.as<std::uint32_t>()});
  }
  std::optional<octet::Context> states;
  if (c.host_states) states = ctx.with_allocator(octet::pinned_host_allocator(ctx.device()));
  optimizer_ = std::make_unique<octet::AdamW>(ctx, c.config, std::move(params), states);
  for (std::size_t i = 0; i < shapes.size(); ++i) {
    optimizer_->initialise(static_cast<int>(i), random.next(shapes[i]));
  }
  ctx.synchronize();
}

void Model::run() {
  const bool clips = work_ == Work::clipped_replay;
  if (clips || work_ == Work::norm) optimizer_->measure();
  if (work_ == Work::norm) return;
  optimizer_->step({.lr_device = lr_.as<float>(),
                    .max_norm = clips ? kMaxNorm : 0.0f,
                    .nonfinite = flag_.as<std::uint32_t>(),
                    .from_contributions = sums_});
}

void Model::require_runs(std::int64_t expected) const {
  if (work_ == Work::norm) {
    const auto sums = octet::read_sync<float>(
        ctx_, optimizer_->segment_sums(), static_cast<std::size_t>(optimizer_->total_segments()));
    octet::require(std::all_of(sums.begin(), sums.end(), [](float sum) { return sum > 0.0f; }),
                   name_, ": a segment's sum of squares is not positive");
    return;
  }
  const auto scalars = octet::read_sync<octet::AdamwScalars>(ctx_, optimizer_->scalars(), 1)[0];
  octet::require(scalars.step == expected && scalars.skipped == 0, name_, ": ", scalars.step,
                 " steps were applied and ", scalars.skipped, " skipped; expected are ", expected,
                 " and 0");
  octet::require((scalars.clip < 1.0f) == (work_ == Work::clipped_replay), name_,
                 ": the clip factor is ", scalars.clip);
}

}  // namespace bench
