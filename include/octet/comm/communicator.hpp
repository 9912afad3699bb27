// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

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

/// The ranks of a data-parallel group, each bound to one Context. Collectives are enqueued on that
/// context's stream, in the same order on every rank; the memory is the context's device memory.
/// FP8 travels as bytes. Errors: CommError when the transport fails; ranks in threads and under MPI
/// also notice a rank that is missing or late and parts that do not match.
class Communicator {
 public:
  explicit Communicator(const Context& ctx) : ctx_(ctx) {}
  virtual ~Communicator() = default;
  Communicator(const Communicator&) = delete;
  Communicator& operator=(const Communicator&) = delete;

  virtual int rank() const = 0;
  virtual int size() const = 0;
  /// What carries the bytes: "single", "threads", "mpi", "nccl".
  virtual std::string name() const = 0;
  const Context& context() const { return ctx_; }

  /// Sends and receives in one group. Between two ranks the k-th send meets the k-th receive and
  /// both have the same length. Parts to or from this rank itself are not allowed.
  void exchange(std::span<const SendPart> sends, std::span<const RecvPart> recvs,
                Traffic traffic = Traffic::payload);
  /// Every rank contributes `bytes` bytes; `recv` holds size() blocks in rank order. Metadata.
  void all_gather(const void* send, void* recv, std::size_t bytes);

  WireBytes wire_bytes() const { return wire_; }

 protected:
  virtual void do_exchange(std::span<const SendPart> sends, std::span<const RecvPart> recvs) = 0;
  virtual void do_all_gather(const void* send, void* recv, std::size_t bytes) = 0;

 private:
  Context ctx_;
  WireBytes wire_;
};

/// One rank.
std::unique_ptr<Communicator> make_single(const Context& ctx);

/// Ranks that are threads of this process: for CPUs, for tests and sanitizers, and for several
/// ranks on one CUDA device. Host threads meet inside each collective; device work is ordered by
/// events, without synchronisation of the host with the device.
class ThreadGroup {
 public:
  /// `deadline` is how long a rank waits for the others before CommError is thrown.
  explicit ThreadGroup(int size, std::chrono::milliseconds deadline = std::chrono::minutes(5));
  ~ThreadGroup();
  /// The communicator of one rank, called once per rank, from its thread. It may outlive the group.
  std::unique_ptr<Communicator> join(int rank, const Context& ctx);
  /// Makes every collective, waiting or to come, throw CommError with this reason.
  void abort(const std::string& reason);

  struct State;

 private:
  std::shared_ptr<State> state_;
};

/// Gathers a text from every rank, in rank order. Waits for the stream: for set-up only.
std::vector<std::string> all_gather_text_sync(Communicator& comm, const std::string& text);

}  // namespace octet
