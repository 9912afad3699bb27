// SPDX-License-Identifier: Apache-2.0
#include "octet/checkpoint/xxh64.hpp"

#include <algorithm>
#include <bit>
#include <cstring>

namespace octet {
namespace {

constexpr std::uint64_t kPrime1 = 0x9E3779B185EBCA87u;
constexpr std::uint64_t kPrime2 = 0xC2B2AE3D27D4EB4Fu;
constexpr std::uint64_t kPrime3 = 0x165667B19E3779F9u;
constexpr std::uint64_t kPrime4 = 0x85EBCA77C2B2AE63u;
constexpr std::uint64_t kPrime5 = 0x27D4EB2F165667C5u;

static_assert(std::endian::native == std::endian::little, "files have the bytes of the memory");

// Little-endian, like everything that the library stores.
template <class T>
T read(const unsigned char* from) {
  T value;
  std::memcpy(&value, from, sizeof(T));
  return value;
}

constexpr std::uint64_t mixed(std::uint64_t lane, std::uint64_t input) {
  return std::rotl(lane + input * kPrime2, 31) * kPrime1;
}

}  // namespace

void Xxh64::add_block(const unsigned char* block) {
  for (std::size_t i = 0; i < 4; ++i) {
    lanes_[i] = mixed(lanes_[i], read<std::uint64_t>(block + 8 * i));
  }
}

void Xxh64::add(const void* data, std::size_t bytes) {
  const auto* next = static_cast<const unsigned char*>(data);
  total_ += bytes;
  if (rest_bytes_ > 0) {
    const std::size_t taken = std::min(bytes, kBlock - rest_bytes_);
    std::memcpy(rest_ + rest_bytes_, next, taken);
    rest_bytes_ += taken;
    next += taken;
    bytes -= taken;
    if (rest_bytes_ < kBlock) return;
    add_block(rest_);
    rest_bytes_ = 0;
  }
  for (; bytes >= kBlock; next += kBlock, bytes -= kBlock) add_block(next);
  if (bytes > 0) std::memcpy(rest_, next, bytes);
  rest_bytes_ = bytes;
}

std::uint64_t Xxh64::value() const {
  std::uint64_t sum = kPrime5;
  if (total_ >= kBlock) {
    sum = std::rotl(lanes_[0], 1) + std::rotl(lanes_[1], 7) + std::rotl(lanes_[2], 12) +
          std::rotl(lanes_[3], 18);
    for (std::uint64_t lane : lanes_) sum = (sum ^ mixed(0, lane)) * kPrime1 + kPrime4;
  }
  sum += total_;
  const unsigned char* next = rest_;
  const unsigned char* const end = rest_ + rest_bytes_;
  for (; end - next >= 8; next += 8) {
    sum = std::rotl(sum ^ mixed(0, read<std::uint64_t>(next)), 27) * kPrime1 + kPrime4;
  }
  if (end - next >= 4) {
    sum = std::rotl(sum ^ (read<std::uint32_t>(next) * kPrime1), 23) * kPrime2 + kPrime3;
    next += 4;
  }
  for (; next < end; ++next) sum = std::rotl(sum ^ (*next * kPrime5), 11) * kPrime1;
  sum = (sum ^ (sum >> 33)) * kPrime2;
  sum = (sum ^ (sum >> 29)) * kPrime3;
  return sum ^ (sum >> 32);
}

}  // namespace octet
