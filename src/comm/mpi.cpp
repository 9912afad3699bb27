// SPDX-License-Identifier: Apache-2.0
// MPI as a carrier of bytes between host buffers. In a collective every rank first sends every
// other a header: which collective this is and how long each part between the two is. When all
// headers have come and fit, the data follows. So nobody waits in the dark: who is missing is who
// has sent no header, and a receive is posted only for what is certain to be sent. All waiting is
// polling, because MPI has no deadlines.
#include "octet/comm/mpi.hpp"

#include <mpi.h>

#include <algorithm>
#include <cstring>
#include <exception>
#include <optional>
#include <thread>

#include "comm/mpi_messages.hpp"

namespace octet {
namespace {

using Clock = std::chrono::steady_clock;
using detail::Collective;
using detail::Header;
using detail::Notice;

constexpr int kHeaderTag = 1, kDataTag = 2, kNoticeTag = 3;
/// How long a failed rank waits for its receives to be cancelled.
constexpr auto kCancelTime = std::chrono::milliseconds(100);

void check_mpi(int status, const char* call) {
  if (status == MPI_SUCCESS) return;
  char text[MPI_MAX_ERROR_STRING] = "";
  int length = 0;
  MPI_Error_string(status, text, &length);
  throw CommError(std::string(call) + " failed with " + text);
}

/// Between polls: at once while an answer is likely, then leaving the core to ranks that share it.
class Pause {
 public:
  void operator()() {
    ++polls_;
    if (polls_ > 2000) {
      std::this_thread::sleep_for(std::chrono::microseconds(50));
    } else if (polls_ > 50) {
      std::this_thread::yield();
    }
  }

 private:
  int polls_ = 0;
};

class MpiRank final : public Communicator {
 public:
  /// Takes over `comm`, whose errors are returned. `owns_mpi`: finalises MPI at its end.
  MpiRank(MPI_Comm comm, bool owns_mpi, const Context& ctx, const MpiOptions& options)
      : Communicator(ctx, options.deadline),
        comm_(comm),
        owns_mpi_(owns_mpi),
        message_bytes_(options.message_bytes) {
    check_mpi(MPI_Comm_rank(comm_, &rank_), "MPI_Comm_rank");
    check_mpi(MPI_Comm_size(comm_, &size_), "MPI_Comm_size");
    memory_->out.resize(static_cast<std::size_t>(size_));
    memory_->in.resize(static_cast<std::size_t>(size_));
  }

  ~MpiRank() override {
    int finalized = 0;
    MPI_Finalized(&finalized);
    if (finalized) return;
    if (!aborted()) leave();
    if (aborted()) {
      static_cast<void>(memory_.release());  // MPI may still be reading it
      return;
    }
    MPI_Comm_free(&comm_);
    if (owns_mpi_) MPI_Finalize();
  }

  int rank() const override { return rank_; }
  int size() const override { return size_; }
  std::string name() const override { return "mpi"; }

 protected:
  void do_exchange(std::span<const SendPart> sends, std::span<const RecvPart> recvs) override {
    run(Collective::exchange, sends, recvs);
  }

  void do_all_gather(const void* send, void* recv, std::size_t bytes) override {
    gather_sends_.clear();
    gather_recvs_.clear();
    char* const blocks = static_cast<char*>(recv);
    char* const own = blocks + static_cast<std::size_t>(rank_) * bytes;
    for (int peer = 0; peer < size_; ++peer) {
      if (peer == rank_) continue;
      gather_sends_.push_back({send, bytes, peer});
      gather_recvs_.push_back({blocks + static_cast<std::size_t>(peer) * bytes, bytes, peer});
    }
    run(Collective::all_gather, gather_sends_, gather_recvs_);
    if (bytes > 0 && own != send) std::memcpy(own, send, bytes);
  }

  void do_check() override {
    std::optional<Notice> notice;
    try {
      notice = next_notice();
    } catch (const CommError& failure) {
      throw given_up(failure);
    }
    if (!notice) return;
    throw error({{notice->op.c_str(), notice->bucket}, notice->number}, notice->reason,
                notice->ranks);
  }

 private:
  struct Memory {  // what MPI reads and writes besides the caller's buffers
    std::vector<Header> out, in;
    std::vector<std::byte> notice;
  };
  struct Pending {
    MPI_Request request;
    int peer;
    bool receives;
  };

  void run(Collective kind, std::span<const SendPart> sends, std::span<const RecvPart> recvs) {
    until_ = Clock::now() + deadline();
    try {
      send_headers(kind, sends, recvs);
      receive_headers();
      heed_notices();  // what a rank has given up need not fit any more
      check_headers();
      move_data(sends, recvs);
    } catch (const Notice& notice) {  // all have heard of it, so nobody is told
      cancel_receives();
      throw error(current(), notice.reason, notice.ranks);
    } catch (const CommError& failure) {
      throw given_up(failure);
    } catch (const std::exception& failure) {
      cancel_receives();
      tell_all(failure.what(), {rank_});
      set_failure(error(current(), failure.what()));
      throw;
    }
  }

