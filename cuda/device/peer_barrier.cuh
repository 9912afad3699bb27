// SPDX-License-Identifier: Apache-2.0
// Meetings of a block with the blocks of the same index on all other ranks. A block tells the
// others by a word in each one's memory and waits for theirs in its own. Unlike NCCL's device
// barriers these can be left: at a deadline, or when a host thread says so.
#pragma once

#include "octet/ops/peer_memory.hpp"

namespace octet::detail::cuda {

/// Where block `block` of rank `from` leaves its number on rank `at`.
__device__ inline std::uint32_t* peer_flag(const PeerMemory& peers, int at, int block, int from) {
  return reinterpret_cast<std::uint32_t*>(peers.windows[at]) + block * peers.ranks + from;
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
__device__ inline bool wait_for_peer(const PeerMemory& peers, int block, int rank,
                                     std::uint32_t epoch) {
  constexpr unsigned kLooksPerCheck = 256;  // host memory is slow to read
  constexpr unsigned kEagerLooks = 8, kPauseNs = 200;
  const std::uint32_t* flag = peer_flag(peers, peers.rank, block, rank);
  std::uint64_t begin = 0;
  for (unsigned looks = 1; static_cast<std::int32_t>(load_acquire(flag) - epoch) < 0; ++looks) {
    // Looks load the memory that others work with.
    if (looks > kEagerLooks) __nanosleep(kPauseNs);
    if (looks % kLooksPerCheck != 0) continue;
    const std::uint64_t now = global_time();
    if (begin == 0) begin = now;
    volatile PeerStatus* status = peers.status;
    const bool late = now - begin > static_cast<std::uint64_t>(peers.deadline_ns);
    if (status->abort == 0 && !late) continue;
    // The first of the grid to give up says why.
    if (atomicExch(&peers.status->abort, 2u) != 2u) {
      status->missing = static_cast<std::uint32_t>(rank);
      status->tag.op = peers.tag.op;
      status->tag.bucket = peers.tag.bucket;
      status->tag.number = peers.tag.number;
      __threadfence_system();
      status->failed = 1;
    }
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
  if (rank < peers.ranks) {
    store_release(peer_flag(peers, rank, blockIdx.x, peers.rank), epoch);
    met = wait_for_peer(peers, blockIdx.x, rank, epoch);
  }
  return __syncthreads_and(met ? 1 : 0) != 0;
}

/// All threads of one block call it: waits until the first `blocks` blocks of every rank, this one
/// included, have come to their second meeting of this kernel.
__device__ inline bool wait_for_all_blocks(const PeerMemory& peers, int blocks) {
  bool met = true;
  for (int i = static_cast<int>(threadIdx.x); met && i < blocks * peers.ranks; i += blockDim.x) {
    const int block = i / peers.ranks;
    met = wait_for_peer(peers, block, i % peers.ranks, peers.epochs[block] + 2);
  }
  return __syncthreads_and(met ? 1 : 0) != 0;
}

}  // namespace octet::detail::cuda
