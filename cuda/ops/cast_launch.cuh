// SPDX-License-Identifier: Apache-2.0
// What the launches of casts share.
#pragma once

#include <algorithm>

#include "cuda/device/launch.cuh"
#include "cuda/ops/cast_vectors.cuh"

namespace octet::detail::cuda::casts {

/// Grid-stride kernels of kThreads that take eight elements at a time: enough blocks to fill the
/// largest GPUs several times over.
inline unsigned blocks_for(std::int64_t count) {
  constexpr std::int64_t kMaxBlocks = 4096;
  return static_cast<unsigned>(
      std::clamp<std::int64_t>((count + 8 * kThreads - 1) / (8 * kThreads), 1, kMaxBlocks));
}

inline bool is_aligned_to_vectors(const void* data, std::size_t width) {
  return reinterpret_cast<std::uintptr_t>(data) % std::min<std::size_t>(8 * width, 16) == 0;
}

/// The wide side of a cast: one of the three types that are not FP8.
template <class F>
void for_wide_dtype(DType dtype, F&& f) {
  if (dtype == DType::bf16) return f(Element<DType::bf16>{});
  if (dtype == DType::f16) return f(Element<DType::f16>{});
  f(Element<DType::f32>{});
}

}  // namespace octet::detail::cuda::casts
