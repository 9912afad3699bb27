// SPDX-License-Identifier: Apache-2.0
// The formats of an optimizer's states: all combinations, those of the levels, and their names.
#pragma once

#include <sstream>
#include <string>
#include <vector>

#include "octet/ops/state_format.hpp"

namespace octet::test {

/// The formats that the levels have, and the smallest states.
inline const StateFormats kPlain = {};
inline const StateFormats kO0 = {.weight = WeightFormat::bf16};
inline const StateFormats kO1 = {.weight = WeightFormat::e4m3, .master = StateFormat::f16};
inline const StateFormats kO2 = {WeightFormat::e4m3, StateFormat::f16, StateFormat::e4m3,
                                 StateFormat::f16};
inline const StateFormats kSmall = {WeightFormat::e4m3, StateFormat::split, StateFormat::e4m3_block,
                                    StateFormat::sqrt_e4m3_block};
/// The same with a transposed weight: matrices only.
inline const StateFormats kSmallTransposed = {WeightFormat::e4m3_and_transpose, StateFormat::split,
                                              StateFormat::e4m3_block,
                                              StateFormat::sqrt_e4m3_block};
/// Weights with scales of blocks: matrices only.
inline const StateFormats kRowBlocks = {WeightFormat::e4m3_row_block, StateFormat::f32,
                                        StateFormat::e4m3_block, StateFormat::f16};
inline const StateFormats kTiles = {WeightFormat::e4m3_tile_and_transpose, StateFormat::f16,
                                    StateFormat::e4m3, StateFormat::f16};
inline const StateFormats kBlocksAlone = {WeightFormat::none, StateFormat::f32,
                                          StateFormat::e4m3_block, StateFormat::sqrt_e4m3_block};

inline std::string describe(const StateFormats& f) {
  std::ostringstream text;
  text << "weight " << name_of(f.weight) << ", master " << name_of(f.master) << ", m "
       << name_of(f.m) << ", v " << name_of(f.v);
  return text.str();
}

inline std::string describe(const StateFormats& f, DType gradient) {
  return describe(f) + ", gradient " + std::string(name_of(gradient));
}

/// Every combination under the two rules: an f32 weight is its own master, a split master needs an
/// E4M3 weight.
inline std::vector<StateFormats> all_formats() {
  std::vector<StateFormats> list;
  for (WeightFormat weight : kWeightFormats) {
    for (StateFormat master : kMasterFormats) {
      if (weight == WeightFormat::f32 && master != StateFormat::f32) continue;
      const bool e4m3_weight =
          weight == WeightFormat::e4m3 || weight == WeightFormat::e4m3_and_transpose;
      if (master == StateFormat::split && !e4m3_weight) continue;
      for (StateFormat m : kMFormats) {
        for (StateFormat v : kVFormats) list.push_back({weight, master, m, v});
      }
    }
  }
  return list;
}

}  // namespace octet::test
