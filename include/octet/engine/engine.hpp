// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "octet/comm/communicator.hpp"
#include "octet/comm/gradient_reducer.hpp"
#include "octet/engine/plan.hpp"
#include "octet/runtime/tensor.hpp"

namespace octet {

struct EngineConfig {
  Level level = Level::O2;
  /// Default: what the level says (O3: optimizer, the others: none).
  std::optional<Sharding> sharding = {};
  /// Default: the level's formats. Every combination of existing formats works but for two: the
  /// weight is never none, and an optimizer cut over several ranks has no weights in
  /// e4m3_row_block. Formats of matrices want FP8-managed parameters of two dimensions, and with
  /// such an optimizer a transposed copy, which every rank then makes for itself, wants rows that
  /// are a multiple of 16.
  std::optional<Formats> formats = {};
  AdamWConfig adamw = {};
  /// What the mean over the ranks of an FP8-managed gradient is stored in for the optimizer: f32,
  /// which a gradient reaches with one rounding, or the gradient's own format, rounded once more
  /// with a common scale (numerics section 5). Default: f32 with a sharding, where the mean does
  /// not travel; the gradient's own without, where there is no other. In the gradient's own format
  /// it takes no memory beside a gradient that is there. For one value the bits are the same with
  /// every sharding and, given the same gradients on every rank, number of ranks.
  std::optional<DType> reduced_gradient = {};
  /// Parameters with at least two dimensions and this many elements are FP8-managed; all others
  /// have FP32 weight, gradient and states.
  std::int64_t fp8_min_elements = 4096;
  /// Gradients are reduced in buckets of at least this many elements. With overlap nothing hides
  /// what the last bucket takes, so a bucket should be a small part of the model. Sharded gradients
  /// are in groups of at least so many, and two of the largest take memory; with sharded weights
  /// the groups are the units.
  std::int64_t bucket_elements = std::int64_t{32} << 20;
  /// When buckets are reduced, and whether into means. Default: overlap where the communicator's
  /// context has a stream of its own, which it needs, else after_backward, which with sharded
  /// gradients is as late as their memory allows. With sharded weights release() says when. fused
  /// needs an optimizer cut over several ranks, gradients that are not, and means in f32.
  std::optional<Schedule> schedule = {};
  /// Whether ranks read and write one another's memory (Communicator::make_window()): gradients,
  /// their scales and, of an optimizer cut over ranks, whole weights then lie in a window. Default:
  /// with NCCL, where the devices can; the plan says why not. true where they cannot is an error at
  /// freeze(); one rank has no peers and no window.
  std::optional<bool> windows = {};
  /// Whether steps may clip. The norm is that of the means, so with `fused` this keeps the FP32
  /// shard buffer (4 bytes per parameter that a rank owns), which only steps that clip fill.
  bool clipping = true;
  /// Gradients of a parameter that make up a step, one from each micro-batch. They are summed, and
  /// the sum is reduced once: for the mean divide the loss by micro_batches. A parameter may get
  /// fewer; with sharded weights see Engine::release().
  int micro_batches = 1;
  /// What more than one micro-batch is summed in: f32 (the default: 4 bytes per parameter, and the
  /// sum is rounded to the gradient's format once) or bf16 (2 bytes, enough for few micro-batches:
  /// one of 256 alike no longer moves the sum), or the gradient's own format, which takes no
  /// memory. In e4m3 every sum is cast anew. A gradient in f32 is summed where it is. Sharded
  /// gradients are summed apart in every format: the sums are whole on every rank.
  std::optional<DType> accumulator = {};
  /// m, v and the master, with the scales of their blocks, live in pinned host memory, which the
  /// update reads and writes across the link in its one pass: the device holds weights and
  /// gradients only, and a step takes as long as the link takes. Same bits. The memory is the
  /// library's (pinned_host_allocator()), not that of the context's allocator. The master of an f32
  /// weight is the weight and stays.
  bool offload_states = false;
};

struct ParamSpec {
  std::string name = {};
  Shape shape = {};
  /// Initial values, f32, bf16 or f16, on the engine's device, the same on every rank (freeze()
  /// compares their amax); read by freeze(), so they must stay valid until then.
  TensorView init = {};
  /// Instead of init, for models whose initial values do not fit beside their state: writes them
  /// into `values`, f32 scratch of this shape, in the order of the context's stream. freeze() calls
  /// it twice, for the comparison of the ranks and to initialise; both times it must make the same
  /// values, the same on every rank (freeze() compares their amax, too). The scratch has the size
  /// of the largest such parameter and is gone after freeze().
  std::function<void(const Context& ctx, const TensorView& values)> fill = {};
  /// False keeps the parameter out of FP8 whatever its size.
  bool fp8 = true;
  /// With Sharding::parameters: what is gathered and released together, a layer say. Units count
  /// from 0 without gaps, in the order of the forward pass; gradients come unit by unit, the last
  /// unit first. Without effect otherwise.
  int unit = 0;
  /// Hyper-parameters that differ from the configuration's.
  AdamWGroup group = {};
};

struct EngineState;  // octet/engine/state.hpp

struct ParamId {
  int index = -1;
};

struct StepOptions {
  float lr = 0.0f;
  /// Read instead of `lr` when set: a device scalar, so that a captured step can change it.
  const float* lr_device = nullptr;
  /// Clip the gradients to this global norm; 0 means no clipping. Refused where
  /// EngineConfig::clipping is false.
  float max_norm = 0.0f;
};

/// What a step leaves in device memory; read_sync() waits for it.
struct StepResult {
  DeviceValue<float> norm;            ///< before clipping; 0 when no clipping was asked for
  DeviceValue<std::int64_t> step;     ///< steps applied so far
  DeviceValue<std::int64_t> skipped;  ///< steps skipped so far because of non-finite values
};

/// A parameter whose gradient made steps be skipped.
struct NonfiniteGradient {
  std::string name;
  std::int64_t steps = 0;  ///< so far
};

/// The trainer's side of the library: parameters are handed over once, gradients every step.
/// add(), freeze() are set-up; the weights, add_gradient() and step() are the hot path: no
/// allocation, no synchronisation, no host read of a device value.
/// All ranks make the same calls in the same order; only add_gradient() may come in any order, or
/// not at all (with sharded weights: release()). Everything is deterministic.
class Engine {
 public:
  /// `comm` must live as long as the engine and belong to a context of the same device: the same,
  /// or one with a stream of its own, on which the reduction then runs beside the backward pass.
  /// To the end of step() it belongs to the engine from the last add_gradient() of a bucket on,
  /// with sharded gradients from the first add_gradient() on, with sharded weights from the first
  /// gather() on. Where reductions run so, and where ranks with a window are on one device,
  /// freeze() tells the context that it shares the device (Context::set_shares_device()).
  Engine(const Context& ctx, Communicator& comm, const EngineConfig& config = {});
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  /// Registers a parameter. Throws octet::Error for a duplicate or empty name, a missing or
  /// mismatching init, both init and fill, an FP8-managed shape that is no matrix where the
  /// weight's format is one of matrices, a negative unit, rows that an optimizer cut over several
  /// ranks has no transposed copy for (EngineConfig::formats), or after freeze().
  ParamId add(const ParamSpec& spec);

