// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <memory>
#include <string>

#include "octet/comm/window.hpp"

struct ncclComm;

namespace octet::detail::cuda {

/// Why the ranks of a communicator cannot reach one another's memory; empty if they can.
std::string nccl_window_refusal(ncclComm* comm, int size);

/// Collective. The flags of the window are being zeroed on the context's stream.
std::unique_ptr<Window> make_nccl_window(const Context& ctx, ncclComm* comm, int rank, int size,
                                         std::size_t bytes);

}  // namespace octet::detail::cuda
