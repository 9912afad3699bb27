// SPDX-License-Identifier: Apache-2.0
// Ranks as threads. In a collective the host threads meet: first when every rank has said what it
// sends and where from, whereupon each copies what it is to receive; then when all have copied. On
// CUDA the copies are only enqueued: a receiver's stream waits for the sender's data, the sender's
// stream for the receivers' copies, and a third meeting keeps the events alive until all waits are
// in place.
#include <algorithm>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <optional>

#include "comm/wording.hpp"
#include "octet/comm/communicator.hpp"
#include "octet/runtime/tensor.hpp"

namespace octet {
namespace {

using detail::Collective;

// What one rank brings to the collective in progress; written before the first meeting, read by the
// others until the last.
struct Offer {
  Collective kind = Collective::exchange;
  CollectiveName name;
  std::uint64_t number = 0;
  std::span<const SendPart> sends;
  std::span<const RecvPart> recvs;
  const void* data = nullptr;  // of all_gather
  std::size_t bytes = 0;
  const Event* ready = nullptr;  // what the rank sends is in place
  const Event* done = nullptr;   // the rank has copied what it receives
};

// Why the group came to its end; every rank makes an error of its own of it.
struct GroupFailure {
  std::string reason;
  std::vector<int> ranks;
  CollectiveName name = {};  // the collective in which it was noticed; number 0: outside of any
  std::uint64_t number = 0;
};

struct Slot {
  Offer offer;
  bool joined = false;
  int device_index = -1;
  bool left = false;
  bool arrived = false;
};

// The next send to `peer` at or after `cursor`; null at the end.
const SendPart* next_send(const Offer& from, int peer, std::size_t& cursor) {
  while (cursor < from.sends.size()) {
    const SendPart& part = from.sends[cursor++];
    if (part.peer == peer) return &part;
  }
  return nullptr;
}

}  // namespace

struct ThreadGroup::State {
  State(int ranks, std::chrono::milliseconds patience)
      : slots(static_cast<std::size_t>(ranks)), deadline(patience) {}

  std::mutex mutex;
  std::condition_variable changed;
  std::vector<Slot> slots;
  const std::chrono::milliseconds deadline;
  std::optional<DeviceType> device;  // of every rank's context
  std::optional<GroupFailure> aborted;
  std::uint64_t meetings = 0;  // first meetings completed so far
  int here = 0;                // ranks at the first meeting in progress
  int copying = 0;             // ranks that still have to come to the second meeting
  int ordering = 0;            // and to the third

  int size() const { return static_cast<int>(slots.size()); }
  Slot& slot(int rank) { return slots[static_cast<std::size_t>(rank)]; }
  const Offer& offer(int rank) const { return slots[static_cast<std::size_t>(rank)].offer; }

  // The functions below are called with the mutex held. They throw GroupFailure.
  void abort_locked(const GroupFailure& failure) {
    if (!aborted.has_value()) aborted = failure;
    changed.notify_all();
  }
  [[noreturn]] void abort_and_throw(const GroupFailure& failure) {
    abort_locked(failure);
    throw GroupFailure(*aborted);
  }
  void throw_if_aborted() const {
    if (aborted.has_value()) throw GroupFailure(*aborted);
  }
  GroupFailure absent(const Offer& offer) const;
  bool somebody_left() const;
  std::optional<GroupFailure> mismatch() const;
  GroupFailure failure_of(const std::string& reason, std::vector<int> ranks) const {
    return {reason, std::move(ranks), offer(0).name, offer(0).number};
  }
  std::string exchange_mismatch(int from, int to) const;
  void complete_first_meeting();

