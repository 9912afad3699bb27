// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace octet::detail::cuda {

/// Largest value of a block, in every thread. Every thread of the block must call it.
__device__ inline std::uint32_t block_max(std::uint32_t value) {
  __shared__ std::uint32_t largest;
  if (threadIdx.x == 0) largest = 0;
  __syncthreads();
  value = __reduce_max_sync(0xFFFFFFFFu, value);
  if (threadIdx.x % 32 == 0) atomicMax(&largest, value);
  __syncthreads();
  value = largest;
  __syncthreads();  // a call after this one starts from 0 again
  return value;
}

/// Largest value of a block into *word: one atomic per block, exact in any order. Every thread of
/// the block must call it.
__device__ inline void block_atomic_max(std::uint32_t value, std::uint32_t* word) {
  const std::uint32_t largest = block_max(value);
  if (threadIdx.x == 0 && largest != 0) atomicMax(word, largest);
}

}  // namespace octet::detail::cuda
