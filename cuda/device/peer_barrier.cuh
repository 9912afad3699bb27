// SPDX-License-Identifier: Apache-2.0
// Meetings of a block with the blocks of the same index on all other ranks. A block tells the
// others by a word in each one's memory and waits for theirs in its own. Unlike NCCL's device
// barriers these can be left: at a deadline, or when a host thread says so.
#pragma once

#include "octet/ops/peer_memory.hpp"

namespace octet::detail::cuda {

__device__ inline std::uint32_t* peer_flag(const PeerMemory& peers, int at, int from) {
  return reinterpret_cast<std::uint32_t*>(peers.windows[at]) + blockIdx.x * peers.ranks + from;
}

__device__ inline std::uint64_t global_time() {
  std::uint64_t now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  return now;
}

__device__ inline std::uint32_t load_acquire(const std::uint32_t* word) {
  std::uint32_t value;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
  return value;
}

__device__ inline void store_release(std::uint32_t* word, std::uint32_t value) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(word), "r"(value) : "memory");
}

/// False when the wait was given up.
__device__ inline bool wait_for_peer(const PeerMemory& peers, int rank, std::uint32_t epoch) {
  constexpr unsigned kLooksPerCheck = 256;  // host memory is slow to read
  const std::uint32_t* flag = peer_flag(peers, peers.rank, rank);
  std::uint64_t begin = 0;
  for (unsigned looks = 1; static_cast<std::int32_t>(load_acquire(flag) - epoch) < 0; ++looks) {
    if (looks % kLooksPerCheck != 0) continue;
    const std::uint64_t now = global_time();
    if (begin == 0) begin = now;
    volatile PeerStatus* status = peers.status;
    const bool late = now - begin > static_cast<std::uint64_t>(peers.deadline_ns);
    if (status->abort == 0 && !late) continue;
    if (status->failed == 0) status->missing = static_cast<std::uint32_t>(rank);
    status->abort = 1;
    __threadfence_system();
    status->failed = 1;
    return false;
  }
  return true;
}

/// All threads of a block call it, with a number that is one more at every meeting. What the
/// threads of the other ranks' blocks wrote before they called it is visible afterwards. False, in
/// every thread, when the wait was given up.
__device__ inline bool meet_peers(const PeerMemory& peers, std::uint32_t epoch) {
  __syncthreads();
  bool met = true;
  const int rank = static_cast<int>(threadIdx.x);
  if (rank < peers.ranks && rank != peers.rank) {
    store_release(peer_flag(peers, rank, peers.rank), epoch);
    met = wait_for_peer(peers, rank, epoch);
  }
  return __syncthreads_and(met ? 1 : 0) != 0;
}

/// True in one block of a kernel, in all its threads: the last that calls it. What the other blocks
/// wrote before is visible there.
__device__ inline bool is_last_block(const PeerMemory& peers) {
  __shared__ bool is_last;
  __syncthreads();
  if (threadIdx.x == 0) {
    std::uint32_t* done = peers.epochs + kMaxPeerBlocks;
    __threadfence();
    is_last = atomicAdd(done, 1u) == gridDim.x - 1;
    if (is_last) *done = 0;
    __threadfence();
  }
  __syncthreads();
  return is_last;
}

}  // namespace octet::detail::cuda
