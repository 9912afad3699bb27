// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <nccl.h>

#include <atomic>
#include <chrono>
#include <future>
#include <mutex>
#include <string>

namespace octet::detail::cuda {

/// "ncclGroupEnd: unhandled system error (details)".
std::string describe_nccl(const char* call, ncclResult_t status, ncclComm_t comm);

/// An ncclComm_t that one thread uses while another may have to abort it. NCCL's calls for one
/// communicator must not run at the same time, so they are made under a lock; a call that hangs in
/// NCCL itself is ended by aborting without the lock.
class NcclLink {
 public:
  using Clock = std::chrono::steady_clock;

  /// Takes the communicator over, or only borrows it.
  NcclLink(ncclComm_t comm, bool owned, int device) : comm_(comm), owned_(owned), device_(device) {}
  /// Aborts a communicator that is owned and was not closed; waits for that for a bounded time.
  ~NcclLink();
  NcclLink(const NcclLink&) = delete;
  NcclLink& operator=(const NcclLink&) = delete;

  /// Makes a call, call(comm), under the lock. The result may be ncclInProgress: then status()
  /// tells the end.
  template <class Call>
  ncclResult_t call(Call call) {
    const std::lock_guard lock(mutex_);
    ncclComm_t comm = comm_;
    if (comm == nullptr) return ncclInvalidUsage;
    const ncclResult_t result = call(comm);
    if (result != ncclSuccess && result != ncclInProgress) keep_text(result, comm);
    return result;
  }
  /// The same with sends and receives in a group; calls(comm) returns its first failure.
  template <class Calls>
  ncclResult_t group(Calls calls) {
    return call([&](ncclComm_t comm) {
      ncclResult_t result = ncclGroupStart();
      if (result != ncclSuccess) return result;
      result = calls(comm);
      // Closed in any case: the nesting depth belongs to the thread, not to the communicator.
      const ncclResult_t end = ncclGroupEnd();
      return result == ncclSuccess || result == ncclInProgress ? end : result;
    });
  }

  /// The asynchronous state; ncclInvalidUsage once aborted.
  ncclResult_t status();
  /// The same, but ncclSuccess when the communicator is in use just now: for the watchdog.
  ncclResult_t status_if_free();
  /// What the first call that failed said.
  std::string failure_text();

  /// Makes NCCL's kernels and threads give up and the communicator go, without waiting for that.
  /// Only the first call does something. From any thread.
  void abort();
  bool aborted() const { return aborted_; }

  /// The end of a communicator that is owned and works: together with the other ranks, which may
  /// be late by `patience`; then it is aborted.
  void close(std::chrono::milliseconds patience);

 private:
  void keep_text(ncclResult_t status, ncclComm_t comm);

  std::mutex mutex_;
  std::atomic<ncclComm_t> comm_;
  bool owned_;
  int device_;
  std::atomic<bool> aborted_{false};
  std::mutex text_mutex_;
  std::string text_;
  std::future<void> aborting_;
};

/// ncclCommInitRankConfig without blocking. At the deadline, and when NCCL fails, the unfinished
/// communicator is aborted and CommError thrown.
ncclComm_t init_nccl(const ncclUniqueId& id, int rank, int size, int device,
                     std::chrono::milliseconds deadline);

}  // namespace octet::detail::cuda
