// SPDX-License-Identifier: Apache-2.0
// What any bytes must do to the reader's checks: pass and then hold what the format promises, or
// throw octet::Error. For the fuzzer and for the test that replays its corpus.
#pragma once

#include <cstdint>
#include <string_view>

#include "fuzz/attempt.hpp"
#include "support/safetensors_bytes.hpp"

namespace octet::test {

/// Throws std::logic_error where a header was let through that breaks the format.
inline void check_promises(const SafetensorsHeader& header, std::uint64_t data_bytes) {
  std::uint64_t end = 0;
  for (const FileTensor& tensor : header.tensors) {
    std::uint64_t bits = static_cast<std::uint64_t>(file_dtype_bits(tensor.dtype));
    bool whole = bits != 0 && tensor.begin == end;
    for (std::int64_t dim : tensor.shape) {
      whole = whole && dim >= 0 &&
              !__builtin_mul_overflow(bits, static_cast<std::uint64_t>(dim), &bits);
    }
    whole = whole && bits % 8 == 0 && bits / 8 == tensor.bytes;
    whole = whole && !__builtin_add_overflow(end, tensor.bytes, &end);
    promise(whole, "a tensor was let through that is not what it says");
  }
  promise(end == data_bytes, "the tensors do not cover the data");
}

/// Takes the bytes for a file, and, because few changes of one keep its length right, for 8 bytes
/// of data length and a header. True where one of them passed.
inline bool check_input(std::string_view bytes) {
  const bool passed = takes([&] {
    const SafetensorsHeader header = parse_file("fuzz", bytes);
    check_promises(header,
                   bytes.size() - 8 - safetensors_header_bytes("fuzz", bytes, bytes.size()));
  });
  if (bytes.size() < 8) return passed;
  const bool header_passed = takes([&] {
    std::uint64_t data_bytes = 0;
    for (std::size_t i = 8; i-- > 0;) {
      data_bytes = data_bytes << 8 | static_cast<unsigned char>(bytes[i]);
    }
    check_promises(parse_safetensors_header("fuzz", bytes.substr(8), data_bytes), data_bytes);
  });
  return passed || header_passed;
}

}  // namespace octet::test
