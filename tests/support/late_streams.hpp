// SPDX-License-Identifier: Apache-2.0
// Two streams of a device, either of which can be late.
#pragma once

#include <chrono>
#include <span>
#include <thread>

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

/// A context on the same device with a stream of its own.
inline Context beside(const Context& comm) {
  if (cudaSetDevice(comm.device().index) != cudaSuccess) fail("no device");
  return Context::cuda(comm.device().index, lasting_stream());
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
