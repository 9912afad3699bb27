// SPDX-License-Identifier: Apache-2.0
// A list of parameters with an octet::AdamW, fed and read from the host.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "octet/optim/adamw.hpp"
#include "support/adamw_blocks.hpp"
#include "support/adamw_formats.hpp"
#include "support/devices.hpp"

namespace octet::test {

/// Who knows the amax of a gradient: the caller, nobody before measure(), or nobody and there is no
/// scale either.
enum class GradientAmax { given, measured, no_scale };

struct ParamCase {
  Shape shape;
  StateFormats formats;
  DType gradient = DType::f32;
  float weight_decay = 0.0f;  ///< without a group, instead of the configuration's
  /// Empty: the whole parameter.
  std::optional<std::vector<Piece>> pieces = std::nullopt;
  std::optional<AdamWGroup> group = std::nullopt;
  GradientAmax amax = GradientAmax::given;
  bool weight_is_shard = false;
};

class AdamwModel {
 public:
  AdamwModel(const Context& ctx, const AdamWConfig& config, std::vector<ParamCase> cases)
      : ctx_(ctx), cases_(std::move(cases)), flag_(upload<std::uint32_t>(ctx, {0})) {
    std::vector<AdamWParam> params;
    for (const ParamCase& what : cases_) {
      const WeightFormat format = what.formats.weight;
      weights_.push_back(format == WeightFormat::none
                             ? Tensor()
                             : Tensor(ctx, dtype_of(format), weight_shape(what)));
      weight_blocks_.emplace_back(
          ctx, what.weight_is_shard && has_block_scales(format)
                   ? static_cast<std::size_t>(
                         scale_bytes(granularity_of(format), what.shape[0], what.shape[1]))
                   : 0);
      const bool transposed = is_transposed(format) && what.shape.rank() == 2;
      transposed_.push_back(transposed ? Tensor(ctx, DType::e4m3, {what.shape[1], what.shape[0]})
                                       : Tensor());
      gradients_.emplace_back(ctx, what.gradient, what.shape);
      for (const TensorView& view :
           {weights_.back().view(), transposed_.back().view(), gradients_.back().view().data}) {
        if (!view.empty()) zero_bytes(ctx, view.data, view.bytes());
      }
      AdamWParam param;
      param.name = "p" + std::to_string(params.size());
      param.shape = what.shape;
      param.formats = what.formats;
      param.gradient = gradients_.back().view().data;
      if (what.amax != GradientAmax::no_scale) {
        param.gradient_scale = gradients_.back().view().scale;
      }
      param.measure_amax = what.amax == GradientAmax::measured;
      measures_ = measures_ || what.amax != GradientAmax::given;
      param.weight = weights_.back().view();
      param.weight_is_shard = what.weight_is_shard;
      param.weight_blocks = weight_blocks_.back().as<float>();
      param.weight_transposed = transposed_.back().view();
      param.group = what.group.value_or(AdamWGroup{.weight_decay = what.weight_decay});
      param.pieces = what.pieces;
      params.push_back(param);
    }
    optimizer_ = std::make_unique<AdamW>(ctx, config, std::move(params));
  }

  void initialise(int i, const std::vector<float>& values) {
    const Buffer buffer = upload(ctx_, values);
    optimizer_->initialise(i, view_of(ctx_, buffer, DType::f32, cases_[at(i)].shape));
    ctx_.synchronize();
  }

  /// Sets the gradient as a trainer's cast would; returns what was stored, decoded.
  Doubles set_gradient(int i, const std::vector<float>& values) {
    Encoded encoded = encode_values(cases_[at(i)].gradient, values);
    const ScaledView view = gradients_[at(i)].view();
    if (cases_[at(i)].amax != GradientAmax::given) encoded.scale.amax = 0.0f;
    write(ctx_, view.data.data, encoded.bytes);
    write_one(ctx_, view.scale, encoded.scale);
    return encoded.decoded;
  }

  /// One step, after measure() where it is needed.
  void step(float lr, float max_norm = 0.0f) {
    if (max_norm > 0 || measures_) optimizer_->measure(measures_ ? flag() : nullptr);
    optimizer_->step({.lr = lr, .max_norm = max_norm, .nonfinite = flag()});
  }

