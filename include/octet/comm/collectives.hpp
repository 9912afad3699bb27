// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "octet/comm/communicator.hpp"
#include "octet/ops/reduce_mean.hpp"
#include "octet/ops/segment.hpp"
#include "octet/ops/window_mean.hpp"
#include "octet/runtime/tensor.hpp"

namespace octet {

/// owners[r] = the pieces that rank r owns, in order. Every element of every tensor belongs to
/// exactly one piece; all ranks hold the same lists.
using Owners = std::vector<std::vector<Piece>>;

struct ReduceTensor {
  /// This rank's gradient, whole: e4m3, bf16 or f32; the same dtype for all tensors of a reducer.
  TensorView gradient = {};
  /// Where this rank's mean goes (sharded only): the elements of its pieces one after the other, in
  /// f32 or the gradient's dtype, the same for all tensors of a reducer (empty ones too); or the
  /// gradient itself, whose elements of these pieces then become the mean. Empty for two_shot,
  /// which puts the mean where every rank's gradient was, and for contributions, which makes none.
  TensorView shard = {};
};

/// The mean of a bucket of gradients over all ranks: send/receive of the stored bytes, a local FP32
/// sum in rank order, one rounding (numerics section 5). Tables and staging are made once; run()
/// allocates nothing, does not synchronise and can be captured.
class MeanReducer {
 public:
  enum class Path : std::uint8_t {
    sharded,   ///< means of this rank's pieces, in FP32 (a gradient is rounded once) or as two_shot
    two_shot,  ///< means rounded to the gradient's dtype and gathered by every rank
    /// No means: all ranks' contributions to this rank's pieces, for an AdamW that sums them.
    contributions,
  };

  /// `scales` are the tensors' scales, one after the other in device memory: on entry of run() this
  /// rank's own, afterwards the common ones of the means with amax = the bound A. They must stay
  /// where they are. `bucket` is the number that errors name.
  /// With a window, which holds gradients and scales at the same offsets on every rank, one kernel
  /// reads and writes the memory of all ranks; without, the bytes travel by send and receive. The
  /// bits are the same. The window must outlive the reducer.
  /// `staging` is memory of the communicator's context for peers' contributions, staging_bytes() of
  /// it; reducers of one communicator may share it, but for those whose contributions() are read.
  /// Null: memory of its own.
  MeanReducer(Communicator& comm, Path path, const std::vector<ReduceTensor>& tensors,
              TensorScale* scales, const Owners& owners, int bucket = -1,
              const Window* window = nullptr, void* staging = nullptr);

  /// What the contributions of all ranks to this rank's pieces take without a window.
  static std::size_t staging_bytes(const Communicator& comm,
                                   const std::vector<ReduceTensor>& tensors, const Owners& owners);

  /// Enqueues the collective on the communicator's stream. Raises *nonfinite (a device word) when
  /// any rank's amax is not finite. Deterministic: same bits for every transport, bucket size and
  /// run. With one rank two_shot leaves the bytes alone and only replaces amax by A. Watched as one
  /// collective; throws CommError if it or an earlier one failed, octet::Error for the path
  /// contributions.
  void run(std::uint32_t* nonfinite);

  /// The first part of run(), not for two_shot: the scales of the means, and the contributions to
  /// this rank's pieces into staging, where they stay until the next run() or collect(). The means
  /// are left to who reads contributions(). The flag, payload, scales and errors are those of
  /// run().
  void collect(std::uint32_t* nonfinite);
  /// What collect() brings together, an entry for every tensor: this rank's own gradient and the
  /// peers' shards in staging, with all ranks' scales. The pointers never change. Throws
  /// octet::Error for two_shot.
  std::vector<RankGradients> contributions() const;

  /// Payload bytes that run() makes this rank send.
  std::uint64_t payload_bytes() const { return payload_; }
  /// Device memory held for staging, tables and gathered scales.
  std::size_t buffer_bytes() const;

 private:
  std::uint64_t payload_of(const Owners& owners) const;
  /// A peer's block of staging.
  char* staged_of(int peer) const {
    return static_cast<char*>(const_cast<void*>(args_.staging)) + peer * args_.stride;
  }
  void plan_parts(const std::vector<ReduceTensor>& tensors, const Owners& owners);
  bool share_scales(std::uint32_t* nonfinite);
  void plan_staging(const std::vector<ReduceTensor>& tensors, const std::vector<Piece>& own,
                    void* staging);
  void plan_pieces(const std::vector<ReduceTensor>& tensors, const std::vector<Piece>& own);
  void plan_window(const std::vector<ReduceTensor>& tensors, const Owners& owners);
  void run_window(std::uint32_t* nonfinite);

  Communicator& comm_;
  Path path_;
  CollectiveName name_;
  const Window* window_ = nullptr;
  MeanArgs args_;
  WindowMeanArgs window_args_;
  TensorScale* scales_;
  std::vector<SendPart> sends_, gather_sends_;
  std::vector<RecvPart> recvs_, gather_recvs_;
  std::vector<const void*> gradients_;  ///< of the tensors, this rank's
  std::vector<std::int64_t> staged_;    ///< where the tensors' shards begin in a block of staging
  Buffer staging_, pieces_, gathered_;
  std::uint64_t payload_ = 0;
};

/// Gives every rank the tensors of rank `root` with their scales, as stored: lists of the same
/// shapes, dtypes and scales on every rank, on the communicator's device. Enqueued on its stream as
/// one collective; exact. Contents are counted on the root as payload, once for each of the others,
/// scales as metadata. For set-up: lists are made on the host in every call. Throws octet::Error
/// for a root that is no rank and a tensor on another device or without memory, CommError as all
/// collectives.
void broadcast(Communicator& comm, std::span<const ScaledView> tensors, int root);

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
