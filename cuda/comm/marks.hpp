// SPDX-License-Identifier: Apache-2.0
// How the watchdog sees, without a call to CUDA, where the device is: kernels count the collectives
// they begin and end in pinned memory of the host.
#pragma once

#include <cstdint>
#include <mutex>
#include <vector>

#include "octet/comm/communicator.hpp"

namespace octet::detail::cuda {

/// In mapped host memory, written by the device.
struct MarkWords {
  std::uint64_t begun = 0;  ///< count of the last collective begun, with its tag above
  std::uint64_t ended = 0;  ///< count of those ended
};

/// In device memory, where the counts live: replays of a captured graph go on counting.
struct MarkCounts {
  std::uint64_t begun = 0;
  std::uint64_t ended = 0;
};

struct DeviceMarks {
  MarkWords* words = nullptr;
  MarkCounts* counts = nullptr;
};

/// Enqueues one thread that counts. Can be captured.
void launch_begin_mark(const Context& ctx, const DeviceMarks& marks, std::uint64_t tag);
void launch_end_mark(const Context& ctx, const DeviceMarks& marks);

/// The words and counts of one communicator, and the names that tags stand for.
class Marks {
 public:
  /// What the words say.
  struct Reading {
    std::uint64_t begun = 0;
    std::uint64_t ended = 0;
    CollectiveName name;  ///< of the last one begun
    bool captured = false;
  };

  explicit Marks(const Context& ctx);
  /// Waits for the device, as freeing memory does, unless leak() was called.
  ~Marks();
  Marks(const Marks&) = delete;
  Marks& operator=(const Marks&) = delete;

  /// Of the name, for the next collective; not the same while the stream is captured.
  std::uint64_t tag_of(const CollectiveName& name);
  DeviceMarks device() const { return device_; }
  /// From any thread.
  Reading read();
  /// For a device that does not come to an end.
  void leak() { leaked_ = true; }

 private:
  Context ctx_;
  MarkWords* words_ = nullptr;
  DeviceMarks device_;
  bool leaked_ = false;
  std::mutex names_mutex_;
  std::vector<CollectiveName> names_;
};

}  // namespace octet::detail::cuda
