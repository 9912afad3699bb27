// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "octet/core/block_scales.hpp"
#include "octet/ops/adamw_rows.hpp"
#include "octet/runtime/tensor.hpp"

namespace octet {

/// Throws octet::Error naming the field for betas outside [0, 1), eps outside [2^-100, 2^60], a
/// weight decay that is negative or not finite, and amsgrad.
void check_adamw(const AdamWConfig& config);
/// The same for the hyper-parameters of a group, beginning with `what`; also for a learning-rate
/// factor that is negative or not finite.
void check_hyper(const std::string& what, const AdamwHyper& hyper);
/// Throws octet::Error, beginning with `what`, for formats that do not exist or that these
/// hyper-parameters do not bound (beta1^2 >= beta2 with quantised states).
void check_formats(const std::string& what, const StateFormats& formats, const AdamwHyper& hyper);
/// Throws octet::Error, beginning with `what`, for a gradient format that does not exist.
void check_gradient_format(const std::string& what, DType dtype);

struct AdamWParam {
  std::string name = {};
  Shape shape = {};
  StateFormats formats = {};
  /// Reduced gradient, e4m3, bf16 or f32: the whole tensor, or this rank's shard of it.
  TensorView gradient = {};
  /// Its scale, whose amax bounds the gradient. Null for bf16 and f32: the optimizer keeps one
  /// itself and measure() finds the amax; for whole parameters only.
  TensorScale* gradient_scale = nullptr;
  /// True: the amax in gradient_scale is not known yet (0), measure() finds that of the pieces; a
  /// sharded caller takes the maximum over the ranks before step().
  bool measure_amax = false;
  bool gradient_is_shard = false;
  /// Instead of a gradient or beside it: what all ranks contribute to it. A step that is told to
  /// (AdamWStep::from_contributions) forms the mean of the elements it updates inside its one pass,
  /// with the bits that reduce_mean into an f32 shard would give. gradient_scale is then the
  /// mean's, with amax = the bound A that mean_scales() writes; a gradient beside is the f32 mean
  /// itself, for steps that read that. No measure() of contributions, because nothing holds the
  /// mean.
  std::optional<RankGradients> contributions = {};
  /// Compute weight, whole or this rank's shard of it, in formats.weight; of an f32 weight the
  /// master too; empty for `none`.
  TensorView weight = {};
  /// True: `weight` holds the pieces one after the other, and nobody else's elements. For formats
  /// without a transposed copy.
  bool weight_is_shard = false;
  /// For a format that is also transposed the transposed weight [columns, rows] of a matrix, whole;
  /// else empty. A step writes what belongs to this rank's pieces.
  TensorView weight_transposed = {};
  /// Where the scales of an e4m3_tile weight go, those of all of it: the caller's, scale_bytes() of
  /// them, for memory that peers reach, say. Null: the optimizer's own.
  float* weight_blocks = nullptr;
  /// Further places where a step writes what it writes of the compute weight, each whole and in its
  /// format: e4m3, bf16, f32 or e4m3_tile (with the tiles' scales). initialise() leaves them alone.
  std::vector<WeightCopy> weight_copies = {};
  /// Pieces of this parameter that this rank updates, unions of whole panels; Piece::tensor is
  /// ignored. Not set: all of it.
  std::optional<std::vector<Piece>> pieces = {};
  /// Hyper-parameters that differ from the configuration's.
  AdamWGroup group = {};
};

struct AdamWStep {
  float lr = 0.0f;  ///< 0 or more; a captured graph keeps it
  /// Device memory, read by the step instead of lr when set; if it is negative or not finite the
  /// step is skipped.
  const float* lr_device = nullptr;
  float max_norm = 0.0f;  ///< 0: no clipping
  /// Device word: not 0 skips the step. Set back to 0 by it.
  std::uint32_t* nonfinite = nullptr;
  /// True: every gradient is the mean of its contributions, which all parameters must have; there
  /// is no clipping then. False: AdamWParam::gradient.
  bool from_contributions = false;
};

/// A state of one parameter (this rank's shard), in memory that the device reaches.
struct StateView {
  StateFormat format = StateFormat::f32;
  std::int64_t count = 0;
  void* data = nullptr;          ///< `count` codes; of a split master the remainders
  float* blocks = nullptr;       ///< of a block format: FP32 scales, one for every 128 elements
  TensorScale* scale = nullptr;  ///< its amax is kept for every format
};

/// AdamW over a list of parameters: owns m, v and (unless FP32 master and weight are one) the
/// master, their scales, the step count and the tables. One pass over the memory, everything
/// decided on the device (numerics section 3).
/// On CUDA the rows of kAdamwRows are fast (docs/performance.md), with stochastic rounding,
/// decoupled weight decay, eps of 2^-44 or more, buffers aligned to 16 bytes and scales far from
/// the ends of FP32's range; a weight that is transposed or in tiles where it has whole ones of
/// 128 x 128. Everything else takes general code with the same bits in several times the time;
/// general_code_reason() tells.
///
/// Memory is taken in the constructor; measure() and step() allocate nothing, do not
/// synchronise and can be captured. Deterministic; equal bits on CPU and CUDA and, given the same
/// reduced gradient, for every sharding.
class AdamW {
 public:
  /// Throws octet::Error naming the parameter and the field for formats that do not exist, views
  /// that do not fit or are on another device, hyper-parameters that check_adamw or check_hyper
  /// refuse, and beta1^2 >= beta2 with quantised states.
  /// m, v, the master and their block scales are allocated from `states`, a second context of the
  /// same device, where it is given: with pinned_host_allocator() they lie in host memory, which
  /// the update's one pass reads and writes where it is, both directions of the link at once.
  AdamW(const Context& ctx, const AdamWConfig& config, std::vector<AdamWParam> params,
        const std::optional<Context>& states = {});

