// SPDX-License-Identifier: Apache-2.0
// A list of parameters with an octet::AdamW, fed and read from the host.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "octet/optim/adamw.hpp"
#include "support/adamw_reference.hpp"
#include "support/devices.hpp"
#include "support/reference.hpp"

namespace octet::test {

/// The formats that the levels have.
inline const StateFormats kPlain = {};
inline const StateFormats kO0 = {DType::bf16, DType::f32, DType::f32, DType::f32};
inline const StateFormats kO1 = {DType::e4m3, DType::f16, DType::f32, DType::f32};
inline const StateFormats kO2 = {DType::e4m3, DType::f16, DType::e4m3, DType::f16};

/// Values as the codes of a dtype times a scale, encoded by the tables.
struct Encoded {
  std::vector<std::uint8_t> bytes;
  TensorScale scale;
  Doubles decoded;
};

inline Encoded encode_values(DType dtype, const std::vector<float>& values) {
  Encoded result;
  for (float value : values) result.scale.amax = std::max(result.scale.amax, std::abs(value));
  if (is_fp8(dtype)) {
    const double scale =
        reference_scale(static_cast<double>(result.scale.amax), table_of(dtype).max());
    result.scale.scale = static_cast<float>(scale);
    result.scale.scale_inv = static_cast<float>(1 / scale);
  }
  const auto append = [&result](const auto& code) {
    const auto* bytes = reinterpret_cast<const std::uint8_t*>(&code);
    result.bytes.insert(result.bytes.end(), bytes, bytes + sizeof(code));
  };
  for (float value : values) {
    if (dtype == DType::f32) {
      append(value);
      result.decoded.push_back(static_cast<double>(value));
      continue;
    }
    const double scaled = static_cast<double>(value * result.scale.scale);
    const std::uint32_t code = table_of(dtype).encode(scaled);
    if (is_fp8(dtype)) {
      append(static_cast<std::uint8_t>(code));
    } else {
      append(static_cast<std::uint16_t>(code));
    }
    result.decoded.push_back(table_of(dtype).decode(code) *
                             static_cast<double>(result.scale.scale_inv));
  }
  return result;
}

/// The fields of scales as bytes; a TensorScale itself has padding that nobody sets.
inline std::vector<std::uint8_t> bytes_of(const std::vector<TensorScale>& scales) {
  std::vector<std::uint8_t> bytes;
  for (const TensorScale& scale : scales) {
    for (float field : {scale.scale, scale.scale_inv, scale.amax}) {
      const std::uint32_t bits = bits_of(field);
      for (int byte = 0; byte < 4; ++byte) {
        bytes.push_back(static_cast<std::uint8_t>(bits >> (8 * byte)));
      }
    }
  }
  return bytes;
}

/// A tensor read back: codes (or FP32 values) and what they stand for.
struct Stored {
  DType dtype = DType::f32;
  std::vector<std::uint32_t> codes;
  Doubles values;
  TensorScale scale;
};

inline Stored read_tensor(const Context& ctx, const ScaledView& view) {
  Stored stored;
  stored.dtype = view.data.dtype;
  if (view.scale != nullptr) stored.scale = download_one<TensorScale>(ctx, view.scale);
  const auto count = static_cast<std::size_t>(view.data.numel());
  if (stored.dtype == DType::f32) {
    for (float x : download<float>(ctx, view.data.data, count)) {
      stored.codes.push_back(bits_of(x));
      stored.values.push_back(static_cast<double>(x));
    }
    return stored;
  }
  if (is_fp8(stored.dtype)) {
    for (std::uint8_t code : download<std::uint8_t>(ctx, view.data.data, count)) {
      stored.codes.push_back(code);
    }
  } else {
    for (std::uint16_t code : download<std::uint16_t>(ctx, view.data.data, count)) {
      stored.codes.push_back(code);
    }
  }
  for (std::uint32_t code : stored.codes) {
    stored.values.push_back(table_of(stored.dtype).decode(code) *
                            static_cast<double>(stored.scale.scale_inv));
  }
  return stored;
}

struct ParamCase {
  Shape shape;
  StateFormats formats;
  DType gradient = DType::f32;
  float weight_decay = 0.0f;
  /// Empty: the whole parameter.
  std::optional<std::vector<Piece>> pieces = std::nullopt;
};

class AdamwModel {
 public:
  AdamwModel(const Context& ctx, const AdamWConfig& config, std::vector<ParamCase> cases)
      : ctx_(ctx), cases_(std::move(cases)), flag_(upload<std::uint32_t>(ctx, {0})) {
    std::vector<AdamWParam> params;
    for (const ParamCase& what : cases_) {
      weights_.emplace_back(ctx, what.formats.weight, what.shape);
      gradients_.emplace_back(ctx, what.gradient, what.shape);
      zero_bytes(ctx, weights_.back().view().data, weights_.back().bytes());
      zero_bytes(ctx, gradients_.back().view().data.data, gradients_.back().view().data.bytes());
      AdamWParam param;
      param.name = "p" + std::to_string(params.size());
      param.shape = what.shape;
      param.formats = what.formats;
      param.gradient = gradients_.back().view().data;
      param.gradient_scale = gradients_.back().view().scale;
      param.weight = weights_.back().view();
      param.weight_decay = what.weight_decay;
      param.whole = !what.pieces.has_value();
      if (what.pieces) param.pieces = *what.pieces;
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
    const Encoded encoded = encode_values(cases_[at(i)].gradient, values);
    const ScaledView view = gradients_[at(i)].view();
    write(ctx_, view.data.data, encoded.bytes);
    write_one(ctx_, view.scale, encoded.scale);
    return encoded.decoded;
  }

  void step(float lr, float max_norm = 0.0f) {
    if (max_norm > 0) optimizer_->sum_squares();
    optimizer_->step({.lr = lr, .max_norm = max_norm, .nonfinite = flag()});
  }

  Stored weight(int i) const {
    return read_tensor(ctx_, {weights_[at(i)].view(), optimizer_->weight_scale(i)});
  }
  Stored master(int i) const { return read_tensor(ctx_, optimizer_->master(i)); }
  Stored m(int i) const { return read_tensor(ctx_, optimizer_->m(i)); }
  Stored v(int i) const { return read_tensor(ctx_, optimizer_->v(i)); }
  AdamwScalars scalars() const { return download_one<AdamwScalars>(ctx_, optimizer_->scalars()); }
  std::vector<TensorScale> scales() const {
    return download<TensorScale>(ctx_, optimizer_->scales(),
                                 static_cast<std::size_t>(optimizer_->scale_count()));
  }
  /// Every byte of weights, masters, moments and scales, one after the other.
  std::vector<std::uint8_t> all_bytes() const {
    std::vector<std::uint8_t> all;
    const auto append = [&](const TensorView& view) {
      const auto bytes = download_bytes(ctx_, view);
      all.insert(all.end(), bytes.begin(), bytes.end());
    };
    for (int i = 0; i < static_cast<int>(cases_.size()); ++i) {
      append(weights_[at(i)].view());
      append(optimizer_->master(i).data);
      append(optimizer_->m(i).data);
      append(optimizer_->v(i).data);
    }
    const auto scale_bytes = bytes_of(scales());
    all.insert(all.end(), scale_bytes.begin(), scale_bytes.end());
    return all;
  }

  const Context& context() const { return ctx_; }
  AdamW& optimizer() { return *optimizer_; }
  const TensorView& weight_view(int i) const { return weights_[at(i)].view(); }
  ScaledView gradient_view(int i) const { return gradients_[at(i)].view(); }
  std::uint32_t* flag() const { return flag_.as<std::uint32_t>(); }

 private:
  static std::size_t at(int i) { return static_cast<std::size_t>(i); }

  Context ctx_;
  std::vector<ParamCase> cases_;
  std::vector<Tensor> weights_;
  std::vector<ScaledTensor> gradients_;
  Buffer flag_;
  std::unique_ptr<AdamW> optimizer_;
};

}  // namespace octet::test
