// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "octet/ops/peer_memory.hpp"
#include "octet/runtime/context.hpp"

namespace octet {

/// One contiguous piece of one tensor whose mean over the ranks this rank computes.
struct WindowPiece {
  std::int32_t tensor = 0;
  std::int64_t count = 0;   ///< elements
  std::int64_t offset = 0;  ///< bytes: where the piece lies in every rank's window
  std::int64_t begin = 0;   ///< packs of 16 bytes, the last one begun, in the pieces before this
  /// Where the means go, to be read by this rank alone: f32, or of `dtype`; that may be this
  /// rank's own contribution. Null: they go to `offset` in every rank's window.
  void* out = nullptr;
};

struct WindowMeanArgs {
  PeerMemory peers;
  const WindowPiece* pieces = nullptr;  ///< [piece_count], device memory
  std::int64_t piece_count = 0;
  std::int64_t pack_count = 0;   ///< of all pieces
  DType dtype = DType::f32;      ///< of the contributions: e4m3, bf16 or f32
  DType out_dtype = DType::f32;  ///< f32 with `out` in every piece, or `dtype` with or without
  /// Where the tensors' scales lie, [tensor_count], in every rank's window: on entry the rank's
  /// own, afterwards those of the means, with amax = the bound A.
  std::int64_t scales_offset = 0;
  TensorScale* mean_scales = nullptr;  ///< [tensor_count], device scratch
  std::int64_t tensor_count = 0;
  std::uint32_t* nonfinite = nullptr;  ///< as MeanArgs::nonfinite
};

/// What mean_scales() and reduce_mean() compute, in one kernel over the memory of all ranks: it
/// meets the other ranks', reads its pieces from every rank, adds them up, rounds once, stores the
/// means to every rank or to `out`, and meets them again. Every rank calls it with pieces that
/// together hold every element once.
/// Stream-ordered; deterministic; the bits of reduce_mean(). A rank that does not come by the
/// deadline leaves the contributions in an unknown state, peers.status->failed set and the flag
/// raised, so that an optimizer's step behind it changes nothing.
/// Throws octet::Error for arguments that do not fit.
void window_mean(const Context& ctx, const WindowMeanArgs& args);

}  // namespace octet
