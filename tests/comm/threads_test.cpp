// SPDX-License-Identifier: Apache-2.0
// Ranks as threads, the single rank, and what every communicator shares: checks, counters, texts.
#include <atomic>
#include <functional>
#include <stdexcept>

#include "support/catch.hpp"
#include "support/compare.hpp"
#include "support/devices.hpp"
#include "support/errors.hpp"
#include "support/ranks.hpp"

namespace octet::test {
namespace {

using Bytes = std::vector<std::uint8_t>;

std::size_t at(int rank) { return static_cast<std::size_t>(rank); }

// Byte i of what rank `from` sends to rank `to` in round `round`.
std::uint8_t pattern(int from, int to, int round, std::size_t i) {
  return static_cast<std::uint8_t>(from * 61 + to * 17 + round * 101 + static_cast<int>(i % 251));
}

// Bytes from one rank to another: differs for every pair, nothing for some.
std::size_t length(int from, int to) {
  return (from + 2 * to) % 3 == 0 ? 0 : at(1 + from * 129 + to * 1031);
}

std::string comm_error_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const CommError& error) {
    return error.what();
  }
  return "no CommError";
}

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

// Every rank's message of the CommError that fn(comm) throws.
std::vector<std::string> errors_of_ranks(int n, const std::function<void(Communicator&)>& fn,
                                         std::chrono::milliseconds deadline) {
  std::vector<std::string> errors(at(n));
  run_ranks(
      n, [&](Communicator& comm) { errors[at(comm.rank())] = comm_error_of([&] { fn(comm); }); },
      DeviceType::cpu, deadline);
  return errors;
}

// All ranks to all ranks, several rounds, buffers overwritten between the rounds. Returns where the
// first wrong byte was.
std::string exchange_rounds(Communicator& comm) {
  const Context& ctx = comm.context();
  const int n = comm.size();
  for (int round = 0; round < 5; ++round) {
    std::vector<Buffer> out(at(n)), in(at(n));
    std::vector<SendPart> sends;
    std::vector<RecvPart> recvs;
    for (int peer = 0; peer < n; ++peer) {
      if (peer == comm.rank()) continue;
      Bytes values(length(comm.rank(), peer));
      for (std::size_t i = 0; i < values.size(); ++i) {
        values[i] = pattern(comm.rank(), peer, round, i);
      }
      out[at(peer)] = upload(ctx, values);
      in[at(peer)] = upload(ctx, Bytes(length(peer, comm.rank()), 0xEE));
      // In two parts: the order between two ranks is part of the contract.
      const std::size_t head = values.size() / 3;
      auto* from = out[at(peer)].as<std::uint8_t>();
      auto* to = in[at(peer)].as<std::uint8_t>();
      const std::size_t in_head = in[at(peer)].bytes() / 3;
      sends.push_back({from, head, peer});
      sends.push_back({from + head, values.size() - head, peer});
      recvs.push_back({to, in_head, peer});
      recvs.push_back({to + in_head, in[at(peer)].bytes() - in_head, peer});
    }
    comm.exchange(sends, recvs);
    // Overwritten at once: the receivers must have read it before.
    for (const Buffer& buffer : out) zero_bytes(ctx, buffer.data(), buffer.bytes());
    for (int peer = 0; peer < n; ++peer) {
      const Bytes got = download<std::uint8_t>(ctx, in[at(peer)].data(), in[at(peer)].bytes());
      Bytes expected(got.size());
      for (std::size_t i = 0; i < got.size(); ++i) {
        expected[i] = pattern(peer, comm.rank(), round, i);
      }
      const std::string difference = first_difference(got, expected);
      if (!difference.empty()) return "from rank " + std::to_string(peer) + ": " + difference;
    }
  }
  return {};
}

std::uint64_t sent_in_rounds(int rank, int n) {
  std::uint64_t bytes = 0;
  for (int peer = 0; peer < n; ++peer) {
    if (peer != rank) bytes += 5 * length(rank, peer);
  }
  return bytes;
}

}  // namespace

TEST_CASE("exchange moves every byte to its place and counts it") {
  for (DeviceType device : rank_devices()) {
    for (int n : {1, 2, 3, 4, 5, 8}) {
      std::vector<std::string> wrong(at(n), "did not run");
      std::vector<WireBytes> wire(at(n));
      run_ranks(
          n,
          [&](Communicator& comm) {
            wrong[at(comm.rank())] = exchange_rounds(comm);
            wire[at(comm.rank())] = comm.wire_bytes();
          },
          device);
      for (int r = 0; r < n; ++r) {
        CAPTURE(n, r);
        CHECK(wrong[at(r)] == "");
        CHECK(wire[at(r)].payload == sent_in_rounds(r, n));
        CHECK(wire[at(r)].metadata == 0);
      }
    }
  }
}

