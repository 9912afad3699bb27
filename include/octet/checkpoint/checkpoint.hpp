// SPDX-License-Identifier: Apache-2.0
// Checkpoints of an Engine: saved by N ranks, loaded by any other number, with any sharding and
// bucket size.
//
// A checkpoint of step S in a directory (one that all ranks see) is
//   octet-S-ID-rank-00003-of-00008.safetensors   one for every rank: what is that rank's to save
//   octet-S.json                                 the index, whose appearance is the commit
// Arrays lie in the files as the engine stores them, quantised bytes and scales, and no element
// twice. The index has the step, the configuration, and for every array its ranges of elements with
// file, tensor and checksum (XXH64), and a checksum of itself. ID is a random number
// for every save (a CheckpointWriter counts on from its first) and stands in every file, so that
// files of two saves are never taken for one checkpoint.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "octet/comm/communicator.hpp"
#include "octet/engine/engine.hpp"

namespace octet {

/// A buffer of the caller's that is saved and loaded beside the engine: the history of
/// DelayedScaling and the scales that it belongs to, AutoScale's state, a random generator's.
/// Every rank saves its own. Loaded on as many ranks each gets its own back; on M ranks rank r gets
/// that of rank r % N.
struct ExtraState {
  std::string name = {};
  /// On the engine's device, read and written in the order of its stream: after
  /// CheckpointWriter::start() it may be changed or freed in that order only.
  void* data = nullptr;
  std::size_t bytes = 0;
};

struct SaveOptions {
  /// Complete checkpoints that stay in the directory, this one included; older ones are removed
  /// once this one is complete. At least 1.
  int keep = 1;
  std::vector<ExtraState> extras = {};  ///< the same names on every rank
  /// The caller's own, the position in the data say; the same on every rank.
  std::map<std::string, std::string> metadata = {};
};

struct LoadOptions {
  std::optional<std::int64_t> step = {};  ///< default: the newest
  /// Which buffers to fill. All that the checkpoint has must be named, unless leave_extras.
  std::vector<ExtraState> extras = {};
  bool leave_extras = false;
  /// Learning-rate factor, betas, eps and weight decay of every parameter, decoupled weight decay,
  /// maximize, stochastic rounding and seed, and what gradients are stored, reduced and, where both
  /// runs have micro-batches, summed in are compared: others than those saved are an error. (What
  /// gradients are reduced in has a default that depends on the sharding.) True: the engine's are
  /// meant, and the run goes on with them.
  bool change_hyper_parameters = false;
};

/// What an index says of its checkpoint.
struct CheckpointInfo {
  std::string index = {};  ///< path
  std::string id = {};
  std::int64_t step = 0;     ///< steps applied
  std::int64_t skipped = 0;  ///< steps skipped
  int ranks = 0;             ///< that saved it
  std::uint64_t bytes = 0;   ///< of the ranks' files
  std::map<std::string, std::string> metadata = {};
  /// Of a save, on rank 0: why older checkpoints, or what saves that died have left, are still
  /// there. The checkpoint is complete; the next save tries again. Empty otherwise.
  std::string not_removed = {};
};

/// Steps of the complete checkpoints in a directory, ascending; empty where there is no directory.
std::vector<std::int64_t> checkpoint_steps(const std::string& directory);

/// Reads and checks the index of a step, by default the newest. Throws octet::Error naming
/// directory or file and field.
CheckpointInfo read_checkpoint_info(const std::string& directory,
                                    std::optional<std::int64_t> step = {});

/// Saves what the engine is between two steps, from a copy in host memory while training goes on,
/// which is held up for as long as the engine's stream copies. The engine and the communicator
/// must outlive it. All ranks make the same calls, in the thread that the communicator belongs to,
/// between step() and the next add_gradient().
///
/// At any moment, and whichever ranks die, the directory holds the last complete checkpoint: files
/// are written under temporary names, flushed and renamed; finish() has all ranks meet, and only
/// when the files of all are on the disk rank 0 puts the index in place, flushes the directory and
/// removes what `keep` does not keep. What saves that died or failed have left behind goes
/// before a writer's first save, and its first after one that failed, so that it takes no room. A
/// directory belongs to one run and one writer at a time:
/// two would take one another's files for such. A step that is saved again replaces the earlier
/// checkpoint of it.
///
/// Ranks wait for the slowest disk within the communicator's deadline: a rank whose file takes
/// longer than that after those of the others gives them a CommError.
class CheckpointWriter {
 public:
  CheckpointWriter(Engine& engine, Communicator& comm, std::string directory);
  /// Waits for the disk. What was not finished is no checkpoint, and its file is removed.
  ~CheckpointWriter();
  CheckpointWriter(const CheckpointWriter&) = delete;
  CheckpointWriter& operator=(const CheckpointWriter&) = delete;

  /// Enqueues the copy of this rank's part of the state to the host, and has a thread write it once
  /// it is there: the host does not wait for the stream, nor for other ranks, but where it says so
  /// here. An earlier save is finished first. The first call, and one after a save that failed,
  /// makes and sweeps the directory and waits for the stream and the other ranks. Host memory
  /// (pinned on CUDA) is taken at the first call and kept; where extras have grown it is taken
  /// anew, which waits for the device. States in host memory (EngineConfig::offload_states) are
  /// copied, too, because steps change them, and by the calling thread, which waits for the stream.
  /// Throws on every rank octet::Error for a directory that cannot be made, and what finish()
  /// throws of the earlier save. All else that is wrong finish() tells: no rank knows before that
  /// whether the others have begun.
  void start(const SaveOptions& options = {});
  /// Whether this rank's thread is still at work; finish() would wait for it, and for other ranks.
  bool is_writing() const;
  /// Waits for this rank's file and for the other ranks, and makes the checkpoint complete. Nothing
  /// when none was started. When one rank has failed every rank throws its octet::Error, and there
  /// is no checkpoint (unless all that failed is the last flush of the directory): options out of
  /// range, gradients that waited for a step, options or steps that differ between ranks, a later
  /// step in the directory, no memory, a full disk. What cannot be removed is no failure:
  /// CheckpointInfo::not_removed.
  std::optional<CheckpointInfo> finish();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

/// start() and finish() in one, without the copy: the state goes to the disk in pieces. Waits for
/// the stream.
CheckpointInfo save_checkpoint(Engine& engine, Communicator& comm, const std::string& directory,
                               const SaveOptions& options = {});

/// Loads a checkpoint into a frozen engine with the same parameters in the same formats; number of
/// ranks, sharding, buckets, schedule, micro-batches and transposed copies are free. Between
/// sharded and not sharded EngineConfig::reduced_gradient must be set to what the other run has.
/// Each rank reads the ranges that it holds. The next step goes on with the bits of the run that
/// saved, given the same gradients and as many ranks, or the same gradient on every rank. With
/// sharded weights no unit may be whole.
/// Index, headers and the checksums of all data are checked first, the data in equal parts by the
/// ranks, and each opens all that it will read: octet::Error, on every rank, names rank, file and
/// field, and nothing has changed. (Only a disk that fails between that and the second read leaves
/// an engine that is partly loaded, and the error says so.) Waits for the stream.
CheckpointInfo load_checkpoint(Engine& engine, Communicator& comm, const std::string& directory,
                               const LoadOptions& options = {});

}  // namespace octet