  void send_headers(Collective kind, std::span<const SendPart> sends,
                    std::span<const RecvPart> recvs) {
    for (Header& header : memory_->out) detail::begin_header(header, current().name, kind);
    for (const SendPart& part : sends) {
      ++out(part.peer)[detail::kSends];
      out(part.peer).push_back(part.bytes);
    }
    for (const RecvPart& part : recvs) {
      ++out(part.peer)[detail::kRecvs];
      out(part.peer).push_back(part.bytes);
    }
    for (int peer = 0; peer < size_; ++peer) {
      if (peer == rank_) continue;
      Pending& pending = pending_.emplace_back(Pending{MPI_REQUEST_NULL, peer, false});
      check_mpi(MPI_Isend(out(peer).data(), static_cast<int>(out(peer).size()), MPI_UINT64_T, peer,
                          kHeaderTag, comm_, &pending.request),
                "MPI_Isend");
    }
  }

  /// Starts to receive a peer's header if it has come. Probing instead of posting receives: a
  /// header is as long as the peer makes it, and nothing needs to be taken back at the deadline.
  bool start_header(int peer) {
    int here = 0;
    MPI_Message message = MPI_MESSAGE_NULL;
    MPI_Status status;
    check_mpi(MPI_Improbe(peer, kHeaderTag, comm_, &here, &message, &status), "MPI_Improbe");
    if (!here) return false;
    int words = 0;
    check_mpi(MPI_Get_count(&status, MPI_UINT64_T, &words), "MPI_Get_count");
    in(peer).resize(static_cast<std::size_t>(words));
    Pending& pending = pending_.emplace_back(Pending{MPI_REQUEST_NULL, peer, true});
    check_mpi(MPI_Imrecv(in(peer).data(), words, MPI_UINT64_T, &message, &pending.request),
              "MPI_Imrecv");
    return true;
  }

  void receive_headers() {
    absent_.clear();
    for (int peer = 0; peer < size_; ++peer) {
      if (peer != rank_) absent_.push_back(peer);
    }
    const auto all_here = [&] {
      std::erase_if(absent_, [&](int peer) { return start_header(peer); });
      return absent_.empty();
    };
    if (!poll(all_here)) fail_for(absent_, "did not come" + in_time());
    finish_pending();
  }

  void check_headers() const {
    for (int peer = 0; peer < size_; ++peer) {
      if (peer == rank_) continue;
      const Header& own = memory_->out[static_cast<std::size_t>(peer)];
      const Header& theirs = memory_->in[static_cast<std::size_t>(peer)];
      if (!detail::is_whole(theirs)) {
        fail_for({peer}, "sent a header that is not octet's");
      }
      // The lower rank first, so that both sides say the same.
      const std::string difference = rank_ < peer ? detail::mismatch(rank_, own, peer, theirs)
                                                  : detail::mismatch(peer, theirs, rank_, own);
      if (difference.empty()) continue;
      throw blaming({std::min(rank_, peer), std::max(rank_, peer)}, difference);
    }
  }

  void move_data(std::span<const SendPart> sends, std::span<const RecvPart> recvs) {
    for (const RecvPart& part : recvs) {
      in_messages(part.bytes, [&](std::size_t begin, int bytes) {
        Pending& pending = pending_.emplace_back(Pending{MPI_REQUEST_NULL, part.peer, true});
        check_mpi(MPI_Irecv(static_cast<char*>(part.data) + begin, bytes, MPI_BYTE, part.peer,
                            kDataTag, comm_, &pending.request),
                  "MPI_Irecv");
      });
    }
    for (const SendPart& part : sends) {
      in_messages(part.bytes, [&](std::size_t begin, int bytes) {
        Pending& pending = pending_.emplace_back(Pending{MPI_REQUEST_NULL, part.peer, false});
        check_mpi(MPI_Isend(static_cast<const char*>(part.data) + begin, bytes, MPI_BYTE, part.peer,
                            kDataTag, comm_, &pending.request),
                  "MPI_Isend");
      });
    }
    finish_pending();
  }

  template <class Post>
  void in_messages(std::size_t bytes, const Post& post) const {
    for (std::size_t begin = 0; begin < bytes; begin += message_bytes_) {
      post(begin, static_cast<int>(std::min(message_bytes_, bytes - begin)));
    }
  }

