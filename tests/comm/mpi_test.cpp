// SPDX-License-Identifier: Apache-2.0
// Run by mpiexec with 1, 2, 3 and 5 ranks, all of which run every case. How ranks die is in
// mpi_failure_test.
#include "octet/comm/mpi.hpp"

#include <mpi.h>

#include <chrono>
#include <cstring>
#include <thread>

#include "octet/comm/bootstrap.hpp"
#include "support/catch.hpp"
#include "support/comm_errors.hpp"
#include "support/errors.hpp"
#include "support/mean_ranks.hpp"
#include "support/ranks.hpp"

namespace octet::test {
namespace {

using namespace std::chrono_literals;
using Clock = std::chrono::steady_clock;
using Bytes = std::vector<std::uint8_t>;
using Ranks = std::vector<int>;

std::size_t at(std::int64_t i) { return static_cast<std::size_t>(i); }

int world_size() {
  int size = 0;
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  return size;
}

int world_rank() {
  int rank = 0;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  return rank;
}

std::unique_ptr<Communicator> adopt(const MpiOptions& options = {.deadline = 30s}) {
  return adopt_mpi(MPI_COMM_WORLD, Context::cpu(), options);
}

/// What part k from one rank to another holds.
Bytes pattern(std::size_t bytes, int from, int to, std::size_t k) {
  Bytes values(bytes);
  std::uint32_t state =
      static_cast<std::uint32_t>(1 + from + 17 * to) * 2654435761u + static_cast<std::uint32_t>(k);
  for (auto& value : values) value = static_cast<std::uint8_t>((state = state * 69069u + 1) >> 24);
  return values;
}

/// Exchanges parts of these sizes between all ranks; empty, or which part came wrongly.
std::string exchange_all(Communicator& comm, const std::vector<std::size_t>& sizes) {
  std::vector<Bytes> sent, received;
  std::vector<SendPart> sends;
  std::vector<RecvPart> recvs;
  for (int peer = 0; peer < comm.size(); ++peer) {
    if (peer == comm.rank()) continue;
    for (std::size_t k = 0; k < sizes.size(); ++k) {
      sent.push_back(pattern(sizes[k], comm.rank(), peer, k));
      received.emplace_back(sizes[k]);
      sends.push_back({sent.back().data(), sizes[k], peer});
      recvs.push_back({received.back().data(), sizes[k], peer});
    }
  }
  comm.exchange(sends, recvs);
  for (std::size_t i = 0; i < received.size(); ++i) {
    const std::size_t k = i % sizes.size();
    if (received[i] != pattern(sizes[k], recvs[i].peer, comm.rank(), k)) {
      return "part " + std::to_string(k) + " from rank " + std::to_string(recvs[i].peer);
    }
  }
  return {};
}

/// The error of a collective in which this rank sends and receives single parts of these sizes
/// between itself and rank `peer`; no parts without a peer.
std::string exchange_error(Communicator& comm, int peer, std::vector<std::size_t> sends,
                           std::vector<std::size_t> recvs) {
  Bytes memory(1000);
  std::vector<SendPart> send_parts;
  std::vector<RecvPart> recv_parts;
  for (std::size_t bytes : sends) send_parts.push_back({memory.data(), bytes, peer});
  for (std::size_t bytes : recvs) recv_parts.push_back({memory.data() + 500, bytes, peer});
  return error_of([&] { comm.exchange(send_parts, recv_parts); });
}

}  // namespace

TEST_CASE("parts of every size come whole and in order") {
  CHECK(has_mpi());
  for (std::size_t message_bytes : {std::size_t{1} << 30, std::size_t{1000}}) {
    const auto comm = adopt({.deadline = 60s, .message_bytes = message_bytes});
    CHECK(comm->name() == "mpi");
    CHECK(comm->size() == world_size());
    const std::vector<std::size_t> sizes = {1, 0, 3, 999, 1000, 1001, 65537, 1048577};
    for (int round = 0; round < 3; ++round) CHECK(exchange_all(*comm, sizes) == "");
    CHECK(exchange_all(*comm, {}) == "");
  }
}

TEST_CASE("all_gather puts the blocks in rank order, also in place") {
  const auto comm = adopt();
  const int n = comm->size();
  for (std::size_t bytes : {std::size_t{1}, std::size_t{7}, std::size_t{100003}}) {
    const Bytes own = pattern(bytes, comm->rank(), 0, 0);
    Bytes expected;
    for (int r = 0; r < n; ++r) {
      const Bytes block = pattern(bytes, r, 0, 0);
      expected.insert(expected.end(), block.begin(), block.end());
    }
    Bytes all(at(n) * bytes), in_place(at(n) * bytes);
    comm->all_gather(own.data(), all.data(), bytes);
    CHECK(all == expected);
    std::uint8_t* const block = in_place.data() + at(comm->rank()) * bytes;
    std::copy(own.begin(), own.end(), block);
    comm->all_gather(block, in_place.data(), bytes);
    CHECK(in_place == expected);
  }
  comm->all_gather(nullptr, nullptr, 0);
  const auto texts = all_gather_text_sync(*comm, std::string(at(comm->rank()), 'x'));
  for (int r = 0; r < n; ++r) CHECK(texts[at(r)] == std::string(at(r), 'x'));
}

TEST_CASE("means have the bits of thread ranks") {
  const auto comm = adopt();
  const int n = comm->size(), rank = comm->rank();
  for (DType dtype : {DType::e4m3, DType::bf16, DType::f32}) {
    MeanCase bucket = random_case(dtype, n, kOddSizes);
    for (const Owners& owners : cuts_of(bucket)) {
      bucket.owners = owners;
      for (auto path : {MeanReducer::Path::sharded, MeanReducer::Path::two_shot}) {
        std::vector<MeanResult> threads(at(n));
        run_ranks(n, [&](Communicator& thread) {
          threads[at(thread.rank())] = reduce_on_rank(thread, bucket, path);
        });
        const MeanResult expected = threads[at(rank)];
        const MeanResult result = reduce_on_rank(*comm, bucket, path);
        CAPTURE(octet::name_of(dtype), n, path, rank);
        if (n > 1) CHECK(wrong_in(bucket, path, rank, result) == "");
        for (std::size_t t = 0; t < bucket.tensors(); ++t) {
          CHECK(first_difference(result.gradients[t], expected.gradients[t]) == "");
          CHECK(first_difference(result.shards[t], expected.shards[t]) == "");
          CHECK(std::memcmp(&result.scales[t], &expected.scales[t], sizeof(TensorScale)) == 0);
        }
        CHECK(result.wire.payload == expected.wire.payload);
        CHECK(result.wire.metadata == expected.wire.metadata);
      }
    }
  }
}

TEST_CASE("a part of another length names both lengths on both sides, and the others hear of it") {
  if (world_size() < 2) return;
  const auto comm = adopt();
  std::string error;
  if (comm->rank() == 0) {
    error = exchange_error(*comm, 1, {4, 100}, {8});
  } else if (comm->rank() == 1) {
    error = exchange_error(*comm, 0, {8}, {4, 96});
  } else {
    error = exchange_error(*comm, 0, {}, {});
    // A rank that has heard of it in time is no longer in this collective.
    if (error == "no error") error = exchange_error(*comm, 0, {}, {});
  }
  CHECK(missing(error, {"exchange", "on rank " + std::to_string(comm->rank()),
                        "part 1 from rank 0 to rank 1 is 100 bytes on rank 0 but 96 on rank 1"}) ==
        "");
  if (comm->rank() > 1) CHECK(missing(error, {"gave up"}) == "");
  // The error stays with the communicator; another one works.
  CHECK(comm->aborted());
  const auto again = comm_error_of([&] { comm->all_gather(nullptr, nullptr, 0); });
  REQUIRE(again.has_value());
  CHECK(again->what() == error);
  CHECK(again->where().rank == comm->rank());
  CHECK(again->where().ranks == Ranks{0, 1});
  CHECK(error_of([&] { comm->synchronize(); }) == error);
  CHECK(exchange_all(*adopt(), {5, 0, 77}) == "");
}

TEST_CASE("more parts than the peer has, another collective, another contribution") {
  if (world_size() < 2) return;
  Bytes memory(at(world_size()) * 8);
  {
    const auto comm = adopt();
    std::string error;
    if (comm->rank() == 0) error = exchange_error(*comm, 1, {1, 2, 3}, {});
    if (comm->rank() == 1) error = exchange_error(*comm, 0, {}, {1, 2});
    if (comm->rank() > 1) exchange_error(*comm, 0, {}, {});
    if (comm->rank() < 2) {
      CHECK(missing(error, {"rank 0 sends more parts to rank 1 than the 2"}) == "");
    }
  }
  {
    const auto comm = adopt();
    const std::string error = error_of([&] {
      if (comm->rank() == 0) comm->exchange({}, {});
      if (comm->rank() > 0) comm->all_gather(memory.data(), memory.data(), 0);
    });
    if (comm->rank() < 2) CHECK(missing(error, {"rank 0 called exchange", "all_gather"}) == "");
  }
  {
    const auto comm = adopt();
    const std::size_t bytes = comm->rank() == 0 ? 4 : 8;
    const Bytes own(bytes);
    const std::string error = error_of([&] { comm->all_gather(own.data(), memory.data(), bytes); });
    if (comm->rank() < 2) {
      CHECK(missing(error, {"rank 0 contributes 4 bytes but rank", "8"}) == "");
    }
  }
}

TEST_CASE("a rank that is late by less than the deadline is waited for") {
  const auto comm = adopt({.deadline = 20s});
  if (comm->rank() == comm->size() - 1) std::this_thread::sleep_for(400ms);
  CHECK(exchange_all(*comm, {1000}) == "");
}

TEST_CASE("a rank that does not come is named within the deadline") {
  if (world_size() < 2) return;
  const auto comm = adopt({.deadline = 500ms});
  CHECK(exchange_all(*comm, {3}) == "");
  if (comm->rank() == 1) {
    std::this_thread::sleep_for(1s);
    std::string error = exchange_error(*comm, 0, {}, {});
    // It may find all that it waits for, and hears what has happened the next time.
    if (error == "no error") error = exchange_error(*comm, 0, {}, {});
    CHECK(missing(error, {"gave up", "rank 1 of"}) == "");
  } else {
    const auto begin = Clock::now();
    const auto error = comm_error_of([&] { comm->exchange({}, {}); });
    const std::string reason =
        "rank 1 of " + std::to_string(comm->size()) + " did not come within 500 ms";
    CHECK(wrong_in(error, comm->rank(), {"exchange"}, 2, {1}, reason) == "");
    CHECK(Clock::now() - begin < 3s);
  }
  CHECK(exchange_all(*adopt(), {9}) == "");
}

TEST_CASE("check() tells a rank that is in no collective what the others have noticed") {
  if (world_size() < 2) return;
  constexpr CollectiveName kName{"two_shot", 3};
  const auto comm = adopt({.deadline = 300ms});
  CHECK(comm->deadline() == 300ms);
  gather_nothing(*comm, {"sharded", 2});
  const bool absent = comm->rank() == 1;
  const auto until = Clock::now() + 20s;
  const auto error = comm_error_of([&] {
    if (!absent) gather_nothing(*comm, kName);
    while (Clock::now() < until) comm->check();
  });
  CHECK(wrong_in(error, comm->rank(), kName, 2, {1},
                 "rank 1 of " + std::to_string(comm->size()) + " did not come within 300 ms") ==
        "");
  if (absent) CHECK(missing(error->what(), {"gave up"}) == "");
}

TEST_CASE("different ops and buckets are told apart") {
  if (world_size() < 2) return;
  const bool odd = world_rank() == 1;
  MPI_Comm pair = MPI_COMM_NULL;
  MPI_Comm_split(MPI_COMM_WORLD, world_rank() < 2 ? 0 : MPI_UNDEFINED, world_rank(), &pair);
  if (pair == MPI_COMM_NULL) return;
  const auto check_both = [&](const CollectiveName& name, const std::string& reason) {
    const auto comm = adopt_mpi(pair, Context::cpu(), {.deadline = 30s});
    const auto error = comm_error_of([&] { gather_nothing(*comm, name); });
    CHECK(wrong_in(error, comm->rank(), name, 1, {0, 1}, reason) == "");
  };
  check_both(
      {odd ? "sharded" : "two_shot", 4},
      "rank 0 called two_shot of bucket 4 (all_gather) while rank 1 called sharded of bucket "
      "4 (all_gather)");
  check_both({"two_shot", odd}, "while rank 1 called two_shot of bucket 1 (all_gather)");
  // Of an op's name 32 bytes are sent.
  check_both({"abcdefghijklmnopqrstuvwxyz012345678", odd},
             "rank 0 called abcdefghijklmnopqrstuvwxyz012345 of bucket 0 (all_gather) while");
  MPI_Comm_free(&pair);
}

TEST_CASE("broadcast gives every rank the root's bytes; another size names both") {
  const auto comm = adopt();
  const int n = comm->size();
  for (int root = 0; root < n; ++root) {
    const Bytes expected = pattern(70001, root, root, 0);
    Bytes data = comm->rank() == root ? expected : Bytes(expected.size());
    const std::uint64_t before = comm->wire_bytes().payload;
    comm->broadcast(data.data(), data.size(), root);
    CHECK(data == expected);
    const std::size_t sent = comm->rank() == root ? data.size() * at(n - 1) : 0;
    CHECK(comm->wire_bytes().payload - before == sent);
  }
  if (n < 2) return;
  char bytes[4] = {};
  const auto error = comm_error_of([&] { comm->broadcast(bytes, comm->rank() == 1 ? 3 : 4, 0); });
  CHECK(wrong_in(error, comm->rank(), {"broadcast"}, static_cast<std::uint64_t>(n) + 1, {0, 1},
                 "from rank 0 to rank 1 is 4 bytes on rank 0 but 3 on rank 1") == "");
}

TEST_CASE("a rank that does not adopt makes the others throw") {
  if (world_size() < 2) return;
  MPI_Comm comm = MPI_COMM_NULL;  // of its own, because the attempt is never taken back
  MPI_Comm_dup(MPI_COMM_WORLD, &comm);
  int rank = 0;
  MPI_Comm_rank(comm, &rank);
  if (rank > 0) {
    const MpiOptions options{.deadline = 300ms};
    const std::string error = error_of([&] { adopt_mpi(comm, Context::cpu(), options); });
    CHECK(missing(error, {"adopt_mpi on rank " + std::to_string(rank), "300 ms"}) == "");
  }
  MPI_Barrier(MPI_COMM_WORLD);
}

TEST_CASE("the end waits for a rank that still works, and one that ends early is named") {
  if (world_size() < 2) return;
  {
    const auto comm = adopt();
    if (comm->rank() == 1) std::this_thread::sleep_for(300ms);
  }
  const auto comm = adopt();
  if (comm->rank() == 0) return;
  const auto error = comm_error_of([&] { comm->exchange({}, {}); });
  REQUIRE(error.has_value());
  REQUIRE(error->where().ranks.size() == 2);
  const int other = error->where().ranks[1];  // whoever saw it first has told the others
  CHECK(wrong_in(error, comm->rank(), {"exchange"}, 1, {0, other},
                 "rank 0 called the end of the group while rank " + std::to_string(other) +
                     " called exchange") == "");
}

TEST_CASE("a rank that leaves by an exception tells the others") {
  if (world_size() < 2) return;
  const auto begin = Clock::now();
  const std::string error = error_of([&] {
    const auto comm = adopt({.deadline = 20s});
    if (comm->rank() == 0) fail("out of paper");
    for (;;) comm->exchange({}, {});
  });
  CHECK((error == "out of paper" || missing(error, {"rank 0 gave up", "exception"}) == ""));
  CHECK(Clock::now() - begin < 10s);
}

TEST_CASE("the caller's own messages are left alone, and subgroups have their own ranks") {
  const int n = world_size(), own = world_rank();
  int theirs = -1;
  MPI_Request request = MPI_REQUEST_NULL;
  MPI_Irecv(&theirs, 1, MPI_INT, MPI_ANY_SOURCE, MPI_ANY_TAG, MPI_COMM_WORLD, &request);
  {
    MPI_Comm reversed = MPI_COMM_NULL;
    MPI_Comm_split(MPI_COMM_WORLD, own == 0 ? 0 : 1, -own, &reversed);
    const auto comm = adopt_mpi(reversed, Context::cpu());
    CHECK(comm->size() == (own == 0 ? 1 : n - 1));
    CHECK(comm->rank() == (own == 0 ? 0 : n - 1 - own));
    CHECK(exchange_all(*comm, {10, 20}) == "");
    MPI_Comm_free(&reversed);
    CHECK(exchange_all(*comm, {30}) == "");  // a duplicate lives on
  }
  CHECK(exchange_all(*adopt(), {10, 20}) == "");
  CHECK(theirs == -1);
  MPI_Barrier(MPI_COMM_WORLD);
  MPI_Send(&own, 1, MPI_INT, (own + 1) % n, 1, MPI_COMM_WORLD);
  MPI_Wait(&request, MPI_STATUS_IGNORE);
  CHECK(theirs == (own + n - 1) % n);
}

TEST_CASE("what cannot be adopted is refused") {
  const Context ctx = Context::cpu();
  CHECK(missing(error_of([&] { adopt_mpi(MPI_COMM_NULL, ctx); }), {"null"}) == "");
  CHECK(missing(error_of([&] { adopt_mpi(MPI_Comm{}, ctx); }), {"null"}) == "");
  CHECK(missing(error_of([&] { adopt_mpi('c', ctx); }), {"1 bytes", "MPI_Comm"}) == "");
  CHECK(missing(error_of([&] { adopt({.deadline = 0ms}); }), {"deadline", "0 ms"}) == "");
  CHECK(missing(error_of([&] { adopt({.message_bytes = 0}); }), {"message_bytes", "0"}) == "");
  CHECK(missing(error_of([&] { adopt({.message_bytes = std::size_t{1} << 31}); }),
                {"message_bytes", "2147483648"}) == "");
  if (cuda_device_count() > 0) {
    const Context cuda = Context::cuda(0, per_thread_stream());
    CHECK(missing(error_of([&] { adopt_mpi(MPI_COMM_WORLD, cuda); }), {"cuda:0", "nccl"}) == "");
    CHECK(missing(error_of([&] { create_mpi(cuda); }), {"cuda:0", "nccl"}) == "");
  }
}

TEST_CASE("mpiexec's environment says who this rank is, and bytes of rank 0 travel by MPI") {
  const int rank = world_rank();
  Launch launch = launch_from_environment();
  CHECK(launch.rank == rank);
  CHECK(launch.size == world_size());
  for (std::size_t count : {std::size_t{0}, std::size_t{128}, kMaxRendezvousBytes}) {
    const Bytes root = pattern(count, 0, 0, 0);
    const auto own = std::as_bytes(std::span(root));
    const auto bytes = broadcast_from_root(launch, rank == 0 ? own : own.first(0));
    CHECK(std::equal(bytes.begin(), bytes.end(), own.begin(), own.end()));
  }
  const auto comm = make_communicator(Context::cpu(), launch);
  CHECK(comm->name() == (world_size() == 1 ? "single" : "mpi"));
  CHECK(exchange_all(*comm, {10}) == "");
  if (world_size() == 1) return;
  ++launch.size;  // as under the mpiexec of another MPI
  CHECK(missing(error_of([&] { make_communicator(Context::cpu(), launch); }),
                {"rank " + std::to_string(rank) + " of " + std::to_string(launch.size - 1),
                 "of " + std::to_string(launch.size), "mpiexec"}) == "");
}

TEST_CASE("MPI that the program began is the program's to end") {
  { const auto comm = create_mpi(Context::cpu()); }
  int finalized = 0;
  MPI_Finalized(&finalized);
  CHECK(!finalized);
}

}  // namespace octet::test
