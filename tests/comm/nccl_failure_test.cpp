// SPDX-License-Identifier: Apache-2.0
// NCCL ranks that are missing, late or killed: what the survivor is told, and that its process goes
// on. Ranks are processes. They share one GPU, over sockets, and where there are two GPUs every
// case also runs over what joins these.
#include <cuda_runtime_api.h>
#include <nccl.h>

#include <cstring>
#include <filesystem>
#include <functional>
#include <optional>

#include "octet/comm/collectives.hpp"
#include "octet/comm/nccl.hpp"
#include "support/catch.hpp"
#include "support/devices.hpp"
#include "support/errors.hpp"
#include "support/processes.hpp"

namespace octet::test {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

constexpr const char* kChildTest = "one of the ranks";
constexpr const char* kRankVariable = "OCTET_FAILURE_RANK";
constexpr const char* kFolderVariable = "OCTET_FAILURE_FOLDER";
constexpr const char* kScenarioVariable = "OCTET_FAILURE_SCENARIO";
constexpr const char* kDeviceVariable = "OCTET_FAILURE_DEVICE";
constexpr const char* kRoundVariable = "OCTET_FAILURE_ROUND";
constexpr auto kDeadline = milliseconds(5000);
// From the deadline to the error: NCCL's kernels leave, on a machine that does other things too.
constexpr auto kSlack = seconds(5);
constexpr auto kPatience = seconds(60);
constexpr std::size_t kBytes = 1 << 20;
constexpr CollectiveName kName{"two_shot", 7};
// Of "killed": each but the last ends with the death of rank 1.
constexpr int kRounds = 4;

void cuda(cudaError_t status) { require(status == cudaSuccess, cudaGetErrorString(status)); }

// A stream of its own for as long as anything that works on it.
class Stream {
 public:
  explicit Stream(int device) {
    cuda(cudaSetDevice(device));
    cuda(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
  }
  ~Stream() { cudaStreamDestroy(stream_); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  cudaStream_t get() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
};

int count_entries(const char* folder) {
  int count = 0;
  for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator(folder)) ++count;
  return count;
}

int thread_count() { return count_entries("/proc/self/task"); }

std::int64_t used_device_bytes() {
  std::size_t free = 0, total = 0;
  cuda(cudaMemGetInfo(&free, &total));
  return static_cast<std::int64_t>(total - free);
}

// NCCL frees a communicator on a thread of its own.
bool soon(const std::function<bool()>& condition, seconds patience = seconds(20)) {
  const auto until = ProcessClock::now() + patience;
  while (!condition()) {
    if (ProcessClock::now() > until) return false;
    std::this_thread::sleep_for(milliseconds(20));
  }
  return true;
}

/// One rank of two.
struct Rank {
  int rank = std::atoi(std::getenv(kRankVariable));
  int device = std::atoi(std::getenv(kDeviceVariable));
  int round = std::atoi(std::getenv(kRoundVariable));
  std::string folder = std::getenv(kFolderVariable);
  Stream stream{device};
  Context ctx = Context::cuda(device, stream.get());
  Buffer out{ctx, kBytes}, in{ctx, kBytes};

