// SPDX-License-Identifier: Apache-2.0
// Every combination of level, formats, reduced gradient, sharding, communicator, number of ranks,
// schedule and place of the states either does what its plan says, to the byte, or is refused on
// every rank with the reason.
#include "octet/comm/nccl.hpp"
#include "support/catch.hpp"
#include "support/engine_walk.hpp"

namespace octet::test {
namespace {

/// Ranks that share a GPU keep to one stream each, and to no kernels that wait for one another.
Axes axes_on(DeviceType device) {
  if (device == DeviceType::cuda) return {{Link::single, Link::threads}, {1, 2, 3}};
  return {{Link::single, Link::threads, Link::windows, Link::apart, Link::windows_apart},
          {1, 2, 3, 5, 8}};
}

/// Of every rank, each with a GPU, what it says of every combination.
std::vector<std::vector<WalkResult>> walk_nccl(const std::vector<Combination>& list, int ranks) {
  const NcclId id = make_nccl_id();
  std::vector<std::vector<WalkResult>> results(static_cast<std::size_t>(ranks));
  std::vector<std::thread> threads;
  for (int rank = 0; rank < ranks; ++rank) {
    threads.emplace_back([&, rank] {
      std::vector<WalkResult>& mine = results[static_cast<std::size_t>(rank)];
      const std::string error = error_of([&] {
        const auto comm = create_nccl(id, rank, ranks, Context::cuda(rank, nullptr));
        for (const Combination& c : list) mine.push_back(walk(comm->context(), *comm, c));
      });
      mine.resize(list.size(), {.error = error, .wrong = {}, .weights = {}});
    });
  }
  for (std::thread& thread : threads) thread.join();
  return results;
}

std::vector<WalkResult> walk_ranks(const Combination& c, DeviceType device) {
  std::vector<WalkResult> results(static_cast<std::size_t>(c.ranks));
  const auto run = [&](Communicator& comm) {
    const Context ctx = c.is_apart() ? Context::cpu() : comm.context();
    results[static_cast<std::size_t>(comm.rank())] = walk(ctx, comm, c);
  };
  if (c.link != Link::single) {
    run_ranks(c.ranks, run, device);
  } else {
    const auto comm = make_single(rank_context(device, 0));
    run(*comm);
  }
  return results;
}

}  // namespace

TEST_CASE("combinations that run do what the plan says, and end with the same weights") {
  for (DeviceType device : rank_devices()) {
    WeightTable table;
    const std::vector<Combination> list = covering(axes_on(device), true);
    CHECK(list.size() > 100);
    for (const Combination& c : list) {
      INFO(describe(c) << ", cuda " << (device == DeviceType::cuda));
      for (const WalkResult& rank : walk_ranks(c, device)) {
        CHECK(rank.error == "no error");
        CHECK(rank.wrong == "");
        CHECK(table.compare(c, rank.weights) == "");
      }
    }
  }
}

// Over windows where the devices can; which rules refuse what does not depend on the communicator.
TEST_CASE("over NCCL combinations that run do what the plan says, and end with the same weights") {
  if (!has_nccl() || cuda_device_count() == 0) {
    WARN("skipped: no NCCL or no CUDA device");
    return;
  }
  WeightTable table;
  for (int ranks : {1, 2, 3}) {
    if (ranks > cuda_device_count()) continue;
    const auto list = covering({{Link::nccl, Link::nccl_windows}, {ranks}}, true);
    for (const std::vector<WalkResult>& rank : walk_nccl(list, ranks)) {
      for (std::size_t i = 0; i < list.size(); ++i) {
        const bool is_refused = rank[i].error.find("there can be none") != std::string::npos;
        if (list[i].has_windows() && is_refused) continue;
        INFO(describe(list[i]));
        CHECK(rank[i].error == "no error");
        CHECK(rank[i].wrong == "");
        CHECK(table.compare(list[i], rank[i].weights) == "");
      }
    }
  }
}

TEST_CASE("combinations that do not run are refused on every rank with the reason") {
  for (DeviceType device : rank_devices()) {
    const std::vector<Combination> list = covering(axes_on(device), false);
    CHECK(list.size() > 100);
    for (const Combination& c : list) {
      INFO(describe(c) << ", cuda " << (device == DeviceType::cuda));
      for (const WalkResult& rank : walk_ranks(c, device)) {
        CHECK(unexplained(rank.error, refusals(c)) == "");
      }
    }
  }
}

}  // namespace octet::test
