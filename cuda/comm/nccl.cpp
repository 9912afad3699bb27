// SPDX-License-Identifier: Apache-2.0
// NCCL as a carrier of bytes: only sends, receives and all-gathers of ncclUint8, so neither its
// reductions nor its choice of algorithm can change a value.
#include "octet/comm/nccl.hpp"

#include <nccl.h>

#include <cstring>

#include "cuda/check.hpp"
#include "cuda/comm/nccl_window.hpp"
#include "octet/runtime/tensor.hpp"

namespace octet {
namespace {

using detail::cuda::set_device;

static_assert(sizeof(NcclId) == sizeof(ncclUniqueId));

void check_nccl(ncclResult_t status, const char* statement, int line, ncclComm_t comm = nullptr) {
  if (status == ncclSuccess) return;
  const char* detail = ncclGetLastError(comm);
  std::ostringstream text;
  text << statement << " failed with " << ncclGetErrorString(status);
  if (detail != nullptr && *detail != '\0') text << " (" << detail << ")";
  text << " at " << __FILE_NAME__ << ":" << line;
  throw CommError(text.str());
}

#define OCTET_NCCL_CHECK(statement, ...) \
  check_nccl((statement), #statement, __LINE__ __VA_OPT__(, ) __VA_ARGS__)

// ncclGroupStart ... ncclGroupEnd. A group that is left by an exception is closed all the same,
// because the nesting depth belongs to the thread, not to the communicator.
class NcclGroup {
 public:
  NcclGroup() { OCTET_NCCL_CHECK(ncclGroupStart()); }
  ~NcclGroup() {
    if (open_) ncclGroupEnd();
  }
  NcclGroup(const NcclGroup&) = delete;
  NcclGroup& operator=(const NcclGroup&) = delete;
  void end(ncclComm_t comm) {
    open_ = false;
    OCTET_NCCL_CHECK(ncclGroupEnd(), comm);
  }

 private:
  bool open_ = true;
};

class NcclRank final : public Communicator {
 public:
  NcclRank(ncclComm_t comm, bool owned, const Context& ctx)
      : Communicator(ctx), comm_(comm), owned_(owned) {
    OCTET_NCCL_CHECK(ncclCommUserRank(comm_, &rank_), comm_);
    OCTET_NCCL_CHECK(ncclCommCount(comm_, &size_), comm_);
  }

  ~NcclRank() override {
    if (!owned_) return;
    cudaSetDevice(context().device().index);
    ncclCommDestroy(comm_);
  }

  int rank() const override { return rank_; }
  int size() const override { return size_; }
  std::string name() const override { return "nccl"; }

 protected:
  void do_exchange(std::span<const SendPart> sends, std::span<const RecvPart> recvs) override {
    set_device(context());
    cudaStream_t stream = context().stream();
    NcclGroup group;
    for (const SendPart& part : sends) {
      if (part.bytes == 0) continue;
      OCTET_NCCL_CHECK(ncclSend(part.data, part.bytes, ncclUint8, part.peer, comm_, stream), comm_);
    }
    for (const RecvPart& part : recvs) {
      if (part.bytes == 0) continue;
      OCTET_NCCL_CHECK(ncclRecv(part.data, part.bytes, ncclUint8, part.peer, comm_, stream), comm_);
    }
    group.end(comm_);
  }

  void do_all_gather(const void* send, void* recv, std::size_t bytes) override {
    if (bytes == 0) return;
    set_device(context());
    OCTET_NCCL_CHECK(ncclAllGather(send, recv, bytes, ncclUint8, comm_, context().stream()), comm_);
  }

  std::string window_refusal() const override {
    return detail::cuda::nccl_window_refusal(comm_, size_);
  }
  std::unique_ptr<Window> do_make_window(std::size_t bytes) override {
    auto window = detail::cuda::make_nccl_window(context(), comm_, rank_, size_, bytes);
    // Nobody may signal before all flags are zero.
    const Buffer words(context(), static_cast<std::size_t>(size_) * sizeof(int));
    do_all_gather(words.as<int>() + rank_, words.data(), sizeof(int));
    context().synchronize();
    return window;
  }

 private:
  ncclComm_t comm_;
  bool owned_;
  int rank_ = 0;
  int size_ = 1;
};

void check_cuda_context(const Context& ctx, const char* what) {
  require(ctx.device().type == DeviceType::cuda, what, ": the context is on ",
          to_string(ctx.device()), "; NCCL needs a CUDA device");
}

}  // namespace

bool has_nccl() { return true; }

NcclId make_nccl_id() {
  ncclUniqueId unique;
  OCTET_NCCL_CHECK(ncclGetUniqueId(&unique));
  NcclId id;
  std::memcpy(id.data(), &unique, sizeof(unique));
  return id;
}

std::unique_ptr<Communicator> adopt_nccl(ncclComm* comm, const Context& ctx) {
  require(comm != nullptr, "adopt_nccl: the communicator is null");
  check_cuda_context(ctx, "adopt_nccl");
  int device = -1;
  OCTET_NCCL_CHECK(ncclCommCuDevice(comm, &device), comm);
  require(device == ctx.device().index, "adopt_nccl: the communicator is on cuda:", device,
          " but the context is on ", to_string(ctx.device()));
  return std::make_unique<NcclRank>(comm, false, ctx);
}

std::unique_ptr<Communicator> create_nccl(const NcclId& id, int rank, int size,
                                          const Context& ctx) {
  require(size >= 1, "create_nccl: size is ", size, "; it must be at least 1");
  require(rank >= 0 && rank < size, "create_nccl: rank is ", rank, "; allowed are 0 to ", size - 1);
  check_cuda_context(ctx, "create_nccl");
  set_device(ctx);
  ncclUniqueId unique;
  std::memcpy(&unique, id.data(), sizeof(unique));
  ncclComm_t comm = nullptr;
  OCTET_NCCL_CHECK(ncclCommInitRank(&comm, size, unique, rank));
  return std::make_unique<NcclRank>(comm, true, ctx);
}

}  // namespace octet
