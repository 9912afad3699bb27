// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <functional>

#include "kernels.hpp"
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

}  // namespace train_gpt
