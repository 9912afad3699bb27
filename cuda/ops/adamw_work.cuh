// SPDX-License-Identifier: Apache-2.0
// The segment that a block of the update works on, and its tensor's entries of the tables.
#pragma once

#include <cstddef>

#include "cuda/device/dependent.cuh"
#include "cuda/ops/adamw_tile.cuh"
#include "octet/ops/adamw_rows.hpp"

namespace octet::detail::cuda {

/// The first elements of a segment in the buffers of its tensor.
struct Streams {
  char *gradient, *master, *m, *v, *weight;
  float *m_blocks, *v_blocks;
};

/// What the threads of a block share.
struct Work {
  AdamwTensor tensor;
  AdamwTensorStep step;
  Segment segment;
  std::uint64_t step_number;
  Streams streams;
};

/// The tables of a block's segment into shared memory: a word a thread. Waits for the kernel
/// before; returns false if the step is skipped. All threads must call it, `Threads` of them.
template <int Threads>
__device__ bool load_work(const AdamwArgs& args, Work& work) {
  constexpr unsigned kTensorWords = sizeof(AdamwTensor) / 4;
  constexpr unsigned kStepWords = sizeof(AdamwTensorStep) / 4;
  static_assert(kTensorWords + kStepWords <= Threads);
  const auto words_of = [](const void* from) { return static_cast<const std::uint32_t*>(from); };
  // The tables of segments and tensors are as they were before prepare; its results are awaited.
  const Segment segment = args.segments[blockIdx.x];
  std::uint32_t word = 0;
  if (threadIdx.x < kTensorWords) word = words_of(args.tensors + segment.tensor)[threadIdx.x];
  wait_for_previous_kernel();
  const std::uint32_t skip = args.scalars->skip;
  const unsigned in_step = threadIdx.x - kTensorWords;
  if (threadIdx.x >= kTensorWords && in_step < kStepWords) {
    word = words_of(args.steps + segment.tensor)[in_step];
  }
  if (threadIdx.x == Threads - 1) {
    work.segment = segment;
    work.step_number = static_cast<std::uint64_t>(args.scalars->step);
  }
  if (skip != 0) return false;
  // The step follows the tensor.
  static_assert(offsetof(Work, step) == sizeof(AdamwTensor));
  if (threadIdx.x < kTensorWords + kStepWords) {
    reinterpret_cast<std::uint32_t*>(&work.tensor)[threadIdx.x] = word;
  }
  __syncthreads();
  return true;
}

/// For formats known at compile time.
template <AdamwRow R>
__device__ Streams streams_of(const Work& work, std::int64_t first) {
  constexpr StateFormats F = R.formats;
  const AdamwTensor& t = work.tensor;
  const AdamwOffsets at = offsets_at(t, work.segment, first);
  const auto start = [](const void* data, std::int64_t i, std::size_t bytes) {
    return static_cast<char*>(const_cast<void*>(data)) + i * static_cast<std::int64_t>(bytes);
  };
  return {start(t.gradient, at.gradient, size_of(R.gradient)),
          start(t.master, at.master, size_of(F.master)),
          start(t.m, at.state, size_of(F.m)),
          start(t.v, at.state, size_of(F.v)),
          has_weight(F) ? start(t.weight, at.weight, size_of(dtype_of(F.weight))) : nullptr,
          is_block(F.m) ? t.m_blocks + at.state / kStateBlock : nullptr,
          is_block(F.v) ? t.v_blocks + at.state / kStateBlock : nullptr};
}

}  // namespace octet::detail::cuda
