// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "octet/comm/window.hpp"
#include "octet/runtime/context.hpp"

namespace octet {

struct SendPart {
  const void* data = nullptr;
  std::size_t bytes = 0;
  int peer = 0;
};

struct RecvPart {
  void* data = nullptr;
  std::size_t bytes = 0;
  int peer = 0;
};

/// What the bytes are counted as: tensor contents, or what describes them (scales, norms, lists).
enum class Traffic : std::uint8_t { payload, metadata };

/// Bytes this rank sent to other ranks.
struct WireBytes {
  std::uint64_t payload = 0;
  std::uint64_t metadata = 0;
};

/// A window, or none and the reason.
struct WindowOffer {
  std::unique_ptr<Window> window = {};
  std::string refusal = {};
};

/// What a collective is called in errors.
struct CollectiveName {
  const char* op = "collective";  ///< a string literal
  int bucket = -1;                ///< of gradients; -1: belongs to none
};

/// How long a collective may take once this rank has come to it, unless a communicator is told
/// otherwise.
inline constexpr std::chrono::milliseconds kCommDeadline = std::chrono::minutes(5);

/// The ranks of a data-parallel group, each bound to one Context. Collectives are enqueued on that
/// context's stream, in the same order on every rank; the memory is the context's device memory.
/// FP8 travels as bytes.
///
/// Errors: a rank that is dead, later than the deadline or asks for something else makes the
/// collective throw CommError on the others. Where the host runs ahead of the device (NCCL) the
/// error is thrown by the next call, or by synchronize(). A communicator that failed stays failed:
/// it throws the same error again, its destructor does not wait for anybody, and a new one can be
/// made.
class Communicator {
 public:
  explicit Communicator(const Context& ctx, std::chrono::milliseconds deadline = kCommDeadline);
  virtual ~Communicator() = default;
  Communicator(const Communicator&) = delete;
  Communicator& operator=(const Communicator&) = delete;

  virtual int rank() const = 0;
  virtual int size() const = 0;
  /// What carries the bytes: "single", "threads", "mpi", "nccl".
  virtual std::string name() const = 0;
  const Context& context() const { return ctx_; }
  std::chrono::milliseconds deadline() const { return deadline_; }

  /// Sends and receives in one group. Between two ranks the k-th send meets the k-th receive and
  /// both have the same length. Parts to or from this rank itself are not allowed.
  void exchange(std::span<const SendPart> sends, std::span<const RecvPart> recvs,
                Traffic traffic = Traffic::payload);
  /// Every rank contributes `bytes` bytes; `recv` holds size() blocks in rank order. Metadata.
  void all_gather(const void* send, void* recv, std::size_t bytes);
  /// Gives every rank the `bytes` bytes at `data` of rank `root`. Counted on the root, once for
  /// each of the others.
  void broadcast(void* data, std::size_t bytes, int root, Traffic traffic = Traffic::payload);

  /// Whether the transport adds E4M3 codes itself ("nccl"). SumReducer does it where none does.
  virtual bool has_sum_e4m3() const { return false; }
  /// Why this rank could not, though the transport does; else empty.
  virtual std::string sum_e4m3_refusal() const { return {}; }
  /// Every rank's `count` codes become their sum over the ranks, rounded and saturated as the
  /// transport does it. Only where has_sum_e4m3(). Payload, counted as sum_e4m3_bytes().
  void sum_e4m3(void* codes, std::int64_t count);

  /// Throws the CommError of a collective that failed, if one did. Waits for nothing.
  void check();
  /// Waits for the context's stream; throws CommError if a collective failed, at the latest one
  /// deadline after this rank came to it. Not while the stream is captured.
  void synchronize();
  /// Whether a collective failed: the ranks have been given up, check() throws.
  bool aborted() const { return failed_.load(std::memory_order_acquire); }

  /// Memory of `bytes` bytes on every rank that the kernels of all ranks can reach. All ranks call
  /// it with the same number; all get a window, or all the same refusal, which names a rank and
  /// why: no path between the devices, a library that is too old. Waits for the stream: for set-up.
  /// The memory is counted as the context's. A kernel on it that waits for a rank longer than the
  /// deadline gives up, and check() says so. All ranks let go of a window together, and before the
  /// communicator.
  WindowOffer make_window(std::size_t bytes);

  WireBytes wire_bytes() const { return wire_; }
  /// Counts bytes that a kernel moved through a window instead of exchange().
  void count_sent(Traffic traffic, std::uint64_t bytes);
  /// Of the collective in progress, for a kernel that is one.
  PeerTag tag() const { return {current_.name.op, current_.name.bucket, current_.number}; }