  std::string file(const std::string& name, int number) const {
    return folder + "/" + name + std::to_string(number);
  }
  // Rank 0 makes the id when rank 1 is there with its CUDA started, so that this takes no time.
  NcclId meet(int number) {
    if (rank == 1) {
      publish(file("here", number));
      return await(file("id", number), kPatience);
    }
    publish(file("want", number));
    await(file("here", number), kPatience);
    const NcclId id = make_nccl_id();
    publish(file("id", number), id);
    return id;
  }
  std::unique_ptr<Communicator> create(int number) {
    return create_nccl(meet(number), rank, 2, ctx, kDeadline);
  }
  // One collective with the other rank, enqueued.
  void swap(Communicator& comm, const CollectiveName& name = kName) {
    const SendPart send{out.data(), kBytes, 1 - rank};
    const RecvPart recv{in.data(), kBytes, 1 - rank};
    const CollectiveScope scope(comm, name);
    comm.exchange(std::span(&send, 1), std::span(&recv, 1));
  }
  // A few of them, and the bytes.
  std::string good_swaps(Communicator& comm) {
    for (std::uint8_t turn = 0; turn < 3; ++turn) {
      const auto value = static_cast<std::uint8_t>(10 * turn + rank);
      write(ctx, out.data(), std::vector<std::uint8_t>(kBytes, value));
      swap(comm);
      comm.synchronize();
      const auto expected = static_cast<std::uint8_t>(10 * turn + 1 - rank);
      const auto got = download<std::uint8_t>(ctx, in.data(), kBytes);
      if (got != std::vector<std::uint8_t>(kBytes, expected)) return "wrong bytes";
    }
    return {};
  }
};

// Of the failure that call() runs into: told in time, with all that is known, again and again.
void check_failure(Communicator& comm, const std::function<void()>& call) {
  const auto start = ProcessClock::now();
  std::optional<CommError> error;
  try {
    call();
  } catch (const CommError& thrown) {
    error = thrown;
  }
  const auto took = ProcessClock::now() - start;
  REQUIRE(error.has_value());
  WARN(error->what() << "; after " << std::chrono::duration_cast<milliseconds>(took).count()
                     << " ms");
  CHECK(took < kDeadline + kSlack);
  CHECK(error->where().rank == comm.rank());
  CHECK(error->where().ranks == std::vector<int>{1 - comm.rank()});
  CHECK(error->where().op == kName.op);
  CHECK(error->where().bucket == kName.bucket);
  CHECK(error->where().collective > 0);
  CHECK(comm.aborted());
  CHECK(error_of([&] { comm.check(); }) == error->what());
  CHECK(error_of([&] { comm.exchange({}, {}); }) == error->what());
  CHECK(error_of([&] { comm.synchronize(); }) == error->what());
}

void check_end(std::unique_ptr<Communicator>& comm) {
  const auto start = ProcessClock::now();
  comm.reset();
  CHECK(ProcessClock::now() - start < seconds(15));
}

// Rank 1 does not come; `connected`: after collectives that went well.
void absent(Rank& r, bool connected, bool adopted) {
  ncclComm_t mine = nullptr;
  std::unique_ptr<Communicator> comm;
  if (adopted) {
    const NcclId id = r.meet(0);
    ncclUniqueId unique;
    std::memcpy(&unique, id.data(), sizeof(unique));
    REQUIRE(ncclCommInitRank(&mine, 2, unique, r.rank) == ncclSuccess);
    comm = adopt_nccl(mine, r.ctx, kDeadline);
  } else {
    comm = r.create(0);
  }
  if (connected) CHECK(r.good_swaps(*comm) == "");
  if (r.rank == 0) {
    check_failure(*comm, [&] {
      r.swap(*comm);
      comm->synchronize();
    });
    publish(r.file("failed", 0));
  } else {
    await(r.file("failed", 0), kPatience);
  }
  const bool mine_is_gone = comm->aborted();
  CHECK(mine_is_gone == (r.rank == 0));
  check_end(comm);
  if (mine != nullptr && !mine_is_gone) ncclCommAbort(mine);
  comm = r.create(1);
  CHECK(r.good_swaps(*comm) == "");
}

void late(Rank& r) {
  const auto comm = r.create(0);
  for (int turn = 0; turn < 3; ++turn) {  // the first also connects
    if (r.rank == 1) std::this_thread::sleep_for(kDeadline / 3);
    CHECK(r.good_swaps(*comm) == "");
  }
  CHECK(!comm->aborted());
}

// Rank 1 gives up with an exception; its communicator must not wait for rank 0.
void throwing(Rank& r) {
  const auto start = ProcessClock::now();
  if (r.rank == 1) {
    try {
      const auto comm = r.create(0);
      CHECK(r.good_swaps(*comm) == "");
      fail("given up");
    } catch (const Error& error) {
      CHECK(error.what() == std::string("given up"));
    }
    CHECK(ProcessClock::now() - start < seconds(30));
    return;
  }
  auto comm = r.create(0);
  CHECK(r.good_swaps(*comm) == "");
  check_failure(*comm, [&] {
    r.swap(*comm);
    comm->synchronize();
  });
  check_end(comm);
}

void killed(Rank& r) {
  if (r.rank == 1) {
    const auto comm = r.create(r.round);
    CHECK(r.good_swaps(*comm) == "");
    if (r.round == kRounds - 1) return;
    for (int turn = 0; turn < 100; ++turn) r.swap(*comm);
    kill(getpid(), SIGKILL);
  }
  std::int64_t bytes = 0;
  int threads = 0;
  for (int round = 0; round < kRounds; ++round) {
    CAPTURE(round);
    auto comm = r.create(round);
    CHECK(r.good_swaps(*comm) == "");
    if (round == kRounds - 1) break;
    check_failure(*comm, [&] {
      for (;;) {
        r.swap(*comm);
        comm->synchronize();
      }
    });
    check_end(comm);
    // Also a communicator of one rank.
    CHECK(create_nccl(make_nccl_id(), 0, 1, r.ctx, kDeadline)->size() == 1);
    if (round == 0) {  // all that NCCL keeps for the process is there
      std::this_thread::sleep_for(seconds(3));
      bytes = used_device_bytes();
      threads = thread_count();
    }
    CHECK(soon([&] { return used_device_bytes() <= bytes + (8 << 20); }));
    CHECK(soon([&] { return thread_count() <= threads; }));
    WARN("round " << round << ": " << used_device_bytes() - bytes << " more bytes, "
                  << thread_count() << " threads of " << threads << ", "
                  << count_entries("/proc/self/fd") << " descriptors");
  }
}

// Rank 1 stops to launch a graph that both have captured.
void captured(Rank& r) {
  auto comm = r.create(0);
  CHECK(r.good_swaps(*comm) == "");
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t exec = nullptr;
  cuda(cudaStreamBeginCapture(r.stream.get(), cudaStreamCaptureModeGlobal));
  r.swap(*comm);
  cuda(cudaStreamEndCapture(r.stream.get(), &graph));
  cuda(cudaGraphInstantiate(&exec, graph, 0));
  for (int replay = 0; replay < 3; ++replay) cuda(cudaGraphLaunch(exec, r.stream.get()));
  comm->synchronize();
  if (r.rank == 0) {
    check_failure(*comm, [&] {
      cuda(cudaGraphLaunch(exec, r.stream.get()));
      comm->synchronize();
    });
    CHECK(missing(error_of([&] { comm->check(); }), {"captured graph", "collective 7"}) == "");
    publish(r.file("failed", 0));
  } else {
    await(r.file("failed", 0), kPatience);
  }
  cuda(cudaGraphExecDestroy(exec));
  cuda(cudaGraphDestroy(graph));
  check_end(comm);
  comm = r.create(1);
  CHECK(r.good_swaps(*comm) == "");
}

// Rank 1 does not come to a kernel over a window. The host hears of it, and what NCCL has to do
// behind it on the stream, for which rank 1 does not come either, keeps nobody from the end.
void absent_from_window(Rank& r) {
  auto comm = r.create(0);
  CHECK(r.good_swaps(*comm) == "");
  WindowOffer offer = comm->make_window(256 + kBytes);
  if (offer.window == nullptr) {
    WARN("skipped: " << offer.refusal);
    return;
  }
  std::unique_ptr<Window> window = std::move(offer.window);
  auto* const scale = static_cast<TensorScale*>(window->data());
  void* const codes = static_cast<char*>(window->data()) + 256;
  write(r.ctx, scale, std::vector<TensorScale>(1));
  zero_bytes(r.ctx, codes, kBytes);
  const Buffer flag = upload_sync<std::uint32_t>(r.ctx, std::vector<std::uint32_t>(1));
  constexpr std::int64_t kHalf = kBytes / 2;
  auto mean = std::make_unique<MeanReducer>(
      *comm, MeanReducer::Path::two_shot,
      std::vector<ReduceTensor>{{{codes, DType::e4m3, {2 * kHalf}, r.ctx.device()}, {}}}, scale,
      Owners{{{0, 0, kHalf}}, {{0, kHalf, kHalf}}}, kName.bucket, window.get());
  if (r.rank == 0) {
    check_failure(*comm, [&] {
      mean->run(flag.as<std::uint32_t>());
      r.swap(*comm);
      for (;;) comm->check();
    });
    publish(r.file("failed", 0));
  } else {
    await(r.file("failed", 0), kPatience);
  }
  const auto start = ProcessClock::now();
  mean.reset();
  window.reset();
  CHECK(ProcessClock::now() - start < seconds(15));
  check_end(comm);
  comm = r.create(1);
  CHECK(r.good_swaps(*comm) == "");
}

void run_scenario(Rank& r, const std::string& scenario) {
  if (scenario == "absent") return absent(r, true, false);
  if (scenario == "absent at first") return absent(r, false, false);
  if (scenario == "absent, adopted") return absent(r, true, true);
  if (scenario == "absent at first, adopted") return absent(r, false, true);
  if (scenario == "late") return late(r);
  if (scenario == "throwing") return throwing(r);
  if (scenario == "killed") return killed(r);
  if (scenario == "captured") return captured(r);
  if (scenario == "absent from a window") return absent_from_window(r);
  fail("there is no scenario ", scenario);
}

pid_t start_rank(const std::string& scenario, const std::string& folder, int rank, int round,
                 bool shared) {
  std::vector<std::string> variables = {
      std::string(kRankVariable) + "=" + std::to_string(rank),
      std::string(kDeviceVariable) + "=" + std::to_string(shared ? 0 : rank),
      std::string(kRoundVariable) + "=" + std::to_string(round),
      std::string(kFolderVariable) + "=" + folder, std::string(kScenarioVariable) + "=" + scenario};
  if (shared) {
    for (const std::string& variable : shared_gpu_variables(rank)) variables.push_back(variable);
  }
  return start_test(kChildTest, variables);
}

void run_processes(const std::string& scenario, bool shared) {
  INFO(scenario << (shared ? ", on one GPU" : ", on two GPUs"));
  char folder[] = "/tmp/octet_failure_XXXXXX";
  REQUIRE(mkdtemp(folder) != nullptr);
  const auto until = ProcessClock::now() + seconds(kProcessSeconds - 10);
  const pid_t survivor = start_rank(scenario, folder, 0, 0, shared);
  const int rounds = scenario == "killed" ? kRounds : 1;
  for (int round = 0; round < rounds; ++round) {
    const std::string wanted =
        error_of([&] { await(std::string(folder) + "/want" + std::to_string(round), kPatience); });
    CHECK(wanted == "no error");
    if (wanted != "no error") break;
    const pid_t other = start_rank(scenario, folder, 1, round, shared);
    CHECK(finish(other, until) == (round < rounds - 1 ? -SIGKILL : 0));
  }
  CHECK(finish(survivor, until) == 0);
  std::filesystem::remove_all(folder);
}

void run_everywhere(const std::string& scenario) {
  if (cuda_device_count() == 0) {
    WARN("skipped: there is no CUDA device");
    return;
  }
  run_processes(scenario, true);
  if (cuda_device_count() < 2) {
    WARN("on two GPUs: skipped, there is one");
    return;
  }
  run_processes(scenario, false);
}

}  // namespace

TEST_CASE("NCCL: a rank that stops to come") { run_everywhere("absent"); }
TEST_CASE("NCCL: a rank that never comes") { run_everywhere("absent at first"); }
TEST_CASE("NCCL, adopted: a rank that stops to come") { run_everywhere("absent, adopted"); }
TEST_CASE("NCCL, adopted: a rank that never comes") { run_everywhere("absent at first, adopted"); }
TEST_CASE("NCCL: a rank that is late by less than the deadline") { run_everywhere("late"); }
TEST_CASE("NCCL: a rank that leaves by an exception") { run_everywhere("throwing"); }
TEST_CASE("NCCL: a rank that is killed, again and again") { run_everywhere("killed"); }
TEST_CASE("NCCL: a rank that stops to launch a captured graph") { run_everywhere("captured"); }
TEST_CASE("NCCL: a rank that does not come to a kernel over a window") {
  run_everywhere("absent from a window");
}

TEST_CASE("NCCL: a rank that is not created, and communicators of one rank leave nothing") {
  if (cuda_device_count() == 0) {
    WARN("skipped: there is no CUDA device");
    return;
  }
  const Stream stream(0);
  const Context ctx = Context::cuda(0, stream.get());
  const auto create_and_use = [&] {
    const auto comm = create_nccl(make_nccl_id(), 0, 1, ctx, kDeadline);
    comm->all_gather(nullptr, nullptr, 0);
    comm->synchronize();
  };
  create_and_use();
  std::this_thread::sleep_for(seconds(2));  // what NCCL keeps for the process is there
  const std::int64_t bytes = used_device_bytes();
  const int threads = thread_count();
  for (int i = 0; i < 10; ++i) create_and_use();
  CHECK(soon([&] { return used_device_bytes() <= bytes + (8 << 20); }));
  CHECK(soon([&] { return thread_count() <= threads; }));

  const auto start = ProcessClock::now();
  std::string error, op;
  try {
    create_nccl(make_nccl_id(), 0, 2, ctx, milliseconds(2000));
  } catch (const CommError& thrown) {
    error = thrown.what();
    op = thrown.where().op;
  }
  const auto took = ProcessClock::now() - start;
  CHECK(missing(error, {"create_nccl on rank 0 of 2", "2000 ms"}) == "");
  CHECK(op == "create_nccl");
  CHECK(took >= milliseconds(2000));
  CHECK(took < milliseconds(2000) + kSlack);
  create_and_use();
  CHECK(soon([&] { return used_device_bytes() <= bytes + (8 << 20); }));
  // NCCL's thread that hands out addresses goes on waiting for the rank that has not come.
  CHECK(soon([&] { return thread_count() <= threads + 1; }));
}

// Run by the cases above in processes of their own.
TEST_CASE("one of the ranks", "[.]") {
  const char* scenario = std::getenv(kScenarioVariable);
  REQUIRE(scenario != nullptr);
  Rank rank;
  INFO(scenario << ", rank " << rank.rank << " on cuda:" << rank.device);
  run_scenario(rank, scenario);
}

// What a collective costs the host: `comm_nccl_failure_test "[time]"`.
TEST_CASE("host time of a collective", "[.][time]") {
  const Stream stream(0);
  const Context ctx = Context::cuda(0, stream.get());
  const Buffer data(ctx, 1024);
  const auto comm = create_nccl(make_nccl_id(), 0, 1, ctx);
  ncclComm_t mine = nullptr;
  REQUIRE(ncclCommInitAll(&mine, 1, nullptr) == ncclSuccess);
  const auto adopted = adopt_nccl(mine, ctx);
  for (Communicator* each : {comm.get(), adopted.get()}) {
    const auto gather = [&] { each->all_gather(data.data(), data.data(), 1024); };
    for (int i = 0; i < 100; ++i) gather();
    each->synchronize();
    const auto start = ProcessClock::now();
    for (int i = 0; i < 1000; ++i) gather();
    const std::chrono::duration<double, std::micro> took = ProcessClock::now() - start;
    each->synchronize();
    CHECK(took.count() / 1000 < 10'000);
    WARN((each == comm.get() ? "created: " : "adopted: ") << took.count() / 1000 << " us");
  }
  ncclCommDestroy(mine);
}

}  // namespace octet::test
