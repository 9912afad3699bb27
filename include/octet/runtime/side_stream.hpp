// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <optional>

#include "octet/runtime/context.hpp"

namespace octet {

/// A context's stream and a second one of the same device beside it, ordered by events; the host
/// never waits, and a CUDA graph captured on the first takes in what lies between fork() and
/// join(). Where both contexts have one stream, everything is in order already and both calls do
/// nothing.
class SideStream {
 public:
  /// Throws octet::Error when the contexts are on different devices.
  SideStream(const Context& main, const Context& side);

  /// Whether there are two streams. Two CPU contexts count as two, although a CPU does everything
  /// before it returns.
  bool is_apart() const { return forked_.has_value(); }
  /// What is enqueued on the side from here on waits for what the main stream has been given so
  /// far.
  void fork();
  /// What is enqueued on the main stream from here on waits for what the side has been given so
  /// far.
  void join();

 private:
  Context main_, side_;
  std::optional<Event> forked_, joined_;
};

}  // namespace octet
