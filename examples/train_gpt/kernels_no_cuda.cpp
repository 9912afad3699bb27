// SPDX-License-Identifier: Apache-2.0
// Takes the place of kernels_cuda.cu in a build without the CUDA toolkit.
#include "kernels.hpp"

namespace train_gpt {

const Kernels& cuda_kernels() { octet::fail("this build of train_gpt has no CUDA kernels"); }

}  // namespace train_gpt