TEST_CASE("all_gather holds every rank's block in rank order, in place too") {
  for (DeviceType device : rank_devices()) {
    for (int n : {1, 2, 3, 7}) {
      std::vector<Bytes> apart(at(n)), in_place(at(n));
      std::vector<WireBytes> wire(at(n));
      constexpr std::size_t kBytes = 129;
      run_ranks(
          n,
          [&](Communicator& comm) {
            const Context& ctx = comm.context();
            const int rank = comm.rank();
            const Buffer own = upload(ctx, Bytes(kBytes, static_cast<std::uint8_t>(rank + 1)));
            const Buffer all(ctx, at(n) * kBytes);
            comm.all_gather(own.data(), all.data(), kBytes);
            apart[at(rank)] = download<std::uint8_t>(ctx, all.data(), all.bytes());
            const Buffer again = upload(ctx, Bytes(at(n) * kBytes, 0xEE));
            auto* block = again.as<std::uint8_t>() + at(rank) * kBytes;
            copy_bytes(ctx, block, own.data(), kBytes);
            comm.all_gather(block, again.data(), kBytes);
            in_place[at(rank)] = download<std::uint8_t>(ctx, again.data(), again.bytes());
            comm.all_gather(nullptr, nullptr, 0);
            wire[at(rank)] = comm.wire_bytes();
          },
          device);
      Bytes expected;
      for (int r = 0; r < n; ++r) {
        expected.insert(expected.end(), kBytes, static_cast<std::uint8_t>(r + 1));
      }
      for (int r = 0; r < n; ++r) {
        CAPTURE(n, r);
        CHECK(first_difference(apart[at(r)], expected) == "");
        CHECK(first_difference(in_place[at(r)], expected) == "");
        CHECK(wire[at(r)].metadata == 2 * kBytes * at(n - 1));
        CHECK(wire[at(r)].payload == 0);
      }
    }
  }
}

TEST_CASE("broadcast gives every rank the root's bytes; the root counts them") {
  constexpr std::size_t kBytes = 1031;
  for (DeviceType device : rank_devices()) {
    for (int n : {1, 2, 3, 8}) {
      const int root = n / 2;
      std::vector<Bytes> got(at(n)), then(at(n));
      std::vector<WireBytes> wire(at(n));
      run_ranks(
          n,
          [&](Communicator& comm) {
            const Context& ctx = comm.context();
            const int rank = comm.rank();
            const Buffer data = upload(ctx, Bytes(kBytes, static_cast<std::uint8_t>(rank + 1)));
            comm.broadcast(data.data(), kBytes, root);
            comm.broadcast(nullptr, 0, root);
            got[at(rank)] = download<std::uint8_t>(ctx, data.data(), kBytes);
            zero_bytes(ctx, data.data(), rank == 0 ? 7 : 0);
            comm.broadcast(data.data(), 7, 0, Traffic::metadata);
            then[at(rank)] = download<std::uint8_t>(ctx, data.data(), 8);
            wire[at(rank)] = comm.wire_bytes();
          },
          device);
      const auto value = static_cast<std::uint8_t>(root + 1);
      Bytes expected(8, 0);
      expected[7] = value;
      for (int r = 0; r < n; ++r) {
        CAPTURE(n, r);
        CHECK(first_difference(got[at(r)], Bytes(kBytes, value)) == "");
        CHECK(first_difference(then[at(r)], expected) == "");
        CHECK(wire[at(r)].payload == (r == root ? kBytes * at(n - 1) : 0));
        CHECK(wire[at(r)].metadata == (r == 0 ? 7 * at(n - 1) : 0));
      }
    }
  }
  const auto alone = make_single(Context::cpu());
  CHECK(contains(error_of([&] { alone->broadcast(nullptr, 0, 1); }), "root is 1"));
  CHECK(contains(error_of([&] { alone->broadcast(nullptr, 4, 0); }), "null pointer"));
}

TEST_CASE("metadata sent by exchange is counted as metadata") {
  std::vector<WireBytes> wire(2);
  run_ranks(2, [&](Communicator& comm) {
    const int peer = 1 - comm.rank();
    std::uint32_t own = 7, theirs = 0;
    const SendPart send{&own, sizeof(own), peer};
    const RecvPart recv{&theirs, sizeof(theirs), peer};
    comm.exchange(std::span(&send, 1), std::span(&recv, 1), Traffic::metadata);
    wire[at(comm.rank())] = comm.wire_bytes();
  });
  for (const WireBytes& bytes : wire) {
    CHECK(bytes.payload == 0);
    CHECK(bytes.metadata == 4);
  }
}

