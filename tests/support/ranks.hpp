// SPDX-License-Identifier: Apache-2.0
// Ranks as threads of the test program.
#pragma once

#include <chrono>
#include <exception>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "octet/comm/communicator.hpp"

namespace octet::test {

/// cudaStreamPerThread, whose handle the CUDA headers fix: a stream of its own for every rank
/// without a CUDA header in the tests.
inline CUstream_st* per_thread_stream() { return reinterpret_cast<CUstream_st*>(0x2); }

/// Where ranks are: on the CPU, or on all GPUs in turn, or on the first one together, because ranks
/// that are threads have windows within one device only.
struct RankDevices {
  RankDevices(DeviceType t, bool is_one = false) : type(t), one(is_one) {}
  DeviceType type;
  bool one;
};

/// A context for one rank, to be made on the rank's thread.
inline Context rank_context(const RankDevices& devices, int rank) {
  if (devices.type == DeviceType::cpu) return Context::cpu();
  return Context::cuda(devices.one ? 0 : rank % cuda_device_count(), per_thread_stream());
}

/// The kinds of device that ranks can run on here: the CPU always.
inline std::vector<DeviceType> rank_devices() {
  std::vector<DeviceType> devices = {DeviceType::cpu};
  if (cuda_device_count() > 0) devices.push_back(DeviceType::cuda);
  return devices;
}

/// Calls fn(Communicator&) for each of n ranks, every one on a thread of its own, and waits for
/// all. The first exception aborts the group, so that nobody hangs, and is rethrown here. Catch's
/// assertions are not thread-safe: fn leaves results behind, the caller checks them.
template <class Fn>
void run_ranks(int n, const Fn& fn, const RankDevices& devices = DeviceType::cpu,
               std::chrono::milliseconds deadline = std::chrono::seconds(60)) {
  ThreadGroup group(n, deadline);
  std::mutex mutex;
  std::exception_ptr first;
  const auto keep_first = [&](int rank, const char* what) {
    const std::lock_guard lock(mutex);
    if (first == nullptr) first = std::current_exception();
    group.abort("rank " + std::to_string(rank) + " failed: " + what);
  };
  const auto run_rank = [&](int rank) {
    // Outside the try block: what the rank leaves the group for must be known before it leaves.
    std::unique_ptr<Communicator> comm;
    try {
      comm = group.join(rank, rank_context(devices, rank));
      fn(*comm);
    } catch (const std::exception& error) {
      keep_first(rank, error.what());
    } catch (...) {
      keep_first(rank, "an exception of unknown type");
    }
  };
  std::vector<std::thread> threads;
  for (int rank = 0; rank < n; ++rank) threads.emplace_back(run_rank, rank);
  for (std::thread& thread : threads) thread.join();
  if (first != nullptr) std::rethrow_exception(first);
}

}  // namespace octet::test
