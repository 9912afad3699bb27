// SPDX-License-Identifier: Apache-2.0
#include "comm/bootstrap.hpp"

#include "octet/comm/mpi.hpp"
#include "octet/comm/nccl.hpp"
#include "octet/core/error.hpp"

namespace octet {
namespace {

bool is_of_mpiexec(const Launch& launch) {
  return launch.launcher == "openmpi" || launch.launcher == "pmi";
}

void check_launch(const char* what, const Launch& launch) {
  require(launch.size >= 1, what, ": size is ", launch.size, "; it must be at least 1");
  require(launch.rank >= 0 && launch.rank < launch.size, what, ": rank is ", launch.rank,
          "; allowed are 0 to ", launch.size - 1);
  require(launch.job.size() <= detail::kMaxJobBytes, what, ": job has ", launch.job.size(),
          " characters; at most ", detail::kMaxJobBytes, " are allowed");
}

Carrier chosen_carrier(const Launch& launch, const Rendezvous& rendezvous) {
  if (rendezvous.carrier != Carrier::automatic) return rendezvous.carrier;
  if (!rendezvous.path.empty()) return Carrier::file;
  return is_of_mpiexec(launch) && has_mpi() ? Carrier::mpi : Carrier::tcp;
}

/// MPI over the ranks of the launch, and not some other number of them.
std::unique_ptr<Communicator> launched_mpi(const Context& ctx, const Launch& launch,
                                           std::chrono::milliseconds deadline) {
  auto comm = create_mpi(ctx, {.deadline = deadline});
  require(comm->size() == launch.size && comm->rank() == launch.rank, "MPI says that this is rank ",
          comm->rank(), " of ", comm->size(), ", but the launcher (", launch.launcher,
          ") says rank ", launch.rank, " of ", launch.size,
          "; start the program with the mpiexec of the MPI that octet was built with");
  return comm;
}

std::vector<std::byte> broadcast_by_mpi(const Launch& launch, std::span<const std::byte> bytes,
                                        std::chrono::milliseconds deadline) {
  const auto comm = launched_mpi(Context::cpu(), launch, deadline);
  std::uint64_t count = bytes.size();
  comm->broadcast(&count, sizeof(count), 0, Traffic::metadata);
  std::vector<std::byte> data(count);
  if (launch.rank == 0) data.assign(bytes.begin(), bytes.end());
  comm->broadcast(data.data(), count, 0, Traffic::metadata);
  return data;
}

}  // namespace

std::vector<std::byte> broadcast_from_root(const Launch& launch, std::span<const std::byte> bytes,
                                           const Rendezvous& rendezvous) {
  constexpr const char* kWhat = "broadcast_from_root";
  check_launch(kWhat, launch);
  require(launch.rank != 0 || bytes.size() <= kMaxRendezvousBytes, kWhat, ": ", bytes.size(),
          " bytes; at most ", kMaxRendezvousBytes, " are allowed");
  require(rendezvous.deadline.count() > 0, kWhat, ": deadline is ", rendezvous.deadline.count(),
          " ms; it must be positive");
  const Carrier carrier = chosen_carrier(launch, rendezvous);
  require(carrier != Carrier::file || !rendezvous.path.empty(), kWhat,
          ": path is empty; name a file in a folder that all ranks see");
  if (launch.size == 1) return {bytes.begin(), bytes.end()};
  if (carrier == Carrier::mpi) return broadcast_by_mpi(launch, bytes, rendezvous.deadline);
  if (carrier == Carrier::file) {
    return detail::broadcast_by_file(launch, bytes, rendezvous.path, rendezvous.deadline);
  }
  require(!launch.host.empty(), kWhat, ": the address of rank 0 is not known; set MASTER_ADDR");
  require(launch.port >= 1 && launch.port <= 65535, kWhat, ": port is ", launch.port,
          "; set MASTER_PORT to a free port of rank 0, 1 to 65535");
  return detail::broadcast_by_tcp(launch, bytes, rendezvous.deadline);
}

std::unique_ptr<Communicator> make_communicator(const Context& ctx, const Launch& launch,
                                                const Rendezvous& rendezvous) {
  constexpr const char* kWhat = "make_communicator";
  check_launch(kWhat, launch);
  if (launch.size == 1) return make_single(ctx);
  if (ctx.device().type == DeviceType::cpu) {
    require(has_mpi(), kWhat, ": ", launch.size,
            " ranks on CPUs talk through MPI, which this build of octet lacks; configure it with "
            "OCTET_MPI=ON");
    require(is_of_mpiexec(launch) || launch.launcher == "slurm", kWhat, ": ", launch.size,
            " ranks on CPUs talk through MPI; start them with mpiexec, not with ", launch.launcher);
    return launched_mpi(ctx, launch, rendezvous.deadline);
  }
  require(has_nccl(), kWhat, ": ", launch.size,
          " ranks on GPUs talk through NCCL, which this build of octet lacks; configure it with "
          "OCTET_NCCL=ON");
  NcclId id{};
  if (launch.rank == 0) id = make_nccl_id();
  const auto bytes = broadcast_from_root(launch, id, rendezvous);
  require(bytes.size() == id.size(), kWhat, ": rank 0 sent ", bytes.size(),
          " bytes; the id of NCCL has ", id.size());
  std::copy(bytes.begin(), bytes.end(), id.begin());
  return create_nccl(id, launch.rank, launch.size, ctx, rendezvous.deadline);
}

}  // namespace octet
