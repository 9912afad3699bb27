// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "octet/engine/level.hpp"

namespace octet {

/// Bytes of one kind of memory of this rank: what the plan says and what the allocator gave out.
/// With EngineConfig::offload_states "master (host)", "m (host)" and "v (host)" stand for the
/// three.
struct MemoryRow {
  /// "weight", "gradient", "master", "m", "v", "scales", where the format has them "transposed
  /// weight" and "weight scales" (of blocks); "reduced gradient shard" (state where gradients are
  /// sharded, else communication), "gradient slots", "weight slots", "gradient accumulator",
  /// "communication", "tables".
  std::string what;
  bool fp8_managed = true;
  bool state = true;  ///< part of the model state (communication memory is not)
  std::uint64_t predicted = 0;
  std::uint64_t measured = 0;
  bool host = false;  ///< not in the device's memory
};

/// What really runs, format by format, path by path, with the reason.
struct Plan {
  Level level = Level::O0;
  Sharding sharding = Sharding::none;
  int ranks = 1;
  std::string transport;
  Formats formats;  ///< of FP8-managed parameters
  /// What the optimizer reads of FP8-managed parameters, on several ranks. The gradient of one rank
  /// is its own mean in either format, and the optimizer reads it as it is stored.
  DType reduced_gradient = DType::f32;
  std::int64_t parameters = 0;            ///< elements
  std::int64_t fp8_parameters = 0;        ///< of those, FP8-managed
  std::int64_t owned_fp8_parameters = 0;  ///< whose optimizer state this rank holds
  int buckets = 0;
  std::string reduction;      ///< path and reason
  std::string schedule;       ///< when buckets are reduced, how, and why
  std::string accumulation;   ///< how the gradients of micro-batches are summed
  std::string weight_gather;  ///< path and reason
  std::string optimizer;      ///< how the update runs, and why not faster
  std::vector<std::string> notes;
  std::vector<MemoryRow> memory;
  /// Payload bytes this rank sends per step, what gather() sends not counted.
  std::uint64_t wire_bytes_per_step = 0;
  /// Of every unit (Sharding::parameters): what this rank sends each time it is gathered.
  std::vector<std::uint64_t> unit_gather_bytes;

  /// Adds bytes to the row of this kind, made when it is new.
  void count(const std::string& what, bool fp8_managed, bool state, std::uint64_t predicted,
             std::uint64_t measured, bool host = false);
  /// Sums over the rows that are model state in the device's memory, of FP8-managed parameters only
  /// or of all.
  std::uint64_t state_bytes(bool fp8_managed_only, bool measured) const;
  /// The same in host memory.
  std::uint64_t host_state_bytes(bool fp8_managed_only, bool measured) const;
  /// The whole plan as Markdown.
  std::string to_markdown() const;
};

}  // namespace octet