  /// Whether a request has ended; MPI_Test also moves all others on.
  bool has_ended(Pending& pending) const {
    int done = 0;
    check_mpi(MPI_Test(&pending.request, &done, MPI_STATUS_IGNORE),
              pending.receives ? "receiving" : "sending");
    return done != 0;
  }

  void finish_pending() {
    std::size_t ended = 0;
    const auto all_ended = [&] {
      while (ended < pending_.size() && has_ended(pending_[ended])) ++ended;
      return ended == pending_.size();
    };
    if (!poll(all_ended)) {
      std::vector<int> peers;
      for (Pending& pending : pending_) {
        if (!has_ended(pending)) peers.push_back(pending.peer);
      }
      std::sort(peers.begin(), peers.end());
      peers.erase(std::unique(peers.begin(), peers.end()), peers.end());
      fail_for(peers, "did not finish" + in_time());
    }
    pending_.clear();
  }

  /// Calls `done` until it is true; false when the deadline has passed.
  template <class Done>
  bool poll(const Done& done) {
    Pause pause;
    while (!done()) {
      heed_notices();
      if (Clock::now() >= until_) return false;
      pause();
    }
    return true;
  }

  void heed_notices() {
    std::optional<Notice> notice = next_notice();
    if (notice) throw Notice(*std::move(notice));
  }

  std::optional<Notice> next_notice() const {
    int here = 0;
    MPI_Status status;
    check_mpi(MPI_Iprobe(MPI_ANY_SOURCE, kNoticeTag, comm_, &here, &status), "MPI_Iprobe");
    if (!here) return std::nullopt;
    int count = 0;
    check_mpi(MPI_Get_count(&status, MPI_BYTE, &count), "MPI_Get_count");
    std::vector<std::byte> bytes(static_cast<std::size_t>(count));
    check_mpi(MPI_Recv(bytes.data(), count, MPI_BYTE, status.MPI_SOURCE, kNoticeTag, comm_,
                       MPI_STATUS_IGNORE),
              "MPI_Recv");
    return detail::unpacked(bytes);
  }

  std::string in_time() const { return " within " + std::to_string(deadline().count()) + " ms"; }

  [[noreturn]] void fail_for(const std::vector<int>& peers, const std::string& what) const {
    throw blaming(peers, to_string_of_ranks(peers) + " of " + std::to_string(size_) + " " + what);
  }

  /// given_up() says the rest.
  static CommError blaming(std::vector<int> ranks, const std::string& reason) {
    CommError::Where where;
    where.ranks = std::move(ranks);
    return {reason, std::move(where)};
  }

  /// Gives the caller its buffers back as far as MPI lets go of them.
  void cancel_receives() {
    std::erase_if(pending_, [](const Pending& pending) { return !pending.receives; });
    for (Pending& pending : pending_) {
      if (pending.request != MPI_REQUEST_NULL) MPI_Cancel(&pending.request);
    }
    const auto until = Clock::now() + kCancelTime;
    for (Pending& pending : pending_) {
      int done = 0;
      while (MPI_Test(&pending.request, &done, MPI_STATUS_IGNORE) == MPI_SUCCESS && !done &&
             Clock::now() < until) {
        std::this_thread::yield();
      }
    }
    pending_.clear();
  }

  CommError given_up(const CommError& failure) {
    cancel_receives();
    const std::vector<int>& ranks = failure.where().ranks;
    tell_all(failure.what(), ranks.empty() ? std::vector<int>{rank_} : ranks);
    return error(current(), failure.what(), ranks);
  }

  /// The other ranks hear that this one has given up, and why.
  void tell_all(const std::string& reason, std::vector<int> ranks) {
    memory_->notice =
        detail::packed({"rank " + std::to_string(rank_) + " gave up: " + reason, std::move(ranks),
                        current().name.op, current().name.bucket, current().number});
    for (int peer = 0; peer < size_; ++peer) {
      if (peer == rank_) continue;
      MPI_Request request = MPI_REQUEST_NULL;
      MPI_Isend(memory_->notice.data(), static_cast<int>(memory_->notice.size()), MPI_BYTE, peer,
                kNoticeTag, comm_, &request);
    }
  }

  /// Waits for the others to leave too, so that no notice is on its way to a communicator that is
  /// freed; unless an exception passes, when the others may wait for this rank.
  void leave() noexcept {
    try {
      if (std::uncaught_exceptions() > exceptions_) {
        constexpr const char* kReason = "it left the group while an exception passed";
        tell_all(kReason, {rank_});
        set_failure(error(current(), kReason));
        return;
      }
      const CollectiveScope scope(*this, {detail::name_of(Collective::leave)});
      run(Collective::leave, {}, {});
    } catch (const CommError& failure) {
      set_failure(failure);
    } catch (const std::exception&) {  // run() has said it
    }
  }

