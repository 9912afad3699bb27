// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <cstddef>
#include <memory>

#include "octet/comm/communicator.hpp"

namespace octet {

/// Whether this build can talk through MPI.
bool has_mpi();

struct MpiOptions {
  /// How long a collective may wait for the other ranks before CommError is thrown.
  std::chrono::milliseconds deadline = kCommDeadline;
  /// Longer parts travel as several messages, because MPI counts in int.
  std::size_t message_bytes = std::size_t{1} << 30;
};

/// A communicator with MPI that this function initialises if nobody has (asking for
/// MPI_THREAD_MULTIPLE, taking what is given), over a duplicate of MPI_COMM_WORLD. Who initialised
/// finalises: MPI ends with the object if it began here, and cannot begin again in this process.
/// All ranks must call. Everything that adopt_mpi says holds here too.
std::unique_ptr<Communicator> create_mpi(const Context& ctx, const MpiOptions& options = {});

namespace detail {
std::unique_ptr<Communicator> adopt_mpi(const void* handle, std::size_t handle_bytes,
                                        const Context& ctx, const MpiOptions& options);
}  // namespace detail

/// A communicator over the caller's MPI_Comm, which stays the caller's: it is duplicated, so that
/// the caller's own messages never meet octet's. All its ranks must call; MPI must be initialised
/// and outlive the object. `Comm` is MPI_Comm, whatever the MPI at hand makes of that type: a
/// pointer (Open MPI) or a number (MPICH); this header needs no mpi.h.
///
/// For CPU contexts: the buffers are host memory and a collective has ended when the call returns.
/// Bytes travel by nonblocking point-to-point messages of MPI_BYTE. Before any data every rank
/// tells every other what it is about to do, so parts that do not match are found on both sides and
/// named. Only one thread at a time may call, from a thread that may call MPI.
///
/// Errors: octet::Error for a context on a GPU (create_nccl is for that), a null or
/// inter-communicator, MPI that is not initialised or already finalised, a build without MPI.
/// CommError when a rank does not come or finish within the deadline, is gone, or asks for
/// something else. The other ranks are told and throw it too: in the collective that they are in,
/// at their next call, or in check(). The destructor waits for the other ranks to come to theirs,
/// at most for the deadline; while an exception passes it does not wait but tells them.
///
/// After a failure the communicator is of no use: its calls throw the same error, and the
/// destructor neither frees it nor finalises MPI, since both could wait for ever. The process
/// should end with a status other than 0, without MPI_Finalize; mpirun then ends the rest of the
/// job, stopped processes included. What the failed collective was to receive into may still be
/// written by later calls of MPI, from whomever: keep it, or make none.
template <class Comm>
std::unique_ptr<Communicator> adopt_mpi(Comm comm, const Context& ctx,
                                        const MpiOptions& options = {}) {
  return detail::adopt_mpi(&comm, sizeof(comm), ctx, options);
}

}  // namespace octet
