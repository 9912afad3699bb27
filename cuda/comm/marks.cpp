// SPDX-License-Identifier: Apache-2.0
#include "cuda/comm/marks.hpp"

#include <atomic>
#include <cstring>
#include <new>

#include "cuda/check.hpp"
#include "cuda/runtime/runtime.hpp"

namespace octet::detail::cuda {
namespace {

// begun: 1 bit captured, 23 bits index of the name, 40 bits count.
constexpr int kCountBits = 40;
constexpr std::uint64_t kCountMask = (std::uint64_t{1} << kCountBits) - 1;
constexpr std::uint64_t kCaptured = std::uint64_t{1} << 63;

template <class T>
T load(const T& word) {
  return std::atomic_ref<T>(const_cast<T&>(word)).load(std::memory_order_acquire);
}

bool same(const CollectiveName& a, const CollectiveName& b) {
  return a.bucket == b.bucket && (a.op == b.op || std::strcmp(a.op, b.op) == 0);
}

}  // namespace

Marks::Marks(const Context& ctx) : ctx_(ctx) {
  set_device(ctx);
  void* words = nullptr;
  OCTET_CUDA_CHECK(
      cudaHostAlloc(&words, sizeof(MarkWords), cudaHostAllocMapped | cudaHostAllocPortable));
  words_ = new (words) MarkWords;
  try {
    OCTET_CUDA_CHECK(cudaHostGetDevicePointer(reinterpret_cast<void**>(&device_.words), words_, 0));
    void* counts = nullptr;
    OCTET_CUDA_CHECK(cudaMalloc(&counts, sizeof(MarkCounts)));
    device_.counts = static_cast<MarkCounts*>(counts);
    OCTET_CUDA_CHECK(cudaMemsetAsync(counts, 0, sizeof(MarkCounts), ctx.stream()));
  } catch (...) {
    cudaFree(device_.counts);
    cudaFreeHost(words_);
    throw;
  }
}

Marks::~Marks() {
  if (leaked_) return;
  cudaSetDevice(ctx_.device().index);
  cudaFree(device_.counts);
  cudaFreeHost(words_);
}

std::uint64_t Marks::tag_of(const CollectiveName& name) {
  std::uint64_t index = 0;
  {
    const std::lock_guard lock(names_mutex_);
    while (index < names_.size() && !same(names_[index], name)) ++index;
    if (index == names_.size()) names_.push_back(name);
  }
  return (capture(ctx_) != 0 ? kCaptured : 0) | index << kCountBits;
}

Marks::Reading Marks::read() {
  const std::uint64_t begun = load(words_->begun);
  Reading reading;
  reading.begun = begun & kCountMask;
  reading.ended = load(words_->ended);
  reading.captured = (begun & kCaptured) != 0;
  const std::uint64_t index = (begun & ~kCaptured) >> kCountBits;
  const std::lock_guard lock(names_mutex_);
  if (reading.begun > 0 && index < names_.size()) reading.name = names_[index];
  return reading;
}

}  // namespace octet::detail::cuda
