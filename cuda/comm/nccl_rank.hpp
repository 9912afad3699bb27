// SPDX-License-Identifier: Apache-2.0
// NCCL as a carrier of bytes: only sends, receives, all-gathers and broadcasts of ncclUint8, so
// neither its reductions nor its choice of algorithm can change a value; but for sum_e4m3.
#pragma once

#include <functional>
#include <memory>
#include <mutex>

#include "cuda/comm/marks.hpp"
#include "cuda/comm/nccl_link.hpp"
#include "cuda/comm/watchdog.hpp"
#include "octet/comm/communicator.hpp"
#include "octet/comm/detail/stall_clock.hpp"

namespace octet::detail::cuda {

/// A collective that NCCL carries is between two marks on the stream. The watchdog gives up when
/// one has begun and not ended for the deadline, when the host has been in NCCL for as long, or
/// when NCCL reports an error: it keeps the error for check(), which also ends kernels that wait in
/// a window, and aborts NCCL's communicator, whose kernels then leave the stream.
///
/// A kernel over a window takes no marks around it: it gives up by itself at the deadline, which
/// the watchdog sees.
class NcclRank final : public Communicator {
 public:
  NcclRank(std::unique_ptr<NcclLink> link, bool owned, int rank, int size, const Context& ctx,
           std::chrono::milliseconds deadline);
  /// Together with the other ranks when all is well and the communicator is owned; else alone.
  ~NcclRank() override;

  int rank() const override { return rank_; }
  int size() const override { return size_; }
  std::string name() const override { return "nccl"; }
  bool has_sum_e4m3() const override { return true; }
  std::string sum_e4m3_refusal() const override;

  /// Makes a call of NCCL's that is not one of the stream (one that registers memory, say), and
  /// waits for its end: for set-up. Throws CommError if it fails or takes longer than the deadline.
  void call(const char* op, const std::function<ncclResult_t(ncclComm_t)>& call);

 protected:
  void do_exchange(std::span<const SendPart> sends, std::span<const RecvPart> recvs) override;
  void do_all_gather(const void* send, void* recv, std::size_t bytes) override;
  void do_broadcast(void* data, std::size_t bytes, int root) override;
  void do_sum_e4m3(void* codes, std::int64_t count) override;
  std::string window_refusal() override;
  std::unique_ptr<Window> do_make_window(std::size_t bytes) override;
  void do_end() noexcept override;
  void do_synchronize() override;

 private:
  /// What the host is doing in NCCL, for the watchdog.
  struct HostCall {
    bool active = false;
    Watched collective;
    NcclLink::Clock::time_point since;
  };

  void begin_mark();
  template <class Calls>
  void enqueue(Calls calls);
  template <class Call>
  void finish(Call call);
  void set_host_call(bool active);
  bool look();
  bool look_at_host(NcclLink::Clock::time_point now);
  void give_up(const Watched& collective, const std::string& reason, std::vector<int> ranks);
  void give_up_on_others(const Watched& collective, const std::string& reason);
  void give_up_after(ncclResult_t status, const Watched& collective);
  bool drain() noexcept;

  int rank_;
  int size_;
  bool owned_;
  int exceptions_;  // in flight when this was made
  Marks marks_;
  std::unique_ptr<NcclLink> link_;
  StallClock device_clock_;
  bool marked_ = false;
  std::mutex host_mutex_;
  HostCall host_call_;
  std::unique_ptr<Watchdog> watchdog_;  // last: it looks at the others
};

}  // namespace octet::detail::cuda
