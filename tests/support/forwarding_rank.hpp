// SPDX-License-Identifier: Apache-2.0
// A communicator that hands everything on, for tests that change or watch a part of it.
#pragma once

#include <string>

#include "octet/comm/communicator.hpp"

namespace octet::test {

class ForwardingRank : public Communicator {
 public:
  explicit ForwardingRank(Communicator& inner) : Communicator(inner.context()), inner_(inner) {}
  int rank() const override { return inner_.rank(); }
  int size() const override { return inner_.size(); }
  std::string name() const override { return inner_.name(); }

 protected:
  void do_exchange(std::span<const SendPart> sends, std::span<const RecvPart> recvs) override {
    inner_.exchange(sends, recvs);
  }
  void do_all_gather(const void* send, void* recv, std::size_t bytes) override {
    inner_.all_gather(send, recv, bytes);
  }

 private:
  Communicator& inner_;
};

}  // namespace octet::test
