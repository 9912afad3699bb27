// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstring>
#include <iomanip>
#include <sstream>
#include <string>
#include <vector>

namespace octet::test {

/// Empty when the two hold the same bits; else where they first differ, for a failure message:
/// `REQUIRE(first_difference(a, b) == "")`.
template <class T>
std::string first_difference(const std::vector<T>& actual, const std::vector<T>& expected) {
  std::ostringstream text;
  if (actual.size() != expected.size()) {
    text << actual.size() << " elements instead of " << expected.size();
    return text.str();
  }
  std::size_t count = 0;
  std::size_t first = 0;
  for (std::size_t i = actual.size(); i-- > 0;) {
    if (std::memcmp(&actual[i], &expected[i], sizeof(T)) == 0) continue;
    first = i;
    ++count;
  }
  if (count == 0) return {};
  text << count << " of " << actual.size() << " differ, first at " << first << ": "
       << std::setprecision(9) << +actual[first] << " instead of " << +expected[first];
  return text.str();
}

}  // namespace octet::test
