// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <vector>

#include "octet/comm/communicator.hpp"
#include "octet/ops/sum_codes.hpp"
#include "octet/runtime/tensor.hpp"

namespace octet {

/// FP8-LM's automatic scaling: one factor mu for the gradients of a model, which trades the
/// headroom of their sums for range. It halves after a step of which more than 0.001 % of the
/// values sat at the maximum, else it grows so that 1000 steps double it, to no more than the
/// headroom. Lives on the device; nothing is read by the host. Sums have the same bytes on all
/// ranks, so mu is the same too. Source: FP8-LM (arXiv 2310.18313), section 2.1.
class AutoScale {
 public:
  /// mu = 1. `ranks` are those of the sums.
  AutoScale(const Context& ctx, int ranks);

  /// Takes a step's counts, after the last SumReducer::run() of the step. Stream-ordered,
  /// deterministic.
  void update();

  /// mu = 2^(exponent / 1000), for checkpoints: waits for the stream. Setting takes -16000 to
  /// 16000; what a checkpoint of more ranks allows beyond the headroom of these waits unused.
  std::int32_t exponent_sync() const;
  void set_exponent_sync(std::int32_t exponent);

  /// In device memory.
  AutoScaleState* state() const { return state_.as<AutoScaleState>(); }

 private:
  Context ctx_;
  int ranks_;
  Buffer state_;
};

/// The mean of a bucket of E4M3 gradients by a sum in FP8, MS-AMP's and FP8-LM's way: all ranks
/// agree on the smallest scale, requantise with headroom for the sum and mu, and add codes; the
/// division by the number of ranks is in the scale. Every hop of a ring rounds, so MeanReducer is
/// better in all but the wish to compare: see the table in docs/numerics.md. Over NCCL it is
/// NCCL's sum, of which the number of roundings and their order are up to the algorithm, the
/// topology and the registration of memory: not deterministic across those. Everywhere else the
/// ranks' codes are added in rank order, with equal bits on CPU and CUDA.
class SumReducer {
 public:
  /// `gradients` are whole on every rank, e4m3; the means replace them. `scales` [tensors], in
  /// device memory that stays where it is, are this rank's own on entry of run(), powers of two,
  /// and those of the means afterwards, powers of two divided by the number of ranks, with amax the
  /// largest magnitude of the means as stored. `auto_scale` (null: mu = 1) must live as long.
  /// Collective. Throws octet::Error for tensors that do not fit and, on all ranks, where one of
  /// them cannot take part: NCCL adds FP8 from compute capability 9.0 on.
  SumReducer(Communicator& comm, const std::vector<TensorView>& gradients, TensorScale* scales,
             AutoScale* auto_scale = nullptr, int bucket = -1);

  /// Enqueues the collective on the communicator's stream; allocates nothing, does not synchronise,
  /// can be captured. Raises *nonfinite (a device word) when any rank's amax is not finite or a sum
  /// is NaN. Watched as one collective; throws CommError if it or an earlier one failed.
  void run(std::uint32_t* nonfinite);

  /// Codes of every tensor's sums at the maximum, [tensors] in device memory, over all runs.
  const std::uint64_t* saturated() const { return saturated_.as<std::uint64_t>(); }
  /// Payload bytes that run() makes this rank send: over NCCL those of a ring.
  std::uint64_t payload_bytes() const { return payload_; }
  /// Device memory held for the packed codes, staging, tables, counters and gathered scales.
  std::size_t buffer_bytes() const;

 private:
  void plan_parts();
  void add_up();

  Communicator& comm_;
  CollectiveName name_;
  SumArgs args_;
  std::int64_t packed_count_ = 0;
  // Where the transport cannot add: the codes that this rank adds up, and how many a rank at most.
  std::uint8_t* own_ = nullptr;
  std::int64_t own_count_ = 0, stride_ = 0;
  std::vector<SendPart> sends_, gather_sends_;
  std::vector<RecvPart> recvs_, gather_recvs_;
  Buffer tensors_, gathered_, packed_, saturated_, staging_;
  std::uint64_t payload_ = 0;
};

}  // namespace octet