  /// Sets master and compute weight of parameter i from `values` (f32, bf16 or f16, whole, on the
  /// context's device; may be the weight itself only for f32 and no shard). m, v start at zero.
  void initialise(int i, const TensorView& values);

  /// One read of this rank's gradients: sums of squares of its segments into segment_sums(), for
  /// clipping; the amax of gradients whose amax is not known; 1 into `nonfinite`, when given, if a
  /// value is not finite. Needed before step() if that clips or an amax is not known. Throws
  /// octet::Error when a parameter has contributions and no gradient.
  void measure(std::uint32_t* nonfinite = nullptr);
  /// [total_segments()] in device memory; a sharded caller fills in the other ranks' sums before
  /// step(), each at its segment's index.
  float* segment_sums() const { return sums_.as<float>(); }
  std::int64_t total_segments() const { return total_segments_; }
  const std::vector<Segment>& segments() const { return segments_; }

  /// One step. With max_norm set, segment_sums() must hold all segments' sums. Throws octet::Error
  /// when measure() has not been called since the last step although max_norm is set or an amax is
  /// not known, for from_contributions with max_norm, and when a parameter lacks the gradient or
  /// the contributions that the step is to read.
  void step(const AdamWStep& step);

  /// Step count, norm, clip factor and decision as of the last step, in device memory.
  const AdamwScalars* scalars() const { return scalars_.as<AdamwScalars>(); }
  /// [parameters], device memory: in how many skipped steps the gradient of each was not finite. Of
  /// a sharded optimizer the same on every rank, because the ranks share the gradients' amax.
  const std::int64_t* nonfinite_counts() const { return nonfinite_counts_.as<std::int64_t>(); }
  /// For those who set `step` and `skipped`, with which a loaded state goes on.
  AdamwScalars* scalars() { return scalars_.as<AdamwScalars>(); }
  /// Scalars of the group of parameter i, in device memory, as of the last step.
  const AdamwGroupScalars* group_scalars(int i) const;
  /// Why on CUDA the update of parameter i takes the general code; empty where it does not. See
  /// reason_for_general_code.
  std::string general_code_reason(int i) const;
  /// What adamw_prepare decided for parameter i, in device memory, as of the last step that was
  /// applied; undefined before that and after one that was skipped.
  const AdamwTensorStep* tensor_step(int i) const;
  /// Scale of the compute weight of parameter i, in device memory, as of the last step. Where its
  /// blocks have scales this one is 1 and has the amax.
  TensorScale* weight_scale(int i) const;
  /// The compute weight of parameter i with the scales of its blocks, which the optimizer owns
  /// unless AdamWParam::weight_blocks says otherwise, as of the last step: what block_quantize()
  /// makes of the decoded master. A step writes what belongs to this rank's pieces. Throws
  /// octet::Error for weights without scales of blocks, and for one that is a shard.
  BlockScaledView block_weight(int i) const;
  /// The transposed copy [columns, rows] of it, with the scales transposed. Throws octet::Error for
  /// formats other than e4m3_tile_and_transpose.
  BlockScaledView block_weight_transposed(int i) const;
  /// All scales one after the other ([4 * parameters]: weight, master, m, v): sharded callers take
  /// the maximum of their amax over the ranks after a step.
  TensorScale* scales() const { return scales_.as<TensorScale>(); }
  std::int64_t scale_count() const { return 4 * static_cast<std::int64_t>(params_.size()); }

