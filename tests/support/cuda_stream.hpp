// SPDX-License-Identifier: Apache-2.0
// Streams and graphs of CUDA, for programs that link its runtime.
#pragma once

#include <cuda_runtime_api.h>

#include "octet/core/error.hpp"

namespace octet::test {

class Stream {
 public:
  Stream() {
    require(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking) == cudaSuccess,
            "cudaStreamCreateWithFlags failed");
  }
  ~Stream() { cudaStreamDestroy(stream_); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  cudaStream_t get() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
};

/// What a callable enqueues on a stream, captured. Errors are exceptions, so that ranks that are
/// threads can capture too.
class Graph {
 public:
  template <class Enqueue>
  Graph(cudaStream_t stream, Enqueue enqueue) : stream_(stream) {
    require(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal) == cudaSuccess,
            "cudaStreamBeginCapture failed");
    enqueue();
    require(cudaStreamEndCapture(stream, &graph_) == cudaSuccess, "cudaStreamEndCapture failed");
    require(cudaGraphInstantiate(&executable_, graph_, 0) == cudaSuccess,
            "cudaGraphInstantiate failed");
  }
  ~Graph() {
    cudaGraphExecDestroy(executable_);
    cudaGraphDestroy(graph_);
  }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;
  void launch() {
    require(cudaGraphLaunch(executable_, stream_) == cudaSuccess, "cudaGraphLaunch failed");
  }

 private:
  cudaStream_t stream_;
  cudaGraph_t graph_ = nullptr;
  cudaGraphExec_t executable_ = nullptr;
};

}  // namespace octet::test
