// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "octet/gemm/gemm.hpp"
#include "octet/nn/recipe.hpp"
#include "octet/ops/delayed_scaling.hpp"
#include "octet/ops/quantize.hpp"
#include "octet/runtime/tensor.hpp"

namespace octet {

struct LinearConfig {
  std::int64_t in_features = 0;
  std::int64_t out_features = 0;
  std::int64_t max_tokens = 0;
  /// False: BF16 GEMMs of operands that are rounded to BF16 where they are not.
  bool fp8 = true;
  Fp8Recipe recipe = Fp8Recipe::tensorwise;
  /// Default: default_format(recipe), so hybrid with a scale per tensor, else e4m3.
  std::optional<Fp8Format> format = {};
  /// Of y; fast is what Transformer Engine takes there with a scale per tensor. The sums of
  /// gradients are promoted, and so are all of products with scales of blocks.
  Accumulation forward_accumulation = Accumulation::promoted;
  /// Of the weight that calls pass: e4m3 with a scale for the whole tensor (an Engine's compute
  /// weight), f32, bf16 or f16.
  /// e4m3 codes go into FP8 GEMMs as they are, for blockwise and mxfp8 with that scale for every
  /// block unless calls pass a block_weight; the others are cast by the recipe (delayed too casts
  /// them by their own amax).
  DType weight_dtype = DType::e4m3;
  /// Calls pass a bias.
  bool bias = false;
  /// y = gelu(x w^T + bias), the tanh form. What gelu was applied to is kept in BF16.
  bool gelu = false;
  /// Keeps what calls make of the weight (casts, transposed copy, copy of the scale) until
  /// weight_changed(), instead of making it anew in every call: for more than one micro-batch per
  /// update. Costs up to 2 bytes per element, with BF16 GEMMs 2.
  bool cache_weight = false;
  /// Optional, device memory: what casts of activations and their gradients could not keep.
  CastCounters* counters = nullptr;
  /// Optional device word, set to 1 by an FP8 Linear when something that it casts is not finite,
  /// which the saturating cast would hide. A BF16 Linear hides nothing and leaves it alone.
  std::uint32_t* nonfinite = nullptr;
};

struct LinearForward {
  TensorView x = {};       ///< [T, K] f32, bf16 or f16; T <= max_tokens, any T
  ScaledView weight = {};  ///< [N, K] of weight_dtype; with its scale if that is e4m3
  /// Instead of `weight`, with the recipe blockwise and weight_dtype e4m3: [N, K] e4m3 with scales
  /// of tiles, as AdamW::block_weight() has them. The GEMM takes it as it is.
  BlockScaledView block_weight = {};
  /// [N] f32, bf16 or f16, where the configuration says so: added in BF16, so one that is not BF16
  /// is rounded first.
  TensorView bias = {};
  TensorView y = {};  ///< [T, N] f32 or bf16, overwritten
  /// False leaves no trace in delayed scaling: the cast takes the scale, but its amax is not
  /// recorded. For validation, and for all but one of the forwards of a recomputed activation.
  bool record_amax = true;
  /// False keeps nothing for a backward, which still belongs to the last forward that did.
  bool save_for_backward = true;
};

struct LinearBackward {
  TensorView dy = {};                 ///< [T, N] f32, bf16 or f16
  ScaledView weight = {};             ///< as in the forward
  BlockScaledView block_weight = {};  ///< as in the forward
  /// Optional [K, N] e4m3, for N a multiple of 16: the codes of an e4m3 weight transposed, as
  /// AdamW writes them with WeightFormat::e4m3_and_transpose. Without it dx costs a transposition.
  TensorView weight_transposed = {};
  /// Optional, the same for block_weight: [K, N] e4m3 with scales of tiles, as AdamW writes it with
  /// WeightFormat::e4m3_tile_and_transpose. Without it codes and scales are transposed.
  BlockScaledView block_weight_transposed = {};
  TensorView dx = {};  ///< [T, K] f32 or bf16, overwritten; optional
  /// Optional [T, K] bf16: x is gelu(input_pre_activation), of a Linear before this one that has it
  /// as its pre_activation(). dx becomes the gradient for that: the GEMM multiplies by gelu'.
  TensorView input_pre_activation = {};
  /// With gelu: dy is the gradient for this Linear's own pre_activation() already, because the
  /// Linear after it was given that as its input_pre_activation.
  bool dy_of_pre_activation = false;
  /// [N, K] f32 or bf16; or e4m3 with a scale, a product rounded to BF16 and cast with current
  /// scaling. Optional.
  ScaledView dw = {};
  TensorView dbias = {};  ///< [N] f32 or bf16: sums of the columns of dy; optional
  /// Add to dw and dbias, which hold the sum of the micro-batches before, instead of overwriting.
  /// Not for dw in e4m3.
  bool accumulate = false;
};

/// y[T, N] = x[T, K] * w[N, K]^T and its gradients, optionally with bias and GELU. Weight, bias and
/// their gradients belong to the caller. Keeps the cast activation between forward and backward.
///
/// FP8 GEMMs of every recipe: y from x and w, dx from dy and w^T, dw from dy^T and x^T, each
/// operand in blocks along the sum, so x and dy are cast into both orientations in one read.
/// T, K and N may be anything; what no backend does without conversions (the registry's report says
/// why) takes a backend that converts, and an epilogue that no GEMM takes is a step of its own.
///
/// Scratch comes from the context's workspace, reserved by the constructor; calls take no device
/// memory and do not synchronise. The first call for a token count makes the GEMMs' plans on the
/// host, and with delayed scaling measures, so a graph is captured after one ordinary forward and
/// backward; with cache_weight the first micro-batch after weight_changed() and the later ones are
/// two graphs.
/// Sources: FP8-LM (arXiv 2310.18313) for the formats, Transformer Engine for the recipes.
class Linear {
 public:
  /// The registry must outlive it and have its backends by now: add(), force() and keep_ranking()
  /// come before. Throws octet::Error naming the field for a configuration that
  /// cannot work, and with the registry's report if no backend can run one of its GEMMs.
  Linear(GemmRegistry& gemms, const LinearConfig& config);
  ~Linear();
  Linear(Linear&&) noexcept;
  Linear& operator=(Linear&&) noexcept;

