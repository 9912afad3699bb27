// SPDX-License-Identifier: Apache-2.0
// NCCL ranks as threads of the test program, each with a GPU of its own.
#pragma once

#include <algorithm>
#include <chrono>
#include <string>
#include <thread>
#include <vector>

#include "octet/comm/nccl.hpp"
#include "support/late_streams.hpp"

namespace octet::test {

/// 2 where there are as many GPUs, else 1; 0 without NCCL or a GPU.
inline int nccl_ranks() { return has_nccl() ? std::min(cuda_device_count(), 2) : 0; }

/// Calls fn(Communicator&) for each of n ranks, every one on a thread, a GPU and a stream of its
/// own. Returns what exceptions of ranks say, nothing if there is none. When one rank fails the
/// others give up at the deadline. Catch's assertions are not thread-safe: as with run_ranks().
template <class Fn>
std::string run_nccl_ranks(int n, const Fn& fn) {
  const NcclId id = make_nccl_id();
  std::vector<std::string> errors(static_cast<std::size_t>(n));
  const auto run_rank = [&](int rank) {
    try {
      require(cudaSetDevice(rank) == cudaSuccess, "cudaSetDevice failed");
      const Context ctx = Context::cuda(rank, lasting_stream());
      const auto comm = create_nccl(id, rank, n, ctx, std::chrono::seconds(60));
      fn(*comm);
    } catch (const std::exception& error) {
      errors[static_cast<std::size_t>(rank)] =
          "rank " + std::to_string(rank) + ": " + error.what() + "; ";
    }
  };
  std::vector<std::thread> threads;
  for (int rank = 0; rank < n; ++rank) threads.emplace_back(run_rank, rank);
  for (std::thread& thread : threads) thread.join();
  std::string all;
  for (const std::string& error : errors) all += error;
  return all;
}

/// Why the ranks of a communicator can have no window; empty if they can. All ranks call.
inline std::string window_refusal(Communicator& comm) {
  return comm.size() == 1 ? "one rank has no peers" : comm.make_window(16).refusal;
}

}  // namespace octet::test
