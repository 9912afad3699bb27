// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <initializer_list>
#include <string>

#include "octet/core/error.hpp"

namespace octet::test {

/// The message of the octet::Error that a call throws; "no error" when it throws none.
template <class F>
std::string error_of(F&& f) {
  try {
    f();
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

/// Empty when the message names all of these, else what it lacks:
/// `CHECK(missing(error_of([&] { ... }), {"width", "7"}) == "")`.
inline std::string missing(const std::string& message, std::initializer_list<std::string> words) {
  for (const std::string& word : words) {
    if (message.find(word) == std::string::npos) return "\"" + word + "\" in: " + message;
  }
  return {};
}

}  // namespace octet::test
