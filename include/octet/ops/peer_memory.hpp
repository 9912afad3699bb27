// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

namespace octet {

/// Kernels over peer memory have at most so many blocks, and serve at most so many ranks.
inline constexpr int kMaxPeerBlocks = 256;
inline constexpr int kMaxPeers = 64;

/// Which collective a kernel is, for the error should it fail: CollectiveName and number.
struct PeerTag {
  const char* op = nullptr;  ///< the host's pointer; kernels only hand it on
  std::int32_t bucket = -1;
  std::uint64_t number = 0;
};

/// Words in host memory that kernels reach too: how a host thread ends a kernel that waits for
/// ranks which do not come, and how the kernel says so.
struct PeerStatus {
  std::uint32_t abort = 0;    ///< not 0: waiting kernels leave
  std::uint32_t failed = 0;   ///< 1: a kernel left without having met all ranks
  std::uint32_t missing = 0;  ///< one of the ranks that it waited for
  PeerTag tag = {};           ///< of that kernel
};

/// What a kernel needs to work on the memory of all ranks (comm's Window): every rank has a window
/// of the same size, laid out the same way, and sees those of the others at addresses of its own.
/// All pointers are device memory but `status`.
struct PeerMemory {
  std::byte* const* windows = nullptr;  ///< [ranks]: where each begins, as this device sees it
  std::uint32_t* epochs = nullptr;      ///< [kMaxPeerBlocks]: how often each block has met others
  PeerStatus* status = nullptr;
  std::int64_t deadline_ns = 0;  ///< how long a block waits for the other ranks
  int ranks = 1;
  int rank = 0;
  int blocks = 1;  ///< of a kernel; the same on every rank, and all of them fit on the device
  PeerTag tag = {};
};

/// A window begins with the flags through which blocks meet: [kMaxPeerBlocks][ranks] words.
constexpr std::size_t peer_flag_bytes(int ranks) {
  return static_cast<std::size_t>(ranks) * kMaxPeerBlocks * sizeof(std::uint32_t);
}

}  // namespace octet
