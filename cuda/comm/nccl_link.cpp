// SPDX-License-Identifier: Apache-2.0
#include "cuda/comm/nccl_link.hpp"

#include <cuda_runtime_api.h>

#include <memory>
#include <system_error>
#include <thread>

#include "octet/core/error.hpp"

namespace octet::detail::cuda {
namespace {

using std::chrono::milliseconds;

// A call that is in progress regularly gives the lock back sooner than this.
constexpr auto kLockPatience = milliseconds(200);
// For NCCL to abort: it stops its threads and frees its memory.
constexpr auto kAbortPatience = std::chrono::seconds(10);
constexpr auto kPollInterval = std::chrono::microseconds(100);

// On a thread of its own, because it may wait: for a thread of NCCL's that does not look at its
// abort flag, for a kernel of somebody else's when memory is freed, or for a captured graph to be
// destroyed.
std::future<void> abort_apart(ncclComm_t comm, int device) {
  const auto task = std::make_shared<std::packaged_task<void()>>([comm, device] {
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    cudaThreadExchangeStreamCaptureMode(&mode);  // another thread's capture stays valid
    cudaSetDevice(device);
    ncclCommAbort(comm);
  });
  std::future<void> done = task->get_future();
  try {
    std::thread([task] { (*task)(); }).detach();
  } catch (const std::system_error&) {
    (*task)();  // no thread to be had
  }
  return done;
}

ncclResult_t async_status(ncclComm_t comm) {
  ncclResult_t status = ncclSuccess;
  const ncclResult_t result = ncclCommGetAsyncError(comm, &status);
  return result == ncclSuccess ? status : result;
}

}  // namespace

std::string describe_nccl(const char* call, ncclResult_t status, ncclComm_t comm) {
  std::string text = std::string(call) + " failed with " + ncclGetErrorString(status);
  const char* detail = ncclGetLastError(comm);
  if (detail != nullptr && *detail != '\0') text += std::string(" (") + detail + ")";
  return text;
}

NcclLink::~NcclLink() {
  if (owned_) abort();  // nothing to do after close()
  if (aborting_.valid()) aborting_.wait_for(kAbortPatience);
}

void NcclLink::keep_text(ncclResult_t status, ncclComm_t comm) {
  const std::lock_guard lock(text_mutex_);
  if (text_.empty()) text_ = describe_nccl("NCCL", status, comm);
}

std::string NcclLink::failure_text() {
  const std::lock_guard lock(text_mutex_);
  return text_;
}

ncclResult_t NcclLink::status() {
  const std::lock_guard lock(mutex_);
  ncclComm_t comm = comm_;
  if (comm == nullptr) return ncclInvalidUsage;
  const ncclResult_t status = async_status(comm);
  if (status != ncclSuccess && status != ncclInProgress) keep_text(status, comm);
  return status;
}

ncclResult_t NcclLink::status_if_free() {
  const std::unique_lock lock(mutex_, std::try_to_lock);
  ncclComm_t comm = comm_;
  if (!lock || comm == nullptr) return ncclSuccess;
  const ncclResult_t status = async_status(comm);
  if (status != ncclSuccess && status != ncclInProgress) keep_text(status, comm);
  return status;
}

void NcclLink::abort() {
  std::unique_lock lock(mutex_, std::try_to_lock);
  for (const auto until = Clock::now() + kLockPatience; !lock && Clock::now() < until;) {
    std::this_thread::sleep_for(kPollInterval);
    (void)lock.try_lock();
  }
  ncclComm_t comm = comm_.exchange(nullptr);
  if (comm == nullptr) return;
  aborted_ = true;
  aborting_ = abort_apart(comm, device_);
}

void NcclLink::close(milliseconds patience) {
  ncclComm_t comm = comm_;
  if (!owned_ || comm == nullptr) return;
  cudaSetDevice(device_);
  const auto until = Clock::now() + patience;
  ncclResult_t status = ncclCommFinalize(comm);
  while (status == ncclInProgress && Clock::now() < until) {
    std::this_thread::sleep_for(kPollInterval);
    status = async_status(comm);
  }
  if (status != ncclSuccess) return abort();
  comm_ = nullptr;
  ncclCommDestroy(comm);
}

ncclComm_t init_nccl(const ncclUniqueId& id, int rank, int size, int device,
                     milliseconds deadline) {
  CommError::Where where;
  where.rank = rank;
  where.op = "create_nccl";
  const std::string what =
      "create_nccl on rank " + std::to_string(rank) + " of " + std::to_string(size) + ": ";
  const auto until = NcclLink::Clock::now() + deadline;
  ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
  config.blocking = 0;
  ncclComm_t comm = nullptr;
  ncclResult_t status = ncclCommInitRankConfig(&comm, size, id, rank, &config);
  while (status == ncclInProgress && NcclLink::Clock::now() < until) {
    std::this_thread::sleep_for(kPollInterval);
    status = async_status(comm);
  }
  if (status == ncclSuccess) return comm;
  const std::string reason =
      status == ncclInProgress
          ? "not all other ranks came within " + std::to_string(deadline.count()) + " ms"
          : describe_nccl("ncclCommInitRankConfig", status, comm);
  if (comm != nullptr) abort_apart(comm, device).wait_for(kAbortPatience);
  throw CommError(what + reason, std::move(where));
}

}  // namespace octet::detail::cuda
