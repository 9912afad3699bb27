// SPDX-License-Identifier: Apache-2.0
// NCCL with one rank in this process and with two ranks in two processes that share one GPU: NCCL
// takes them for two hosts because each has a host id of its own. Without NCCL or a GPU only the
// refusals can be tested.
#include "octet/comm/nccl.hpp"

#include "support/catch.hpp"
#include "support/errors.hpp"
#include "support/mean_ranks.hpp"
#include "support/processes.hpp"
#include "support/random.hpp"

namespace octet::test {
namespace {

using Path = MeanReducer::Path;
constexpr int kRanks = 2;
constexpr const char* kRankVariable = "OCTET_NCCL_TEST_RANK";
constexpr const char* kFileVariable = "OCTET_NCCL_TEST_FILE";
constexpr const char* kChildTest = "one of the processes";
constexpr auto kPatience = std::chrono::seconds(120);

bool can_run() { return has_nccl() && cuda_device_count() > 0; }

const char* reason_to_skip() {
  return has_nccl() ? "skipped: there is no CUDA device" : "skipped: this build has no NCCL";
}

MeanCase nccl_case(DType dtype, int ranks) {
  MeanCase bucket;
  bucket.dtype = dtype;
  for (int r = 0; r < ranks; ++r) {
    std::vector<Contribution> own;
    std::uint32_t seed = static_cast<std::uint32_t>(r);
    for (std::size_t count : {1u, 129u, 0u, 40001u}) {
      own.push_back(contribute(dtype, wide_values(count, seed += 10, -12 - r, 3 * r)));
    }
    bucket.gradients.push_back(own);
  }
  bucket.owners = deal(bucket, 5003, [ranks](int k) { return (k / 2) % ranks; });
  return bucket;
}

// Every path and dtype against the plain loops; the first thing that is wrong.
std::string reductions_of(Communicator& comm) {
  for (DType dtype : {DType::e4m3, DType::bf16, DType::f32}) {
    const MeanCase bucket = nccl_case(dtype, comm.size());
    for (Path path : {Path::sharded, Path::two_shot}) {
      if (path == Path::two_shot && comm.size() == 1) continue;
      const MeanResult result = reduce_on_rank(comm, bucket, path, 3);
      std::string wrong = wrong_in(bucket, path, comm.rank(), result);
      if (wrong.empty() && result.wire.payload != 3 * result.planned) wrong = "payload";
      if (!wrong.empty()) return std::string(octet::name_of(dtype)) + ": " + wrong;
    }
  }
  return {};
}

std::string gather_of(Communicator& comm) {
  const Context& ctx = comm.context();
  const MeanCase bucket = nccl_case(DType::e4m3, comm.size());
  const auto& whole = bucket.gradients[0][3].bytes;
  const Guarded memory(ctx, whole.size());
  Owners owners(bucket.owners.size());
  for (std::size_t r = 0; r < owners.size(); ++r) {
    for (Piece piece : bucket.owners[r]) {
      if (piece.tensor != 3) continue;
      piece.tensor = 0;
      owners[r].push_back(piece);
      if (static_cast<int>(r) != comm.rank()) continue;
      copy_bytes(ctx, static_cast<char*>(memory.data()) + piece.begin, whole.data() + piece.begin,
                 static_cast<std::size_t>(piece.count));
    }
  }
  const TensorView view = memory.view(DType::e4m3, {static_cast<std::int64_t>(whole.size())});
  PieceGather gather(comm, {view}, owners);
  gather.run();
  if (!memory.intact()) return "bytes outside were written";
  return first_difference(memory.values<std::uint8_t>(), whole);
}

std::string texts_of(Communicator& comm) {
  std::vector<std::string> expected;
  for (int r = 0; r < comm.size(); ++r) {
    expected.push_back(std::string(static_cast<std::size_t>(r) * 70, 'a'));
  }
  const auto texts = all_gather_text_sync(comm, expected[static_cast<std::size_t>(comm.rank())]);
  return texts == expected ? "" : "the gathered texts differ";
}

std::string broadcast_of(Communicator& comm) {
  const Context& ctx = comm.context();
  const int root = comm.size() - 1;
  std::vector<std::uint8_t> expected(100003, 7);
  std::vector<std::uint8_t> own = expected;
  if (comm.rank() != root) own.assign(own.size(), 0);
  const Buffer data = upload(ctx, own);
  const std::uint64_t before = comm.wire_bytes().payload;
  comm.broadcast(data.data(), own.size(), root);
  const std::uint64_t sent = comm.wire_bytes().payload - before;
  const std::uint64_t peers = static_cast<std::uint64_t>(comm.size() - 1);
  if (sent != (comm.rank() == root ? own.size() * peers : 0)) return "payload of broadcast";
  return first_difference(download<std::uint8_t>(ctx, data.data(), own.size()), expected);
}

}  // namespace

TEST_CASE("without NCCL every entry says so") {
  if (has_nccl()) return;
  const Context ctx = Context::cpu();
  CHECK(missing(error_of([] { make_nccl_id(); }), {"make_nccl_id", "no NCCL", "OCTET_NCCL"}) == "");
  CHECK(missing(error_of([&] { adopt_nccl(nullptr, ctx); }), {"adopt_nccl", "no NCCL"}) == "");
  CHECK(missing(error_of([&] { create_nccl({}, 0, 1, ctx); }), {"create_nccl", "no NCCL"}) == "");
}

TEST_CASE("NCCL refuses what cannot work before it talks to anybody") {
  if (!has_nccl()) return;
  const Context ctx = Context::cpu();
  CHECK(missing(error_of([&] { adopt_nccl(nullptr, ctx); }), {"null"}) == "");
  CHECK(missing(error_of([&] { create_nccl({}, 0, 0, ctx); }), {"size is 0"}) == "");
  CHECK(missing(error_of([&] { create_nccl({}, 2, 2, ctx); }), {"rank is 2", "0 to 1"}) == "");
  CHECK(missing(error_of([&] { create_nccl({}, 0, 1, ctx); }), {"cpu", "CUDA device"}) == "");
}

TEST_CASE("one NCCL rank in this process") {
  if (!can_run()) {
    WARN(reason_to_skip());
    return;
  }
  const auto comm = create_nccl(make_nccl_id(), 0, 1, Context::cuda(0, nullptr));
  CHECK(comm->name() == "nccl");
  CHECK(comm->size() == 1);
  CHECK(reductions_of(*comm) == "");
  CHECK(gather_of(*comm) == "");
  CHECK(texts_of(*comm) == "");
  CHECK(comm->wire_bytes().payload == 0);
}

TEST_CASE("two NCCL ranks in two processes") {
  if (!can_run()) {
    WARN(reason_to_skip());
    return;
  }
  char folder[] = "/tmp/octet_nccl_XXXXXX";
  REQUIRE(mkdtemp(folder) != nullptr);
  const std::string file = std::string(folder) + "/id";
  std::vector<pid_t> children;
  for (int rank = 0; rank < kRanks; ++rank) {
    std::vector<std::string> variables = shared_gpu_variables(rank);
    variables.push_back(std::string(kRankVariable) + "=" + std::to_string(rank));
    variables.push_back(std::string(kFileVariable) + "=" + file);
    children.push_back(start_test(kChildTest, variables));
  }
  const auto until = ProcessClock::now() + kPatience;
  for (int rank = 0; rank < kRanks; ++rank) {
    INFO("rank " << rank << "; its own output says what failed");
    CHECK(children[static_cast<std::size_t>(rank)] > 0);
    CHECK(finish(children[static_cast<std::size_t>(rank)], until) == 0);
  }
  std::remove(file.c_str());
  rmdir(folder);
}

// Run by the case above in a process of its own.
TEST_CASE("one of the processes", "[.]") {
  const char* rank_text = std::getenv(kRankVariable);
  const char* file = std::getenv(kFileVariable);
  REQUIRE(rank_text != nullptr);
  REQUIRE(file != nullptr);
  const int rank = std::atoi(rank_text);
  NcclId id{};
  if (rank == 0) {
    id = make_nccl_id();
    publish(file, id);
  } else {
    id = await(file, kPatience);
  }
  const auto comm = create_nccl(id, rank, kRanks, Context::cuda(0, nullptr));
  CHECK(comm->rank() == rank);
  CHECK(comm->size() == kRanks);
  CHECK(reductions_of(*comm) == "");
  CHECK(gather_of(*comm) == "");
  CHECK(texts_of(*comm) == "");
  CHECK(broadcast_of(*comm) == "");
  comm->synchronize();
}

}  // namespace octet::test
