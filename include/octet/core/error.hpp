// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace octet {

/// What every function of the library throws. The message names the value that was refused and
/// what is allowed; nothing has been changed when it is thrown for an argument.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// A collective that could not finish: a rank is gone, late, or asks for something else. The text
/// says all of it; where() has the parts.
class CommError : public Error {
 public:
  /// What is not known keeps its default.
  struct Where {
    int rank = -1;                 ///< the rank that throws
    std::string op;                ///< "two_shot", "exchange", ...; empty outside of a collective
    int bucket = -1;               ///< of gradients
    std::uint64_t collective = 0;  ///< its number in the life of the communicator, from 1
    std::vector<int> ranks;        ///< the ranks that are gone or late or do not match
  };

  explicit CommError(const std::string& text) : CommError(text, Where()) {}
  CommError(const std::string& text, Where where)
      : Error(text), where_(std::make_shared<const Where>(std::move(where))) {}
  const Where& where() const { return *where_; }

 private:
  std::shared_ptr<const Where> where_;  // an exception's copy must not throw
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