  /// Allocates, checks that all ranks registered the same list (throws on every rank, naming the
  /// first difference) and builds the plan. Throws for units with gaps where weights are sharded,
  /// and for a fill that makes other values the second time. Waits for the stream. When one rank
  /// cannot allocate what it needs, every rank throws; the engine is then of no further use.
  void freeze();

  /// A parameter as it was registered; after freeze() without init and fill. Throws octet::Error
  /// for an id that add() did not return.
  const ParamSpec& spec(ParamId id) const;
  /// How a parameter's compute weight is stored: the configuration's format where it is
  /// FP8-managed, else f32.
  WeightFormat weight_format(ParamId id) const;
  /// The compute weight: e4m3 with scale (FP8-managed at O1 to O3), bf16 (O0) or f32. The pointer
  /// stays the same, here and below; the contents change in step(). With Sharding::parameters there
  /// is one from gather() to release() of its unit, and the next time it may be another; asking for
  /// it at other times throws octet::Error, here and below. Throws octet::Error for a weight with
  /// scales of blocks.
  ScaledView weight(ParamId id) const;
  /// The transposed copy [columns, rows] of it, with the same scale. Throws octet::Error for
  /// formats other than e4m3_and_transpose.
  TensorView weight_transposed(ParamId id) const;
  /// The compute weight with scales of its blocks, as Linear takes tiles. Throws octet::Error for
  /// formats without.
  BlockScaledView block_weight(ParamId id) const;
  /// The transposed copy [columns, rows] of it, with the scales transposed. Throws octet::Error for
  /// formats other than e4m3_tile_and_transpose.
  BlockScaledView block_weight_transposed(ParamId id) const;
  /// The compute weight of any format decoded into the caller's buffer (f32, bf16 or f16), rounded
  /// once.
  void weight_as(ParamId id, const TensorView& out) const;

