// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "octet/comm/communicator.hpp"

namespace octet {

/// Which of the processes of a job this one is.
struct Launch {
  int rank = 0;
  int size = 1;
  int local_rank = 0;  ///< among the processes of this host: the GPU to take
  int local_size = 1;
  std::string host;      ///< where rank 0 listens (MASTER_ADDR); empty: not known
  int port = 0;          ///< its TCP port (MASTER_PORT); 0: not known
  std::string job;       ///< names this run of the job; empty: the launcher gives none
  std::string launcher;  ///< "torchrun", "openmpi", "pmi", "slurm", or "none"
};

/// What the program was told, by its command line say: stands above the environment.
struct LaunchArguments {
  std::optional<int> rank = {}, size = {}, local_rank = {}, local_size = {}, port = {};
  std::optional<std::string> host = {}, job = {};
};

/// Value of a variable, null if it is not set: std::getenv, or a test's.
using Environment = std::function<const char*(const char* name)>;

/// Reads what the launcher has left in the environment. The first of these that is there counts,
/// the innermost first, because a launcher that runs inside another inherits its variables:
///   torchrun  RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, TORCHELASTIC_RUN_ID
///             (and TORCHELASTIC_RESTART_COUNT)
///   openmpi   OMPI_COMM_WORLD_RANK, _SIZE, _LOCAL_RANK, _LOCAL_SIZE, PMIX_NAMESPACE
///   pmi       PMI_RANK, PMI_SIZE; MPI_LOCALRANKID, MPI_LOCALNRANKS
///   slurm     inside a step (SLURM_STEP_ID): SLURM_PROCID, SLURM_STEP_NUM_TASKS or SLURM_NTASKS,
///             SLURM_LOCALID, SLURM_JOB_ID
/// Nothing set is one rank. MASTER_ADDR and MASTER_PORT count with every launcher. Without them the
/// address is the first host of SLURM_STEP_NODELIST (or SLURM_NODELIST), or 127.0.0.1 where all
/// ranks are on one host; the port under Slurm is made of job and step, 20000 to 29999. Where
/// torchrun itself listens on MASTER_PORT (TORCHELASTIC_USE_AGENT_STORE=True) the next port is
/// taken.
///
/// Throws octet::Error naming variable and value for what is not a number, out of range or
/// contradictory: a rank not below the size, one variable of a pair without the other, RANK and
/// WORLD_SIZE set by hand (without TORCHELASTIC_RUN_ID) beside another launcher that says
/// otherwise.
Launch launch_from_environment(const LaunchArguments& arguments = {},
                               const Environment& environment = {});

/// What carries a few bytes from rank 0 to the others before there is a communicator.
enum class Carrier : std::uint8_t {
  automatic,  ///< file if a path is given; else MPI if mpiexec started the job and octet has it;
              ///< else TCP
  mpi,
  tcp,
  file,
};

struct Rendezvous {
  Carrier carrier = Carrier::automatic;
  /// Carrier::file: a name in a folder that all ranks see. Files whose names begin with it are made
  /// and removed. Two jobs at once without a job id need two names.
  std::string path = {};
  std::chrono::milliseconds deadline = kCommDeadline;
};

constexpr std::size_t kMaxRendezvousBytes = 4096;

/// Gives every rank the bytes of rank 0, for whom `bytes` counts; at most kMaxRendezvousBytes.
/// Returns when the bytes are here; on rank 0 when every rank has come. All ranks must call, in any
/// order.
///
/// TCP: rank 0 listens on launch.host:launch.port, the others try until it does. Every connection
/// says a magic, the job, the size and its rank, in a message of bounded length and within 5
/// seconds; strangers are dropped and the rendezvous goes on. There is no secrecy: use a network
/// that you trust.
/// File: every rank leaves a request with a random number, and rank 0 answers it, so that nothing
/// an earlier run left can be taken for an answer.
///
/// Errors: octet::Error for bad arguments. CommError when the deadline passes (rank 0 names the
/// ranks that are not there, and tells those that wait), when the port is in use, when a process of
/// another job or another size, or a second one of the same rank, meets this job: on both sides.
std::vector<std::byte> broadcast_from_root(const Launch& launch, std::span<const std::byte> bytes,
                                           const Rendezvous& rendezvous = {});

/// The communicator that fits: one rank: make_single; on a CPU MPI (create_mpi); on a GPU NCCL,
/// with an id that broadcast_from_root carries. With several ranks on a host the context should be
/// on Context::cuda(launch.local_rank, ...). `rendezvous.deadline` is the communicator's too.
/// Throws octet::Error saying what to do where nothing fits.
std::unique_ptr<Communicator> make_communicator(const Context& ctx, const Launch& launch,
                                                const Rendezvous& rendezvous = {});

}  // namespace octet
