// SPDX-License-Identifier: Apache-2.0
// Takes the place of nccl_window.cu where NCCL has no device interface yet.
#include "cuda/comm/nccl_window.hpp"

#if NCCL_VERSION_CODE < 22800

#include "octet/core/error.hpp"

namespace octet::detail::cuda {

std::string nccl_window_refusal(NcclRank&) {
  return "octet was built with NCCL " + std::to_string(NCCL_VERSION_CODE) + ", windows need 22800";
}

std::unique_ptr<Window> make_nccl_window(NcclRank& rank, std::size_t) {
  fail("make_window: ", nccl_window_refusal(rank));
}

}  // namespace octet::detail::cuda

#endif