 protected:
  /// The collective in progress; number 0 outside of one.
  struct Watched {
    CollectiveName name;
    std::uint64_t number = 0;
  };
  const Watched& current() const { return current_; }
  /// The error of a collective, with text and fields.
  CommError error(const Watched& collective, const std::string& reason,
                  std::vector<int> ranks = {}) const;
  /// Makes check() throw this error; the first one stays. From any thread.
  void set_failure(const CommError& error);
  /// Of a kernel over a window that gave up, if one did. From any thread.
  std::optional<CommError> window_failure();

  virtual void do_exchange(std::span<const SendPart> sends, std::span<const RecvPart> recvs) = 0;
  virtual void do_all_gather(const void* send, void* recv, std::size_t bytes) = 0;
  /// Why this rank can have no window; empty if it can.
  virtual std::string window_refusal();
  virtual std::unique_ptr<Window> do_make_window(std::size_t bytes);
  /// By default sends of the root to every other rank.
  virtual void do_broadcast(void* data, std::size_t bytes, int root);
  virtual void do_sum_e4m3(void* codes, std::int64_t count);
  /// Around every collective: an outermost CollectiveScope. current() is set.
  virtual void do_begin() {}
  virtual void do_end() noexcept {}
  /// Throws what the transport knows beyond set_failure().
  virtual void do_check() {}
  virtual void do_synchronize() { ctx_.synchronize(); }

 private:
  friend class CollectiveScope;
  void open(const CollectiveName& name);
  void close() noexcept;
  template <class Call>
  void keep_failure(Call call);

  Context ctx_;
  std::chrono::milliseconds deadline_;
  WireBytes wire_;
  Watched current_;
  std::uint64_t collectives_ = 0;
  int open_scopes_ = 0;
  std::atomic<bool> failed_{false};
  std::mutex failure_mutex_;
  std::optional<CommError> failure_;
  std::vector<std::shared_ptr<PeerWords>> windows_;  ///< also of windows that are gone
};

/// What a rank sends of `count` codes in a ring: 2 (ranks - 1) / ranks of them, rounded down.
constexpr std::uint64_t sum_e4m3_bytes(std::int64_t count, int ranks) {
  return 2 * static_cast<std::uint64_t>(count) * static_cast<std::uint64_t>(ranks - 1) /
         static_cast<std::uint64_t>(ranks);
}

/// What is called inside counts as one collective, watched and numbered as one, with this name.
/// Scopes nest; the outermost gives the name. A call outside of any scope is a collective itself.
class CollectiveScope {
 public:
  /// Throws CommError if an earlier collective failed.
  CollectiveScope(Communicator& comm, const CollectiveName& name) : comm_(comm) {
    comm_.open(name);
  }
  ~CollectiveScope() { comm_.close(); }
  CollectiveScope(const CollectiveScope&) = delete;
  CollectiveScope& operator=(const CollectiveScope&) = delete;

 private:
  Communicator& comm_;
};

/// "two_shot of bucket 3".
std::string to_string(const CollectiveName& name);
/// "rank 2", "ranks 0, 2".
std::string to_string_of_ranks(std::span<const int> ranks);

/// One rank.
std::unique_ptr<Communicator> make_single(const Context& ctx);

/// Ranks that are threads of this process: for CPUs, for tests and sanitizers, and for several
/// ranks on one CUDA device. Host threads meet inside each collective; device work is ordered by
/// events, without synchronisation of the host with the device. Over several CUDA devices, give the
/// ranks streams of cudaStreamCreate and not cudaStreamPerThread: with more than 32 streams on a
/// device, and threads that used theirs and ended, driver 580.159.04 dies in copies between
/// devices.
class ThreadGroup {
 public:
  /// `deadline` is how long a rank waits for the others before CommError is thrown.
  explicit ThreadGroup(int size, std::chrono::milliseconds deadline = kCommDeadline);
  ~ThreadGroup();
  /// The communicator of one rank, called once per rank, from its thread. It may outlive the group.
  std::unique_ptr<Communicator> join(int rank, const Context& ctx);
  /// Makes every collective, waiting or to come, throw CommError with this reason.
  void abort(const std::string& reason);

  struct State;

 private:
  std::shared_ptr<State> state_;
};

/// One rank could not do its part of a set-up, so none goes on: "rank 1: out of memory ...", the
/// same on every rank.
class SetUpError : public Error {
 public:
  using Error::Error;
};

/// Gathers a text from every rank, in rank order. Waits for the stream: for set-up only. Throws
/// SetUpError on all ranks when one of them has failed in set_up_together_sync().
std::vector<std::string> all_gather_text_sync(Communicator& comm, const std::string& text);

/// Does `work` on every rank or throws SetUpError on every rank. Where it throws on one, the others
/// learn of it at the end of theirs or in the next all_gather_text_sync() of it; other collectives
/// of `work` must not come behind what can fail on one rank alone.
void set_up_together_sync(Communicator& comm, const std::function<void()>& work);

}  // namespace octet
