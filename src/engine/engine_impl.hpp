// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "engine/weight_units.hpp"
#include "octet/comm/collectives.hpp"
#include "octet/comm/gradient_reducer.hpp"
#include "octet/engine/engine.hpp"
#include "octet/engine/shard_plan.hpp"
#include "octet/engine/state.hpp"
#include "octet/optim/adamw.hpp"

namespace octet {

/// Of the blocks of a matrix, and of those of its transposed copy.
inline std::uint64_t weight_scale_bytes(WeightFormat format, const Shape& shape) {
  const Granularity granularity = granularity_of(format);
  std::int64_t bytes = scale_bytes(granularity, shape[0], shape[1]);
  if (is_transposed(format)) bytes += scale_bytes(granularity, shape[1], shape[0]);
  return static_cast<std::uint64_t>(bytes);
}

struct Engine::Impl {
  /// A registered parameter.
  struct Param {
    ParamSpec spec;
    bool managed = false;
    Formats formats;
    Tensor weight;             ///< whole; not where weights are cut
    Tensor weight_transposed;  ///< [columns, rows], for formats that have it
    Tensor gradient;     ///< this rank's, whole: its own memory or, of sharded ones, part of a slot
    Tensor accumulator;  ///< of micro-batches, where they are not summed in `gradient`
    float* weight_blocks = nullptr;  ///< in a window: the scales of the weight's tiles
    Buffer transposed_blocks;        ///< scales of the copy's tiles, where AdamW has no copy
    Tensor shard;  ///< sharded, where it is kept apart: the mean of the owned pieces
    TensorScale* gradient_scale = nullptr;
    std::vector<Piece> pieces;  ///< what this rank updates
    int gradients = 0;          ///< handed over since the last step
    float initial_amax = 0.0f;  ///< of the values that the ranks compared
    std::size_t bucket = 0;     ///< that reduces them

    /// Elements that this rank updates.
    std::int64_t owned() const { return numel_of(pieces); }
  };

  /// Parameters reduced together; one gradient dtype.
  struct Bucket {
    std::vector<int> params;
    Owners owners;
    int group = -1;  ///< of sharded gradients
    int after = -1;  ///< the last bucket that had its slot before
  };
  /// Where the gradients of a group lie in its slot.
  struct SlotLayout {
    std::vector<std::size_t> offsets;  ///< of every parameter, bytes
    std::size_t bytes = 0;             ///< of a slot: the largest group
    int count = 0;
  };

  Impl(const Context& context, Communicator& communicator, const EngineConfig& c)
      : ctx(context), comm(communicator), config(c), streams(context, communicator.context()) {}
  ~Impl();

  // set-up, in the order of freeze()
  void check_lists_agree();
  void build();
  void make_buckets();
  std::vector<std::vector<int>> runs_of(std::optional<bool> managed) const;
  std::vector<std::vector<int>> runs_of_units() const;
  void check_units() const;
  void cut_buckets();
  void make_window();
  std::vector<std::size_t> window_parts() const;
  void allocate_parameters();
  void allocate_weight(Param& p);
  void allocate_tensor(const char* what, const Param& p, Tensor& tensor, DType dtype,
                       const Shape& shape, bool for_peers);
  void allocate_slots();
  void make_units();
  void allocate_accumulators();
  void allocate_reducer();
  void allocate_optimizer();
  void allocate_communication();
  void make_gathers();
  void add_weight_scales(std::vector<TensorView>& tensors, Owners& owners) const;
  void initialise();
  /// Calls visit(parameter, its initial values) for all, one after the other; the values of those
  /// with a fill are in scratch until the next. Waits, and returns the amax of each.
  std::vector<float> visit_initial_values_sync(
      const std::function<void(std::size_t, const TensorView&)>& visit) const;
  void describe();
  void describe_gradients();
  std::string describe_optimizer() const;
  bool casts_from_masters(int i) const;
  std::string describe_schedule() const;
  std::string describe_reduction() const;
  std::string describe_means() const;
  std::string describe_slots() const;
  std::string describe_weights() const;

  /// Memory of the window, which make_window() has counted; aligned for vectors.
  void* take_from_window(std::size_t bytes);
  /// Where the other ranks have the weight of a parameter and the scales of its tiles.
  std::vector<WeightCopy> weight_copies(const Param& p) const;
  std::string describe_memory() const;

