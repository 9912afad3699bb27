// SPDX-License-Identifier: Apache-2.0
// libFuzzer's entry to the readers of indexes.
#include "fuzz/index_input.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  octet::test::check_index({reinterpret_cast<const char*>(data), size});
  return 0;
}
