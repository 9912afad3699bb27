// SPDX-License-Identifier: Apache-2.0
#include "cuda/comm/nccl_rank.hpp"

#include <algorithm>
#include <exception>
#include <thread>

#include "cuda/check.hpp"
#include "cuda/comm/nccl_window.hpp"
#include "cuda/runtime/runtime.hpp"

namespace octet::detail::cuda {
namespace {

using Clock = NcclLink::Clock;
using std::chrono::milliseconds;

// For kernels to leave the stream after an abort.
constexpr auto kLeavePatience = milliseconds(10'000);
// For the other ranks to come to the end of a communicator that worked. Aborting it then does no
// harm, because nothing is under way.
constexpr auto kClosePatience = milliseconds(30'000);

// ncclFloat8e4m3, which the headers of older versions lack.
constexpr int kFirstFp8Version = 22400;
constexpr auto kE4m3 = static_cast<ncclDataType_t>(10);
#if NCCL_VERSION_CODE >= 22400
static_assert(kE4m3 == ncclFloat8e4m3);
#endif

// Waiting that is short as a rule: first for as long as a thread start takes, then without load.
void pause(int turn) {
  if (turn < 2000) {
    std::this_thread::yield();
  } else {
    std::this_thread::sleep_for(std::chrono::microseconds(50));
  }
}

std::string in_ms(milliseconds time) { return std::to_string(time.count()) + " ms"; }

}  // namespace

NcclRank::NcclRank(std::unique_ptr<NcclLink> link, bool owned, int rank, int size,
                   const Context& ctx, milliseconds deadline)
    : Communicator(ctx, deadline),
      rank_(rank),
      size_(size),
      owned_(owned),
      exceptions_(std::uncaught_exceptions()),
      marks_(ctx),
      link_(std::move(link)),
      device_clock_(deadline),
      watchdog_(std::make_unique<Watchdog>([this] { return look(); })) {}

NcclRank::~NcclRank() {
  // The watchdog still looks: what hangs comes to an end.
  const bool idle = drain();
  watchdog_.reset();
  if (!idle) marks_.leak();
  // A rank that leaves by an exception cannot expect the others to come.
  if (owned_ && (!idle || std::uncaught_exceptions() > exceptions_)) link_->abort();
  link_->close(std::min(deadline(), kClosePatience));
}

// Whether the stream has come to its end. After a failure it has less time for that.
bool NcclRank::drain() noexcept {
  cudaSetDevice(context().device().index);
  auto until = Clock::now() + deadline() + kLeavePatience;
  bool failed = false;
  cudaError_t status = cudaStreamQuery(context().stream());
  for (int turn = 0; status == cudaErrorNotReady && Clock::now() < until; ++turn) {
    if (!failed && aborted()) {
      failed = true;
      until = Clock::now() + kLeavePatience;
    }
    pause(turn);
    status = cudaStreamQuery(context().stream());
  }
  cudaGetLastError();
  return status == cudaSuccess;
}

void NcclRank::begin_mark() {
  if (size_ == 1 || marked_) return;
  launch_begin_mark(context(), marks_.device(), marks_.tag_of(current().name));
  marked_ = true;
}

void NcclRank::do_end() noexcept {
  if (!std::exchange(marked_, false)) return;
  try {
    launch_end_mark(context(), marks_.device());
  } catch (const std::exception&) {
    // The device has failed for good: the next call says why.
  }
}

void NcclRank::set_host_call(bool active) {
  const std::lock_guard lock(host_mutex_);
  host_call_ = {active, current(), Clock::now()};
}

// Until NCCL has done it or the watchdog has given up.
template <class Call>
void NcclRank::finish(Call call) {
  set_host_call(true);
  ncclResult_t status = call();
  // In progress: NCCL connects to peers and launches on a thread of its own.
  for (int turn = 0; status == ncclInProgress && !aborted(); ++turn) {
    pause(turn);
    status = link_->status();
  }
  set_host_call(false);
  check();
  if (status == ncclSuccess) return;
  give_up_after(status, current());
  check();
}

template <class Calls>
void NcclRank::enqueue(Calls calls) {
  set_device(context());
  begin_mark();
  finish([&] { return link_->group(calls); });
}

void NcclRank::call(const char* op, const std::function<ncclResult_t(ncclComm_t)>& call) {
  const CollectiveScope scope(*this, {op});
  set_device(context());
  finish([&] { return link_->call(call); });
}

void NcclRank::do_exchange(std::span<const SendPart> sends, std::span<const RecvPart> recvs) {
  cudaStream_t stream = context().stream();
  enqueue([&](ncclComm_t comm) {
    ncclResult_t status = ncclSuccess;
    const auto failed = [&] { return status != ncclSuccess && status != ncclInProgress; };
    for (const SendPart& part : sends) {
      if (part.bytes == 0) continue;
      status = ncclSend(part.data, part.bytes, ncclUint8, part.peer, comm, stream);
      if (failed()) return status;
    }
    for (const RecvPart& part : recvs) {
      if (part.bytes == 0) continue;
      status = ncclRecv(part.data, part.bytes, ncclUint8, part.peer, comm, stream);
      if (failed()) return status;
    }
    return ncclSuccess;
  });
}

void NcclRank::do_all_gather(const void* send, void* recv, std::size_t bytes) {
  enqueue([&](ncclComm_t comm) {
    if (bytes == 0) return ncclSuccess;
    return ncclAllGather(send, recv, bytes, ncclUint8, comm, context().stream());
  });
}

void NcclRank::do_broadcast(void* data, std::size_t bytes, int root) {
  enqueue([&](ncclComm_t comm) {
    if (bytes == 0) return ncclSuccess;
    return ncclBroadcast(data, data, bytes, ncclUint8, root, comm, context().stream());
  });
}

std::string NcclRank::window_refusal() { return nccl_window_refusal(*this); }

std::unique_ptr<Window> NcclRank::do_make_window(std::size_t bytes) {
  return make_nccl_window(*this, bytes);
}

std::string NcclRank::sum_e4m3_refusal() const {
  const int index = context().device().index;
  const int capability = compute_capability(index);
  if (capability < 90) {
    return "NCCL does it from compute capability 9.0 on; " + to_string(context().device()) +
           " has " + std::to_string(capability / 10) + "." + std::to_string(capability % 10);
  }
  int version = 0;
  ncclGetVersion(&version);
  if (version < kFirstFp8Version) {
    return "NCCL does it from version 2.24 on; loaded is " + std::to_string(version);
  }
  return {};
}

// Never ncclAvg: it rounds 1/N to FP8.
void NcclRank::do_sum_e4m3(void* codes, std::int64_t count) {
  enqueue([&](ncclComm_t comm) {
    if (count == 0) return ncclSuccess;
    return ncclAllReduce(codes, codes, static_cast<std::size_t>(count), kE4m3, ncclSum, comm,
                         context().stream());
  });
}

void NcclRank::do_synchronize() {
  set_device(context());
  cudaError_t status = cudaStreamQuery(context().stream());
  Clock::time_point failed_at{};
  for (int turn = 0; status == cudaErrorNotReady; ++turn) {
    if (aborted()) {
      if (failed_at == Clock::time_point{}) failed_at = Clock::now();
      if (Clock::now() - failed_at > kLeavePatience) check();
    }
    pause(turn);
    status = cudaStreamQuery(context().stream());
  }
  OCTET_CUDA_CHECK(status);
  // A kernel of NCCL's also leaves when the network fails, perhaps before the watchdog has seen it.
  const ncclResult_t result = link_->status();
  if (result == ncclSuccess || result == ncclInProgress || aborted()) return;
  const Marks::Reading reading = marks_.read();
  give_up_after(result, {reading.name, reading.begun});
}

// The functions that give up are also called by the watchdog.
void NcclRank::give_up(const Watched& collective, const std::string& reason,
                       std::vector<int> ranks) {
  set_failure(error(collective, reason, std::move(ranks)));
  link_->abort();
}

void NcclRank::give_up_on_others(const Watched& collective, const std::string& reason) {
  std::vector<int> ranks;
  if (size_ == 2) ranks = {1 - rank_};
  const std::string who = ranks.empty() ? "one of the other ranks" : to_string_of_ranks(ranks);
  give_up(collective, reason + "; " + who + " is dead, late or asks for something else", ranks);
}

void NcclRank::give_up_after(ncclResult_t status, const Watched& collective) {
  const bool own_fault = status == ncclInvalidArgument || status == ncclInvalidUsage ||
                         status == ncclUnhandledCudaError;
  if (own_fault) return give_up(collective, link_->failure_text(), {});
  give_up_on_others(collective, link_->failure_text());
}

// True while there is something to look for.
bool NcclRank::look() {
  // What a kernel over a window has given up: NCCL's kernels behind it on the stream would wait for
  // the same rank. Whoever sees it first keeps the error, here all are made to leave.
  if (const auto failure = window_failure()) set_failure(*failure);
  if (aborted()) {
    link_->abort();
    return false;
  }
  const auto now = Clock::now();
  if (look_at_host(now)) return false;
  const Marks::Reading reading = marks_.read();
  const Watched last{reading.name, reading.begun};
  if (device_clock_.stalled(reading.begun, reading.ended, now)) {
    give_up_on_others(last, std::string(reading.captured ? "in a captured graph: " : "") +
                                "no end within " + in_ms(deadline()) + " on the device");
    return false;
  }
  // The communicator of somebody else is aborted only for a collective of ours.
  if (!owned_ && reading.begun == reading.ended) return true;
  const ncclResult_t status = link_->status_if_free();
  if (status == ncclSuccess || status == ncclInProgress) return true;
  give_up_after(status, last);
  return false;
}

bool NcclRank::look_at_host(Clock::time_point now) {
  HostCall call;
  {
    const std::lock_guard lock(host_mutex_);
    call = host_call_;
  }
  if (!call.active || now - call.since < deadline()) return false;
  give_up_on_others(call.collective, "NCCL has not connected within " + in_ms(deadline()));
  return true;
}

}  // namespace octet::detail::cuda
