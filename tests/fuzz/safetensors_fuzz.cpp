// SPDX-License-Identifier: Apache-2.0
// libFuzzer's entry to the check of safetensors headers.
#include "fuzz/safetensors_input.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  octet::test::check_input({reinterpret_cast<const char*>(data), size});
  return 0;
}
