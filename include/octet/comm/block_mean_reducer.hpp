// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "octet/comm/collectives.hpp"
#include "octet/core/block_scales.hpp"
#include "octet/ops/block_mean.hpp"

namespace octet {

struct BlockReduceTensor {
  /// This rank's gradient, whole: e4m3 [R, C] with row_block scales, as block_quantize() stores it.
  BlockScaledView gradient = {};
  /// Where this rank's mean goes (sharded only): f32, the elements of its pieces one after the
  /// other. Empty for two_shot, which puts the mean where the gradient was.
  TensorView shard = {};
};

/// What MeanReducer does, for gradients with a scale for every 128 of a row: send/receive of codes
/// and scales, a local FP32 sum in rank order, one rounding with scales from the exact amaxes of
/// the means. Tables and staging are made once; run() allocates nothing, does not synchronise and
/// can be captured. One rank does the same without a collective, which changes no value.
class BlockMeanReducer {
 public:
  /// `scales` [tensors], in device memory that stays where it is, is written alone: run() makes it
  /// {1, 1, largest magnitude of the tensor's means as they are stored}, the same on all ranks: the
  /// A of an f32 shard. Pieces are whole rows, as panels are. `bucket` is the number that errors
  /// name. Throws octet::Error for the path contributions, pieces that are not whole rows, tensors
  /// or owners that do not fit.
  BlockMeanReducer(Communicator& comm, MeanReducer::Path path,
                   const std::vector<BlockReduceTensor>& tensors, TensorScale* scales,
                   const Owners& owners, int bucket = -1);

  /// Enqueues the collective on the communicator's stream. *nonfinite is this rank's flag (a device
  /// word): raised by its casts, because infinity does not show in codes, it reaches all ranks, as
  /// does a NaN among the codes. Deterministic: same bits for every transport, bucket size and run.
  /// Watched as one collective; throws CommError if it or an earlier one failed.
  void run(std::uint32_t* nonfinite);

  /// Bytes of codes that run() makes this rank send. Scales, 3.1 % as many, count as metadata.
  std::uint64_t payload_bytes() const { return payload_; }
  /// Device memory held for staging, tables and packed scales.
  std::size_t buffer_bytes() const;

 private:
  void plan_scales(const std::vector<BlockReduceTensor>& tensors, const Owners& runs);
  void plan_pieces(const std::vector<BlockReduceTensor>& tensors, const std::vector<Piece>& own);
  void plan_parts(const std::vector<BlockReduceTensor>& tensors, const Owners& runs);

  Communicator& comm_;
  MeanReducer::Path path_;
  CollectiveName name_;
  TensorScale* scales_;
  std::int64_t tensor_count_;
  PieceGather gather_;  // of the codes of the means; checks the owners for both paths
  BlockMeanArgs args_;
  std::int64_t scale_pieces_ = 0;
  std::vector<std::int64_t> sections_;  // first packed scale of every rank's pieces; the end
  std::vector<SendPart> code_sends_, scale_sends_, scale_gather_sends_;
  std::vector<RecvPart> code_recvs_, scale_recvs_, scale_gather_recvs_;
  Buffer staging_, staged_scales_, packed_, pieces_, scale_table_, words_, gathered_;
  std::uint64_t payload_ = 0;
};

}  // namespace octet
