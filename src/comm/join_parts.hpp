// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <vector>

#include "octet/comm/communicator.hpp"

namespace octet {

/// Whether `next` begins where the `bytes` bytes at `data` end, in memory that was allocated with
/// them: some copies refuse to go over the border between two allocations.
bool follows(const Context& ctx, const void* next, const void* data, std::size_t bytes);

/// Parts of an exchange that follow one another in the memory of sender and receiver become one: a
/// transport pays for every part. All ranks call it together, with the parts of one exchange; what
/// arrives where stays the same. Waits for the stream: for set-up.
void join_parts(Communicator& comm, std::vector<SendPart>& sends, std::vector<RecvPart>& recvs);

}  // namespace octet
