// SPDX-License-Identifier: Apache-2.0
#include "cuda/comm/marks.hpp"

#include <atomic>
#include <cstring>
#include <new>

#include "cuda/check.hpp"

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

// The legacy default stream cannot be captured, and asking about it while another stream is would
// break that capture.
bool is_captured(cudaStream_t stream) {
  if (stream == nullptr || stream == cudaStreamLegacy) return false;
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  OCTET_CUDA_CHECK(cudaStreamIsCapturing(stream, &status));
  return status != cudaStreamCaptureStatusNone;
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
  return (is_captured(ctx_.stream()) ? kCaptured : 0) | index << kCountBits;
}

Marks::Reading Marks::read() {
  const std::uint64_t begun = load(words_->begun);
  Reading reading;
  reading.begun = begun & kCountMask;
  reading.ended = load(words_->ended);
  reading.captured = (begun & kCaptured) != 0;
  reading.waiting_for = load(words_->waiting_for);
  const std::uint64_t index = (begun & ~kCaptured) >> kCountBits;
  const std::lock_guard lock(names_mutex_);
  if (reading.begun > 0 && index < names_.size()) reading.name = names_[index];
  return reading;
}

void Marks::raise_abort() {
  std::atomic_ref<std::uint32_t>(words_->abort).store(1, std::memory_order_release);
}

}  // namespace octet::detail::cuda
