// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <cstdint>

namespace octet::detail {

/// Tells from two counters, of collectives begun and ended on the device, whether one has been in
/// progress for longer than a deadline. Nothing in progress, or any change, starts the time anew.
class StallClock {
 public:
  using Time = std::chrono::steady_clock::time_point;
  explicit StallClock(std::chrono::milliseconds deadline) : deadline_(deadline) {}

  bool stalled(std::uint64_t begun, std::uint64_t ended, Time now) {
    if (!started_ || begun == ended || begun != begun_ || ended != ended_) {
      started_ = true;
      begun_ = begun;
      ended_ = ended;
      since_ = now;
      return false;
    }
    return now - since_ >= deadline_;
  }

 private:
  std::chrono::milliseconds deadline_;
  bool started_ = false;
  std::uint64_t begun_ = 0, ended_ = 0;
  Time since_{};
};

}  // namespace octet::detail
