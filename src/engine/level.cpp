// SPDX-License-Identifier: Apache-2.0
#include "octet/engine/level.hpp"

#include <string>

#include "octet/core/error.hpp"

namespace octet {

Formats formats_of(Level level) {
  using State = StateFormat;
  switch (level) {
    case Level::O0: return {.gradient = DType::bf16, .state = {.weight = WeightFormat::bf16}};
    case Level::O1:
      return {.gradient = DType::e4m3,
              .state = {.weight = WeightFormat::e4m3, .master = State::f16}};
    case Level::O2:
    case Level::O3: break;
  }
  return {
      .gradient = DType::e4m3,
      .state = {
          .weight = WeightFormat::e4m3, .master = State::f16, .m = State::e4m3, .v = State::f16}};
}

Formats small_formats() {
  return {.gradient = DType::e4m3,
          .state = {.weight = WeightFormat::e4m3,
                    .master = StateFormat::split,
                    .m = StateFormat::e4m3_block,
                    .v = StateFormat::sqrt_e4m3_block}};
}

Sharding sharding_of(Level level) {
  return level == Level::O3 ? Sharding::optimizer : Sharding::none;
}

std::string_view name_of(Level level) {
  constexpr std::string_view kNames[] = {"O0", "O1", "O2", "O3"};
  return kNames[static_cast<int>(level)];
}

std::string_view name_of(Sharding sharding) {
  constexpr std::string_view kNames[] = {"none", "optimizer", "gradients", "parameters"};
  return kNames[static_cast<int>(sharding)];
}

Level parse_level(std::string_view text) {
  for (Level level : {Level::O0, Level::O1, Level::O2, Level::O3}) {
    if (text == name_of(level)) return level;
  }
  fail("unknown level \"", text, "\"; allowed are O0, O1, O2, O3");
}

Sharding parse_sharding(std::string_view text) {
  std::string names;
  for (Sharding sharding :
       {Sharding::none, Sharding::optimizer, Sharding::gradients, Sharding::parameters}) {
    if (text == name_of(sharding)) return sharding;
    names += (names.empty() ? "" : ", ") + std::string(name_of(sharding));
  }
  fail("unknown sharding \"", text, "\"; allowed are ", names);
}

}  // namespace octet
