// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <vector>

#include "octet/comm/communicator.hpp"
#include "octet/ops/reduce_mean.hpp"
#include "octet/ops/segment.hpp"
#include "octet/runtime/tensor.hpp"

namespace octet {

/// owners[r] = the pieces that rank r owns, in order. Every element of every tensor belongs to
/// exactly one piece; all ranks hold the same lists.
using Owners = std::vector<std::vector<Piece>>;

struct ReduceTensor {
  /// This rank's gradient, whole: e4m3, bf16 or f32; the same dtype for all tensors of a reducer.
  TensorView gradient = {};
  /// Where this rank's mean goes (sharded only): f32, the elements of its pieces one after the
  /// other. Empty for two_shot, which puts the mean where the gradient was.
  TensorView shard = {};
};

/// The mean of a bucket of gradients over all ranks: send/receive of the stored bytes, a local FP32
/// sum in rank order, one rounding (numerics section 5). Tables and staging are made once; run()
/// allocates nothing, does not synchronise and can be captured.
class MeanReducer {
 public:
  enum class Path : std::uint8_t {
    sharded,   ///< FP32 means of this rank's pieces; a gradient is rounded once
    two_shot,  ///< means rounded to the gradient's dtype and gathered by every rank
  };

  /// `scales` are the tensors' scales, one after the other in device memory: on entry of run() this
  /// rank's own, afterwards the common ones of the means with amax = the bound A. They must stay
  /// where they are. `bucket` is the number that errors name.
  MeanReducer(Communicator& comm, Path path, const std::vector<ReduceTensor>& tensors,
              TensorScale* scales, const Owners& owners, int bucket = -1);

  /// Enqueues the collective on the communicator's stream. Raises *nonfinite (a device word) when
  /// any rank's amax is not finite. Deterministic: same bits for every transport, bucket size and
  /// run. With one rank two_shot leaves the bytes alone and only replaces amax by A. Watched as one
  /// collective; throws CommError if it or an earlier one failed.
  void run(std::uint32_t* nonfinite);

  /// Payload bytes that run() makes this rank send.
  std::uint64_t payload_bytes() const { return payload_; }
  /// Device memory held for staging, tables and gathered scales.
  std::size_t buffer_bytes() const;

 private:
  void plan_parts(const std::vector<ReduceTensor>& tensors, const Owners& owners);
  void plan_pieces(const std::vector<ReduceTensor>& tensors, const std::vector<Piece>& own);

  Communicator& comm_;
  Path path_;
  CollectiveName name_;
  MeanArgs args_;
  TensorScale* scales_;
  std::vector<SendPart> sends_, gather_sends_;
  std::vector<RecvPart> recvs_, gather_recvs_;
  Buffer staging_, pieces_, gathered_;
  std::uint64_t payload_ = 0;
};

/// Gives every rank all pieces of a list of tensors: each rank sends the pieces it owns.
class PieceGather {
 public:
  /// `tensors` are whole on every rank; only the owned pieces are valid on entry of run().
  PieceGather(Communicator& comm, const std::vector<TensorView>& tensors, const Owners& owners,
              Traffic traffic = Traffic::payload);
  /// Enqueues the gather. Exact.
  void run();
  std::uint64_t payload_bytes() const { return payload_; }

 private:
  Communicator& comm_;
  Traffic traffic_;
  std::vector<SendPart> sends_;
  std::vector<RecvPart> recvs_;
  std::uint64_t payload_ = 0;
};

}  // namespace octet
