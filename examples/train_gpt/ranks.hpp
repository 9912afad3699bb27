// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <functional>
#include <memory>

#include "kernels.hpp"
#include "octet/comm/bootstrap.hpp"
#include "octet/comm/communicator.hpp"
#include "octet/comm/gradient_reducer.hpp"

namespace train_gpt {

/// What a rank works with; valid for as long as its thread runs.
struct Rank {
  int index;
  octet::Context& ctx;
  octet::Communicator& comm;
  const Kernels& kernels;
};

/// Runs data-parallel ranks as threads of this process and waits for all. On a CPU they share the
/// cores and talk through octet::ThreadGroup; on CUDA each has a GPU and a stream of its own and
/// they talk through NCCL. With Schedule::overlap the communicator's context is another one than
/// the rank's, on CUDA with a stream of its own. The first exception of any rank ends the others
/// and is thrown once, as octet::Error naming the rank.
void run_ranks(octet::DeviceType device, int count, octet::Schedule schedule,
               const std::function<void(const Rank&)>& body);

/// The one rank that this process is when a launcher has started it: on a CPU through MPI, on CUDA
/// with a GPU of its own through NCCL. With Schedule::overlap the communicator has a context of its
/// own, as in run_ranks().
class LaunchedRank {
 public:
  LaunchedRank(octet::DeviceType device, const octet::Launch& launch, octet::Schedule schedule);
  ~LaunchedRank();
  /// Calls body. An exception is thrown as octet::Error naming the rank; MPI tells the other ranks
  /// when this object ends because of it. On CUDA they may wait inside NCCL, so there it is printed
  /// and the process ends, which makes the launcher end the others.
  void run(const std::function<void(const Rank&)>& body);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace train_gpt
