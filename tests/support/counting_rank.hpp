// SPDX-License-Identifier: Apache-2.0
// A communicator that counts the parts it sends.
#pragma once

#include "support/forwarding_rank.hpp"

namespace octet::test {

/// Hands everything on and counts the parts that it sends.
class CountingRank final : public ForwardingRank {
 public:
  using ForwardingRank::ForwardingRank;
  std::size_t sent() const { return sent_; }

 protected:
  void do_exchange(std::span<const SendPart> sends, std::span<const RecvPart> recvs) override {
    sent_ += sends.size();
    ForwardingRank::do_exchange(sends, recvs);
  }

 private:
  std::size_t sent_ = 0;
};

}  // namespace octet::test
