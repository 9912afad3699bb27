// SPDX-License-Identifier: Apache-2.0
#include "model.hpp"

#include <algorithm>
#include <cmath>
#include <functional>
#include <numbers>
#include <utility>

#include "random.hpp"

namespace train_gpt {
namespace {

/// A standard normal value times `deviation`: Box-Muller over the counter-based generator.
float normal_value(std::uint64_t seed, int parameter, std::int64_t i, double deviation) {
  const std::uint64_t bits =
      random_bits(seed, static_cast<std::uint64_t>(parameter), static_cast<std::uint64_t>(i));
  const double u = (static_cast<double>(bits >> 32) + 0.5) * 0x1p-32;
  const double v = static_cast<double>(bits & 0xFFFFFFFFu) * 0x1p-32;
  const double radius = deviation * std::sqrt(-2.0 * std::log(u));
  return static_cast<float>(radius * std::cos(2.0 * std::numbers::pi * v));
}

/// Fills an f32 tensor with value(i), made on the host and copied in parts.
template <class Value>
void fill_from_host(const octet::Context& ctx, const octet::TensorView& values,
                    const Value& value) {
  constexpr std::int64_t kPart = std::int64_t{4} << 20;
  std::vector<float> part;
  for (std::int64_t begin = 0; begin < values.numel(); begin += kPart) {
    part.resize(static_cast<std::size_t>(std::min(kPart, values.numel() - begin)));
    const auto count = static_cast<std::int64_t>(part.size());
#pragma omp parallel for
    for (std::int64_t i = 0; i < count; ++i) part[static_cast<std::size_t>(i)] = value(begin + i);
    octet::copy_bytes(ctx, values.as<float>() + begin, part.data(), part.size() * sizeof(float));
    ctx.synchronize();
  }
}

}  // namespace

/// Adds parameters to the engine, those of one unit after the other.
class Gpt::Registration {
 public:
  Registration(octet::Engine& engine, std::uint64_t seed) : engine_(engine), seed_(seed) {}

  void next_unit() { ++unit_; }
  /// The number of the unit that parameters belong to now.
  int unit() const { return unit_; }

  Weight matrix(const std::string& name, std::int64_t rows, std::int64_t columns,
                double deviation) {
    return add(name, {rows, columns},
               [seed = seed_, parameter = count_, deviation](const octet::Context& ctx,
                                                             const octet::TensorView& values) {
                 fill_from_host(ctx, values, [&](std::int64_t i) {
                   return normal_value(seed, parameter, i, deviation);
                 });
               });
  }

  /// Weight decay is for matrices only.
  Weight vector(const std::string& name, std::int64_t count, float value) {
    return add(
        name, {count},
        [value](const octet::Context& ctx, const octet::TensorView& values) {
          fill_from_host(ctx, values, [&](std::int64_t) { return value; });
        },
        octet::AdamWGroup{.weight_decay = 0.0f});
  }

  Norm norm(const std::string& name, std::int64_t width) {
    return {.gain = vector(name + ".gain", width, 1.0f),
            .bias = vector(name + ".bias", width, 0.0f),
            .mean = {},
            .rstd = {}};
  }

 private:
  Weight add(const std::string& name, octet::Shape shape,
             std::function<void(const octet::Context&, const octet::TensorView&)> fill,
             const octet::AdamWGroup& group = {}) {
    ++count_;
    return {
        engine_.add(
            {.name = name, .shape = shape, .fill = std::move(fill), .unit = unit_, .group = group}),
        shape};
  }

