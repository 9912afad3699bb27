// SPDX-License-Identifier: Apache-2.0
// The rendezvous by TCP and by file, with threads as the processes of jobs, and strangers.
#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <fstream>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "octet/comm/bootstrap.hpp"
#include "octet/comm/mpi.hpp"
#include "support/catch.hpp"
#include "support/errors.hpp"
#include "support/folder.hpp"

namespace octet::test {
namespace {

using namespace std::chrono_literals;
using Clock = std::chrono::steady_clock;
using Bytes = std::vector<std::byte>;

Bytes blob(std::size_t count, int seed = 1) {
  Bytes bytes(count);
  for (std::size_t i = 0; i < count; ++i) {
    bytes[i] = static_cast<std::byte>((i * 37 + static_cast<std::size_t>(seed)) & 0xFF);
  }
  return bytes;
}

sockaddr_in loopback(int port) {
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  address.sin_port = htons(static_cast<std::uint16_t>(port));
  return address;
}

/// A listening socket on a port that was free.
class Listener {
 public:
  Listener() : fd_(socket(AF_INET, SOCK_STREAM, 0)) {
    sockaddr_in address = loopback(0);
    socklen_t length = sizeof(address);
    bind(fd_, reinterpret_cast<sockaddr*>(&address), length);
    listen(fd_, 8);
    getsockname(fd_, reinterpret_cast<sockaddr*>(&address), &length);
    port_ = ntohs(address.sin_port);
  }
  ~Listener() { close(fd_); }
  Listener(const Listener&) = delete;
  Listener& operator=(const Listener&) = delete;
  int fd() const { return fd_; }
  int port() const { return port_; }

 private:
  int fd_;
  int port_ = 0;
};

int free_port() { return Listener().port(); }

/// A connection that says `bytes` and then nothing, for as long as it lives.
class Stranger {
 public:
  Stranger(int port, const Bytes& bytes) : fd_(socket(AF_INET, SOCK_STREAM, 0)) {
    const sockaddr_in address = loopback(port);
    for (int i = 0; i < 100 && !connected_; ++i) {
      connected_ = connect(fd_, reinterpret_cast<const sockaddr*>(&address), sizeof(address)) == 0;
      if (!connected_) std::this_thread::sleep_for(20ms);
    }
    if (!bytes.empty()) send(fd_, bytes.data(), bytes.size(), MSG_NOSIGNAL);
  }
  ~Stranger() { close(fd_); }
  Stranger(const Stranger&) = delete;
  Stranger& operator=(const Stranger&) = delete;
  bool connected() const { return connected_; }