  void meet(int rank, const Offer& offer);
  void meet_again(int& outstanding);
};

// "rank 2 of 4 did not come within 50 ms".
GroupFailure ThreadGroup::State::absent(const Offer& offer) const {
  std::vector<int> missing, left;
  for (int r = 0; r < size(); ++r) {
    const Slot& slot = slots[static_cast<std::size_t>(r)];
    if (!slot.arrived) (slot.left ? left : missing).push_back(r);
  }
  const std::vector<int>& ranks = left.empty() ? missing : left;
  std::ostringstream text;
  text << to_string_of_ranks(ranks) << " of " << size();
  if (!left.empty()) {
    text << " left the group without calling it";
  } else {
    text << " did not come within " << deadline.count() << " ms";
  }
  return {text.str(), ranks, offer.name, offer.number};
}

bool ThreadGroup::State::somebody_left() const {
  for (const Slot& slot : slots) {
    if (slot.left && !slot.arrived) return true;
  }
  return false;
}

std::string ThreadGroup::State::exchange_mismatch(int from, int to) const {
  std::size_t send_cursor = 0;
  std::size_t k = 0;
  for (const RecvPart& recv : offer(to).recvs) {
    if (recv.peer != from) continue;
    const SendPart* send = next_send(offer(from), to, send_cursor);
    if (send == nullptr) return detail::too_many_receives(from, to, k);
    if (send->bytes != recv.bytes) {
      return detail::different_lengths(from, to, k, send->bytes, recv.bytes);
    }
    ++k;
  }
  if (next_send(offer(from), to, send_cursor) == nullptr) return {};
  return detail::too_many_sends(from, to, k);
}

// Nothing when all offers fit together.
std::optional<GroupFailure> ThreadGroup::State::mismatch() const {
  for (int r = 1; r < size(); ++r) {
    const std::string first = detail::described(offer(0).name, offer(0).kind);
    const std::string other = detail::described(offer(r).name, offer(r).kind);
    if (first != other) return failure_of(detail::different_calls(0, first, r, other), {0, r});
    if (offer(r).bytes != offer(0).bytes) {
      return failure_of(detail::different_contributions(0, offer(0).bytes, r, offer(r).bytes),
                        {0, r});
    }
  }
  if (offer(0).kind == Collective::all_gather) return {};
  for (int from = 0; from < size(); ++from) {
    for (int to = 0; to < size(); ++to) {
      if (from == to) continue;
      const std::string difference = exchange_mismatch(from, to);
      if (!difference.empty()) return failure_of(difference, {from, to});
    }
  }
  return {};
}

void ThreadGroup::State::complete_first_meeting() {
  const std::optional<GroupFailure> difference = mismatch();
  if (difference.has_value()) abort_and_throw(*difference);
  for (Slot& slot : slots) slot.arrived = false;
  here = 0;
  copying = size();
  ordering = size();
  ++meetings;
  changed.notify_all();
}

// The first meeting. Whoever returns from it must come to the later ones.
void ThreadGroup::State::meet(int rank, const Offer& offer) {
  std::unique_lock lock(mutex);
  throw_if_aborted();
  slot(rank).offer = offer;
  slot(rank).arrived = true;
  const std::uint64_t meeting = meetings;
  if (++here == size()) {
    complete_first_meeting();
    return;
  }
  const auto until = std::chrono::steady_clock::now() + deadline;
  const auto over = [&] { return meetings != meeting || aborted.has_value() || somebody_left(); };
  const bool in_time = changed.wait_until(lock, until, over);
  if (meetings != meeting)
    return;  // complete: even if aborted since, the others count on this rank
  throw_if_aborted();
  if (!in_time || somebody_left()) abort_and_throw(absent(offer));
}

// The later meetings. They cannot hang, because between meetings nobody waits for another. No rank
// leaves before all are through, so what a rank offered stays valid while others read it, also when
// one of them fails.
void ThreadGroup::State::meet_again(int& outstanding) {
  std::unique_lock lock(mutex);
  if (--outstanding == 0) changed.notify_all();
  changed.wait(lock, [&] { return outstanding == 0; });
}

namespace {

class ThreadRank final : public Communicator {
 public:
  ThreadRank(std::shared_ptr<ThreadGroup::State> state, int rank, const Context& ctx)
      : Communicator(ctx, state->deadline),
        state_(std::move(state)),
        rank_(rank),
        ready_(ctx),
        done_(ctx) {}

  ~ThreadRank() override {
    const std::lock_guard lock(state_->mutex);
    state_->slot(rank_).left = true;
    state_->changed.notify_all();
  }

  int rank() const override { return rank_; }
  int size() const override { return state_->size(); }
  std::string name() const override { return "threads"; }

 protected:
  void do_exchange(std::span<const SendPart> sends, std::span<const RecvPart> recvs) override {
    Offer offer;
    offer.sends = sends;
    offer.recvs = recvs;
    collective(offer, [&] {
      for (int peer = 0; peer < size(); ++peer) receive_from(peer, recvs);
    });
  }

  void do_all_gather(const void* send, void* recv, std::size_t bytes) override {
    Offer offer;
    offer.kind = Collective::all_gather;
    offer.data = send;
    offer.bytes = bytes;
    collective(offer, [&] {
      for (int peer = 0; peer < size(); ++peer) {
        const Offer& theirs = state_->offer(peer);
        void* to = static_cast<char*>(recv) + static_cast<std::size_t>(peer) * bytes;
        if (peer != rank_) theirs.ready->make_wait(context());
        if (to != theirs.data) copy_bytes(context(), to, theirs.data, bytes);
      }
    });
  }

  void do_check() override {
    const std::optional<CommError> gave_up = window_failure();
    const std::lock_guard lock(state_->mutex);
    // The others may be in no kernel, and would not know.
    if (gave_up.has_value()) {
      const CommError::Where& where = gave_up->where();
      state_->abort_locked({"rank " + std::to_string(rank_) + " gave up: " + gave_up->what(),
                            where.ranks, current().name, current().number});
      throw CommError(*gave_up);
    }
    if (state_->aborted.has_value()) throw error_of(*state_->aborted);
  }

