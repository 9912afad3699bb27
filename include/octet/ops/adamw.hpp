// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <optional>

#include "octet/ops/reduce_mean.hpp"
#include "octet/ops/segment.hpp"
#include "octet/ops/state_format.hpp"
#include "octet/runtime/context.hpp"

namespace octet {

/// Hyper-parameters of a group of parameters, as the kernels read them.
struct AdamwHyper {
  float lr_factor = 1.0f;
  float beta1 = 0.9f, beta2 = 0.95f, eps = 1e-8f, weight_decay = 0.0f;
  bool operator==(const AdamwHyper&) const = default;
};

/// What a group of parameters has of its own; the rest is the configuration's.
struct AdamWGroup {
  /// The learning rate of a step times this is the group's.
  float lr_factor = 1.0f;
  std::optional<float> beta1 = {}, beta2 = {}, eps = {}, weight_decay = {};
};

/// Hyper-parameters of AdamW ("Decoupled Weight Decay Regularization", Loshchilov and Hutter,
/// arXiv 1711.05101), with PyTorch's names and placement of eps.
struct AdamWConfig {
  float beta1 = 0.9f;
  float beta2 = 0.95f;
  /// Outside the root, after bias correction; 2^-100 to 2^60.
  float eps = 1e-8f;
  float weight_decay = 0.0f;
  /// Seed of the stochastic rounding of stored states.
  std::uint64_t seed = 0;
  /// False is Adam with L2 regularisation (Kingma and Ba, arXiv 1412.6980): weight_decay * w joins
  /// the clipped gradient, and with it both moments, instead of shrinking the weight.
  bool decoupled_weight_decay = true;
  /// Goes up the gradient instead of down.
  bool maximize = false;
  /// How states in fewer than 32 bits are rounded when they are stored: unbiased with random bits,
  /// or to nearest, ties to even.
  bool stochastic_rounding = true;
  /// Refused: the running maximum of v would be a fourth state, and the bound on the update that
  /// the scales rest on does not cover it.
  bool amsgrad = false;

  /// The hyper-parameters of a group.
  AdamwHyper of(const AdamWGroup& group = {}) const {
    return {.lr_factor = group.lr_factor,
            .beta1 = group.beta1.value_or(beta1),
            .beta2 = group.beta2.value_or(beta2),
            .eps = group.eps.value_or(eps),
            .weight_decay = group.weight_decay.value_or(weight_decay)};
  }
};

/// One tensor of an update, as device memory sees it. Every pointer belongs to the caller.
struct alignas(16) AdamwTensor {
  /// Reduced gradient: e4m3, bf16 or f32. Its scale holds amax too, which bounds the update: no
  /// element may be larger, or its new states saturate.
  const void* gradient = nullptr;
  TensorScale* gradient_scale = nullptr;
  /// Master weight; of a split one the remainder, an int8 per element.
  void* master = nullptr;
  TensorScale* master_scale = nullptr;
  /// First moment, and the block scales (to decode) of a block format.
  void* m = nullptr;
  float* m_blocks = nullptr;
  TensorScale* m_scale = nullptr;
  /// Second moment, and the block scales (to decode) of a block format.
  void* v = nullptr;
  float* v_blocks = nullptr;
  TensorScale* v_scale = nullptr;
  /// Compute weight written by the update; null where none is or where the FP32 master is it. Its
  /// scale is 1 where its blocks have scales, and has its amax.
  void* weight = nullptr;
  TensorScale* weight_scale = nullptr;
  /// Scales of the weight's blocks in the layout of its granularity, padding included.
  float* weight_blocks = nullptr;
  /// Of a format that is also transposed: [columns, rows], with the weight's scale or, of tiles,
  /// with scales of its own.
  void* weight_transposed = nullptr;
  float* weight_transposed_blocks = nullptr;
  std::int64_t rows = 0, columns = 0;

