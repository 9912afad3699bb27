// SPDX-License-Identifier: Apache-2.0
// A save, step by step: open_directory() on all ranks together, once for any number of saves;
// describe_save() and write_rank_file() on each; commit() on all.
#pragma once

#include <cstdint>
#include <exception>
#include <functional>
#include <string>
#include <vector>

#include "octet/checkpoint/checkpoint.hpp"
#include "octet/checkpoint/safetensors.hpp"
#include "octet/engine/state.hpp"

namespace octet {

/// What a call fails with; empty when it does not.
template <class Fn>
std::string problem_of(const Fn& fn) {
  try {
    fn();
  } catch (const std::exception& error) {
    return *error.what() != '\0' ? error.what() : "it failed";
  }
  return {};
}

/// A tensor of this rank's file.
struct SavePart {
  FileTensor tensor = {};
  const void* data = nullptr;  ///< device memory
  int param = -1, array = -1;  ///< of the engine's state, with the range; else
  std::int64_t begin = 0, count = 0;
  int extra = -1;          ///< of the options; neither: the scales
  std::uint64_t hash = 0;  ///< once it is written
};

struct Save {
  std::string directory = {}, level = {}, sharding = {};
  std::uint64_t id = 0;  ///< the same on every rank, and no other save's
  SaveOptions options = {};
  EngineState state;
  int rank = 0, ranks = 1;
  std::int64_t step = 0, skipped = 0;  ///< once it is written
  std::vector<SavePart> parts = {};    ///< in the order of the file
  std::uint64_t file_bytes = 0;        ///< once it is written

  std::string path() const;
  std::size_t part_bytes() const;  ///< of all parts
};

/// Makes the directory, removes what saves that died or failed have left (which may fill the disk),
/// and has rank 0 choose a number at random. No rank writes before it has heard that.
std::uint64_t open_directory(const std::string& directory, Communicator& comm);

/// What this rank is to save, but for `id`; checks options and state.
Save describe_save(Engine& engine, const Communicator& comm, const std::string& directory,
                   const SaveOptions& options);

/// Host memory with `bytes` bytes of a part from `offset` on, valid until the next call.
using PartSource =
    std::function<const void*(const SavePart& part, std::size_t offset, std::size_t bytes)>;

/// Writes, flushes and renames this rank's file, and fills in step and checksums. Refuses a step
/// before one that the directory has.
void write_rank_file(Save& save, const AdamwScalars& scalars, const PartSource& source);

/// Together, with what write_rank_file() failed with on this rank (empty: it did not). The index
/// appears only when all ranks have saved the same step with the same options, and all files are
/// there.
CheckpointInfo commit(Save& save, Communicator& comm, const std::string& problem);

}  // namespace octet
