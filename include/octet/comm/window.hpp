// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <chrono>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "octet/ops/peer_memory.hpp"
#include "octet/runtime/tensor.hpp"

namespace octet {

/// The PeerStatus of a window, in host memory that kernels reach. Any thread may ask and abort.
class PeerWords {
 public:
  explicit PeerWords(const Context& ctx);
  ~PeerWords();
  PeerWords(const PeerWords&) = delete;
  PeerWords& operator=(const PeerWords&) = delete;

  PeerStatus* on_device() const { return on_device_; }
  /// What a kernel that gave up left behind, if one did.
  std::optional<PeerStatus> failure() const;
  /// Makes kernels that wait for other ranks leave, and those to come.
  void abort();

 private:
  Context ctx_;
  PeerStatus* status_ = nullptr;
  PeerStatus* on_device_ = nullptr;
};

/// Device memory of which every rank has a piece of the same size, and which the kernels of all
/// ranks load from and store to: over NVLink through NCCL's symmetric windows, within one device or
/// one process directly. Made by Communicator::make_window() on all ranks together. The memory goes
/// back in the order of the communicator's stream.
class Window {
 public:
  /// For communicators. Memory begins with peer_flag_bytes(), zeroed, and behind them come the
  /// window's own bytes; begins[r] is where rank r's is seen from this device. `memory` bytes were
  /// taken for it in all, which `owner` gives back. is_within_device: the ranks are on one device.
  /// Waits for the stream.
  Window(const Context& ctx, int rank, const std::vector<void*>& begins, std::size_t bytes,
         std::size_t memory, int blocks, std::chrono::milliseconds deadline,
         std::shared_ptr<void> owner, bool is_within_device = false);
  Window(const Window&) = delete;
  Window& operator=(const Window&) = delete;

  /// This rank's piece.
  void* data() const { return data_; }
  std::size_t bytes() const { return bytes_; }
  /// Device memory held, of the context: bytes(), flags and tables.
  std::size_t memory_bytes() const { return memory_ + table_.bytes() + epochs_.bytes(); }
  bool contains(const void* data, std::size_t bytes) const;
  /// Bytes from the beginning of the memory, flags included: the same place in every rank's.
  std::int64_t offset_of(const void* data) const;
  /// Where rank `rank` has, as this device sees it, what this rank has at `data`.
  template <class T>
  T* on_rank(int rank, T* data) const {
    return reinterpret_cast<T*>(begins_[static_cast<std::size_t>(rank)] + offset_of(data));
  }
  /// For kernels.
  const PeerMemory& peers() const { return peers_; }
  /// Fewer blocks for the kernels of reducers that are made afterwards, so that they leave most of
  /// the device to what runs beside them. The same number on every rank.
  void limit_blocks(int blocks) { peers_.blocks = std::min(peers_.blocks, blocks); }
  /// Whether several ranks are on one device: a kernel of one then waits, on the device, for those
  /// of others that have yet to get their turn there (Context::set_shares_device()).
  bool is_within_device() const { return is_within_device_; }
  const std::shared_ptr<PeerWords>& words() const { return words_; }

 private:
  std::shared_ptr<void> owner_;
  std::vector<std::byte*> begins_;
  std::byte* begin_ = nullptr;
  void* data_ = nullptr;
  std::size_t bytes_ = 0, memory_ = 0;
  bool is_within_device_ = false;
  Buffer table_, epochs_;
  std::shared_ptr<PeerWords> words_;
  PeerMemory peers_;
};

}  // namespace octet
