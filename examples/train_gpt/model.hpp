// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "kernels.hpp"
#include "octet/checkpoint/checkpoint.hpp"
#include "octet/engine/engine.hpp"
#include "octet/nn/linear.hpp"

namespace train_gpt {

/// How FP8 matrix products scale their operands, and in which formats.
struct Fp8Settings {
  octet::Fp8Recipe recipe = octet::Fp8Recipe::tensorwise;
  octet::Fp8Format format = octet::Fp8Format::hybrid;
  octet::DelayedScalingConfig delayed = {};
};

/// Validation leaves no trace: nothing for backward(), nothing in delayed scaling.
enum class Pass { training, validation };

struct GptConfig {
  int layers = 0;
  int width = 0;
  int heads = 0;
  int context = 0;
  int micro_batches = 1;  ///< whose gradients add up to that of the mean loss
  Fp8Settings fp8 = {};
};

constexpr std::int64_t kVocabulary = 256;  // bytes

/// A decoder-only transformer over bytes: token and position embedding, pre-LayerNorm blocks of
/// causal attention and a GELU MLP, final LayerNorm, head tied to the token embedding. Weights live
/// in the engine; matrix products are octet::Linear; everything else is Kernels.
class Gpt {
 public:
  /// Registers the parameters with GPT-2's initialisation, freezes the engine and allocates the
  /// activations of `rows` windows. Waits for the stream.
  Gpt(const octet::Context& ctx, octet::Engine& engine, octet::GemmRegistry& gemms,
      const Kernels& kernels, const GptConfig& config, std::int64_t rows, std::uint64_t seed);

  /// Mean loss of the windows, of one micro-batch, into *loss (device memory). Keeps what
  /// backward() needs.
  void forward(const Windows& windows, float* loss, Pass pass = Pass::training);
  /// Gradients of the last forward() for training, handed to the engine one by one.
  void backward(const Windows& windows);
  /// To be called after every step of the engine: with delayed scaling the next scales.
  void end_step();

  /// What a checkpoint keeps beside the engine: the histories and scales of delayed scaling.
  std::vector<octet::ExtraState> extra_states() const;
  /// extra_states() have been filled from a checkpoint.
  void restored();

 private:
  /// A parameter of the engine.
  struct Weight {
    octet::ParamId id;
    octet::Shape shape;
  };
  /// An embedding, and where it is decoded if its weight has scales of tiles.
  struct EmbeddingTable {
    Weight weight;
    octet::Tensor decoded;
  };
  /// A weight [out, in] and the products with it, which exist once the engine is frozen.
  struct Matrix {
    Weight weight;
    std::optional<octet::Linear> linear = std::nullopt;
  };
  struct Norm {
    Weight gain, bias;
    octet::Tensor mean, rstd;
  };
  /// One block and the activations that its backward pass reads again.
  struct Block {
    Norm attention_norm;
    Matrix qkv, out;
    Norm mlp_norm;
    Matrix up, down;
    int unit = 0;
    octet::Tensor input, qkv_values, attended, log_sum, middle, hidden;
  };
  class Registration;

  void register_parameters(octet::Engine& engine, std::uint64_t seed);
  void allocate(octet::GemmRegistry& gemms);

  /// Around work with the weights of a unit, which may be cut over the ranks.
  template <class Work>
  void with_unit(int unit, const Work& work);
  void block_forward(Block& block, float* output);
  void block_backward(Block& block);
  void norm_forward(Norm& norm, const float* x, float* y);
  void norm_backward(Norm& norm, const float* dy, const float* x);
  void matrix_forward(Matrix& matrix, const octet::Tensor& x, const octet::Tensor& y);
  void matrix_backward(Matrix& matrix, const octet::Tensor& dy, const octet::Tensor& dx,
                       const octet::Tensor& dw);
  void hand_over(const Weight& weight, const octet::Tensor& gradient);

  octet::ScaledView table_values(const EmbeddingTable& table) const;
  /// What a product takes of a weight: one of these, the other is empty.
  octet::ScaledView weight_of(const Weight& weight) const;
  octet::BlockScaledView block_weight_of(const Weight& weight) const;
  bool has_tiles(const Weight& weight) const;
  const float* vector_of(const Weight& weight) const;
  octet::Tensor floats(std::int64_t count) const;
  octet::TensorView matrix_view(const octet::Tensor& tensor, octet::Shape shape) const;

  octet::Context ctx_;
  Pass pass_ = Pass::training;  ///< of the forward that is running
  octet::Engine& engine_;
  const Kernels& kernels_;
  GptConfig config_;
  std::int64_t tokens_;
  AttentionShape attention_;

  std::optional<octet::DelayedScaling> delayed_;
  std::vector<octet::DelayedScaling::Entry> delayed_entries_;
  EmbeddingTable token_table_, position_table_;
  std::vector<Block> blocks_;
  /// Units: the embedding tables, which the head shares, are the first, each block is one, the last
  /// norm is the last.
  static constexpr int kTables = 0;
  int final_unit_ = 0;
  Norm final_norm_;
  Matrix head_;

  /// Output of the last block; scratch of one and of four widths, for values on the way forward and
  /// for gradients on the way back; logits, then their gradient.
  octet::Tensor last_, narrow_, wide_, logits_, token_loss_;
  octet::Tensor dresidual_, dmatrix_, dtokens_, dgain_, dbias_;
};

}  // namespace train_gpt