  std::string window_refusal() override {
    const std::lock_guard lock(state_->mutex);
    const int own = context().device().index;
    for (int r = 0; r < size(); ++r) {
      const int other = state_->slot(r).device_index;
      if (other == own || other < 0) continue;
      return "ranks that are threads have windows within one device, but this one is on cuda:" +
             std::to_string(own) + " and rank " + std::to_string(r) +
             " on cuda:" + std::to_string(other);
    }
    return {};
  }

  // One address space: a pointer is good for all.
  std::unique_ptr<Window> do_make_window(std::size_t bytes) override {
    const std::size_t flags = peer_flag_bytes(size());
    std::shared_ptr<Buffer> memory;
    set_up_together_sync(*this,
                         [&] { memory = std::make_shared<Buffer>(context(), flags + bytes); });
    zero_bytes(context(), memory->data(), flags);
    void* const own = memory->data();
    const Buffer mine = upload_sync<void*>(context(), std::span(&own, 1));
    const Buffer all(context(), sizeof(own) * static_cast<std::size_t>(size()));
    all_gather(mine.data(), all.data(), sizeof(own));
    const auto begins =
        octet::read_sync<void*>(context(), all.data(), static_cast<std::size_t>(size()));
    return std::make_unique<Window>(context(), rank_, begins, bytes, memory->bytes(),
                                    std::max(1, kBlocksOnDevice / size()), deadline(), memory,
                                    size() > 1);
  }

 private:
  // Kernels of all ranks must fit on the device together.
  static constexpr int kBlocksOnDevice = 128;

  CommError error_of(const GroupFailure& failure) const {
    const Watched theirs{failure.name, failure.number};
    return error(current().number > 0 ? current() : theirs, failure.reason, failure.ranks);
  }

  template <class Copy>
  void collective(Offer& offer, Copy copy) {
    ready_.record();
    offer.ready = &ready_;
    offer.done = &done_;
    offer.name = current().name;
    offer.number = current().number;
    try {
      state_->meet(rank_, offer);
    } catch (const GroupFailure& failure) {
      throw error_of(failure);
    }
    guarded([&] {
      copy();
      done_.record();
    });
    state_->meet_again(state_->copying);
    if (context().device().type == DeviceType::cuda) {
      guarded([&] {
        for (int peer = 0; peer < size(); ++peer) {
          if (peer != rank_) state_->offer(peer).done->make_wait(context());
        }
      });
      state_->meet_again(state_->ordering);
    }
    if (failure_ != nullptr) std::rethrow_exception(failure_);
  }

  // A rank that fails between meetings aborts the group but still comes to the meetings.
  template <class Work>
  void guarded(Work work) {
    if (failure_ != nullptr) return;
    try {
      work();
    } catch (const std::exception& error) {
      failure_ = std::current_exception();
      const std::lock_guard lock(state_->mutex);
      state_->abort_locked({"rank " + std::to_string(rank_) + " failed: " + error.what(),
                            {rank_},
                            current().name,
                            current().number});
    }
  }

  void receive_from(int peer, std::span<const RecvPart> recvs) {
    const Offer& theirs = state_->offer(peer);
    std::size_t cursor = 0;
    bool waited = false;
    for (const RecvPart& recv : recvs) {
      if (recv.peer != peer) continue;
      const SendPart* send = next_send(theirs, rank_, cursor);
      if (!waited) theirs.ready->make_wait(context());
      waited = true;
      copy_bytes(context(), recv.data, send->data, recv.bytes);
    }
  }

  std::shared_ptr<ThreadGroup::State> state_;
  int rank_;
  Event ready_, done_;
  std::exception_ptr failure_;
};

int checked_size(int size) {
  require(size >= 1, "ThreadGroup: size is ", size, "; it must be at least 1");
  return size;
}

}  // namespace

ThreadGroup::ThreadGroup(int size, std::chrono::milliseconds deadline)
    : state_(std::make_shared<State>(checked_size(size), deadline)) {}

ThreadGroup::~ThreadGroup() = default;

std::unique_ptr<Communicator> ThreadGroup::join(int rank, const Context& ctx) {
  require(rank >= 0 && rank < state_->size(), "ThreadGroup::join: rank is ", rank,
          "; allowed are 0 to ", state_->size() - 1);
  const std::lock_guard lock(state_->mutex);
  require(!state_->slot(rank).joined, "ThreadGroup::join: rank ", rank, " has joined before");
  const DeviceType device = ctx.device().type;
  require(state_->device.value_or(device) == device, "ThreadGroup::join: rank ", rank, " is on ",
          to_string(ctx.device()), "; all ranks must be on the same kind of device");
  auto comm = std::make_unique<ThreadRank>(state_, rank, ctx);
  state_->slot(rank).joined = true;
  state_->slot(rank).device_index = ctx.device().index;
  state_->device = device;
  return comm;
}

void ThreadGroup::abort(const std::string& reason) {
  const std::lock_guard lock(state_->mutex);
  state_->abort_locked({.reason = reason, .ranks = {}});
}

}  // namespace octet
