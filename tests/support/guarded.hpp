// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "support/devices.hpp"

namespace octet::test {

/// An output buffer between two stretches of known bytes. The buffer itself starts with the same
/// bytes, so that an element never written is seen as well.
class Guarded {
 public:
  static constexpr std::uint8_t kFill = 0xA5;
  static constexpr std::size_t kGuard = 256;

  Guarded(const Context& ctx, std::size_t bytes)
      : ctx_(ctx), bytes_(bytes), buffer_(ctx, bytes + 2 * kGuard), begin_(buffer_.data()) {
    fill();
  }
  /// In memory of the caller's: bytes + 2 * kGuard of them.
  Guarded(const Context& ctx, std::size_t bytes, void* memory)
      : ctx_(ctx), bytes_(bytes), begin_(memory) {
    fill();
  }

  void* data() const { return static_cast<std::uint8_t*>(begin_) + kGuard; }
  std::size_t bytes() const { return bytes_; }
  TensorView view(DType dtype, Shape shape) const { return {data(), dtype, shape, ctx_.device()}; }

  template <class T>
  std::vector<T> values() const {
    return download<T>(ctx_, data(), bytes_ / sizeof(T));
  }

  /// Whether nothing was written before or behind the buffer.
  bool intact() const {
    const auto all = download<std::uint8_t>(ctx_, begin_, bytes_ + 2 * kGuard);
    const auto is_fill = [](std::uint8_t byte) { return byte == kFill; };
    return std::all_of(all.begin(), all.begin() + kGuard, is_fill) &&
           std::all_of(all.end() - kGuard, all.end(), is_fill);
  }

 private:
  void fill() { write(ctx_, begin_, std::vector<std::uint8_t>(bytes_ + 2 * kGuard, kFill)); }

  Context ctx_;
  std::size_t bytes_;
  Buffer buffer_;
  void* begin_;
};

}  // namespace octet::test