  /// Makes the weights of a unit whole, for what the stream is given from here on, and gathers the
  /// unit that is likely next ahead, beside the stream: the one that came next in the step before,
  /// else the next in the direction of travel. At most two units are whole at a time. One that is
  /// still in memory since the last step is not gathered again. The host does not wait.
  /// A CUDA graph holds whole steps, from before the first gather() to step(), and no unit is whole
  /// when it is replayed. Replays change weights unseen by the host: once a gather() has been
  /// captured, those outside of captures always gather anew and nothing ahead.
  /// With shardings other than parameters, and with one rank, all weights are whole all the time;
  /// both calls do nothing. Throws octet::Error for a number that no unit has, a unit that is whole
  /// already and a third one, CommError when an earlier collective failed.
  void gather(int unit);
  /// Gives the weights of a unit up, behind what the stream has been given so far. When a parameter
  /// of the unit has got the last of its micro-batches, and gradients of all units behind it are
  /// reduced, this ends the unit's: their reduction is launched here, a parameter without any
  /// counts as zero, and one more for the unit is an error until step(). Which collectives run in
  /// which order follows from gather(), release() and step(), which all ranks call in the same
  /// order, and from which units have such a parameter. So a unit that has one on one rank must
  /// have one on all, another it may be (zeros do), handed over between the same two of these
  /// calls. Throws octet::Error for a unit that is not whole, CommError when an earlier collective
  /// failed.
  void release(int unit);
  /// How often the weights of a unit have travelled since freeze(): gather() of one that is still
  /// in memory sends nothing, gathering ahead does. Of what this rank has sent,
  /// Plan::wire_bytes_per_step every step and Plan::unit_gather_bytes every time are all. A capture
  /// counts as if it were run, replays do not. Host state, the same on every rank; 0 where all
  /// weights are whole all the time. Throws octet::Error before freeze() and for a number that no
  /// unit has.
  std::int64_t unit_gathers(int unit) const;

  /// Hands over the gradient of a parameter for one micro-batch: same shape, f32, bf16 or f16. It
  /// is stored in the engine's format or added to those of the micro-batches before, so `gradient`
  /// may be reused at once in stream order. With the last of EngineConfig::micro_batches the
  /// parameter is ready to be reduced, and with overlap buckets whose parameters all are get
  /// launched; ranks may hand over in different orders. One more before step() is an error: sum the
  /// uses of a shared parameter first. A parameter without any counts as zero gradient, one with
  /// fewer than micro_batches has the sum of those. With sharded gradients parameters are in
  /// groups, in reverse order of registration: the gradient of a group has the one two before it
  /// reduced, with what there is, and a gradient that comes for that one is an error. Throws
  /// CommError when an earlier collective failed.
  void add_gradient(ParamId id, const TensorView& gradient);

  /// Reduce over the ranks, clip, update, gather. No unit may be whole: step() changes the weights,
  /// and of those that units hold nothing is kept. If any gradient on any rank is not finite
  /// nothing changes on any rank but the count of skipped steps. Throws octet::Error for options
  /// out of range, for max_norm without EngineConfig::clipping and naming units that are whole;
  /// CommError when an earlier collective failed (comm.synchronize() waits until that is known);
  /// all of them before anything changes.
  StepResult step(const StepOptions& options);

  const Plan& plan() const;
  /// Device word that a trainer's own kernels (and Linear) set to 1 to have the step skipped.
  std::uint32_t* nonfinite_flag() const;
  /// The parameters whose reduced gradient was not finite in steps that were skipped, in the order
  /// of registration, with the number of those steps; the same on every rank, whichever rank's
  /// gradient it was. Steps that were skipped for another reason (nonfinite_flag(), a norm that
  /// overflows, the learning rate) name nobody. Waits for the stream: for reports, when `skipped`
  /// has grown.
  std::vector<NonfiniteGradient> nonfinite_gradients_sync() const;
  /// The optimizer, for reading states.
  const AdamW& optimizer() const;

  /// All that lasts from step to step, as this rank holds it: what a checkpoint saves, and where
  /// loading writes to. In the order of the engine's stream. Throws octet::Error before freeze(),
  /// and naming the parameter where gradients wait for a step.
  EngineState state();
  /// After the memory that state() tells of was written: makes anew what follows from it, the
  /// transposed copies of weights. Waits for the stream.
  void state_loaded();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace octet