TEST_CASE("texts of any length are gathered in rank order") {
  const std::vector<std::string> texts = {"", "one", std::string("with a \0 inside", 15),
                                          std::string(5000, 'x'), "last"};
  for (DeviceType device : rank_devices()) {
    for (int n : {1, 2, 5}) {
      std::vector<std::vector<std::string>> gathered(at(n));
      run_ranks(
          n,
          [&](Communicator& comm) {
            gathered[at(comm.rank())] = all_gather_text_sync(comm, texts[at(comm.rank())]);
          },
          device);
      for (const auto& all : gathered) {
        CHECK(all == std::vector<std::string>(texts.begin(), texts.begin() + n));
      }
    }
  }
}

TEST_CASE("a single rank gathers itself and refuses peers") {
  for (const Context& ctx : test_contexts()) {
    const auto comm = make_single(ctx);
    CHECK(comm->rank() == 0);
    CHECK(comm->size() == 1);
    CHECK(comm->name() == "single");
    const Buffer own = upload(ctx, Bytes{1, 2, 3});
    const Buffer all = upload(ctx, Bytes{0, 0, 0});
    comm->all_gather(own.data(), all.data(), 3);
    CHECK(download<std::uint8_t>(ctx, all.data(), 3) == Bytes{1, 2, 3});
    CHECK(all_gather_text_sync(*comm, "alone") == std::vector<std::string>{"alone"});
    CHECK(comm->wire_bytes().metadata == 0);
    const SendPart to_self{own.data(), 3, 0};
    CHECK_THROWS_AS(comm->exchange(std::span(&to_self, 1), {}), Error);
    const SendPart to_nobody{own.data(), 3, 1};
    CHECK(contains(error_of([&] { comm->exchange(std::span(&to_nobody, 1), {}); }),
                   "names rank 1; allowed are 0 to 0"));
  }
}

TEST_CASE("a part with a null pointer is refused before anybody waits") {
  const auto comm = make_single(Context::cpu());
  CHECK_THROWS_AS(comm->all_gather(nullptr, nullptr, 4), Error);
  std::atomic<int> refused = 0;
  run_ranks(2, [&](Communicator& rank) {
    const RecvPart recv{nullptr, 4, 1 - rank.rank()};
    try {
      rank.exchange({}, std::span(&recv, 1));
    } catch (const Error&) {
      ++refused;
    }
  });
  CHECK(refused == 2);
}

