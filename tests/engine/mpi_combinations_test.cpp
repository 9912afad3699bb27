// SPDX-License-Identifier: Apache-2.0
// The walk of combinations_test over MPI. Run by mpiexec with 1 and 4 ranks, all of which walk the
// same list.
#include <mpi.h>

#include "octet/comm/mpi.hpp"
#include "support/catch.hpp"
#include "support/engine_walk.hpp"

namespace octet::test {
namespace {

Axes axes() {
  int size = 0;
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  return {{Link::mpi, Link::mpi_windows, Link::mpi_apart}, {size}};
}

WalkResult walk_here(const Combination& c) {
  const auto comm =
      adopt_mpi(MPI_COMM_WORLD, Context::cpu(), {.deadline = std::chrono::seconds(30)});
  return walk(c.is_apart() ? Context::cpu() : comm->context(), *comm, c);
}

}  // namespace

TEST_CASE("over MPI combinations that run do what the plan says, and end with the same weights") {
  WeightTable table;
  const std::vector<Combination> list = covering(axes(), true);
  CHECK(list.size() > 50);
  for (const Combination& c : list) {
    INFO(describe(c));
    const WalkResult rank = walk_here(c);
    CHECK(rank.error == "no error");
    CHECK(rank.wrong == "");
    CHECK(table.compare(c, rank.weights) == "");
  }
}

TEST_CASE("over MPI combinations that do not run are refused with the reason") {
  const std::vector<Combination> list = covering(axes(), false);
  CHECK(list.size() > 50);
  for (const Combination& c : list) {
    INFO(describe(c));
    CHECK(unexplained(walk_here(c).error, refusals(c)) == "");
  }
}

}  // namespace octet::test
