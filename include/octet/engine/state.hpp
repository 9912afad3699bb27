// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "octet/engine/level.hpp"
#include "octet/optim/adamw.hpp"

namespace octet {

/// Elements [begin, begin + count) of an array of a parameter, and where this rank has them.
struct StateRange {
  std::int64_t begin = 0;
  std::int64_t count = 0;
  void* data = nullptr;  ///< device memory; with EngineConfig::offload_states maybe pinned memory
};

/// One stored array of a parameter. Everything is counted in elements of the parameter;
/// `entry_elements` of them in a row share an entry (a block's scale), so ranges begin at multiples
/// of it.
struct StateArray {
  /// "weight", "weight_blocks", "master", "m", "m_blocks", "v", "v_blocks".
  std::string_view name;
  /// As name_of() spells the weight's or state's format; "f32" for scales of blocks.
  std::string_view format;
  std::int64_t entry_elements = 1;
  std::size_t entry_bytes = 0;
  /// All that this rank has, in ascending order.
  std::vector<StateRange> held = {};
  /// Of that the part that is this rank's to save: over all ranks each element once, whatever the
  /// sharding.
  std::vector<StateRange> owned = {};

  /// Bytes of `count` elements from the start of an entry.
  std::size_t bytes(std::int64_t count) const {
    return static_cast<std::size_t>((count + entry_elements - 1) / entry_elements) * entry_bytes;
  }
};

/// What this rank has of a parameter. Transposed copies are no state: Engine::state_loaded() makes
/// them anew.
struct ParamState {
  std::string name = {};
  Shape shape = {};
  StateFormats formats = {};  ///< of the stored arrays: the weight's without its transposed copy
  AdamwHyper hyper = {};
  std::vector<StateArray> arrays = {};
};

/// How gradients of FP8-managed parameters become what the optimizer reads: with other formats the
/// same gradients give other bits. All f32 where no parameter is FP8-managed.
struct GradientFormats {
  DType gradient = DType::f32;     ///< stored and, but for micro-batches, handed to the reduction
  DType reduced = DType::f32;      ///< EngineConfig::reduced_gradient
  DType accumulator = DType::f32;  ///< what more than one micro-batch is summed in
  int micro_batches = 1;
};

/// What an engine is between two steps: all that a later one needs to go on with the same bits.
/// Pointers are into the engine's memory, on its device or, of states with
/// EngineConfig::offload_states, in pinned host memory, and stay valid as long as it lives.
struct EngineState {
  Context ctx;  ///< whose stream the memory belongs to
  AdamWConfig adamw;
  GradientFormats gradients;
  std::vector<ParamState> params;  ///< as registered
  /// [4 * parameters]: weight, master, m, v of all parameters; the same on every rank.
  TensorScale* scales = nullptr;
  std::int64_t scale_count = 0;
  /// Of which `step` and `skipped` persist; the same on every rank.
  AdamwScalars* scalars = nullptr;
  /// Units that are whole (Engine::gather()), as errors name them. While there are any nothing may
  /// be written.
  std::string whole_units = {};
};

}  // namespace octet
