// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace octet {

/// What every function of the library throws. The message names the value that was refused and
/// what is allowed; nothing has been changed when it is thrown for an argument.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// A collective that could not finish: a rank is gone, late, or asks for something else.
class CommError : public Error {
 public:
  using Error::Error;
};

/// Throws Error with the parts joined as text.
template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw Error(text.str());
}

/// fail(parts...) unless the condition holds. Text is made only then: pass the objects themselves
/// (a Shape, a Device, a GemmProblem), not their to_string().
template <class... Parts>
void require(bool condition, const Parts&... parts) {
  if (!condition) fail(parts...);
}

}  // namespace octet
