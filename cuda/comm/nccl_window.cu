// SPDX-License-Identifier: Apache-2.0
// Windows over NCCL's symmetric memory. Only their addresses are asked of NCCL's device interface,
// once; the kernels that work on them know plain pointers.
#include "cuda/comm/nccl_window.hpp"

#include <nccl.h>
#include <nccl_device.h>

#include "backend.hpp"
#include "cuda/check.hpp"

namespace octet::detail::cuda {
namespace {

// One kernel at a time works on a window, on a device of its own.
constexpr int kBlocks = 128;

void check_nccl(ncclResult_t status, const char* statement, ncclComm_t comm) {
  if (status == ncclSuccess) return;
  throw CommError(std::string(statement) + " failed with " + ncclGetErrorString(status) + " (" +
                  ncclGetLastError(comm) + ")");
}

__global__ void addresses_kernel(ncclWindow_t window, void** begins) {
  begins[threadIdx.x] = ncclGetLsaPointer(window, 0, static_cast<int>(threadIdx.x));
}

/// Memory of one rank and its registration.
struct NcclMemory {
  Context ctx;
  ncclComm_t comm;
  std::size_t bytes;
  void* data = nullptr;
  ncclWindow_t window = nullptr;

  NcclMemory(const Context& context, ncclComm_t c, std::size_t size)
      : ctx(context), comm(c), bytes(size) {
    check_nccl(ncclMemAlloc(&data, bytes), "ncclMemAlloc", comm);
    MemoryUse& use = ctx.state()->use;
    use.current += bytes;
    use.peak = std::max(use.peak, use.current);
  }
  ~NcclMemory() {
    cudaSetDevice(ctx.device().index);
    if (window != nullptr) ncclCommWindowDeregister(comm, window);
    ncclMemFree(data);
    ctx.state()->use.current -= bytes;
  }
  NcclMemory(const NcclMemory&) = delete;
  NcclMemory& operator=(const NcclMemory&) = delete;
};

}  // namespace

std::string nccl_window_refusal(ncclComm* comm, int size) {
  int version = 0;
  check_nccl(ncclGetVersion(&version), "ncclGetVersion", comm);
  if (version < NCCL_VERSION_CODE) {
    return "NCCL " + std::to_string(version) + " is older than the " +
           std::to_string(NCCL_VERSION_CODE) + " that octet was built with";
  }
  const int reached = ncclTeamLsa(comm).nRanks;
  if (reached == size) return {};
  return "of " + std::to_string(size) + " ranks " + std::to_string(reached) +
         " reach one another's memory";
}

std::unique_ptr<Window> make_nccl_window(const Context& ctx, ncclComm* comm, int rank, int size,
                                         std::size_t bytes) {
  set_device(ctx);
  const std::size_t flags = peer_flag_bytes(size);
  const auto padded = [](std::size_t n) {
    constexpr std::size_t kAlignment = NCCL_WIN_REQUIRED_ALIGNMENT;
    return (n + kAlignment - 1) / kAlignment * kAlignment;
  };
  const auto memory = std::make_shared<NcclMemory>(ctx, comm, padded(flags + bytes));
  OCTET_CUDA_CHECK(cudaMemsetAsync(memory->data, 0, flags, ctx.stream()));
  check_nccl(ncclCommWindowRegister(comm, memory->data, memory->bytes, &memory->window,
                                    NCCL_WIN_COLL_SYMMETRIC),
             "ncclCommWindowRegister", comm);
  const Buffer table(ctx, static_cast<std::size_t>(size) * sizeof(void*));
  addresses_kernel<<<1, static_cast<unsigned>(size), 0, ctx.stream()>>>(memory->window,
                                                                        table.as<void*>());
  OCTET_CUDA_CHECK(cudaGetLastError());
  const auto begins = read_sync<void*>(ctx, table.data(), static_cast<std::size_t>(size));
  return std::make_unique<Window>(ctx, rank, begins, bytes, kBlocks, std::chrono::minutes(5),
                                  memory);
}

}  // namespace octet::detail::cuda
