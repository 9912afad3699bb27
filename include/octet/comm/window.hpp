// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <memory>
#include <string>
#include <vector>

#include "octet/ops/peer_memory.hpp"
#include "octet/runtime/tensor.hpp"

namespace octet {

/// Device memory of which every rank has a piece of the same size, and which the kernels of all
/// ranks load from and store to: over NVLink through NCCL's symmetric windows, within one device or
/// one process directly. Made by Communicator::make_window() on all ranks together.
class Window {
 public:
  /// For communicators. `memory` holds peer_flag_bytes(), zeroed, and behind them the window's own
  /// bytes; begins[r] is where rank r's is seen from this device. `owner` gives the memory back.
  /// Waits for the stream.
  Window(const Context& ctx, int rank, const std::vector<void*>& begins, std::size_t bytes,
         int blocks, std::chrono::milliseconds deadline, std::shared_ptr<void> owner);
  ~Window();
  Window(const Window&) = delete;
  Window& operator=(const Window&) = delete;

  /// This rank's piece.
  void* data() const { return data_; }
  std::size_t bytes() const { return bytes_; }
  bool contains(const void* data, std::size_t bytes) const;
  /// Bytes from the window's beginning, flags included, as offsets in all ranks' memory count.
  std::int64_t offset_of(const void* data) const;
  /// For kernels.
  const PeerMemory& peers() const { return peers_; }
  /// Empty, or why a kernel that worked on this window gave up: "rank 1 did not come within ...".
  std::string failure() const;
  /// Makes kernels that wait for other ranks leave, and those to come.
  void abort();

 private:
  Context ctx_;
  std::shared_ptr<void> owner_;
  std::byte* begin_ = nullptr;
  void* data_ = nullptr;
  std::size_t bytes_ = 0;
  Buffer table_, epochs_;
  PeerStatus* status_ = nullptr;  // as the host sees it
  PeerMemory peers_;
};

}  // namespace octet
