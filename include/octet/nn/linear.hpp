// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "octet/gemm/gemm.hpp"
#include "octet/ops/delayed_scaling.hpp"
#include "octet/ops/quantize.hpp"
#include "octet/runtime/tensor.hpp"

namespace octet {

struct LinearConfig {
  std::int64_t in_features = 0;
  std::int64_t out_features = 0;
  std::int64_t max_tokens = 0;
  /// e4m3: FP8 GEMMs, activations in E4M3; in_features and out_features must be multiples of 16,
  /// because every GEMM contracts over one of them or writes rows of that length. bf16: BF16 GEMMs.
  DType weight_dtype = DType::e4m3;
  /// Gradients of activations with FP8 GEMMs: e5m2 (the HYBRID formats) or e4m3.
  DType gradient_dtype = DType::e5m2;
  /// How activations and their gradients are scaled with FP8 GEMMs: by their own amax, or by scales
  /// that the caller's DelayedScaling over delayed_entries() sets once per optimizer step. The
  /// first cast of each is by its own amax even then (without margin), because no step has left a
  /// scale; if that is 0 or not finite, the scale is 1 until a step has recorded another. Every
  /// forward counts, one for validation too.
  Scaling scaling = Scaling::current;
  /// Optional, device memory: what casts of activations and their gradients could not keep.
  CastCounters* counters = nullptr;
  /// Optional device word, set to 1 by an FP8 Linear when an activation or its gradient is not
  /// finite, which the saturating cast would hide. A BF16 Linear hides nothing and leaves it alone.
  std::uint32_t* nonfinite = nullptr;
};

/// y[T, N] = x[T, K] * w[N, K]^T and its gradients, without bias. The weight belongs to the caller
/// (an Engine's compute weight, say). Keeps the cast activation between forward and backward.
/// Scratch comes from the context's workspace, reserved by the constructor; calls take no device
/// memory and do not synchronise. The first call for a token count makes the GEMMs' plans on the
/// host, and with delayed scaling measures, so a graph is captured after one ordinary forward and
/// backward. Source: FP8-LM (arXiv 2310.18313) for the formats.
class Linear {
 public:
  /// The registry must outlive it. Throws if no backend can run its GEMMs on the context's device.
  Linear(GemmRegistry& gemms, const LinearConfig& config);

  /// x: [T, K] f32 or bf16, T <= max_tokens, any T. weight: [N, K] of weight_dtype, with its scale
  /// if that is e4m3. y: [T, N] f32 or bf16, overwritten.
  void forward(const TensorView& x, const ScaledView& weight, const TensorView& y);
  /// Gradients for the last forward. dy: [T, N] f32 or bf16. dx: [T, K], dw: [N, K], f32 or bf16,
  /// overwritten; either may be empty.
  void backward(const TensorView& dy, const ScaledView& weight, const TensorView& dx,
                const TensorView& dw);

  /// The scales of activations and of their gradients, for DelayedScaling; without FP8 GEMMs none.
  /// They are this object's: it must outlive whoever holds them.
  std::vector<DelayedScaling::Entry> delayed_entries() const;
  /// The scales in delayed_entries() have been set (restored from a checkpoint, say), so that the
  /// next casts take them instead of measuring.
  void keep_scales();

 private:
  bool fp8() const { return config_.weight_dtype == DType::e4m3; }
  bool is_delayed() const { return fp8() && config_.scaling == Scaling::given; }
  Scaling scaling_of(bool has_scale) const;
  void check(const char* what, const TensorView& view, std::int64_t rows, std::int64_t columns,
             DType allowed, DType also_allowed) const;
  void check_weight(const ScaledView& weight) const;
  void check_backends() const;
  TensorView saved() const;
  void backward_fp8(const TensorView& dy, const ScaledView& weight, const TensorView& dx,
                    const TensorView& dw);
  void backward_bf16(const TensorView& dy, const ScaledView& weight, const TensorView& dx,
                     const TensorView& dw);

  GemmRegistry& gemms_;
  LinearConfig config_;
  std::int64_t tokens_ = -1;                         ///< of the last forward; none yet
  bool x_has_scale_ = false, dy_has_scale_ = false;  ///< of a cast before
  Tensor saved_;   ///< bf16: x [T, K]; fp8: x transposed [K, T padded]; memory for max_tokens
  Buffer scales_;  ///< fp8: scales of x and dy, and of x as saved; they outlive a call because a
                   ///< cast of a tensor that is not finite keeps the scale before it
};

}  // namespace octet
