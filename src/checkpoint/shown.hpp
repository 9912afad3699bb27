// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <string_view>

namespace octet {

/// Text from a file as an error shows it: in quotes, without control characters, cut where it is
/// long.
inline std::string shown_text(std::string_view text) {
  constexpr std::size_t kLongest = 200;
  std::string shown = "\"";
  bool follows_c2 = false;  // in UTF-8 controls above 0x7F are C2 80 to C2 9F
  for (char c : text.substr(0, kLongest)) {
    const auto code = static_cast<unsigned char>(c);
    shown += code < 0x20 || code == 0x7F || (follows_c2 && code < 0xA0) ? '?' : c;
    follows_c2 = code == 0xC2;
  }
  return shown + (text.size() > kLongest ? "...\"" : "\"");
}

}  // namespace octet
