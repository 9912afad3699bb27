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
  for (char c : text.substr(0, kLongest)) {
    shown += static_cast<unsigned char>(c) < 0x20 || c == 0x7F ? '?' : c;
  }
  return shown + (text.size() > kLongest ? "...\"" : "\"");
}

}  // namespace octet
