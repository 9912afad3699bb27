// SPDX-License-Identifier: Apache-2.0
// For kernels that are collectives themselves: the counters that the watchdog reads and the word by
// which it ends them. All of it is called by one thread of the grid.
#pragma once

#include "cuda/comm/marks.hpp"

namespace octet::detail::cuda {

__device__ inline void store_system(std::uint64_t* word, std::uint64_t value) {
  asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(word), "l"(value) : "memory");
}

/// The collective has come to its turn on the stream; `tag` as from MarkTable::tag_of().
__device__ inline void mark_begin(const DeviceMarks& marks, std::uint64_t tag) {
  store_system(&marks.words->begun, tag | ++marks.counts->begun);
}

/// It is done.
__device__ inline void mark_end(const DeviceMarks& marks) {
  store_system(&marks.words->ended, ++marks.counts->ended);
}

/// Says which rank the kernel waits for, -1 for nobody: the error names it.
__device__ inline void mark_waiting(const DeviceMarks& marks, int rank) {
  asm volatile("st.relaxed.sys.global.s32 [%0], %1;" ::"l"(&marks.words->waiting_for), "r"(rank)
               : "memory");
}

/// Whether to give up. A read over the bus: not in every turn of a loop.
__device__ inline bool is_aborted(const DeviceMarks& marks) {
  std::uint32_t word;
  asm volatile("ld.relaxed.sys.global.u32 %0, [%1];"
               : "=r"(word)
               : "l"(&marks.words->abort)
               : "memory");
  return word != 0;
}

}  // namespace octet::detail::cuda
