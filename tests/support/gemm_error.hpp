// SPDX-License-Identifier: Apache-2.0
// How far products may be from the true ones, relative to the sum of the magnitudes that are added.
#pragma once

#include "octet/gemm/gemm.hpp"

namespace octet::test {

/// Of FP8 operands on tensor cores. Hopper's align the products of an instruction to the largest,
/// cut what then lies below about 13 bits, and so lose in one direction: with operands whose sizes
/// differ much an H100 was off by 1.02 * 2^-11 although sums were promoted to FP32 after every 128
/// of k. Not promoted, the loss grows with k.
constexpr double kPromotedError = 0x1p-10, kFastError = 0x1p-8;

/// Of an activation inside a kernel of cuBLASLt, which takes the hardware's tanh: PTX promises t
/// within d = 2^-11. GELU is 0.5 x (1 + t), off by 0.5 |x| d. Its derivative is off by (0.5 + |x|
/// u') d, u' that of tanh's argument, up to 2^-8 at the last x where 1 - t^2 is above d. Beyond, t
/// is 1. The library's own is within 1e-6.
constexpr double vendor_activation_error(Activation activation) {
  switch (activation) {
    case Activation::gelu: return 0x1p-12;
    case Activation::dgelu: return 0x1p-8;
    case Activation::none: break;
  }
  return 0.0;
}

/// Of a D in BF16 that cuBLASLt accumulates into: it rounds to BF16 on the way as well, the product
/// before it adds D and, it seems, the sum before it adds the bias.
constexpr double vendor_accumulate_error(const GemmProblem& p) {
  return p.accumulate && p.d == DType::bf16 ? 0x1p-8 : 0.0;
}

}  // namespace octet::test
