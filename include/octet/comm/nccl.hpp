// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstddef>
#include <memory>

#include "octet/comm/communicator.hpp"

struct ncclComm;

namespace octet {

/// Whether this build can talk through NCCL.
bool has_nccl();

/// The 128 bytes that rank 0 creates and every rank needs for create_nccl.
using NcclId = std::array<std::byte, 128>;
NcclId make_nccl_id();

/// A communicator over the caller's ncclComm_t, which stays the caller's. `ctx` must be on the
/// communicator's device. Throws octet::Error when the build has no NCCL.
std::unique_ptr<Communicator> adopt_nccl(ncclComm* comm, const Context& ctx);

/// A communicator of its own; destroyed with the object. Blocks until all ranks have called.
std::unique_ptr<Communicator> create_nccl(const NcclId& id, int rank, int size, const Context& ctx);

}  // namespace octet
