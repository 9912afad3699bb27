// SPDX-License-Identifier: Apache-2.0
// What ranks under MPI tell one another: before the data of a collective, and after a failure.
#pragma once

#include <algorithm>
#include <array>
#include <cstring>

#include "comm/bytes.hpp"
#include "comm/wording.hpp"

namespace octet::detail {

/// What a rank tells a peer before any data: the words named below, then the lengths of the parts
/// that it sends to the peer, then those of the parts that it receives from it.
using Header = std::vector<std::uint64_t>;
enum HeaderWord : std::size_t { kKind, kBucket, kOp, kSends = kOp + 4, kRecvs, kHeaderWords };
/// Longer names are cut off.
constexpr std::size_t kOpBytes = (kSends - kOp) * sizeof(std::uint64_t);

/// Without parts.
inline void begin_header(Header& header, const CollectiveName& name, Collective kind) {
  header.assign(kHeaderWords, 0);
  header[kKind] = static_cast<std::uint64_t>(kind);
  header[kBucket] = static_cast<std::uint64_t>(static_cast<std::int64_t>(name.bucket));
  std::memcpy(&header[kOp], name.op, std::min(std::strlen(name.op), kOpBytes));
}

inline bool is_whole(const Header& header) {
  return header.size() >= kHeaderWords &&
         header.size() == kHeaderWords + header[kSends] + header[kRecvs];
}

inline std::span<const std::uint64_t> sends_of(const Header& header) {
  return std::span(header).subspan(kHeaderWords, header[kSends]);
}
inline std::span<const std::uint64_t> recvs_of(const Header& header) {
  return std::span(header).subspan(kHeaderWords + header[kSends], header[kRecvs]);
}

/// "two_shot of bucket 3 (exchange)".
inline std::string described(const Header& header) {
  std::array<char, kOpBytes + 1> op{};
  std::memcpy(op.data(), &header[kOp], kOpBytes);
  const auto bucket = static_cast<int>(static_cast<std::int64_t>(header[kBucket]));
  return described({op.data(), bucket}, static_cast<Collective>(header[kKind]));
}

/// Empty when what `from` sends to `to` is what `to` receives from it.
inline std::string mismatch(int from, std::span<const std::uint64_t> sent, int to,
                            std::span<const std::uint64_t> received) {
  for (std::size_t k = 0; k < std::min(sent.size(), received.size()); ++k) {
    if (sent[k] != received[k]) return different_lengths(from, to, k, sent[k], received[k]);
  }
  if (received.size() > sent.size()) return too_many_receives(from, to, sent.size());
  if (sent.size() > received.size()) return too_many_sends(from, to, received.size());
  return {};
}

/// Empty when two ranks are about to do the same.
inline std::string mismatch(int a, const Header& of_a, int b, const Header& of_b) {
  if (!std::equal(of_a.begin(), of_a.begin() + kSends, of_b.begin())) {
    return different_calls(a, described(of_a), b, described(of_b));
  }
  if (static_cast<Collective>(of_a[kKind]) == Collective::all_gather) {
    if (sends_of(of_a)[0] == sends_of(of_b)[0]) return {};
    return different_contributions(a, sends_of(of_a)[0], b, sends_of(of_b)[0]);
  }
  const std::string there = mismatch(a, sends_of(of_a), b, recvs_of(of_b));
  return there.empty() ? mismatch(b, sends_of(of_b), a, recvs_of(of_a)) : there;
}

/// What a rank that has given up tells all others.
struct Notice {
  std::string reason;
  std::vector<int> ranks;  ///< at fault
  std::string op;          ///< of the collective that it was in; number 0: in none
  int bucket = -1;
  std::uint64_t number = 0;
};

/// A notice must leave without the help of its receiver, which MPI does with short messages.
constexpr std::size_t kLongestReason = 1000, kMostRanks = 64;

inline std::vector<std::byte> packed(const Notice& notice) {
  Writer writer;
  writer.text(notice.reason.substr(0, kLongestReason));
  writer.text(notice.op.substr(0, kOpBytes));
  writer.number(static_cast<std::uint64_t>(static_cast<std::int64_t>(notice.bucket)));
  writer.number(notice.number);
  const std::size_t count = std::min(notice.ranks.size(), kMostRanks);
  writer.number(count);
  for (std::size_t i = 0; i < count; ++i)
    writer.number(static_cast<std::uint64_t>(notice.ranks[i]));
  return writer.bytes();
}

inline Notice unpacked(std::span<const std::byte> bytes) {
  Reader reader(bytes);
  Notice notice;
  notice.reason = reader.text(kLongestReason);
  notice.op = reader.text(kOpBytes);
  notice.bucket = static_cast<int>(static_cast<std::int64_t>(reader.number()));
  notice.number = reader.number();
  const std::uint64_t count = reader.number();
  for (std::uint64_t i = 0; i < count && reader.good(); ++i) {
    notice.ranks.push_back(static_cast<int>(reader.number()));
  }
  return notice;
}

}  // namespace octet::detail
