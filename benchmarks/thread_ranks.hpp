// SPDX-License-Identifier: Apache-2.0
// Ranks as threads of a benchmark.
#pragma once

#include <exception>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "octet/octet.hpp"

namespace bench {

/// The CPU's, or one on the default stream of a GPU, which ranks share where there are fewer.
inline octet::Context rank_context(octet::DeviceType device, int rank) {
  if (device == octet::DeviceType::cpu) return octet::Context::cpu();
  return octet::Context::cuda(rank % octet::cuda_device_count(), nullptr);
}

/// Calls fn(Communicator&) for each of n ranks on a thread of its own and waits for all. The first
/// failure aborts the group, so that nobody hangs, and is rethrown here.
template <class Fn>
void run_ranks(int n, octet::DeviceType device, const Fn& fn) {
  octet::ThreadGroup group(n);
  std::mutex mutex;
  std::exception_ptr failure;
  const auto run_rank = [&](int rank) {
    // Outside the try block: the others must not see this rank leave before they know why.
    std::unique_ptr<octet::Communicator> comm;
    try {
      comm = group.join(rank, rank_context(device, rank));
      fn(*comm);
    } catch (const std::exception&) {
      const std::lock_guard lock(mutex);
      if (!failure) failure = std::current_exception();
      group.abort("rank " + std::to_string(rank) + " has failed");
    }
  };
  {
    std::vector<std::jthread> threads;
    for (int rank = 0; rank < n; ++rank) threads.emplace_back(run_rank, rank);
  }
  if (failure) std::rethrow_exception(failure);
}

}  // namespace bench
