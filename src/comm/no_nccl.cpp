// SPDX-License-Identifier: Apache-2.0
// Takes the place of cuda/comm/nccl.cpp in a build without NCCL.
#include "octet/comm/nccl.hpp"

namespace octet {
namespace {

[[noreturn]] void refuse(const char* what) {
  fail(what, ": this build of octet has no NCCL; configure it with OCTET_NCCL=ON");
}

}  // namespace

bool has_nccl() { return false; }
NcclId make_nccl_id() { refuse("make_nccl_id"); }
std::unique_ptr<Communicator> adopt_nccl(ncclComm*, const Context&, std::chrono::milliseconds) {
  refuse("adopt_nccl");
}
std::unique_ptr<Communicator> create_nccl(const NcclId&, int, int, const Context&,
                                          std::chrono::milliseconds) {
  refuse("create_nccl");
}

}  // namespace octet
