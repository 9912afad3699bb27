// SPDX-License-Identifier: Apache-2.0
#include "octet/comm/window.hpp"

#include <atomic>
#include <new>
#include <sstream>

#include "backend.hpp"

namespace octet {

Window::Window(const Context& ctx, int rank, const std::vector<void*>& begins, std::size_t bytes,
               int blocks, std::chrono::milliseconds deadline, std::shared_ptr<void> owner)
    : ctx_(ctx), owner_(std::move(owner)), bytes_(bytes) {
  const int ranks = static_cast<int>(begins.size());
  begin_ = static_cast<std::byte*>(begins[static_cast<std::size_t>(rank)]);
  data_ = begin_ + peer_flag_bytes(ranks);
  table_ = upload_sync<void*>(ctx, begins);
  const std::vector<std::uint32_t> none(kMaxPeerBlocks + 1);
  epochs_ = upload_sync<std::uint32_t>(ctx, none);
  void* on_device = nullptr;
  status_ =
      new (detail::backend_of(ctx).allocate_mapped(ctx, sizeof(PeerStatus), &on_device)) PeerStatus;
  peers_.windows = table_.as<std::byte*>();
  peers_.epochs = epochs_.as<std::uint32_t>();
  peers_.status = static_cast<PeerStatus*>(on_device);
  peers_.deadline_ns = std::chrono::nanoseconds(deadline).count();
  peers_.ranks = ranks;
  peers_.rank = rank;
  peers_.blocks = blocks;
}

Window::~Window() { detail::backend_of(ctx_).deallocate_mapped(ctx_, status_); }

bool Window::contains(const void* data, std::size_t bytes) const {
  const auto* at = static_cast<const std::byte*>(data);
  const auto* begin = static_cast<const std::byte*>(data_);
  return at >= begin && bytes <= bytes_ && static_cast<std::size_t>(at - begin) <= bytes_ - bytes;
}

std::int64_t Window::offset_of(const void* data) const {
  return static_cast<const std::byte*>(data) - begin_;
}

std::string Window::failure() const {
  if (std::atomic_ref(status_->failed).load(std::memory_order_acquire) == 0) return {};
  std::ostringstream text;
  text << "rank " << std::atomic_ref(status_->missing).load() << " of " << peers_.ranks
       << " did not come to a kernel of rank " << peers_.rank << " within "
       << peers_.deadline_ns / 1'000'000 << " ms";
  return text.str();
}

void Window::abort() { std::atomic_ref(status_->abort).store(1, std::memory_order_release); }

}  // namespace octet
