// SPDX-License-Identifier: Apache-2.0
// Two streams of a device, either of which can be late.
#pragma once

#include <chrono>
#include <map>
#include <mutex>
#include <span>
#include <thread>
#include <utility>

#include "support/cuda_stream.hpp"
#include "support/forwarding_rank.hpp"

namespace octet::test {

/// A stream that lives until the program ends: contexts of several threads use it.
inline CUstream_st* lasting_stream() {
  cudaStream_t stream = nullptr;
  if (cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking) != cudaSuccess) {
    fail("no stream can be made");
  }
  return stream;
}

/// A context on a rank's device with a second stream, the same one in every run of the program. Few
/// streams, so that none shares a hardware queue with another rank's, whose kernel may wait for it;
/// and a driver (580.159.04) that has 33 streams on a device, copies between devices, and threads
/// that ended and had used cudaStreamPerThread, dies in cudaMemcpyAsync or cudaStreamWaitEvent.
inline Context beside(const Communicator& comm) {
  static std::mutex mutex;
  static std::map<std::pair<int, int>, CUstream_st*> streams;
  const int device = comm.context().device().index;
  if (cudaSetDevice(device) != cudaSuccess) fail("no device");
  const std::lock_guard lock(mutex);
  CUstream_st*& stream = streams[{device, comm.rank()}];
  if (stream == nullptr) stream = lasting_stream();
  return Context::cuda(device, stream);
}

/// Holds up all that is enqueued on a stream from here on.
inline void delay(CUstream_st* stream) {
  const auto sleep = [](void*) { std::this_thread::sleep_for(std::chrono::milliseconds(2)); };
  if (cudaLaunchHostFunc(stream, sleep, nullptr) != cudaSuccess) fail("no host function");
}

/// A communicator whose collectives start late.
class Late final : public ForwardingRank {
 public:
  using ForwardingRank::ForwardingRank;

 protected:
  void do_exchange(std::span<const SendPart> sends, std::span<const RecvPart> recvs) override {
    delay(context().stream());
    ForwardingRank::do_exchange(sends, recvs);
  }
  void do_all_gather(const void* send, void* recv, std::size_t bytes) override {
    delay(context().stream());
    ForwardingRank::do_all_gather(send, recv, bytes);
  }
};

}  // namespace octet::test
