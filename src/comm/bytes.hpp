// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace octet::detail {

/// Numbers, little-endian, and texts, one after the other: what travels and what files hold.
class Writer {
 public:
  void number(std::uint64_t value) {
    for (int i = 0; i < 8; ++i) bytes_.push_back(static_cast<std::byte>(value >> (8 * i)));
  }
  void raw(std::span<const std::byte> data) {
    bytes_.insert(bytes_.end(), data.begin(), data.end());
  }
  void text(const std::string& value) {
    number(value.size());
    raw(std::as_bytes(std::span(value)));
  }
  const std::vector<std::byte>& bytes() const { return bytes_; }

 private:
  std::vector<std::byte> bytes_;
};

/// Reads what Writer wrote; good() turns false at the first thing that is not there.
class Reader {
 public:
  explicit Reader(std::span<const std::byte> bytes) : rest_(bytes) {}

  std::uint64_t number() {
    std::uint64_t value = 0;
    const auto data = raw(8);
    for (std::size_t i = 0; i < data.size(); ++i) {
      value |= static_cast<std::uint64_t>(data[i]) << (8 * i);
    }
    return value;
  }
  std::span<const std::byte> raw(std::size_t count) {
    good_ = good_ && count <= rest_.size();
    if (!good_) return {};
    const auto data = rest_.first(count);
    rest_ = rest_.subspan(count);
    return data;
  }
  std::string text(std::size_t longest) {
    const std::uint64_t length = number();
    good_ = good_ && length <= longest;
    const auto data = raw(good_ ? length : 0);
    return {reinterpret_cast<const char*>(data.data()), data.size()};
  }
  bool good() const { return good_; }

 private:
  std::span<const std::byte> rest_;
  bool good_ = true;
};

}  // namespace octet::detail