  /// For set-up: the registry times its backends for the GEMMs of these two calls, once for every
  /// shape, and they run on the fastest from then on. Nothing of the arguments is read but shapes,
  /// dtypes and what is given at all. Allocates and synchronises.
  void prepare(const LinearForward& forward, const LinearBackward& backward);

  /// What these two calls would run, for set-up: for every product the problem, the backend that
  /// gets it, what is done around it, and the registry's report, which says why not the others. Of
  /// the arguments the same counts as in prepare(). Nothing without tokens.
  std::string report(const LinearForward& forward, const LinearBackward& backward);

  /// Throws octet::Error naming the argument before anything has changed. No output may overlap
  /// what is read or another output, here and in backward().
  void forward(const LinearForward& args);
  /// Gradients for the last forward that saved its input.
  void backward(const LinearBackward& args);

  /// What gelu was applied to in the last forward that saved its input: [T, N] bf16. Valid until
  /// the next one. Throws without gelu.
  TensorView pre_activation() const;

  /// What was made of the weight is out of date: to be called after every optimizer step, with
  /// cache_weight.
  void weight_changed();

  /// The scales of activations and of their gradients, for DelayedScaling; none for other recipes.
  /// Each is set by the first cast, which goes by its own amax (without margin) because no step has
  /// left a scale; if that is 0 or not finite, the scale is 1 until a step has recorded another.
  /// They are this object's: it must outlive whoever holds them.
  std::vector<DelayedScaling::Entry> delayed_entries() const;
  /// The scales in delayed_entries() have been set (restored from a checkpoint, say), so that the
  /// next casts take them instead of measuring.
  void keep_scales();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace octet
