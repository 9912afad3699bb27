// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string_view>

#include "octet/optim/adamw.hpp"

namespace octet {

/// Presets of the formats of FP8-managed parameters, named as in MS-AMP:
/// O0 is the BF16 baseline; O1 has FP8 GEMMs, gradients and weights with FP32 states; O2 adds FP8
/// and FP16 states; O3 is O2 with the optimizer sharded by default.
enum class Level : std::uint8_t { O0, O1, O2, O3 };

/// What is cut into panels, of which every rank has its share, instead of being whole on every
/// rank (ZeRO 0, 1, 2, 3).
enum class Sharding : std::uint8_t {
  none,
  optimizer,  ///< states and master weights
  gradients,  ///< these, and reduced gradients: no rank keeps a whole gradient of the model
  parameters  ///< these, and weights: whole ones exist by units, from gather() to release()
};

struct Formats {
  DType gradient = DType::f32;
  StateFormats state = {};
  bool operator==(const Formats&) const = default;
};

Formats formats_of(Level level);
/// The smallest there are: O2 with both moments in E4M3 per block of 128 and a split master, 5.06
/// bytes of state per FP8-managed parameter instead of 7. For EngineConfig::formats.
Formats small_formats();
Sharding sharding_of(Level level);
std::string_view name_of(Level level);
std::string_view name_of(Sharding sharding);
/// Throws octet::Error for anything but O0, O1, O2, O3.
Level parse_level(std::string_view text);
/// Throws octet::Error for anything but a name_of(Sharding).
Sharding parse_sharding(std::string_view text);

}  // namespace octet
