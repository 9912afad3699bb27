// SPDX-License-Identifier: Apache-2.0
#include "octet/comm/nccl.hpp"

#include <cstring>

#include "cuda/check.hpp"
#include "cuda/comm/nccl_rank.hpp"

namespace octet {
namespace {

using detail::cuda::describe_nccl;
using detail::cuda::NcclLink;
using detail::cuda::NcclRank;
using std::chrono::milliseconds;

static_assert(sizeof(NcclId) == sizeof(ncclUniqueId));

void check_nccl(ncclResult_t status, const char* call, ncclComm_t comm = nullptr) {
  if (status != ncclSuccess) throw CommError(describe_nccl(call, status, comm));
}

void check_context(const Context& ctx, const char* what) {
  require(ctx.device().type == DeviceType::cuda, what, ": the context is on ",
          to_string(ctx.device()), "; NCCL needs a CUDA device");
}

void check_deadline(milliseconds deadline, const char* what) {
  require(deadline.count() > 0, what, ": deadline is ", deadline.count(),
          " ms; it must be positive");
}

}  // namespace

bool has_nccl() { return true; }

NcclId make_nccl_id() {
  ncclUniqueId unique;
  check_nccl(ncclGetUniqueId(&unique), "ncclGetUniqueId");
  NcclId id;
  std::memcpy(id.data(), &unique, sizeof(unique));
  return id;
}

std::unique_ptr<Communicator> adopt_nccl(ncclComm* comm, const Context& ctx,
                                         milliseconds deadline) {
  require(comm != nullptr, "adopt_nccl: the communicator is null");
  check_context(ctx, "adopt_nccl");
  check_deadline(deadline, "adopt_nccl");
  int device = -1, rank = 0, size = 1;
  check_nccl(ncclCommCuDevice(comm, &device), "ncclCommCuDevice", comm);
  check_nccl(ncclCommUserRank(comm, &rank), "ncclCommUserRank", comm);
  check_nccl(ncclCommCount(comm, &size), "ncclCommCount", comm);
  require(device == ctx.device().index, "adopt_nccl: the communicator is on cuda:", device,
          " but the context is on ", to_string(ctx.device()));
  return std::make_unique<NcclRank>(std::make_unique<NcclLink>(comm, false, device), false, rank,
                                    size, ctx, deadline);
}

std::unique_ptr<Communicator> create_nccl(const NcclId& id, int rank, int size, const Context& ctx,
                                          milliseconds deadline) {
  require(size >= 1, "create_nccl: size is ", size, "; it must be at least 1");
  require(rank >= 0 && rank < size, "create_nccl: rank is ", rank, "; allowed are 0 to ", size - 1);
  check_context(ctx, "create_nccl");
  check_deadline(deadline, "create_nccl");
  detail::cuda::set_device(ctx);
  ncclUniqueId unique;
  std::memcpy(&unique, id.data(), sizeof(unique));
  const int device = ctx.device().index;
  auto link = std::make_unique<NcclLink>(
      detail::cuda::init_nccl(unique, rank, size, device, deadline), true, device);
  return std::make_unique<NcclRank>(std::move(link), true, rank, size, ctx, deadline);
}

}  // namespace octet
