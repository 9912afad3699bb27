// SPDX-License-Identifier: Apache-2.0
// What readers may do with bytes that are wrong, and no more.
#pragma once

#include <stdexcept>

#include "octet/core/error.hpp"

namespace octet::test {

/// Whether `parse` takes its input; octet::Error is the one way not to. All else is a find.
template <class Parse>
bool takes(const Parse& parse) {
  try {
    parse();
    return true;
  } catch (const Error&) {
    return false;
  }
}

/// What an input that passed must hold; std::logic_error is a find.
inline void promise(bool holds, const char* what) {
  if (!holds) throw std::logic_error(what);
}

}  // namespace octet::test
