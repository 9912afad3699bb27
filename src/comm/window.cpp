// SPDX-License-Identifier: Apache-2.0
#include "octet/comm/window.hpp"

#include <atomic>
#include <new>

#include "backend.hpp"

namespace octet {

PeerWords::PeerWords(const Context& ctx) : ctx_(ctx) {
  void* on_device = nullptr;
  status_ =
      new (detail::backend_of(ctx).allocate_mapped(ctx, sizeof(PeerStatus), &on_device)) PeerStatus;
  on_device_ = static_cast<PeerStatus*>(on_device);
}

PeerWords::~PeerWords() { detail::backend_of(ctx_).deallocate_mapped(ctx_, status_); }

std::optional<PeerStatus> PeerWords::failure() const {
  if (std::atomic_ref(status_->failed).load(std::memory_order_acquire) == 0) return std::nullopt;
  return *status_;
}

void PeerWords::abort() { std::atomic_ref(status_->abort).store(1, std::memory_order_release); }

Window::Window(const Context& ctx, int rank, const std::vector<void*>& begins, std::size_t bytes,
               std::size_t memory, int blocks, std::chrono::milliseconds deadline,
               std::shared_ptr<void> owner, bool is_within_device)
    : owner_(std::move(owner)),
      bytes_(bytes),
      memory_(memory),
      is_within_device_(is_within_device),
      words_(std::make_shared<PeerWords>(ctx)) {
  for (void* begin : begins) begins_.push_back(static_cast<std::byte*>(begin));
  begin_ = begins_[static_cast<std::size_t>(rank)];
  data_ = begin_ + peer_flag_bytes(static_cast<int>(begins.size()));
  table_ = upload_sync<void*>(ctx, begins);
  epochs_ = upload_sync<std::uint32_t>(ctx, std::vector<std::uint32_t>(kMaxPeerBlocks));
  peers_.windows = table_.as<std::byte*>();
  peers_.epochs = epochs_.as<std::uint32_t>();
  peers_.status = words_->on_device();
  peers_.deadline_ns = std::chrono::nanoseconds(deadline).count();
  peers_.ranks = static_cast<int>(begins.size());
  peers_.rank = rank;
  peers_.blocks = blocks;
}

bool Window::contains(const void* data, std::size_t bytes) const {
  const auto* at = static_cast<const std::byte*>(data);
  const auto* begin = static_cast<const std::byte*>(data_);
  return at >= begin && bytes <= bytes_ && static_cast<std::size_t>(at - begin) <= bytes_ - bytes;
}

std::int64_t Window::offset_of(const void* data) const {
  return static_cast<const std::byte*>(data) - begin_;
}

}  // namespace octet
