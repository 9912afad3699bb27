// SPDX-License-Identifier: Apache-2.0
#include "progress.hpp"

#include <unistd.h>

namespace train_gpt {

Progress::Progress(std::FILE* out, int steps, int every, std::int64_t tokens_per_step)
    : out_(out),
      terminal_(isatty(fileno(out)) != 0),
      steps_(steps),
      every_(every),
      tokens_per_step_(tokens_per_step) {}

void Progress::begin(std::string_view level) {
  level_ = level;
  shown_ = 0;
  begin_ = Clock::now();
  shown_at_ = {};
}

bool Progress::is_due(int done, Clock::time_point now) const {
  if (done == steps_) return true;
  if (terminal_) return now - shown_at_ >= std::chrono::milliseconds(100);
  return done / every_ > shown_ / every_;
}

void Progress::update(int done, float loss) {
  const Clock::time_point now = Clock::now();
  if (!is_due(done, now)) return;
  const double seconds = std::chrono::duration<double>(now - begin_).count();
  const double rate = static_cast<double>(done) / seconds;
  const double tokens = rate * static_cast<double>(tokens_per_step_);
  const long left = static_cast<long>(static_cast<double>(steps_ - done) / rate + 0.5);
  const bool last = done == steps_;
  std::fprintf(out_, "%s%s  step %d/%d  loss %.4f  %.0f tokens/s  %ld:%02ld left%s",
               terminal_ ? "\r\033[K" : "", level_.c_str(), done, steps_, static_cast<double>(loss),
               tokens, left / 60, left % 60, terminal_ && !last ? "" : "\n");
  std::fflush(out_);
  shown_ = done;
  shown_at_ = now;
}

}  // namespace train_gpt
