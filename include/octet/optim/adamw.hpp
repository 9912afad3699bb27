// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "octet/ops/adamw.hpp"
#include "octet/runtime/tensor.hpp"

namespace octet {

/// The formats that exist, in any combination: the checks, their messages and the tests go by these
/// lists. A weight in e4m3 or bf16 is written by the update; in f32 it is the FP32 master itself.
inline constexpr DType kGradientFormats[] = {DType::f32, DType::bf16, DType::e4m3};
inline constexpr DType kWeightFormats[] = {DType::f32, DType::bf16, DType::e4m3};
inline constexpr DType kMasterFormats[] = {DType::f32, DType::f16};
inline constexpr DType kMFormats[] = {DType::f32, DType::bf16, DType::e4m3};
inline constexpr DType kVFormats[] = {DType::f32, DType::bf16, DType::f16};

/// Storage formats of one parameter's optimizer.
struct StateFormats {
  DType weight = DType::f32;
  DType master = DType::f32;
  DType m = DType::f32;
  DType v = DType::f32;
  bool operator==(const StateFormats&) const = default;
};

/// Throws octet::Error naming the field for betas outside [0, 1), eps <= 0, a weight decay that is
/// negative or not finite, and amsgrad.
void check_adamw(const AdamWConfig& config);
/// Throws octet::Error, beginning with `what`, for formats that do not exist or that these
/// hyper-parameters do not bound (beta1^2 >= beta2 with quantised states).
void check_formats(const std::string& what, const StateFormats& formats, const AdamWConfig& config);
/// Throws octet::Error, beginning with `what`, for a gradient format that does not exist.
void check_gradient_format(const std::string& what, DType dtype);

struct AdamWParam {
  std::string name = {};
  Shape shape = {};
  StateFormats formats = {};
  /// Reduced gradient, e4m3, bf16 or f32: the whole tensor, or this rank's shard of it.
  TensorView gradient = {};
  /// Its scale, whose amax bounds the gradient; required for every dtype.
  TensorScale* gradient_scale = nullptr;
  bool gradient_is_shard = false;
  /// Compute weight, whole, in formats.weight. With f32 it is the master too.
  TensorView weight = {};
  /// Pieces of this parameter that this rank updates, unions of whole panels; Piece::tensor is
  /// ignored. `whole` updates everything.
  std::vector<Piece> pieces = {};
  bool whole = true;
  float weight_decay = 0.0f;
};

struct AdamWStep {
  float lr = 0.0f;
  const float* lr_device = nullptr;  ///< read instead of lr when set
  float max_norm = 0.0f;             ///< 0: no clipping
  std::uint32_t* nonfinite = nullptr;
};

/// AdamW over a list of parameters: owns m, v and (unless FP32 master and weight are one) the
/// master, their scales, the step count and the tables. One pass over the memory, everything
/// decided on the device (numerics section 3).
/// Memory is taken in the constructor; sum_squares() and step() allocate nothing, do not
/// synchronise and can be captured. Deterministic; equal bits on CPU and CUDA and, given the same
/// reduced gradient, for every sharding.
class AdamW {
 public:
  /// Throws octet::Error naming the parameter and the field for formats that do not exist, betas
  /// outside [0, 1), eps <= 0, and beta1^2 >= beta2 with quantised states.
  AdamW(const Context& ctx, const AdamWConfig& config, std::vector<AdamWParam> params);

  /// Sets master and compute weight of parameter i from `values` (f32, bf16 or f16, whole, on the
  /// context's device; may be the weight itself only for f32). m, v start at zero.
  void initialise(int i, const TensorView& values);

  /// First half of clipping: sums of squares of this rank's segments into segment_sums().
  void sum_squares();
  /// [total_segments()] in device memory; a sharded caller fills in the other ranks' sums before
  /// step(), each at its segment's index.
  float* segment_sums() const { return sums_.as<float>(); }
  std::int64_t total_segments() const { return total_segments_; }
  const std::vector<Segment>& segments() const { return segments_; }

  /// One step. With max_norm set, segment_sums() must hold all segments' sums.
  void step(const AdamWStep& step);

  const AdamwScalars* scalars() const { return scalars_.as<AdamwScalars>(); }
  TensorScale* weight_scale(int i) const { return scale(kWeight, i); }
  /// All scales one after the other ([4 * parameters]: weight, master, m, v): sharded callers take
  /// the maximum of their amax over the ranks after a step.
  TensorScale* scales() const { return scales_.as<TensorScale>(); }
  std::int64_t scale_count() const { return 4 * static_cast<std::int64_t>(params_.size()); }

  /// Bytes the allocator gave for the states of parameter i.
  struct StateBytes {
    std::size_t master = 0, m = 0, v = 0;
  };
  StateBytes state_bytes(int i) const { return bytes_.at(static_cast<std::size_t>(i)); }

  /// Bytes of the tables, scalars and sums beside states and scales.
  std::size_t table_bytes() const {
    return tensors_.bytes() + segment_table_.bytes() + scalars_.bytes() + step_scales_.bytes() +
           sums_.bytes();
  }

  /// State views of parameter i (this rank's shard).
  ScaledView m(int i) const;
  ScaledView v(int i) const;
  /// Of an f32 weight the whole weight, which is its master.
  ScaledView master(int i) const;

 private:
  enum Slot { kWeight, kMaster, kM, kV };
  TensorScale* scale(Slot slot, int i) const;
  void check_index(int i) const;
  std::size_t grow(std::vector<Tensor>& states, DType dtype, std::int64_t numel);
  AdamwTensor make_tensor(int i, std::uint64_t random_base);
  AdamwArgs args(const AdamWStep& step) const;

  Context ctx_;
  AdamWConfig config_;
  std::vector<AdamWParam> params_;
  std::vector<Tensor> m_, v_, master_;
  std::vector<StateBytes> bytes_;
  std::vector<AdamwTensor> tensors_host_;
  std::vector<Segment> segments_;
  std::int64_t total_segments_ = 0;
  Buffer tensors_, segment_table_, scalars_, step_scales_, scales_, sums_;
};

}  // namespace octet
