// SPDX-License-Identifier: Apache-2.0
// Windows over NCCL's symmetric memory. Only their addresses are asked of NCCL's device interface,
// once; the kernels that work on them know plain pointers.
#include "cuda/comm/nccl_window.hpp"

#if NCCL_VERSION_CODE >= 22800  // else no_nccl_window.cpp

#include <nccl_device.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <exception>
#include <thread>

#include "backend.hpp"
#include "cuda/check.hpp"

namespace octet::detail::cuda {
namespace {

// One kernel at a time works on a window, on a device of its own.
constexpr int kBlocks = 128;

__global__ void addresses_kernel(ncclWindow_t window, void** begins) {
  begins[threadIdx.x] = ncclGetLsaPointer(window, 0, static_cast<int>(threadIdx.x));
}

/// Memory of one rank and its registration.
class NcclMemory {
 public:
  NcclMemory(NcclRank& rank, std::size_t bytes) : rank_(rank), bytes_(bytes) {
    const ncclResult_t status = ncclMemAlloc(&data_, bytes);
    require(status == ncclSuccess, "make_window: ", bytes,
            " bytes: ", describe_nccl("ncclMemAlloc", status, nullptr));
    MemoryUse& use = rank.context().state()->use;
    use.current += bytes;
    use.peak = std::max(use.peak, use.current);
  }
  ~NcclMemory() {
    cudaSetDevice(rank_.context().device().index);
    cudaStreamSynchronize(rank_.context().stream());
    try {
      if (window_ != nullptr && !rank_.aborted()) {
        rank_.call("window",
                   [this](ncclComm_t comm) { return ncclCommWindowDeregister(comm, window_); });
      }
    } catch (const std::exception&) {
      // The communicator has failed and keeps the error.
    }
    ncclMemFree(data_);
    rank_.context().state()->use.current -= bytes_;
  }
  NcclMemory(const NcclMemory&) = delete;
  NcclMemory& operator=(const NcclMemory&) = delete;

  void* data() const { return data_; }
  std::size_t bytes() const { return bytes_; }
  ncclWindow_t window() const { return window_; }
  void make_window() {
    rank_.call("window", [this](ncclComm_t comm) {
      return ncclCommWindowRegister(comm, data_, bytes_, &window_, NCCL_WIN_COLL_SYMMETRIC);
    });
    // A communicator that does not block registers on a thread of its own, and says nothing of it.
    const auto until = std::chrono::steady_clock::now() + rank_.deadline();
    while (std::atomic_ref(window_).load() == nullptr) {
      require(std::chrono::steady_clock::now() < until,
              "make_window: NCCL registered no window for ", bytes_, " bytes within ",
              rank_.deadline().count(), " ms");
      std::this_thread::yield();
      rank_.call("window", [](ncclComm_t comm) {
        ncclResult_t state = ncclSuccess;
        const ncclResult_t result = ncclCommGetAsyncError(comm, &state);
        return result == ncclSuccess ? state : result;
      });
    }
  }

 private:
  NcclRank& rank_;
  std::size_t bytes_;
  void* data_ = nullptr;
  ncclWindow_t window_ = nullptr;
};

}  // namespace

std::string nccl_window_refusal(NcclRank& rank) {
  int version = 0;
  if (ncclGetVersion(&version) != ncclSuccess || version < NCCL_VERSION_CODE) {
    return "NCCL " + std::to_string(version) + " is older than the " +
           std::to_string(NCCL_VERSION_CODE) + " that octet was built with";
  }
  int reached = 0;
  rank.call("window", [&](ncclComm_t comm) {
    reached = ncclTeamLsa(comm).nRanks;
    return ncclSuccess;
  });
  if (reached == rank.size()) return {};
  return "of " + std::to_string(rank.size()) + " ranks " + std::to_string(reached) +
         " reach one another's memory";
}

std::unique_ptr<Window> make_nccl_window(NcclRank& rank, std::size_t bytes) {
  const Context& ctx = rank.context();
  set_device(ctx);
  const auto size = static_cast<std::size_t>(rank.size());
  const std::size_t flags = peer_flag_bytes(rank.size());
  constexpr std::size_t kAlignment = NCCL_WIN_REQUIRED_ALIGNMENT;
  // A rank that has none cannot register it with the others.
  std::shared_ptr<NcclMemory> memory;
  set_up_together_sync(rank, [&] {
    memory = std::make_shared<NcclMemory>(
        rank, (flags + bytes + kAlignment - 1) / kAlignment * kAlignment);
  });
  OCTET_CUDA_CHECK(cudaMemsetAsync(memory->data(), 0, flags, ctx.stream()));
  memory->make_window();
  const Buffer table(ctx, size * sizeof(void*));
  addresses_kernel<<<1, static_cast<unsigned>(size), 0, ctx.stream()>>>(memory->window(),
                                                                        table.as<void*>());
  OCTET_CUDA_CHECK(cudaGetLastError());
  const auto begins = read_sync<void*>(ctx, table.data(), size);
  auto window = std::make_unique<Window>(ctx, rank.rank(), begins, bytes, memory->bytes(), kBlocks,
                                         rank.deadline(), memory);
  // Nobody may signal before all flags are zero.
  const std::uint64_t here = 0;
  const Buffer own = upload_sync<std::uint64_t>(ctx, std::span(&here, 1));
  const Buffer all(ctx, size * sizeof(here));
  rank.all_gather(own.data(), all.data(), sizeof(here));
  rank.synchronize();
  return window;
}

}  // namespace octet::detail::cuda

#endif
