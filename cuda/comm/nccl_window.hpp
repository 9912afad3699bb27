// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <memory>
#include <string>

#include "cuda/comm/nccl_rank.hpp"

namespace octet::detail::cuda {

/// Why the ranks of a communicator cannot reach one another's memory; empty if they can.
std::string nccl_window_refusal(NcclRank& rank);

/// Collective. Waits for the stream.
std::unique_ptr<Window> make_nccl_window(NcclRank& rank, std::size_t bytes);

}  // namespace octet::detail::cuda