TEST_CASE("a rank that never comes is named on every other rank, within the deadline") {
  const auto start = std::chrono::steady_clock::now();
  std::atomic<int> waiting = 2;
  const auto errors = errors_of_ranks(
      3,
      [&](Communicator& comm) {
        if (comm.rank() == 1) {  // there, but elsewhere
          while (waiting > 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
          comm.all_gather(nullptr, nullptr, 0);
          return;
        }
        try {
          comm.all_gather(nullptr, nullptr, 0);
        } catch (...) {
          --waiting;
          throw;
        }
        --waiting;
      },
      std::chrono::milliseconds(100));
  CHECK(std::chrono::steady_clock::now() - start < std::chrono::seconds(20));
  for (const std::string& error : errors) {
    INFO(error);
    CHECK(contains(error, "rank 1 of 3 did not come within 100 ms"));
    CHECK(contains(error, "all_gather"));
  }
}

TEST_CASE("a rank that leaves is noticed at once") {
  const auto start = std::chrono::steady_clock::now();
  std::vector<std::string> errors(3);
  run_ranks(3, [&](Communicator& comm) {
    if (comm.rank() == 2) return;
    errors[at(comm.rank())] = comm_error_of([&] { comm.exchange({}, {}); });
  });
  CHECK(std::chrono::steady_clock::now() - start < std::chrono::seconds(30));
  CHECK(contains(errors[0], "rank 2 of 3 left the group"));
  CHECK(contains(errors[1], "rank 2 of 3 left the group"));
}

TEST_CASE("a late rank is waited for") {
  std::vector<std::vector<std::string>> texts(2);
  run_ranks(2, [&](Communicator& comm) {
    if (comm.rank() == 1) std::this_thread::sleep_for(std::chrono::milliseconds(60));
    texts[at(comm.rank())] = all_gather_text_sync(comm, std::to_string(comm.rank()));
  });
  CHECK(texts[0] == std::vector<std::string>{"0", "1"});
  CHECK(texts[1] == texts[0]);
}

TEST_CASE("a rank that throws wakes the others; its exception is the one that is seen") {
  std::vector<std::string> errors(4);
  const auto run = [&] {
    run_ranks(4, [&](Communicator& comm) {
      if (comm.rank() == 2) throw std::logic_error("rank two gave up");
      errors[at(comm.rank())] = comm_error_of([&] { comm.exchange({}, {}); });
    });
  };
  std::string seen;
  try {
    run();
  } catch (const std::logic_error& error) {
    seen = error.what();
  }
  CHECK(seen == "rank two gave up");
  for (int r : {0, 1, 3}) CHECK(contains(errors[at(r)], "rank 2 failed: rank two gave up"));
}

TEST_CASE("different calls, lengths and counts are named on every rank") {
  constexpr auto kDeadline = std::chrono::seconds(60);
  std::vector<std::uint8_t> memory(1000);
  const auto expect_all = [](const std::vector<std::string>& errors, const std::string& part) {
    for (const std::string& error : errors) {
      INFO(error);
      CHECK(contains(error, part));
    }
  };
  expect_all(errors_of_ranks(
                 3,
                 [](Communicator& comm) {
                   if (comm.rank() == 2) {
                     comm.exchange({}, {});
                   } else {
                     comm.all_gather(nullptr, nullptr, 0);
                   }
                 },
                 kDeadline),
             "rank 0 called all_gather while rank 2 called exchange");
  expect_all(errors_of_ranks(
                 3,
                 [](Communicator& comm) {
                   Bytes own(64), all(192);
                   comm.all_gather(own.data(), all.data(), comm.rank() == 1 ? 8 : 16);
                 },
                 kDeadline),
             "rank 0 contributes 16 bytes but rank 1 8");
  // Rank 0 sends two parts to rank 1; what rank 1 makes of it varies.
  const auto receive_as = [&](std::vector<std::size_t> lengths) {
    return errors_of_ranks(
        2,
        [&](Communicator& comm) {
          std::vector<SendPart> sends;
          std::vector<RecvPart> recvs;
          Bytes data(1000);
          if (comm.rank() == 0) sends = {{data.data(), 10, 1}, {data.data(), 20, 1}};
          if (comm.rank() == 1) {
            for (std::size_t bytes : lengths) recvs.push_back({data.data(), bytes, 0});
          }
          comm.exchange(sends, recvs);
        },
        kDeadline);
  };
  expect_all(receive_as({10, 21}), "part 1 from rank 0 to rank 1 is 20 bytes on rank 0 but 21");
  expect_all(receive_as({10}), "rank 0 sends more parts to rank 1 than the 1");
  expect_all(receive_as({10, 20, 0}), "rank 1 receives more parts from rank 0 than the 2");
  expect_all(receive_as({10, 20}), "no CommError");
}

TEST_CASE("after an error the group stays aborted, and a new group works") {
  std::vector<std::string> later(2);
  run_ranks(2, [&](Communicator& comm) {
    Bytes own(64), all(128);
    const std::size_t bytes = comm.rank() == 0 ? 1 : 2;
    comm_error_of([&] { comm.all_gather(own.data(), all.data(), bytes); });
    later[at(comm.rank())] = comm_error_of([&] { comm.all_gather(own.data(), all.data(), 4); });
  });
  CHECK(contains(later[0], "rank 0 contributes 1 bytes but rank 1 2"));
  CHECK(contains(later[1], "rank 0 contributes 1 bytes but rank 1 2"));
  std::vector<std::string> fresh(2, "did not run");
  run_ranks(2, [&](Communicator& comm) { fresh[at(comm.rank())] = exchange_rounds(comm); });
  CHECK(fresh == std::vector<std::string>(2));
}

TEST_CASE("abort from outside ends the waiting") {
  ThreadGroup group(2);
  std::string error;
  std::thread waiting([&] {
    const auto comm = group.join(0, Context::cpu());
    error = comm_error_of([&] { comm->exchange({}, {}); });
  });
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  group.abort("the trainer was interrupted");
  waiting.join();
  CHECK(contains(error, "the trainer was interrupted"));
}

TEST_CASE("a communicator may outlive its group") {
  std::unique_ptr<Communicator> comm;
  {
    ThreadGroup group(1);
    comm = group.join(0, Context::cpu());
  }
  CHECK(all_gather_text_sync(*comm, "still here") == std::vector<std::string>{"still here"});
}

TEST_CASE("a group refuses sizes, ranks and second joins") {
  CHECK(contains(error_of([] { ThreadGroup{0}; }), "size is 0"));
  ThreadGroup group(2);
  CHECK(contains(error_of([&] { group.join(2, Context::cpu()); }), "rank is 2"));
  CHECK(contains(error_of([&] { group.join(-1, Context::cpu()); }), "rank is -1"));
  const auto comm = group.join(0, Context::cpu());
  CHECK(contains(error_of([&] { group.join(0, Context::cpu()); }), "has joined before"));
}

}  // namespace octet::test