  /// Bytes the allocator gave for the states of parameter i.
  struct StateBytes {
    std::size_t master = 0, m = 0, v = 0;
    std::size_t weight_blocks = 0;  ///< scales of the weight's blocks
  };
  StateBytes state_bytes(int i) const;

  /// Bytes of the tables, scalars and sums beside states and scales.
  std::size_t table_bytes() const {
    return tensors_.bytes() + segment_table_.bytes() + scalars_.bytes() + steps_.bytes() +
           scratch_.bytes() + groups_.bytes() + group_scalars_.bytes() + sums_.bytes() +
           gradient_scales_.bytes() + exchanges_.bytes() + rank_gradients_.bytes() +
           weight_copies_.bytes() + nonfinite_counts_.bytes();
  }

  /// States of parameter i (this rank's shard). The master of an f32 weight is the weight, whole or
  /// a shard as that is.
  StateView m(int i) const;
  StateView v(int i) const;
  StateView master(int i) const;

 private:
  enum Slot { kWeight, kMaster, kM, kV };
  struct State {
    Buffer codes, blocks;
  };
  TensorScale* scale(Slot slot, int i) const;
  void check_index(int i) const;
  std::size_t grow(std::vector<State>& states, StateFormat format, std::int64_t count);
  std::size_t grow_weight_blocks(const AdamWParam& param);
  std::int32_t group_index(const AdamwHyper& hyper);
  AdamwTensor make_tensor(int i, std::uint64_t random_base);
  void make_exchanges();
  void require_gradients(const char* call) const;
  AdamwArgs args(const AdamWStep& step) const;

  Context ctx_;
  Context states_;  ///< that m, v and master come from
  bool states_are_far_;
  AdamWConfig config_;
  std::vector<AdamWParam> params_;
  std::vector<AdamwHyper> groups_host_;
  std::vector<State> m_, v_, master_;
  std::vector<Buffer> weight_blocks_, transposed_blocks_;
  std::vector<StateBytes> bytes_;
  std::vector<AdamwTensor> tensors_host_;
  std::vector<Segment> segments_;
  std::int64_t total_segments_ = 0;
  /// The first parameter that lacks what a step may read; -1: none does.
  int without_gradient_ = -1, without_contributions_ = -1;
  bool must_measure_ = false;  ///< some amax is not known before measure()
  bool measured_ = false;
  Buffer tensors_, segment_table_, scalars_, steps_, scratch_, groups_, group_scalars_, scales_,
      sums_;
  Buffer gradient_scales_;                     ///< of gradients that came without one
  std::vector<AdamwExchange> exchanges_host_;  ///< empty where no parameter has one
  Buffer exchanges_, rank_gradients_, weight_copies_, nonfinite_counts_;
};

}  // namespace octet
