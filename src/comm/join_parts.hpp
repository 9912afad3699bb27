// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <vector>

#include "octet/comm/communicator.hpp"

namespace octet {

/// Parts of an exchange that follow one another in the memory of sender and receiver become one: a
/// transport pays for every part. All ranks call it together, with the parts of one exchange; what
/// arrives where stays the same. Waits for the stream: for set-up.
void join_parts(Communicator& comm, std::vector<SendPart>& sends, std::vector<RecvPart>& recvs);

}  // namespace octet
