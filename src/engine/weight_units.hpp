// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "octet/comm/shard_gather.hpp"
#include "octet/engine/plan.hpp"
#include "octet/runtime/side_stream.hpp"
#include "octet/runtime/tensor.hpp"

namespace octet {

/// How many units are whole at a time at most, and of how many groups gradients are in memory.
inline constexpr int kSlots = 2;

/// The weights of Sharding::parameters. Every rank keeps its pieces; whole ones exist by units, in
/// slots that units are gathered into: two, or one for a single unit. All ranks make the same calls
/// in the same order, and which collectives follow depends on these calls alone.
///
/// The unit that is wanted next is gathered ahead, on the communicator's stream and beside what the
/// engine's does, as soon as a slot is free: the one that came next in the step before, or else the
/// next in the direction of travel.
///
/// What a slot holds is known by the calls that were made. A CUDA graph does its work whenever it
/// is replayed, without calls: so a capture does not count on what is in a slot from outside of it,
/// and nobody does any more once there has been one.
class WeightUnits {
 public:
  struct Weight {
    WeightFormat format = WeightFormat::f32;
    Shape shape = {};
    bool managed = false;
  };
  /// Weights of one unit and one kind, cut over the ranks together.
  struct Part {
    int unit = 0;
    std::vector<int> params = {};
    Owners owners = {};  ///< pieces name parameters
  };

  /// `weights` by parameter; every parameter is in one part, every unit of 0 to its largest has
  /// one. Counts its memory in `plan`. `gathers` is about how many gathers a step has. Waits for
  /// the stream; all ranks make one together.
  WeightUnits(const Context& ctx, Communicator& comm, std::vector<Weight> weights,
              const std::vector<Part>& parts, std::size_t gathers, Plan& plan);
  /// Lets the engine's stream wait for gathers on their way, so that memory is freed behind them.
  ~WeightUnits();
  WeightUnits(const WeightUnits&) = delete;
  WeightUnits& operator=(const WeightUnits&) = delete;

  int count() const { return static_cast<int>(units_.size()); }
  /// This rank's pieces of a parameter's weight, for the optimizer, which has no copies.
  TensorView shard(int param) const;
  /// The scales of its tiles, those of all of it; null where it has none.
  float* blocks(int param) const;

  /// Makes a unit whole for what the engine's stream is given from here on. Throws octet::Error for
  /// a number that no unit has, for a unit that is whole, and when two others are.
  void gather(int unit);
  /// Gives it up again: its slot may be overwritten behind what the engine's stream has been given.
  void release(int unit);
  /// Whether a unit has been gathered and not released.
  bool is_whole(int unit) const;
  /// Throws octet::Error, beginning with `call`, when one is.
  void require_none_whole(const char* call) const;
  /// Lets the engine's stream wait for gathers on their way, which read the shards.
  void settle() { streams_.join(); }
  /// The units that are whole, for errors; empty when none is.
  std::string held_units() const;
  /// What is in the slots is no longer what the shards hold.
  void invalidate();

  /// Of a unit that is whole.
  TensorView weight(int param) const;
  TensorView transposed(int param) const;
  void* weight_scales(int param) const;
  void* transposed_scales(int param) const;

  /// Payload bytes that gathering a unit makes this rank send.
  std::uint64_t payload_bytes(int unit) const;
  /// Gathers of a unit so far, those ahead included. Throws as gather() for a number no unit has.
  std::int64_t gathers(int unit) const;
  int slot_count() const { return static_cast<int>(slots_.size()); }
  std::size_t slot_bytes() const { return slot_bytes_; }

 private:
  static constexpr std::size_t kNowhere = static_cast<std::size_t>(-1);

  /// Where a weight lies: its shard in the memory of its part, and in a slot everything of it.
  struct Place {
    int unit = 0;
    Buffer* memory = nullptr;
    std::size_t shard = 0;
    std::int64_t owned = 0;
    Buffer blocks;
    std::size_t codes = 0, scales = kNowhere, transposed = kNowhere, transposed_scales = kNowhere;
  };
  struct Unit {
    std::vector<int> params;
    std::vector<ShardedTensor> tensors;
    Owners owners;
    std::size_t bytes = 0;
    std::unique_ptr<ShardGather> gather;
    std::int64_t gathers = 0;
  };
  struct Slot {
    Buffer memory;
    std::unique_ptr<Event> arrived;
    int unit = -1;  ///< what is in it, or on its way
    bool is_held = false;
    std::uint64_t capture = 0;  ///< that the gather belongs to
    std::uint64_t used = 0;     ///< when it was last taken
  };

  void lay_out(const std::vector<Part>& parts, Plan& plan);
  void add_part(const Part& part, Plan& plan);
  void add_scales(Unit& unit, const Part& part, Plan& plan);
  void add_transposed(Unit& unit);
  void allocate_slots(Plan& plan);
  void check_unit(int unit, const char* call) const;
  void forget_uncertain();
  int slot_of(int unit) const;
  int free_slot() const;
  void fetch(int unit, int slot);
  void transpose(int unit, int slot);
  int wanted_after(int unit);
  void fetch_ahead();
  void* in_slot(int param, std::size_t offset) const;

  Context ctx_;
  Communicator& comm_;
  SideStream streams_;
  std::vector<Weight> weights_;
  std::vector<Place> places_;
  std::vector<std::unique_ptr<Buffer>> shards_;  ///< of the parts
  std::vector<Unit> units_;
  std::vector<Slot> slots_;
  std::size_t slot_bytes_ = 0;
  std::vector<int> before_, now_;  ///< what was gathered in the step before, and so far in this one
  std::size_t position_ = 0;       ///< gathers of this step
  bool follows_ = true;            ///< whether they have been those of the step before
  int last_ = -1, direction_ = 1, ahead_ = -1;
  std::uint64_t clock_ = 0;
  std::uint64_t capture_ = 0;  ///< that the stream is in
  bool was_captured_ = false;
};

}  // namespace octet
