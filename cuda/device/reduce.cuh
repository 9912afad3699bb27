// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace octet::detail::cuda {

/// Largest value of a block, in every thread. Every thread of the block must call it. `largest` is
/// in shared memory.
__device__ inline std::uint32_t block_max(std::uint32_t value, std::uint32_t& largest) {
  if (threadIdx.x == 0) largest = 0;
  __syncthreads();
  value = __reduce_max_sync(0xFFFFFFFFu, value);
  if (threadIdx.x % 32 == 0) atomicMax(&largest, value);
  __syncthreads();
  value = largest;
  __syncthreads();  // a call after this one starts from 0 again
  return value;
}
__device__ inline std::uint32_t block_max(std::uint32_t value) {
  __shared__ std::uint32_t largest;
  return block_max(value, largest);
}

/// Largest value of a block into *word: one atomic per block, exact in any order. Every thread of
/// the block must call it.
__device__ inline void block_atomic_max(std::uint32_t value, std::uint32_t* word,
                                        std::uint32_t& largest) {
  value = block_max(value, largest);
  if (threadIdx.x == 0 && value != 0) atomicMax(word, value);
}
__device__ inline void block_atomic_max(std::uint32_t value, std::uint32_t* word) {
  __shared__ std::uint32_t largest;
  block_atomic_max(value, word, largest);
}

}  // namespace octet::detail::cuda
