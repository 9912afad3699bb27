// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <chrono>
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

// A thread of the communicator watches it: a collective that this rank's stream has come to and
// that does not end within `deadline` is given up with CommError (Communicator::check(),
// synchronize() or the next call throw it), as is one that NCCL reports an error of. Collectives
// can be captured; replays are watched too. The context's stream must outlive the communicator.

/// A communicator over the caller's ncclComm_t, which stays the caller's: the caller destroys it,
/// after this object. But when a collective fails, NCCL's side of it is aborted, because nothing
/// else ends NCCL's kernels, and must then neither be used nor destroyed: call synchronize(), and
/// ask aborted(), before this object goes. Best made without blocking (ncclConfig_t::blocking = 0):
/// NCCL cannot be interrupted cleanly while it blocks in a first connection. `ctx` must be on the
/// communicator's device. Throws octet::Error when the build has no NCCL.
std::unique_ptr<Communicator> adopt_nccl(ncclComm* comm, const Context& ctx,
                                         std::chrono::milliseconds deadline = kCommDeadline);

/// A communicator of its own. Waits until all ranks have called; throws CommError when they have
/// not within `deadline`. Its end waits for the other ranks' end, half a minute at most, and not
/// after a failure or during the unwinding of an exception.
std::unique_ptr<Communicator> create_nccl(const NcclId& id, int rank, int size, const Context& ctx,
                                          std::chrono::milliseconds deadline = kCommDeadline);

}  // namespace octet
