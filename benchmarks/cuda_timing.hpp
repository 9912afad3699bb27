// SPDX-License-Identifier: Apache-2.0
// Times of work on a CUDA stream, between events.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <vector>

#include "octet/core/error.hpp"
#include "octet/runtime/context.hpp"

namespace bench {

constexpr int kWarmup = 3;

inline void check(cudaError_t status, const char* what) {
  octet::require(status == cudaSuccess, what, ": ", cudaGetErrorString(status));
}

/// A stream on device 0.
class Stream {
 public:
  Stream() {
    check(cudaSetDevice(0), "cudaSetDevice");
    check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
  }
  ~Stream() { cudaStreamDestroy(stream_); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  cudaStream_t get() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
};

class TimingEvent {
 public:
  TimingEvent() { check(cudaEventCreate(&event_), "cudaEventCreate"); }
  ~TimingEvent() { cudaEventDestroy(event_); }
  TimingEvent(const TimingEvent&) = delete;
  TimingEvent& operator=(const TimingEvent&) = delete;
  void record(cudaStream_t stream) { check(cudaEventRecord(event_, stream), "cudaEventRecord"); }
  double ms_since(const TimingEvent& start) const {
    float ms = 0.0f;
    check(cudaEventElapsedTime(&ms, start.event_, event_), "cudaEventElapsedTime");
    return static_cast<double>(ms);
  }

 private:
  cudaEvent_t event_ = nullptr;
};

/// What `work` enqueued while the constructor captured it, to be replayed.
class Graph {
 public:
  template <class Work>
  Graph(cudaStream_t stream, const Work& work) : stream_(stream) {
    check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal),
          "cudaStreamBeginCapture");
    work();
    check(cudaStreamEndCapture(stream, &graph_), "cudaStreamEndCapture");
    check(cudaGraphInstantiate(&executable_, graph_, 0), "cudaGraphInstantiate");
  }
  ~Graph() {
    cudaGraphExecDestroy(executable_);
    cudaGraphDestroy(graph_);
  }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;
  void replay() const { check(cudaGraphLaunch(executable_, stream_), "cudaGraphLaunch"); }

 private:
  cudaStream_t stream_;
  cudaGraph_t graph_ = nullptr;
  cudaGraphExec_t executable_ = nullptr;
};

/// Milliseconds of each of `repeats` runs after kWarmup more.
template <class Work>
std::vector<double> time_each(const octet::Context& ctx, int repeats, const Work& work) {
  std::vector<TimingEvent> events(static_cast<std::size_t>(repeats) + 1);
  for (int i = 0; i < kWarmup; ++i) work();
  events.front().record(ctx.stream());
  for (std::size_t i = 1; i < events.size(); ++i) {
    work();
    events[i].record(ctx.stream());
  }
  ctx.synchronize();
  std::vector<double> times;
  for (std::size_t i = 1; i < events.size(); ++i) {
    times.push_back(events[i].ms_since(events[i - 1]));
  }
  return times;
}

/// Milliseconds of a run in a batch, host time included where that is longer.
template <class Work>
double batch_ms(const octet::Context& ctx, int runs, const Work& work) {
  TimingEvent start, end;
  start.record(ctx.stream());
  for (int i = 0; i < runs; ++i) work();
  end.record(ctx.stream());
  ctx.synchronize();
  return end.ms_since(start) / runs;
}

/// Microseconds that the host takes to enqueue a run. `runs` must be fewer than the stream's queue
/// holds, so that the host never waits for the device.
template <class Work>
double host_us(const octet::Context& ctx, int runs, const Work& work) {
  ctx.synchronize();
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < runs; ++i) work();
  const std::chrono::duration<double, std::micro> passed = std::chrono::steady_clock::now() - start;
  ctx.synchronize();
  return passed.count() / runs;
}

struct Timing {
  double median_ms = 0.0;
  double spread = 0.0;  ///< (largest - smallest) / median
};

inline Timing timing_of(std::vector<double> times) {
  std::sort(times.begin(), times.end());
  const std::size_t n = times.size();
  const double median = (times[(n - 1) / 2] + times[n / 2]) / 2.0;
  return {median, (times.back() - times.front()) / median};
}

}  // namespace bench