  octet::Engine& engine_;
  std::uint64_t seed_;
  int count_ = 0;  ///< of parameters so far
  int unit_ = 0;
};

Gpt::Gpt(const octet::Context& ctx, octet::Engine& engine, octet::GemmRegistry& gemms,
         const Kernels& kernels, const GptConfig& config, std::int64_t rows, std::uint64_t seed)
    : ctx_(ctx),
      engine_(engine),
      kernels_(kernels),
      config_(config),
      tokens_(rows * config.context),
      attention_{rows, config.context, config.heads, config.width} {
  register_parameters(engine, seed);
  allocate(gemms);
}

void Gpt::register_parameters(octet::Engine& engine, std::uint64_t seed) {
  constexpr double kDeviation = 0.02;
  // Each block adds two branches to the residual stream: their variances must sum to one share.
  const double branch = kDeviation / std::sqrt(2.0 * config_.layers);
  const std::int64_t width = config_.width;
  Registration add(engine, seed);
  token_table_.weight = add.matrix("token_embedding", kVocabulary, width, kDeviation);
  position_table_.weight = add.matrix("position_embedding", config_.context, width, kDeviation);
  for (int layer = 0; layer < config_.layers; ++layer) {
    const std::string name = "block." + std::to_string(layer) + ".";
    Block block;
    add.next_unit();
    block.unit = add.unit();
    block.attention_norm = add.norm(name + "attention_norm", width);
    block.qkv.weight = add.matrix(name + "qkv", 3 * width, width, kDeviation);
    block.out.weight = add.matrix(name + "out", width, width, branch);
    block.mlp_norm = add.norm(name + "mlp_norm", width);
    block.up.weight = add.matrix(name + "up", 4 * width, width, kDeviation);
    block.down.weight = add.matrix(name + "down", width, 4 * width, branch);
    blocks_.push_back(std::move(block));
  }
  add.next_unit();
  final_unit_ = add.unit();
  final_norm_ = add.norm("final_norm", width);
  head_.weight = token_table_.weight;
  engine.freeze();
}

void Gpt::end_step() {
  if (delayed_) delayed_->update();
}

std::vector<octet::ExtraState> Gpt::extra_states() const {
  if (!delayed_) return {};
  const auto count = static_cast<std::size_t>(delayed_->count());
  const auto length = static_cast<std::size_t>(config_.fp8.delayed.amax_history_len);
  std::vector<octet::ExtraState> list{
      {"delayed.history", delayed_->history(), count * length * sizeof(float)},
      {"delayed.next", delayed_->next(), count * sizeof(std::uint32_t)}};
  for (std::size_t i = 0; i < delayed_entries_.size(); ++i) {
    list.push_back({"delayed.scale." + std::to_string(i), delayed_entries_[i].scale,
                    sizeof(octet::TensorScale)});
  }
  return list;
}

void Gpt::restored() {
  if (!delayed_) return;
  for (Block& block : blocks_) {
    for (Matrix* matrix : {&block.qkv, &block.out, &block.up, &block.down}) {
      matrix->linear->keep_scales();
    }
  }
  head_.linear->keep_scales();
}

void Gpt::allocate(octet::GemmRegistry& gemms) {
  const std::int64_t width = config_.width;
  const auto make_linear = [&](Matrix& matrix) {
    const octet::DType dtype = octet::dtype_of(engine_.weight_format(matrix.weight.id));
    octet::LinearConfig linear{.in_features = matrix.weight.shape[1],
                               .out_features = matrix.weight.shape[0],
                               .max_tokens = tokens_,
                               .fp8 = octet::is_fp8(dtype),
                               .weight_dtype = dtype,
                               .nonfinite = engine_.nonfinite_flag()};
    if (linear.fp8) linear.recipe = config_.fp8.recipe, linear.format = config_.fp8.format;
    matrix.linear.emplace(gemms, linear);
    for (const auto& entry : matrix.linear->delayed_entries()) {
      delayed_entries_.push_back(entry);
    }
  };
  const auto make_norm = [&](Norm& norm) {
    norm.mean = floats(tokens_);
    norm.rstd = floats(tokens_);
  };
  for (Block& block : blocks_) {
    for (Norm* norm : {&block.attention_norm, &block.mlp_norm}) make_norm(*norm);
    for (Matrix* matrix : {&block.qkv, &block.out, &block.up, &block.down}) make_linear(*matrix);
    block.input = floats(tokens_ * width);
    block.qkv_values = floats(tokens_ * 3 * width);
    block.attended = floats(tokens_ * width);
    block.log_sum = floats(tokens_ * config_.heads);
    block.middle = floats(tokens_ * width);
    block.hidden = floats(tokens_ * 4 * width);
  }
  make_norm(final_norm_);
  make_linear(head_);
  if (config_.fp8.recipe == octet::Fp8Recipe::delayed) {
    delayed_.emplace(ctx_, config_.fp8.delayed, delayed_entries_);
  }
  for (EmbeddingTable* table : {&token_table_, &position_table_}) {
    if (has_tiles(table->weight)) table->decoded = {ctx_, octet::DType::f32, table->weight.shape};
  }
  last_ = floats(tokens_ * width);
  narrow_ = floats(tokens_ * width);
  wide_ = floats(tokens_ * 4 * width);
  logits_ = floats(tokens_ * kVocabulary);
  token_loss_ = floats(tokens_);
  dresidual_ = floats(tokens_ * width);
  dmatrix_ = floats(std::max<std::int64_t>(4 * width, config_.context) * width);
  dtokens_ = floats(kVocabulary * width);
  dgain_ = floats(width);
  dbias_ = floats(width);
  ctx_.reserve_workspace(kernels_.workspace_bytes(attention_, kVocabulary));
}

template <class Work>
void Gpt::with_unit(int unit, const Work& work) {
  engine_.gather(unit);
  work();
  engine_.release(unit);
}

void Gpt::forward(const Windows& windows, float* loss, Pass pass) {
  pass_ = pass;
  with_unit(kTables, [&] {
    kernels_.embedding_forward(ctx_, windows, table_values(token_table_),
                               table_values(position_table_), blocks_.front().input.as<float>());
  });
  for (std::size_t i = 0; i < blocks_.size(); ++i) {
    octet::Tensor& output = i + 1 < blocks_.size() ? blocks_[i + 1].input : last_;
    with_unit(blocks_[i].unit, [&] { block_forward(blocks_[i], output.as<float>()); });
  }
  with_unit(final_unit_,
            [&] { norm_forward(final_norm_, last_.as<float>(), narrow_.as<float>()); });
  with_unit(kTables, [&] { matrix_forward(head_, narrow_, logits_); });
  kernels_.cross_entropy(ctx_, windows, kVocabulary, tokens_ * config_.micro_batches,
                         logits_.as<float>(), token_loss_.as<float>(), loss);
}

void Gpt::block_forward(Block& block, float* output) {
  const std::int64_t count = tokens_ * config_.width;
  norm_forward(block.attention_norm, block.input.as<float>(), narrow_.as<float>());
  matrix_forward(block.qkv, narrow_, block.qkv_values);
  kernels_.attention_forward(ctx_, attention_, block.qkv_values.as<float>(),
                             block.attended.as<float>(), block.log_sum.as<float>());
  matrix_forward(block.out, block.attended, narrow_);
  kernels_.add(ctx_, block.input.as<float>(), narrow_.as<float>(), count, block.middle.as<float>());

  norm_forward(block.mlp_norm, block.middle.as<float>(), narrow_.as<float>());
  matrix_forward(block.up, narrow_, block.hidden);
  kernels_.gelu_forward(ctx_, block.hidden.as<float>(), 4 * count, wide_.as<float>());
  matrix_forward(block.down, wide_, narrow_);
  kernels_.add(ctx_, block.middle.as<float>(), narrow_.as<float>(), count, output);
}

void Gpt::backward(const Windows& windows) {
  // The head and the embedding share a weight: their gradients are summed before the engine sees
  // them.
  with_unit(kTables, [&] { matrix_backward(head_, logits_, narrow_, dtokens_); });
  octet::zero_bytes(ctx_, dresidual_.view().data, dresidual_.bytes());
  with_unit(final_unit_,
            [&] { norm_backward(final_norm_, narrow_.as<float>(), last_.as<float>()); });
  for (std::size_t i = blocks_.size(); i-- > 0;) {
    with_unit(blocks_[i].unit, [&] { block_backward(blocks_[i]); });
  }
  kernels_.embedding_backward(ctx_, windows, dresidual_.as<float>(), kVocabulary, config_.width,
                              dtokens_.as<float>(), dmatrix_.as<float>());
  hand_over(token_table_.weight, dtokens_);
  hand_over(position_table_.weight, dmatrix_);
}

void Gpt::block_backward(Block& block) {
  const auto trained_matrix_backward = [&](Matrix& matrix, const octet::Tensor& dy,
                                           const octet::Tensor& dx) {
    matrix_backward(matrix, dy, dx, dmatrix_);
    hand_over(matrix.weight, dmatrix_);
  };
  trained_matrix_backward(block.down, dresidual_, wide_);
  kernels_.gelu_backward(ctx_, block.hidden.as<float>(), tokens_ * 4 * config_.width,
                         wide_.as<float>());
  trained_matrix_backward(block.up, wide_, narrow_);
  norm_backward(block.mlp_norm, narrow_.as<float>(), block.middle.as<float>());

  trained_matrix_backward(block.out, dresidual_, narrow_);
  kernels_.attention_backward(ctx_, attention_, narrow_.as<float>(), block.qkv_values.as<float>(),
                              block.attended.as<float>(), block.log_sum.as<float>(),
                              wide_.as<float>());
  trained_matrix_backward(block.qkv, wide_, narrow_);
  norm_backward(block.attention_norm, narrow_.as<float>(), block.input.as<float>());
}

void Gpt::norm_forward(Norm& norm, const float* x, float* y) {
  kernels_.layernorm_forward(ctx_, x, vector_of(norm.gain), vector_of(norm.bias), tokens_,
                             config_.width, y, norm.mean.as<float>(), norm.rstd.as<float>());
}

void Gpt::norm_backward(Norm& norm, const float* dy, const float* x) {
  kernels_.layernorm_backward(ctx_, dy, x, vector_of(norm.gain), norm.mean.as<float>(),
                              norm.rstd.as<float>(), tokens_, config_.width, dresidual_.as<float>(),
                              dgain_.as<float>(), dbias_.as<float>());
  hand_over(norm.gain, dgain_);
  hand_over(norm.bias, dbias_);
}

void Gpt::matrix_forward(Matrix& matrix, const octet::Tensor& x, const octet::Tensor& y) {
  const octet::Shape& shape = matrix.weight.shape;
  const bool trains = pass_ == Pass::training;
  matrix.linear->forward({.x = matrix_view(x, {tokens_, shape[1]}),
                          .weight = weight_of(matrix.weight),
                          .block_weight = block_weight_of(matrix.weight),
                          .y = matrix_view(y, {tokens_, shape[0]}),
                          .record_amax = trains,
                          .save_for_backward = trains});
}

void Gpt::matrix_backward(Matrix& matrix, const octet::Tensor& dy, const octet::Tensor& dx,
                          const octet::Tensor& dw) {
  const octet::Shape& shape = matrix.weight.shape;
  matrix.linear->backward({.dy = matrix_view(dy, {tokens_, shape[0]}),
                           .weight = weight_of(matrix.weight),
                           .block_weight = block_weight_of(matrix.weight),
                           .dx = matrix_view(dx, {tokens_, shape[1]}),
                           .dw = {matrix_view(dw, shape), nullptr}});
}

void Gpt::hand_over(const Weight& weight, const octet::Tensor& gradient) {
  engine_.add_gradient(weight.id, matrix_view(gradient, weight.shape));
}

octet::ScaledView Gpt::table_values(const EmbeddingTable& table) const {
  if (!has_tiles(table.weight)) return engine_.weight(table.weight.id);
  engine_.weight_as(table.weight.id, table.decoded);
  return {table.decoded.view(), nullptr};
}

octet::ScaledView Gpt::weight_of(const Weight& weight) const {
  return has_tiles(weight) ? octet::ScaledView{} : engine_.weight(weight.id);
}

octet::BlockScaledView Gpt::block_weight_of(const Weight& weight) const {
  return has_tiles(weight) ? engine_.block_weight(weight.id) : octet::BlockScaledView{};
}

bool Gpt::has_tiles(const Weight& weight) const {
  return octet::has_block_scales(engine_.weight_format(weight.id));
}

const float* Gpt::vector_of(const Weight& weight) const {
  return engine_.weight(weight.id).data.as<float>();
}

octet::Tensor Gpt::floats(std::int64_t count) const { return {ctx_, octet::DType::f32, {count}}; }

octet::TensorView Gpt::matrix_view(const octet::Tensor& tensor, octet::Shape shape) const {
  return {tensor.view().data, octet::DType::f32, shape, ctx_.device()};
}

}  // namespace train_gpt