  /// Of a weight in blocks the values are those that the codes and the blocks' scales stand for.
  Stored weight(int i) const {
    Stored stored = read_tensor(ctx_, {weights_[at(i)].view(), optimizer_->weight_scale(i)});
    if (has_block_scales(cases_[at(i)].formats.weight)) {
      decode_blocks(stored, cases_[at(i)].shape, granularity_of(cases_[at(i)].formats.weight),
                    block_weight(i));
    }
    return stored;
  }
  /// Codes and scales of a weight in blocks, and of its transposed copy.
  Blocks block_weight(int i) const { return read_blocks(ctx_, optimizer_->block_weight(i)); }
  /// The scales alone, those of a shard too.
  Codes weight_scales(int i) const {
    const Buffer& own = weight_blocks_[at(i)];
    if (own.bytes() == 0) return block_weight(i).scales;
    return download<std::uint8_t>(ctx_, own.data(), own.bytes());
  }
  Blocks block_weight_transposed(int i) const {
    return read_blocks(ctx_, optimizer_->block_weight_transposed(i));
  }
  std::vector<std::uint8_t> transposed_weight(int i) const {
    return download_bytes(ctx_, transposed_[at(i)].view());
  }
  Stored master(int i) const {
    const StateView view = optimizer_->master(i);
    return view.format == StateFormat::split ? read_split(ctx_, view, weights_[at(i)].view())
                                             : read_state(ctx_, view);
  }
  Stored m(int i) const { return read_state(ctx_, optimizer_->m(i)); }
  Stored v(int i) const { return read_state(ctx_, optimizer_->v(i)); }
  AdamwScalars scalars() const { return download_one<AdamwScalars>(ctx_, optimizer_->scalars()); }
  AdamwGroupScalars group_scalars(int i) const {
    return download_one<AdamwGroupScalars>(ctx_, optimizer_->group_scalars(i));
  }
  AdamwTensorStep tensor_step(int i) const {
    return download_one<AdamwTensorStep>(ctx_, optimizer_->tensor_step(i));
  }
  std::vector<TensorScale> scales() const {
    return download<TensorScale>(ctx_, optimizer_->scales(),
                                 static_cast<std::size_t>(optimizer_->scale_count()));
  }

  /// Every byte of the weights, master and moments of parameter i, and of its scales.
  std::vector<std::uint8_t> bytes(int i) const {
    std::vector<std::uint8_t> all;
    const auto append = [&all](const std::vector<std::uint8_t>& part) {
      all.insert(all.end(), part.begin(), part.end());
    };
    append(download_bytes(ctx_, weights_[at(i)].view()));
    append(download_bytes(ctx_, transposed_[at(i)].view()));
    append(block_scale_bytes(ctx_, *optimizer_, i, cases_[at(i)].formats.weight));
    std::vector<TensorScale> scales = {
        download_one<TensorScale>(ctx_, optimizer_->weight_scale(i))};
    for (const StateView& view : {optimizer_->master(i), optimizer_->m(i), optimizer_->v(i)}) {
      append(download_state(ctx_, view));
      scales.push_back(download_one<TensorScale>(ctx_, view.scale));
    }
    append(bytes_of(scales));
    return all;
  }
  /// The bytes of all parameters, one after the other.
  std::vector<std::uint8_t> all_bytes() const {
    std::vector<std::uint8_t> all;
    for (int i = 0; i < static_cast<int>(cases_.size()); ++i) {
      const auto part = bytes(i);
      all.insert(all.end(), part.begin(), part.end());
    }
    return all;
  }

  const Context& context() const { return ctx_; }
  const StateFormats& formats(int i) const { return cases_[at(i)].formats; }
  AdamW& optimizer() { return *optimizer_; }
  const TensorView& weight_view(int i) const { return weights_[at(i)].view(); }
  const TensorView& transposed_view(int i) const { return transposed_[at(i)].view(); }
  ScaledView gradient_view(int i) const { return gradients_[at(i)].view(); }
  std::uint32_t* flag() const { return flag_.as<std::uint32_t>(); }

 private:
  static std::size_t at(int i) { return static_cast<std::size_t>(i); }
  static Shape weight_shape(const ParamCase& what) {
    if (!what.weight_is_shard) return what.shape;
    std::int64_t owned = 0;
    for (const Piece& piece : *what.pieces) owned += piece.count;
    return {owned};
  }

  Context ctx_;
  std::vector<ParamCase> cases_;
  std::vector<Tensor> weights_, transposed_;
  std::vector<ScaledTensor> gradients_;
  std::vector<Buffer> weight_blocks_;  ///< of shards
  Buffer flag_;
  bool measures_ = false;
  std::unique_ptr<AdamW> optimizer_;
};

}  // namespace octet::test
