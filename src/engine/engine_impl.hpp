// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "octet/comm/collectives.hpp"
#include "octet/engine/engine.hpp"
#include "octet/engine/shard_plan.hpp"
#include "octet/optim/adamw.hpp"

namespace octet {

struct Engine::Impl {
  /// A registered parameter.
  struct Param {
    ParamSpec spec;
    bool managed = false;
    Formats formats;
    Tensor weight;
    Tensor weight_transposed;  ///< [columns, rows], for formats that have it
    Tensor gradient;           ///< this rank's, whole, before and (two_shot) after the reduction
    Tensor shard;              ///< sharded, where it is kept: the FP32 mean of the owned pieces
    TensorScale* gradient_scale = nullptr;
    std::vector<Piece> pieces;  ///< what this rank updates
    bool has_gradient = false;

    /// Elements that this rank updates.
    std::int64_t owned() const {
      std::int64_t count = 0;
      for (const Piece& piece : pieces) count += piece.count;
      return count;
    }
  };

  /// Parameters reduced together; one gradient dtype.
  struct Bucket {
    std::vector<int> params;
    Owners owners;
    std::unique_ptr<MeanReducer> reducer;
  };

  Impl(const Context& context, Communicator& communicator, const EngineConfig& c)
      : ctx(context), comm(communicator), config(c) {}

  // set-up, in the order of freeze()
  void check_lists_agree();
  void build();
  void make_buckets();
  void allocate_parameters();
  void allocate_reducers();
  void allocate_optimizer();
  void allocate_communication();
  void make_gathers();
  void add_weight_scales(std::vector<TensorView>& tensors, Owners& owners) const;
  void initialise();
  void describe();
  std::string describe_optimizer() const;
  std::string describe_schedule() const;

  bool sharded() const { return plan.sharding == Sharding::optimizer && comm.size() > 1; }
  /// Whether AdamW can sum the ranks' contributions, and whether there is a buffer for their means.
  bool fused() const { return sharded() && config.schedule == Schedule::fused; }
  bool keeps_shards() const { return sharded() && (!fused() || config.clipping); }
  Param& param(ParamId id, const char* call);
  const Param& param(ParamId id, const char* call) const;
  const Param& frozen_param(ParamId id, const char* call) const;
  void require_frozen(const char* call) const;
  void store_gradient(Param& p, const TensorView& gradient);
  /// Any rank's flag becomes every rank's.
  void share_flag();
  std::uint32_t* nonfinite() const {
    return reinterpret_cast<std::uint32_t*>(&flag.as<TensorScale>()->amax);
  }

  Context ctx;
  Communicator& comm;
  EngineConfig config;
  std::vector<Param> params;
  bool frozen = false;
  bool failed = false;  ///< freeze() began and did not end well

  std::vector<Bucket> buckets;
  /// The non-finite flag, kept as the amax of a TensorScale so that it is shared like one.
  Buffer flag, gathered_flags;
  Buffer zero_scale;       ///< TensorScale{}: the scale of a missing gradient
  Buffer gradient_scales;  ///< in the order of the buckets
  std::unique_ptr<AdamW> adamw;
  std::unique_ptr<PieceGather> weight_gather;
  std::unique_ptr<PieceGather> sum_gather;
  Buffer gathered_scales;
  Plan plan;
};

}  // namespace octet
