// SPDX-License-Identifier: Apache-2.0
// What comm_bench times on one rank: collectives over random gradients, and NCCL's as their rivals.
#pragma once

#include <nccl.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "octet/octet.hpp"

namespace bench {

/// A rank's device, stream and communicator. NCCL's own is used by the rivals too.
struct CommRank {
  octet::Context ctx;
  ncclComm_t nccl;
  octet::Communicator& comm;
};

struct CommCase {
  std::string name;
  std::function<void()> run;  ///< enqueues it once
  std::uint64_t payload = 0;  ///< bytes that this rank sends
};

/// The buffers of `elements` gradient elements in matrices of a GPT's size, and what can be done
/// with them. Made by all ranks together.
class CommModel {
 public:
  CommModel(const CommRank& rank, std::int64_t elements);
  ~CommModel();
  /// NCCL's BF16 all-reduce first.
  const std::vector<CommCase>& cases() const { return cases_; }
  /// Why there is no case over windows; empty if there is.
  const std::string& no_windows() const { return no_windows_; }
  /// Throws octet::Error unless the reduced gradients are there, finite and the same on all ranks.
  void verify() const;

 private:
  struct Reduction;
  Reduction& add(octet::MeanReducer::Path path, const octet::Window* window);
  void cast(const Reduction& r, octet::Scaling scaling) const;
  void add_rivals();
  void add_send_receive();
  void add_window();
  void add_copy(std::byte* spare, std::uint64_t payload);

  CommRank rank_;
  std::int64_t elements_;
  std::vector<octet::Shape> shapes_;
  octet::Owners owners_;
  octet::Buffer wide_, sums_, flag_;
  std::unique_ptr<octet::Window> window_;
  std::vector<std::unique_ptr<Reduction>> reductions_;
  std::vector<CommCase> cases_;
  std::string no_windows_;
};

}  // namespace bench