  bool sharded() const { return plan.sharding != Sharding::none && comm.size() > 1; }
  bool shards_gradients() const { return sharded() && plan.sharding >= Sharding::gradients; }
  bool shards_weights() const { return sharded() && plan.sharding == Sharding::parameters; }
  /// Whether the engine makes the transposed copies of weights that every rank has whole: AdamW
  /// writes this rank's panels alone.
  bool transposes_weights() const { return sharded() && !shards_weights(); }
  /// Whether AdamW can sum the ranks' contributions, and whether there is a buffer for their means.
  bool fused() const { return sharded() && schedule() == Schedule::fused; }
  bool keeps_shards() const { return sharded() && (!fused() || config.clipping); }
  /// What the optimizer reads of gradients that are stored so.
  DType reduced(DType gradient) const {
    return gradient == DType::f32 ? gradient : plan.reduced_gradient;
  }
  /// Whether this rank's gradient takes the mean of the owned pieces in. Nobody else reads these.
  bool reduces_in_place(const Param& p) const {
    return keeps_shards() && !shards_gradients() &&
           reduced(p.formats.gradient) == p.formats.gradient;
  }
  void check_reduced_gradient() const;
  Param& param(ParamId id, const char* call);
  const Param& param(ParamId id, const char* call) const;
  const Param& frozen_param(ParamId id, const char* call) const;
  /// Throw octet::Error while the weight's unit is not whole.
  TensorView whole_weight(ParamId id, const char* call) const;
  TensorView whole_transposed(ParamId id, const char* call) const;
  void require_whole(const Param& p, const char* call) const;
  /// Launches the reduction of a unit's gradients where its turn has come.
  void reduce_unit(int unit);
  void require_frozen(const char* call) const;

  Schedule schedule() const;
  /// Whether collectives run beside what the engine's stream does. Those of sharded gradients and
  /// weights begin during the backward pass whatever the schedule.
  bool overlaps() const {
    return comm.size() > 1 &&
           (schedule() == Schedule::overlap || (shards_gradients() && streams.is_apart()));
  }
  /// Whether kernels that do not end before others do, of other streams or of other ranks, are on
  /// the device beside what the engine's stream does.
  bool shares_device() const {
    return overlaps() || (window != nullptr && window->is_within_device());
  }
  /// What the micro-batches of gradients stored so are summed in.
  DType accumulator_of(DType gradient) const;
  void check_accumulator() const;
  int group_count() const;
  /// The last unit is the first group.
  int group_of_unit(int unit) const { return group_count() - 1 - unit; }
  SlotLayout slot_layout() const;
  /// Throws octet::Error when the group of the parameter has been reduced.
  void require_open(int i) const;
  void open_gradient(int i);
  void store_sums_of(const Bucket& bucket);
  /// Stores it in `to`, with the parameter's scale.
  void store_gradient(Param& p, const TensorView& gradient, const TensorView& to);
  /// Adds the gradient of a micro-batch to those before.
  void accumulate_gradient(Param& p, const TensorView& gradient);
  /// Makes the sum of micro-batches the gradient that is reduced.
  void store_sum(Param& p);
  /// Ends the backward pass: all gradients are reduced, or only brought together.
  void finish_gradients(bool sums_contributions);

  ParamState state_of(int i) const;
  GradientFormats gradient_formats() const;
  /// A weight that is not cut, and its transposed copy, with scales of blocks if they have them.
  BlockScaledView stored_weight(int i) const;
  BlockScaledView stored_transposed(int i) const;
  /// The transposed copies from the codes, for formats that have one.
  void transpose_weights();
  void transpose_weight(int i);

  /// Any rank's flag becomes every rank's.
  void share_flag();
  /// What the sharded step gives every rank: all segments' sums of squares, the new weights and
  /// all scales.
  void gather_sums();
  void gather_weights();
  /// Bytes in use of the engine's context and of the communicator's.
  std::size_t memory_in_use() const;
  std::uint32_t* nonfinite() const {
    return reinterpret_cast<std::uint32_t*>(&flag.as<TensorScale>()->amax);
  }

  Context ctx;
  Communicator& comm;
  EngineConfig config;
  SideStream streams;  ///< the engine's, and beside it the communicator's
  std::vector<Param> params;
  bool frozen = false;
  bool failed = false;  ///< freeze() began and did not end well

  std::vector<Bucket> buckets;
  std::unique_ptr<Window> window;  ///< outlives all that works on it
  std::string window_refusal;
  std::size_t window_next = 0;   ///< where its next part begins
  std::size_t window_taken = 0;  ///< bytes of the parts
  /// The non-finite flag, kept as the amax of a TensorScale so that it is shared like one.
  Buffer flag, gathered_flags;
  Buffer gradient_scales;              ///< in the order of the buckets
  std::vector<Buffer> gradient_slots;  ///< where there is no window
  std::unique_ptr<WeightUnits> units;  ///< where weights are cut
  std::unique_ptr<GradientReducer> reducer;
  std::unique_ptr<AdamW> adamw;
  std::unique_ptr<PieceGather> weight_gather;
  std::unique_ptr<PieceGather> sum_gather;
  Buffer gathered_scales;
  Plan plan;
};

}  // namespace octet
