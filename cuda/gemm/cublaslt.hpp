// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <memory>

#include "octet/gemm/gemm.hpp"

namespace octet::detail::cuda {

/// The cuBLASLt backend for the context's device. Its workspace comes from the context's allocator.
std::unique_ptr<GemmBackend> make_cublaslt_gemm(const Context& ctx);

}  // namespace octet::detail::cuda
