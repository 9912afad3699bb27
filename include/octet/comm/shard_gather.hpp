// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "octet/comm/collectives.hpp"

namespace octet {

/// A tensor that ranks hold in pieces.
struct ShardedTensor {
  DType dtype = DType::f32;
  Shape shape = {};
  /// Memory of this rank's pieces: one after the other, or each at its place in a whole tensor.
  const void* data = nullptr;
  bool is_shard = true;
  /// Where the whole tensor begins in a destination, in bytes.
  std::size_t offset = 0;
};

/// Brings whole tensors together from the pieces of all ranks, in memory apart from them. Pieces of
/// a rank that follow one another in its memory and in the destination travel as one part, so
/// tensors that are cut together should lie together in both. Lists are made once; run() allocates
/// nothing, does not synchronise and can be captured.
class ShardGather {
 public:
  /// Every destination is device memory of `bytes` bytes on every rank, laid out alike, where none
  /// of the pieces lie. All ranks hold the same lists but for pointers. Waits for the stream.
  /// Throws octet::Error for owners that do not cover every element once, pieces without memory,
  /// tensors that pass the end of a destination or one another, and no destination.
  ShardGather(Communicator& comm, const std::vector<ShardedTensor>& tensors, const Owners& owners,
              const std::vector<void*>& destinations, std::size_t bytes);

  /// Enqueues the gather on the communicator's stream: this rank's pieces are copied, the others
  /// travel. Exact. Watched as one collective, "shard_gather"; throws CommError if it or an earlier
  /// one failed, octet::Error for a number that is no destination's.
  void run(int destination);

  /// Payload bytes that run() makes this rank send.
  std::uint64_t payload_bytes() const { return payload_; }

 private:
  struct Copy {
    const char* from;
    std::size_t to, bytes;
  };
  void plan(const std::vector<ShardedTensor>& tensors, const Owners& owners);
  void add_copy(const Copy& copy);

  Communicator& comm_;
  std::vector<void*> destinations_;
  std::vector<SendPart> sends_;
  std::vector<std::vector<RecvPart>> recvs_;  ///< for every destination
  std::vector<Copy> copies_;
  std::uint64_t payload_ = 0;
};

}  // namespace octet