  DType gradient_dtype = DType::f32;
  StateFormats formats = {};
  /// Whether gradient, master and weight are indexed by Segment::local (a shard: this rank's pieces
  /// one after the other) or by Segment::begin (the whole tensor). m and v are always shards, the
  /// scales of a weight's blocks always whole; a transposed weight is whole, and so is the weight
  /// beside it.
  bool gradient_is_shard = false;
  bool master_is_shard = false;
  bool weight_is_shard = false;
  /// True: the gradient's amax is not known yet; adamw_measure finds it.
  bool measure_amax = false;
  /// True: m, v and a master that is not the weight lie across a link, in host memory. On CUDA they
  /// are then not asked for ahead, which pays only where the second-level cache keeps them.
  bool states_are_far = false;
  std::int32_t group = 0;  ///< index into AdamwArgs::groups
  /// Global index of the tensor's first element for the random words; a multiple of 4.
  std::uint64_t random_base = 0;
};

/// A further place of a compute weight, in device memory: whole, in the format of the first.
struct WeightCopy {
  void* data = nullptr;
  float* blocks = nullptr;  ///< of e4m3_tile: the scales of its tiles, in their layout
};

/// What the update of a tensor reads and writes of other ranks. Every pointer belongs to the
/// caller; a peer's memory that kernels can reach is as good as the device's own.
struct alignas(16) AdamwExchange {
  /// [ranks], device memory: the contributions whose mean is the gradient, in rank order; e4m3,
  /// bf16 or f32. That of rank r is decoded with scales[r * scale_stride].
  const RankGradient* gradients = nullptr;
  const TensorScale* scales = nullptr;
  std::int64_t scale_stride = 0;
  /// [copy_count], device memory: where the compute weight goes besides AdamwTensor::weight (f32:
  /// besides the master); of formats e4m3, bf16, f32 and e4m3_tile.
  const WeightCopy* copies = nullptr;
  std::int32_t ranks = 0, copy_count = 0;
  DType dtype = DType::f32;  ///< of the contributions
  bool is_aligned = true;    ///< all contributions and copies are aligned to 16 bytes
};

/// Scalars of a running optimizer, in device memory. `step`, `skipped` persist; the rest is
/// computed anew by adamw_prepare in every step.
struct AdamwScalars {
  std::int64_t step = 0;         ///< steps applied
  std::int64_t skipped = 0;      ///< steps skipped
  double sum_squares = 0.0;      ///< of the gradients, before clipping
  float norm = 0.0f;             ///< its root; 0 when no clipping was asked for
  std::uint32_t skip = 0;        ///< 1 if this step changes nothing
  float clip = 1.0f;             ///< factor of clipping, at most 1
  float gradient_factor = 1.0f;  ///< on every gradient: clip, negative when maximizing
  float lr = 0.0f;               ///< before the groups' factors
};

/// Scalars of one group in the running step.
struct AdamwGroupScalars {
  float lr = 0.0f;
  float beta1 = 0.0f, one_minus_beta1 = 0.0f;
  float beta2 = 0.0f, one_minus_beta2 = 0.0f;
  float root_factor = 0.0f;    ///< (1 - beta1^t) / sqrt(1 - beta2^t)
  float root_eps = 0.0f;       ///< eps (1 - beta1^t)
  float bound = 0.0f;          ///< largest |ratio| that exact Adam can reach at this step
  float l2 = 0.0f;             ///< weight decay that joins the gradient; 0 where decoupled
  float weight_factor = 1.0f;  ///< 1 - lr * weight_decay; 1 in L2 mode
};

/// One tensor in the running step: its group's scalars, how to decode the old state, how to encode
/// the new one. Scratch of the step.
struct alignas(16) AdamwTensorStep {
  AdamwGroupScalars group;
  float gradient_inv = 1.0f;  ///< decodes a gradient and clips it: gradient_factor * scale_inv
  float m_inv = 1.0f, m_scale = 1.0f, m_scale_inv = 1.0f;
  float v_inv = 1.0f, v_scale = 1.0f, v_scale_inv = 1.0f;
  float master_inv = 1.0f, master_scale = 1.0f, master_scale_inv = 1.0f;
  float weight_scale = 1.0f, weight_scale_inv = 1.0f;
  /// 1: all scales and bounds are far from the ends of FP32's range, so that a product of two
  /// factors is exact where the formulas multiply by one after the other.
  std::uint32_t ordinary = 0;
  /// On CUDA which row of kAdamwRows the update takes, counted from 1; 0: the general code.
  std::uint32_t row = 0;
};

/// What the blocks of a device's adamw_prepare tell one another; the CPU does not use it. All zero
/// before the first step. Steps that may overlap must not share it.
struct AdamwScratch {
  static constexpr int kMaxBlocks = 64;
  double sums[kMaxBlocks] = {};
  /// Of this step and the next in turn: how many blocks have voted, and in the upper half how many
  /// to skip.
  std::uint64_t votes[2] = {};
  std::uint32_t turn = 0;
};

struct AdamwArgs {
  const AdamwTensor* tensors = nullptr;  ///< [tensor_count], device memory
  std::int64_t tensor_count = 0;
  /// [segment_count], device memory: what this rank updates, as segments_of lists it.
  const Segment* segments = nullptr;
  std::int64_t segment_count = 0;
  const AdamwHyper* groups = nullptr;          ///< [group_count], device memory
  AdamwGroupScalars* group_scalars = nullptr;  ///< [group_count], device memory, written per step
  std::int64_t group_count = 0;
  AdamwScalars* scalars = nullptr;   ///< device memory
  AdamwTensorStep* steps = nullptr;  ///< [tensor_count], device memory, written per step
  AdamwScratch* scratch = nullptr;   ///< device memory, written per step

