// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "octet/runtime/context.hpp"

namespace octet {

/// FP8-LM's automatic scaling factor mu of a model, in device memory.
struct AutoScaleState {
  /// mu = 2^(mu_exponent / 1000): halving it takes away 1000, a step of growth adds 1, so that it
  /// takes the same values everywhere and 1000 steps double it exactly. Sums use the power of two
  /// in it, 2^floor(mu_exponent / 1000): other factors would round every mantissa once more.
  std::int32_t mu_exponent = 0;
  std::int32_t padding = 0;
  std::uint64_t saturated = 0;  ///< codes of this step's sums at the maximum
  std::uint64_t values = 0;     ///< and codes in all
};

/// What a loaded or adapted mu may be: 2^-16 to 2^16.
constexpr std::int32_t kMuExponentLimit = 16000;

/// One gradient that is summed in FP8.
struct SumTensor {
  void* codes = nullptr;  ///< e4m3
  std::int64_t count = 0;
  std::int64_t packed = 0;  ///< index of its first code in the buffer of the sum
};

struct SumArgs {
  const SumTensor* tensors = nullptr;  ///< [tensor_count], device memory
  std::int64_t tensor_count = 0;
  int ranks = 1;
  int rank = 0;
  const TensorScale* gathered = nullptr;  ///< every rank's scales, [ranks][tensor_count]
  TensorScale* scales = nullptr;          ///< [tensor_count], the common ones
  std::uint8_t* packed = nullptr;         ///< codes of all tensors as they are summed
  std::uint64_t* saturated = nullptr;     ///< [tensor_count], added to
  AutoScaleState* auto_scale = nullptr;   ///< null: mu = 1 and nothing is recorded
  std::uint32_t* nonfinite = nullptr;     ///< device word
};

/// The common scale of every tensor. With s the smallest scale of the ranks whose amax is neither
/// zero nor non-finite, codes are to be value * p with p = s * 2^m / 2^k, where 2^k is the smallest
/// power of two that is not below the number of ranks (the headroom of their sum), and 2^m the
/// power of two in mu, at most 2^k: what is added never saturates, only the sum can. Writes scale =
/// p * ranks and scale_inv = 1 / (p * ranks), so the sum decodes to the mean with no division of
/// codes; scale 1 where no rank has a finite amax but zero; amax 0. An amax that is not finite
/// raises the flag. Stream-ordered, deterministic, equal bits on CPU and CUDA.
void sum_scales(const Context& ctx, const SumArgs& args);

/// packed = this rank's codes, from its own scale to p: a product with a power of two, rounded to
/// nearest where it becomes subnormal; NaN stays. Reads what sum_scales wrote. As above.
void requantise_codes(const Context& ctx, const SumArgs& args);

/// `own` = codes of all ranks added one after the other in rank order, every sum rounded to E4M3 at
/// once and saturating, as NCCL's ring does it. Block r of `staging`, at r * stride bytes, has
/// those of rank r; block `rank` is not read. As above.
void add_codes(const Context& ctx, std::uint8_t* own, std::int64_t count,
               const std::uint8_t* staging, std::int64_t stride, int ranks, int rank);

/// Copies the sums back to the tensors. Sets amax of their scales to the largest decoded magnitude;
/// adds the codes at the maximum to `saturated` and to auto_scale; a NaN raises the flag. As above.
void take_sums(const Context& ctx, const SumArgs& args);

/// After the last sum of a step: more than 0.001 % of its values at the maximum halve mu, else it
/// grows by 2^(1/1000), to no more than 2^k (see sum_scales). Takes the counts down; without values
/// nothing changes. As above.
void update_auto_scale(const Context& ctx, AutoScaleState* state, int ranks);

}  // namespace octet
