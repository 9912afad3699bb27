// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <string>
#include <string_view>

namespace train_gpt {

/// One line about the running level: step, loss, tokens per second, time left. On a terminal it
/// rewrites itself; in a file it is a plain line every `every` steps.
class Progress {
 public:
  Progress(std::FILE* out, int steps, int every, std::int64_t tokens_per_step);

  void begin(std::string_view level);
  /// `done` steps of the level are complete; the last of them had this loss.
  void update(int done, float loss);

 private:
  using Clock = std::chrono::steady_clock;
  bool is_due(int done, Clock::time_point now) const;

  std::FILE* out_;
  bool terminal_;
  int steps_, every_;
  std::int64_t tokens_per_step_;
  std::string level_;
  int shown_ = 0;
  Clock::time_point begin_, shown_at_;
};

}  // namespace train_gpt