  /// [tensor_count], device memory; null where no tensor has anything to exchange.
  const AdamwExchange* exchanges = nullptr;
  /// True: the gradient of every tensor is the mean of AdamwExchange::gradients, which the update
  /// forms itself with the bits of reduce_mean into f32; AdamwTensor::gradient is not read, its
  /// dtype must be f32, and gradient_scale must be the f32 mean's, with amax = the bound A.
  bool sums_contributions = false;

  /// Modes and seed; the groups hold the hyper-parameters.
  AdamWConfig config = {};
  /// Learning rate: read from `lr_device` (device memory) by adamw_prepare when that is set, else
  /// `lr`, which must be 0 or more. One that is negative or not finite skips the step.
  float lr = 0.0f;
  const float* lr_device = nullptr;
  /// Gradients are scaled so that their norm is at most this; 0 means no clipping. When it is set,
  /// `segment_sums` must hold the sums of all `total_segments` segments of all ranks.
  float max_norm = 0.0f;
  const float* segment_sums = nullptr;
  std::int64_t total_segments = 0;
  /// Device word: not 0 means that a gradient is not finite and the step is skipped. Set back to 0.
  std::uint32_t* nonfinite = nullptr;
  /// [tensor_count], device memory; may be null. adamw_prepare adds 1 for every tensor whose
  /// gradient's amax is not finite in a step that it skips.
  std::int64_t* nonfinite_counts = nullptr;
};

/// One read of the gradients. Sums of squares of the decoded values, segment by segment, into
/// sums[Segment::index]: 256 lanes, of which lane l takes the runs of 16 elements l, l + 256, ...
/// one after the other, then a binary tree, all in FP32. For tensors with measure_amax also the
/// amax, as decoded, into the gradient's scale (which must hold 0 or a lower bound before), and
/// where `nonfinite` is set, 1 into it if a value of any tensor is not finite.
/// Stream-ordered, one launch. Deterministic; for finite values equal bits on CPU and CUDA and for
/// every sharding. Throws octet::Error with sums_contributions: nothing holds the means.
void adamw_measure(const Context& ctx, const AdamwArgs& args, float* sums);

/// First half of a step: norm and clip factor (a fixed binary tree over the segments in double),
/// decision to skip, step count, bias corrections, the new scales from the bounds of numerics
/// section 3. How to decode the old state is taken over into `steps`, the new scales stand in the
/// tensors' scales, their amax is set to 0. A skipped step changes no state, weight, scale or step
/// count, only `skipped`, `nonfinite_counts` and the scalars that say why. Either way `nonfinite`
/// and the amax of gradients with measure_amax are set to 0 for the next step. Stream-ordered, one
/// launch (on CUDA a cooperative one of at most 64 blocks). Deterministic; equal bits on CPU and
/// CUDA.
void adamw_prepare(const Context& ctx, const AdamwArgs& args);

/// Second half: the update of numerics section 3 over all segments in one pass; writes m, v,
/// master, the compute weight with its copies, and their amax. The segments of a panel must be
/// there together.
/// Stream-ordered, one launch. Deterministic; equal bits on CPU and CUDA and for every sharding.
void adamw_update(const Context& ctx, const AdamwArgs& args);

struct AdamwInit {
  AdamwTensor tensor;
  /// Initial weights, whole: f32, bf16 or f16.
  TensorView values;
  /// The pieces whose state this rank holds, in the order of its shard; host memory.
  const Piece* pieces = nullptr;
  std::int64_t piece_count = 0;
};

/// State of one tensor before the first step: master = the values, rounded to nearest; m = v = 0;
/// the compute weight from the rounded master, whole or, of a shard, that of the pieces with the
/// scales of their blocks; all scales of the tensor from the values' amax.
/// Stream-ordered; for set-up. Deterministic; equal bits on CPU and CUDA and for every sharding.
void adamw_initialise(const Context& ctx, const AdamwInit& init);

}  // namespace octet
