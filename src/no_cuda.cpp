// SPDX-License-Identifier: Apache-2.0
// Takes the place of cuda/ in a build without the CUDA toolkit.
#include "backend.hpp"
#include "octet/gemm/gemm.hpp"

namespace octet::detail {

const CudaPart& cuda_part() {
  static const CudaPart none;
  return none;
}

}  // namespace octet::detail
