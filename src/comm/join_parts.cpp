// SPDX-License-Identifier: Apache-2.0
#include "comm/join_parts.hpp"

#include <sstream>

#include "backend.hpp"

namespace octet {
namespace {

// One character for each part to or from a rank: '1' where it begins where the one before ends.
template <class Part>
std::string touching(const Context& ctx, const std::vector<Part>& parts, int peer) {
  std::string text;
  const Part* last = nullptr;
  for (const Part& part : parts) {
    if (part.peer != peer) continue;
    text += last != nullptr && follows(ctx, part.data, last->data, last->bytes) ? '1' : '0';
    last = &part;
  }
  return text;
}

template <class Part>
std::vector<Part> joined(const std::vector<Part>& parts, const std::vector<std::string>& own,
                         const std::vector<std::string>& theirs) {
  std::vector<Part> result;
  std::vector<std::size_t> seen(own.size(), 0), last(own.size(), 0);
  for (const Part& part : parts) {
    const auto peer = static_cast<std::size_t>(part.peer);
    const std::size_t k = seen[peer]++;
    const bool touches = own[peer][k] == '1' && k < theirs[peer].size() && theirs[peer][k] == '1';
    if (touches) {
      result[last[peer]].bytes += part.bytes;
    } else {
      last[peer] = result.size();
      result.push_back(part);
    }
  }
  return result;
}

}  // namespace

bool follows(const Context& ctx, const void* next, const void* data, std::size_t bytes) {
  return next == static_cast<const char*>(data) + bytes &&
         detail::backend_of(ctx).is_one_allocation(ctx, data, next);
}

void join_parts(Communicator& comm, std::vector<SendPart>& sends, std::vector<RecvPart>& recvs) {
  const auto ranks = static_cast<std::size_t>(comm.size());
  if (ranks == 1) return;
  // Two words for every rank: what goes there, what comes from there.
  std::vector<std::string> own_sends, own_recvs, their_sends(ranks), their_recvs(ranks);
  std::ostringstream text;
  for (int peer = 0; peer < comm.size(); ++peer) {
    own_sends.push_back(touching(comm.context(), sends, peer));
    own_recvs.push_back(touching(comm.context(), recvs, peer));
    text << '.' << own_sends.back() << " ." << own_recvs.back() << ' ';
  }
  const std::vector<std::string> texts = all_gather_text_sync(comm, text.str());
  for (std::size_t peer = 0; peer < ranks; ++peer) {
    std::istringstream in(texts[peer]);
    std::string to, from;
    for (std::size_t rank = 0; rank < ranks; ++rank) {
      in >> to >> from;
      if (static_cast<int>(rank) != comm.rank()) continue;
      their_sends[peer] = to.substr(1);
      their_recvs[peer] = from.substr(1);
    }
  }
  sends = joined(sends, own_sends, their_recvs);
  recvs = joined(recvs, own_recvs, their_sends);
}

}  // namespace octet