  Header& out(int peer) { return memory_->out[static_cast<std::size_t>(peer)]; }
  Header& in(int peer) { return memory_->in[static_cast<std::size_t>(peer)]; }

  MPI_Comm comm_;
  bool owns_mpi_;
  std::size_t message_bytes_;
  int rank_ = 0;
  int size_ = 1;
  int exceptions_ = std::uncaught_exceptions();
  Clock::time_point until_;  ///< the deadline of the collective in progress
  std::unique_ptr<Memory> memory_ = std::make_unique<Memory>();
  std::vector<Pending> pending_;
  std::vector<int> absent_;
  std::vector<SendPart> gather_sends_;
  std::vector<RecvPart> gather_recvs_;
};

void check_arguments(const char* what, const Context& ctx, const MpiOptions& options) {
  require(ctx.device().type == DeviceType::cpu, what, ": the context is on ",
          to_string(ctx.device()), "; MPI moves host memory only, create_nccl is for CUDA devices");
  require(options.deadline.count() > 0, what, ": deadline is ", options.deadline.count(),
          " ms; it must be positive");
  require(options.message_bytes >= 1 && options.message_bytes <= std::size_t{1} << 30, what,
          ": message_bytes is ", options.message_bytes, "; allowed are 1 to 2^30");
  int finalized = 0;
  MPI_Finalized(&finalized);
  require(!finalized, what, ": MPI has been finalised in this process and cannot begin again");
}

/// Duplicates a communicator. Polling, because a rank that does not call would block all others.
MPI_Comm duplicate(MPI_Comm comm, const char* what, const MpiOptions& options) {
  // Where MPI puts the result; it must stay if the result comes too late.
  auto copy = std::make_unique<MPI_Comm>(MPI_COMM_NULL);
  MPI_Request request = MPI_REQUEST_NULL;
  check_mpi(MPI_Comm_idup(comm, copy.get(), &request), "MPI_Comm_idup");
  const auto until = Clock::now() + options.deadline;
  Pause pause;
  for (int done = 0; !done; pause()) {
    check_mpi(MPI_Test(&request, &done, MPI_STATUS_IGNORE), "MPI_Comm_idup");
    if (done || Clock::now() < until) continue;
    static_cast<void>(copy.release());
    int rank = 0, size = 0;
    MPI_Comm_rank(comm, &rank);
    MPI_Comm_size(comm, &size);
    std::ostringstream text;
    text << what << " on rank " << rank << ": not all of the " << size << " ranks called it within "
         << options.deadline.count() << " ms";
    CommError::Where where;
    where.rank = rank;
    throw CommError(text.str(), std::move(where));
  }
  check_mpi(MPI_Comm_set_errhandler(*copy, MPI_ERRORS_RETURN), "MPI_Comm_set_errhandler");
  return *copy;
}

}  // namespace

bool has_mpi() { return true; }

std::unique_ptr<Communicator> create_mpi(const Context& ctx, const MpiOptions& options) {
  check_arguments("create_mpi", ctx, options);
  int initialized = 0;
  MPI_Initialized(&initialized);
  if (!initialized) {
    int provided = 0;
    check_mpi(MPI_Init_thread(nullptr, nullptr, MPI_THREAD_MULTIPLE, &provided), "MPI_Init_thread");
  }
  const MPI_Comm comm = duplicate(MPI_COMM_WORLD, "create_mpi", options);
  return std::make_unique<MpiRank>(comm, !initialized, ctx, options);
}

namespace detail {

std::unique_ptr<Communicator> adopt_mpi(const void* handle, std::size_t handle_bytes,
                                        const Context& ctx, const MpiOptions& options) {
  require(handle_bytes == sizeof(MPI_Comm), "adopt_mpi: the communicator is a handle of ",
          handle_bytes, " bytes; an MPI_Comm of the MPI that octet was built with has ",
          sizeof(MPI_Comm));
  MPI_Comm comm;
  std::memcpy(&comm, handle, sizeof(comm));
  check_arguments("adopt_mpi", ctx, options);
  int initialized = 0;
  MPI_Initialized(&initialized);
  require(initialized != 0,
          "adopt_mpi: MPI is not initialised; call MPI_Init first, or create_mpi");
  require(comm != MPI_COMM_NULL && comm != MPI_Comm{}, "adopt_mpi: the communicator is null");
  int is_inter = 0;
  check_mpi(MPI_Comm_test_inter(comm, &is_inter), "MPI_Comm_test_inter");
  require(!is_inter, "adopt_mpi: the communicator joins two groups (an inter-communicator)");
  return std::make_unique<MpiRank>(duplicate(comm, "adopt_mpi", options), false, ctx, options);
}

}  // namespace detail
}  // namespace octet