 private:
  int fd_;
  bool connected_ = false;
};

Launch rank_of(int rank, int size, int port, const std::string& job = "job") {
  return {.rank = rank,
          .size = size,
          .local_rank = rank,
          .local_size = size,
          .host = "127.0.0.1",
          .port = port,
          .job = job,
          .launcher = "test"};
}

struct Result {
  Bytes bytes;
  std::string error = "no error";
};

/// Each launch on a thread of its own; rank 0 gives `bytes`.
std::vector<Result> run(const std::vector<Launch>& launches, const Bytes& bytes,
                        const Rendezvous& rendezvous,
                        const std::function<void(std::size_t)>& before = {}) {
  std::vector<Result> results(launches.size());
  std::vector<std::thread> threads;
  for (std::size_t i = 0; i < launches.size(); ++i) {
    threads.emplace_back([&, i] {
      if (before) before(i);
      results[i].error = error_of([&] {
        const Bytes own = launches[i].rank == 0 ? bytes : Bytes();
        results[i].bytes = broadcast_from_root(launches[i], own, rendezvous);
      });
    });
  }
  for (std::thread& thread : threads) thread.join();
  return results;
}

Rendezvous tcp(std::chrono::milliseconds deadline = 20s) {
  return {.carrier = Carrier::tcp, .path = {}, .deadline = deadline};
}

Rendezvous file(const Folder& folder, std::chrono::milliseconds deadline = 20s) {
  return {.carrier = Carrier::file, .path = folder.file("meet"), .deadline = deadline};
}

std::vector<Launch> job_of(int size, int port = 0, const std::string& job = "job") {
  std::vector<Launch> launches;
  for (int rank = 0; rank < size; ++rank) launches.push_back(rank_of(rank, size, port, job));
  return launches;
}

/// A hello as rank 1 of 2 of "job" says it, with changes.
Bytes hello(std::uint64_t job_bytes, std::size_t filling) {
  Bytes bytes;
  for (std::uint64_t value : {std::uint64_t{0x7a76647274636f31u}, std::uint64_t{1},
                              std::uint64_t{2}, std::uint64_t{1}, job_bytes}) {
    for (int i = 0; i < 8; ++i) bytes.push_back(static_cast<std::byte>(value >> (8 * i)));
  }
  bytes.resize(bytes.size() + filling, std::byte{'x'});
  return bytes;
}

void check_all_have(const std::vector<Result>& results, const Bytes& bytes) {
  for (const Result& result : results) {
    CHECK(result.error == "no error");
    CHECK(result.bytes == bytes);
  }
}

std::size_t files_in(const Folder& folder) {
  return static_cast<std::size_t>(
      std::distance(std::filesystem::directory_iterator(folder.file("")), {}));
}

/// Copies the files that are there; they may vanish meanwhile.
void copy_files(const Folder& from, const Folder& to) {
  std::error_code ignored;
  std::filesystem::directory_iterator at(from.file(""), ignored);
  for (; at != std::filesystem::directory_iterator(); at.increment(ignored)) {
    std::filesystem::copy_file(at->path(), to.file(at->path().filename().string()),
                               std::filesystem::copy_options::overwrite_existing, ignored);
  }
}

}  // namespace

TEST_CASE("every rank gets the bytes of rank 0, by both carriers") {
  for (const std::string job : {"", "job"}) {
    for (int size : {1, 2, 3, 8}) {
      for (std::size_t count : {0, 1, 128, 4096}) {
        check_all_have(run(job_of(size, free_port(), job), blob(count), tcp()), blob(count));
        const Folder folder;
        check_all_have(run(job_of(size, 0, job), blob(count), file(folder)), blob(count));
        CHECK(files_in(folder) == 0);
      }
    }
  }
}

TEST_CASE("bad arguments are refused before anything starts") {
  const auto refused = [](const Launch& launch, const Rendezvous& rendezvous, std::size_t count) {
    return error_of([&] { broadcast_from_root(launch, blob(count), rendezvous); });
  };
  const Launch root = rank_of(0, 2, 1234);
  CHECK(missing(refused(root, tcp(), 4097), {"4097", "4096"}) == "");
  CHECK(missing(refused(rank_of(2, 2, 1), tcp(), 1), {"rank is 2", "0 to 1"}) == "");
  CHECK(missing(refused(rank_of(0, 0, 1), tcp(), 1), {"size is 0"}) == "");
  CHECK(missing(refused(rank_of(0, 2, 0), tcp(), 1), {"port is 0", "MASTER_PORT"}) == "");
  CHECK(missing(refused(rank_of(0, 2, 1, std::string(257, 'j')), tcp(), 1), {"257", "256"}) == "");
  CHECK(missing(refused(root, tcp(0ms), 1), {"deadline", "0 ms"}) == "");
  CHECK(missing(refused(root, {.carrier = Carrier::file}, 1), {"path"}) == "");
  Launch nowhere = root;
  nowhere.host.clear();
  CHECK(missing(refused(nowhere, tcp(), 1), {"MASTER_ADDR"}) == "");
}

TEST_CASE("tcp: rank 0 and others may be late") {
  for (std::size_t late : {std::size_t{0}, std::size_t{2}}) {
    const auto results = run(job_of(3, free_port()), blob(128), tcp(), [&](std::size_t i) {
      if (i == late) std::this_thread::sleep_for(400ms);
    });
    check_all_have(results, blob(128));
  }
}

TEST_CASE("tcp: a rank that never comes is named by rank 0, and the others are told") {
  const int port = free_port();
  const auto begin = Clock::now();
  // Rank 2 begins later, so that its own deadline does not pass before that of rank 0.
  const auto results = run({rank_of(0, 4, port), rank_of(2, 4, port)}, blob(8), tcp(600ms),
                           [](std::size_t i) { std::this_thread::sleep_for(i * 300ms); });
  CHECK(Clock::now() - begin < 5s);
  for (const Result& result : results) {
    CHECK(missing(result.error, {"ranks 1, 3 of 4", "600 ms"}) == "");
  }
  const std::string alone = run({rank_of(1, 2, port)}, {}, tcp(300ms))[0].error;
  CHECK(missing(alone, {"rank 1", "127.0.0.1:" + std::to_string(port), "300 ms", "refused"}) == "");
}

TEST_CASE("tcp: a port in use is an error of rank 0 at once; the others see a stranger") {
  const Listener other;
  const auto begin = Clock::now();
  const std::string root = run({rank_of(0, 2, other.port())}, blob(8), tcp())[0].error;
  CHECK(missing(root, {"rank 0 cannot listen", std::to_string(other.port()), "MASTER_PORT"}) == "");
  std::thread server([&] {
    const int guest = accept(other.fd(), nullptr, nullptr);
    send(guest, "HTTP/1.1 400 Bad Request\r\n\r\n", 28, MSG_NOSIGNAL);
    std::this_thread::sleep_for(300ms);
    close(guest);
  });
  const std::string rank = run({rank_of(1, 2, other.port())}, {}, tcp())[0].error;
  server.join();
  CHECK(missing(rank, {"rank 1", "wrong magic"}) == "");
  CHECK(Clock::now() - begin < 5s);
  // Somebody who answers as octet does, but without end.
  std::thread endless([&] {
    const int guest = accept(other.fd(), nullptr, nullptr);
    Bytes answer(100000, std::byte{0});
    const Bytes magic = hello(0, 0);
    std::copy(magic.begin(), magic.begin() + 8, answer.begin());
    answer[20] = std::byte{1};  // 2^32 bytes
    send(guest, answer.data(), answer.size(), MSG_NOSIGNAL);
    std::this_thread::sleep_for(300ms);
    close(guest);
  });
  const std::string longest = run({rank_of(1, 2, other.port())}, {}, tcp())[0].error;
  endless.join();
  CHECK(missing(longest, {"rank 1", "too long", "4294967296"}) == "");
  // Somebody who listens and says nothing.
  const std::string silent = run({rank_of(1, 2, other.port())}, {}, tcp(300ms))[0].error;
  CHECK(missing(silent, {"rank 1", "no answer", "300 ms"}) == "");
}

TEST_CASE("tcp: a wrong world size and a second process of one rank are errors on both sides") {
  for (const std::string job : {"", "job"}) {
    const int port = free_port();
    const auto sizes =
        run({rank_of(0, 3, port, job), rank_of(1, 3, port, job), rank_of(2, 4, port, job)}, blob(8),
            tcp(1s));
    CHECK(missing(sizes[0].error, {"rank 2", "size is 4", "rank 0 says 3"}) == "");
    CHECK(missing(sizes[2].error, {"rank 2", "size is 4", "rank 0 says 3"}) == "");
    CHECK(sizes[1].error != "no error");
    const int again = free_port();
    const auto twice =
        run({rank_of(0, 3, again, job), rank_of(1, 3, again, job), rank_of(1, 3, again, job)},
            blob(8), tcp(1s));
    for (const Result& result : twice) {
      if (result.error.find("no answer") != std::string::npos) continue;  // came after the end
      CHECK(missing(result.error, {"two processes are rank 1"}) == "");
    }
    CHECK(missing(twice[0].error, {"two processes are rank 1"}) == "");
    const auto roots =
        run({rank_of(0, 2, again, job), rank_of(0, 2, again, job)}, blob(8), tcp(500ms));
    const bool first = missing(roots[0].error, {"rank 0 cannot listen"}) == "";
    CHECK(missing(roots[first ? 0 : 1].error, {"rank 0 cannot listen"}) == "");
    CHECK(missing(roots[first ? 1 : 0].error, {"rank 1 of 2 did not come"}) == "");
  }
}

TEST_CASE("tcp: two jobs at once, on two ports and on one") {
  const int one = free_port(), two = free_port();
  auto both = job_of(3, one, "a");
  for (const Launch& launch : job_of(2, two, "b")) both.push_back(launch);
  const auto apart = run(both, blob(64), tcp());
  check_all_have(apart, blob(64));

  // Job b's ranks meet job a, whose rank 2 comes late: they are refused, job a goes on.
  const int port = free_port();
  const auto results =
      run({rank_of(0, 3, port, "a"), rank_of(1, 3, port, "a"), rank_of(2, 3, port, "a"),
           rank_of(0, 3, port, "b"), rank_of(1, 3, port, "b"), rank_of(1, 3, port, "")},
          blob(64), tcp(), [](std::size_t i) {
            if (i == 2) std::this_thread::sleep_for(1200ms);
            if (i > 2) std::this_thread::sleep_for(500ms);
          });
  check_all_have({results[0], results[1], results[2]}, blob(64));
  CHECK(missing(results[3].error, {"rank 0 cannot listen", "another job"}) == "");
  CHECK(missing(results[4].error, {"refused", "job \"b\"", "job \"a\""}) == "");
  CHECK(missing(results[5].error, {"refused", "without a job id", "job \"a\""}) == "");
}

TEST_CASE("tcp: strangers do not stop the rendezvous") {
  const int port = free_port();
  std::vector<std::unique_ptr<Stranger>> strangers(6);
  const auto results = run(job_of(2, port), blob(128), tcp(), [&](std::size_t i) {
    if (i == 0) return;
    strangers[0] = std::make_unique<Stranger>(port, Bytes());               // silent
    strangers[1] = std::make_unique<Stranger>(port, blob(100000));          // garbage
    strangers[2] = std::make_unique<Stranger>(port, hello(1u << 30, 200));  // an oversized job id
    strangers[3] = std::make_unique<Stranger>(port, hello(200, 10));        // half a hello
    Stranger(port, blob(3));                                                // gone again
    strangers[4] = std::make_unique<Stranger>(port, hello(~std::uint64_t{0}, 0));
    std::this_thread::sleep_for(200ms);
  });
  for (int i = 0; i < 5; ++i) CHECK(strangers[static_cast<std::size_t>(i)]->connected());
  check_all_have(results, blob(128));
}

TEST_CASE("tcp: rank 0 says whom it dropped when its job is not complete") {
  const int port = free_port();
  std::unique_ptr<Stranger> stranger;
  std::thread visit([&] { stranger = std::make_unique<Stranger>(port, blob(50)); });
  const auto results = run({rank_of(0, 2, port)}, blob(1), tcp(500ms));
  visit.join();
  CHECK(missing(results[0].error, {"rank 1 of 2", "1 other connections", "magic"}) == "");
}

TEST_CASE("tcp: a flood of silent connections does not stop the rendezvous") {
  const int port = free_port();
  std::vector<std::unique_ptr<Stranger>> strangers;
  const auto results = run(job_of(3, port), blob(16), tcp(), [&](std::size_t i) {
    if (i == 0) return;
    if (i == 2) std::this_thread::sleep_for(300ms);
    if (i != 1) return;
    for (int k = 0; k < 150; ++k) strangers.push_back(std::make_unique<Stranger>(port, Bytes()));
  });
  check_all_have(results, blob(16));
}

TEST_CASE("tcp: a rank whose process ends may come again") {
  const int port = free_port();
  Bytes bytes = hello(3, 0);
  for (char c : {'j', 'o', 'b'}) bytes.push_back(static_cast<std::byte>(c));
  bytes[16] = std::byte{3};  // of 3 ranks
  const auto results = run(job_of(3, port), blob(16), tcp(), [&](std::size_t i) {
    if (i == 1) {
      {
        const Stranger first(port, bytes);
        std::this_thread::sleep_for(200ms);
      }
      std::this_thread::sleep_for(200ms);
    }
    if (i == 2) std::this_thread::sleep_for(700ms);
  });
  check_all_have(results, blob(16));
}

TEST_CASE("file: what an earlier run left is never taken for an answer") {
  for (const std::string job : {"", "job"}) {
    const Folder folder;
    // A run whose rank 0 never came, one whose rank 2 never came, with another size: both leave.
    CHECK(run({rank_of(1, 2, 0, job)}, {}, file(folder, 100ms))[0].error != "no error");
    run({rank_of(0, 5, 0, job), rank_of(4, 5, 0, job)}, blob(8, 7), file(folder, 200ms));
    // And one that was killed: copies of the files of a rendezvous in progress.
    const Folder dead;
    std::thread watcher([&] {
      const auto until = Clock::now() + 500ms;
      while (Clock::now() < until) copy_files(folder, dead);
    });
    check_all_have(run(job_of(3, 0, job), blob(64, 9), file(folder),
                       [](std::size_t i) {
                         if (i == 1) std::this_thread::sleep_for(100ms);
                       }),
                   blob(64, 9));
    watcher.join();
    REQUIRE(files_in(dead) > 0);
    copy_files(dead, folder);
    for (std::size_t late : {std::size_t{0}, std::size_t{2}}) {
      const auto results = run(job_of(3, 0, job), blob(128), file(folder), [&](std::size_t i) {
        if (i == late) std::this_thread::sleep_for(200ms);
      });
      check_all_have(results, blob(128));
    }
  }
}

TEST_CASE("file: garbage in the way is no answer") {
  const Folder folder;
  for (const char* name : {"meet.answer.1", "meet.request.1", "meet.root"}) {
    std::ofstream(folder.file(name)) << std::string(100000, 'x');
  }
  check_all_have(run(job_of(2, 0, ""), blob(10), file(folder)), blob(10));
}

TEST_CASE("file: wrong world size, missing ranks, no folder") {
  for (int size : {2, 5}) {
    const Folder folder;
    const auto results =
        run({rank_of(0, 3, 0), rank_of(size - 1, size, 0)}, blob(8), file(folder, 2s));
    for (const Result& result : results) {
      CHECK(missing(result.error, {"size is " + std::to_string(size), "rank 0 says 3"}) == "");
    }
  }
  const Folder folder;
  const auto results = run({rank_of(0, 4, 0), rank_of(2, 4, 0)}, blob(8), file(folder, 300ms));
  CHECK(missing(results[0].error, {"ranks 1, 3 of 4", "300 ms"}) == "");
  CHECK(results[1].error != "no error");
  const Rendezvous nowhere{
      .carrier = Carrier::file, .path = folder.file("no/such/folder"), .deadline = 1s};
  for (const Result& result : run(job_of(2), blob(8), nowhere)) {
    CHECK(missing(result.error, {"no/such/folder", "cannot be written"}) == "");
  }
}

TEST_CASE("file: two jobs at once") {
  const Folder folder;
  auto both = job_of(3, 0, "a");
  for (const Launch& launch : job_of(3, 0, "b")) both.push_back(launch);
  check_all_have(run(both, blob(64), file(folder)), blob(64));
  // Without job ids on one path it is an error for the one that came first.
  const auto results = run({rank_of(0, 2, 0, ""), rank_of(0, 2, 0, "")}, blob(1),
                           file(folder, 500ms), [](std::size_t i) {
                             if (i == 1) std::this_thread::sleep_for(150ms);
                           });
  CHECK(missing(results[0].error, {"another rank 0"}) == "");
  CHECK(missing(results[1].error, {"rank 1 of 2"}) == "");
  const auto ranks =
      run({rank_of(1, 2, 0, ""), rank_of(1, 2, 0, "")}, {}, file(folder, 500ms), [](std::size_t i) {
        if (i == 1) std::this_thread::sleep_for(150ms);
      });
  CHECK(missing(ranks[0].error, {"two processes are rank 1"}) == "");
}

TEST_CASE("the communicator that fits, or what to do") {
  const Context ctx = Context::cpu();
  CHECK(make_communicator(ctx, {})->name() == "single");
  Launch launch = rank_of(0, 2, 1);
  launch.launcher = "torchrun";
  const std::string error = error_of([&] { make_communicator(ctx, launch); });
  CHECK(missing(error, {"2 ranks on CPUs", has_mpi() ? "mpiexec" : "OCTET_MPI"}) == "");
}

}  // namespace octet::test
