// SPDX-License-Identifier: Apache-2.0
// What the values of a tensor look like.
#pragma once

#include <cstdint>
#include <optional>

#include "octet/checkpoint/safetensors.hpp"
#include "scales.hpp"

namespace inspect {

struct Statistics {
  std::uint64_t elements = 0;
  std::uint64_t zeros = 0;
  std::uint64_t saturated = 0;   ///< codes of the largest magnitude, of FP8
  std::uint64_t subnormal = 0;   ///< codes below the smallest normal one, zero apart
  std::uint64_t non_finite = 0;  ///< NaN and infinity
  /// Largest magnitude of the finite values, decoded; NaN where a factor is.
  double amax = 0;
  bool has_amax = true;         ///< whether the factors are known
  bool has_saturation = false;  ///< whether the dtype is FP8
};

/// Reads a tensor in pieces of `piece_bytes`. Nothing for dtypes other than F8_E4M3, F8_E5M2, F16,
/// BF16, F32 and F64. Throws octet::Error when the file fails.
std::optional<Statistics> measure(const octet::SafetensorsReader& file,
                                  const octet::FileTensor& tensor,
                                  const std::optional<Scales>& scales,
                                  std::size_t piece_bytes = std::size_t{8} << 20);

}  // namespace inspect
