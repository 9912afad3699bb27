// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>

namespace octet::detail::cuda {

/// A thread that calls `look` every few milliseconds until it returns false or the object goes.
/// `look` must not throw and must not wait for the device.
class Watchdog {
 public:
  explicit Watchdog(std::function<bool()> look) : thread_([this, look] { run(look); }) {}
  ~Watchdog() {
    {
      const std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    changed_.notify_all();
    thread_.join();
  }
  Watchdog(const Watchdog&) = delete;
  Watchdog& operator=(const Watchdog&) = delete;

 private:
  static constexpr auto kInterval = std::chrono::milliseconds(5);

  void run(const std::function<bool()>& look) {
    std::unique_lock lock(mutex_);
    while (!changed_.wait_for(lock, kInterval, [this] { return stopping_; })) {
      lock.unlock();
      if (!look()) return;
      lock.lock();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  bool stopping_ = false;
  std::thread thread_;  // last: it uses the others
};

}  // namespace octet::detail::cuda
