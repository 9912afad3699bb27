// SPDX-License-Identifier: Apache-2.0
// Bytes of safetensors files, put together by hand.
#pragma once

#include <cstdint>
#include <fstream>
#include <string>
#include <string_view>

#include "octet/checkpoint/safetensors.hpp"

namespace octet::test {

/// 8 bytes, little-endian.
inline std::string header_length(std::uint64_t length) {
  std::string text;
  for (int i = 0; i < 8; ++i) text += static_cast<char>(length >> (8 * i) & 0xFF);
  return text;
}

inline std::string file_bytes(const std::string& header, std::uint64_t data_bytes) {
  return header_length(header.size()) + header + std::string(data_bytes, '\x38');
}

inline void write_bytes(const std::string& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary).write(bytes.data(), static_cast<long>(bytes.size()));
}

/// The checks that opening a file makes, on its bytes.
inline SafetensorsHeader parse_file(std::string_view file, std::string_view bytes) {
  const std::uint64_t length = safetensors_header_bytes(file, bytes.substr(0, 8), bytes.size());
  return parse_safetensors_header(file, bytes.substr(8, length), bytes.size() - 8 - length);
}

}  // namespace octet::test
