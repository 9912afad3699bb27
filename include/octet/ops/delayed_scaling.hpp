// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <vector>

#include "octet/runtime/tensor.hpp"

namespace octet {

/// Which amax of the history makes the scale.
enum class AmaxComputeAlgo : std::uint8_t { max, most_recent };

/// Scales from the amaxes of the steps before, so that a cast need not measure first: delayed
/// scaling with the names of Transformer Engine.
struct DelayedScalingConfig {
  int amax_history_len = 1024;
  AmaxComputeAlgo amax_compute_algo = AmaxComputeAlgo::max;
  /// The scale is divided by 2^margin; -64 to 64.
  int margin = 0;
};

/// One tensor with delayed scaling, as device memory sees it.
struct DelayedTensor {
  /// Its amax is what casts with Scaling::given have raised since the last update.
  TensorScale* scale = nullptr;
  float* history = nullptr;       ///< [amax_history_len], of the steps before, 0 where none was
  std::uint32_t* next = nullptr;  ///< which of them is the oldest
  DType dtype = DType::e4m3;
};

struct DelayedArgs {
  const DelayedTensor* tensors = nullptr;  ///< [tensor_count], device memory
  std::int64_t tensor_count = 0;
  DelayedScalingConfig config = {};
};

/// One step of delayed scaling for all tensors: the amax takes the place of the oldest, and
/// scale = 2^(exponent of maximum / a) / 2^margin with a the largest of the history or the newest,
/// the exponent clamped to +-126 before and after the margin.
/// A tensor whose amax is 0 (nothing was cast, or only zeros) keeps scale and history. One whose
/// amax is not finite keeps both too, so that one bad step does not stay in the history; its casts
/// have raised their flag. In every case amax is taken down to 0.
///
/// Call it once per optimizer step, after all micro-batches: every cast between two calls is with
/// one scale, and the largest of their amaxes is recorded once. Ranks that hold parts of a batch
/// keep scales of their own: nothing is shared (Transformer Engine reduces over ranks unless told
/// not to).
///
/// Stream-ordered, one launch. Deterministic, equal bits on CPU and CUDA. Throws octet::Error for a
/// length or margin out of range.
/// Source: "FP8 Formats for Deep Learning" (arXiv 2209.05433) and Transformer Engine's recipe.
void delayed_update(const Context& ctx, const DelayedArgs& args);

/// Histories and tables for a list of scales that belong to others (of Linear, say).
class DelayedScaling {
 public:
  struct Entry {
    TensorScale* scale = nullptr;  ///< device memory, with scale and scale_inv set
    DType dtype = DType::e4m3;     ///< e4m3 or e5m2
  };

  /// Throws octet::Error naming the field for a length below 1, a margin out of range, a null
  /// scale, two entries with one scale, or a dtype that is not FP8. The scales must outlive it.
  /// Takes all memory; update() takes none and can be captured.
  DelayedScaling(const Context& ctx, const DelayedScalingConfig& config,
                 const std::vector<Entry>& entries);

  /// delayed_update() for all of them.
  void update();

  const DelayedScalingConfig& config() const { return config_; }
  /// What a checkpoint has to keep beside the scales: [entries, amax_history_len] f32, and the
  /// oldest of each, [entries], below amax_history_len; device memory. (A Linear is told by
  /// keep_scales() that its scales are there.)
  float* history() const { return history_.as<float>(); }
  std::uint32_t* next() const { return next_.as<std::uint32_t>(); }
  std::int64_t count() const { return count_; }

 private:
  Context ctx_;
  DelayedScalingConfig config_;
  std::int64_t count_ = 0;
  Buffer tensors_, history_, next_;
};

}  // namespace octet
