// SPDX-License-Identifier: Apache-2.0
// The trainer's own kernels: everything of the model that is not a matrix product. One table per
// kind of device, so that the model is one text for both. Activations and gradients are f32 in the
// context's device memory, row-major; "tokens" are rows * context. Every kernel runs in stream
// order and is deterministic: sums have a fixed order, there are no float atomics.
#pragma once

#include <cstddef>
#include <cstdint>

#include "octet/runtime/context.hpp"

namespace train_gpt {

/// Windows of text in device memory, [rows, context + 1] bytes: the model reads the first `context`
/// bytes of a row and predicts the last `context`.
struct Windows {
  const std::uint8_t* text = nullptr;
  std::int64_t rows = 0;
  std::int64_t context = 0;

  constexpr std::int64_t tokens() const { return rows * context; }
};

struct AttentionShape {
  std::int64_t rows = 0;
  std::int64_t context = 0;
  std::int64_t heads = 0;
  std::int64_t width = 0;

  constexpr std::int64_t head_width() const { return width / heads; }
};

constexpr std::int64_t kMaxHeadWidth = 128;
constexpr float kLayerNormEps = 1e-5f;

struct Kernels {
  /// x[token] = token_table[byte] + position_table[position]. The tables are engine weights of at
  /// most one scale: [vocabulary, width] and [context, width].
  void (*embedding_forward)(const octet::Context&, const Windows&, const octet::ScaledView& tokens,
                            const octet::ScaledView& positions, float* x);
  /// Adds the gradient of the token table to dtokens (the tied head has left its own there) and
  /// overwrites dpositions.
  void (*embedding_backward)(const octet::Context&, const Windows&, const float* dx,
                             std::int64_t vocabulary, std::int64_t width, float* dtokens,
                             float* dpositions);

  /// y = (x - mean) * rstd * gain + bias over each row of `width`; keeps mean and rstd.
  void (*layernorm_forward)(const octet::Context&, const float* x, const float* gain,
                            const float* bias, std::int64_t tokens, std::int64_t width, float* y,
                            float* mean, float* rstd);
  /// Adds to dx (the residual stream's gradient); overwrites dgain and dbias.
  void (*layernorm_backward)(const octet::Context&, const float* dy, const float* x,
                             const float* gain, const float* mean, const float* rstd,
                             std::int64_t tokens, std::int64_t width, float* dx, float* dgain,
                             float* dbias);

  /// Causal multi-head attention. qkv: [tokens, 3 * width] with all heads of q, then k, then v.
  /// out: [tokens, width]. log_sum: [rows, heads, context], log of the softmax denominator.
  void (*attention_forward)(const octet::Context&, const AttentionShape&, const float* qkv,
                            float* out, float* log_sum);
  void (*attention_backward)(const octet::Context&, const AttentionShape&, const float* dout,
                             const float* qkv, const float* out, const float* log_sum, float* dqkv);

  void (*gelu_forward)(const octet::Context&, const float* x, std::int64_t count, float* y);
  /// dx = dy * gelu'(x), written over dy.
  void (*gelu_backward)(const octet::Context&, const float* x, std::int64_t count, float* dy);
  /// out = a + b.
  void (*add)(const octet::Context&, const float* a, const float* b, std::int64_t count,
              float* out);

  /// Mean cross-entropy of the next byte into *loss. token_loss: [tokens] scratch. Overwrites the
  /// logits [tokens, vocabulary] with the gradient of this batch's part in the mean over
  /// `mean_tokens`, those of all micro-batches.
  void (*cross_entropy)(const octet::Context&, const Windows&, std::int64_t vocabulary,
                        std::int64_t mean_tokens, float* logits, float* token_loss, float* loss);

  /// Workspace that the kernels above take from the context.
  std::size_t (*workspace_bytes)(const AttentionShape&, std::int64_t vocabulary);

  /// A stream of the device for a Context, and its end. Null streams on a CPU. Blocks of an urgent
  /// one are the first to get what a multiprocessor has free.
  CUstream_st* (*create_stream)(int device, bool urgent);
  void (*destroy_stream)(int device, CUstream_st* stream);
};

const Kernels& cpu_kernels();
/// Throws octet::Error in a build without CUDA.
const Kernels& cuda_kernels();

}  // namespace train_gpt
