// SPDX-License-Identifier: Apache-2.0
// A communicator that counts the parts it sends.
#pragma once

#include <memory>
#include <string>

#include "octet/comm/communicator.hpp"

namespace octet::test {

/// Hands everything on and counts the parts that it sends.
class CountingRank final : public Communicator {
 public:
  explicit CountingRank(Communicator& inner) : Communicator(inner.context()), inner_(inner) {}
  int rank() const override { return inner_.rank(); }
  int size() const override { return inner_.size(); }
  std::string name() const override { return inner_.name(); }
  std::size_t sent() const { return sent_; }

 protected:
  void do_exchange(std::span<const SendPart> sends, std::span<const RecvPart> recvs) override {
    sent_ += sends.size();
    inner_.exchange(sends, recvs);
  }
  void do_all_gather(const void* send, void* recv, std::size_t bytes) override {
    inner_.all_gather(send, recv, bytes);
  }

 private:
  Communicator& inner_;
  std::size_t sent_ = 0;
};

}  // namespace octet::test
