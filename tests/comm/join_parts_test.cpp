// SPDX-License-Identifier: Apache-2.0
// How many parts an exchange has: pieces that touch in the memory of sender and receiver are one.
#include <numeric>

#include "octet/comm/collectives.hpp"
#include "support/catch.hpp"
#include "support/counting_rank.hpp"
#include "support/devices.hpp"
#include "support/ranks.hpp"

namespace octet::test {
namespace {

constexpr std::int64_t kCount = 64;

struct Outcome {
  std::size_t reduction = 0, gather = 0;  ///< parts sent
  std::vector<std::uint8_t> bytes;        ///< of all tensors, one after the other
};

/// Four E4M3 tensors, two for each of two ranks; on each rank gap bytes lie between them.
std::vector<Outcome> run(std::size_t gap_on_rank_0, std::size_t gap_on_rank_1) {
  std::vector<Outcome> outcomes(2);
  run_ranks(2, [&](Communicator& inner) {
    CountingRank comm(inner);
    const Context& ctx = comm.context();
    const std::size_t gap = comm.rank() == 0 ? gap_on_rank_0 : gap_on_rank_1;
    const Buffer memory(ctx, 4 * (kCount + gap)), scales = upload(ctx, std::vector<TensorScale>(4));
    std::vector<ReduceTensor> tensors;
    std::vector<TensorView> views;
    for (std::size_t t = 0; t < 4; ++t) {
      auto* data = memory.as<std::uint8_t>() + t * (kCount + gap);
      std::iota(data, data + kCount, static_cast<std::uint8_t>(16 * t));  // the same on both ranks
      views.push_back({data, DType::e4m3, {kCount}, ctx.device()});
      tensors.push_back({views.back(), {}});
    }
    const Owners owners = {{{0, 0, kCount}, {1, 0, kCount}}, {{2, 0, kCount}, {3, 0, kCount}}};
    const Buffer flag = upload(ctx, std::vector<std::uint32_t>{0});
    MeanReducer reducer(comm, MeanReducer::Path::two_shot, tensors, scales.as<TensorScale>(),
                        owners);
    PieceGather gather(comm, views, owners);
    Outcome& outcome = outcomes[static_cast<std::size_t>(comm.rank())];
    gather.run();
    outcome.gather = comm.sent();
    for (const TensorView& view : views) {
      const auto* data = view.as<std::uint8_t>();
      outcome.bytes.insert(outcome.bytes.end(), data, data + kCount);
    }
    reducer.run(flag.as<std::uint32_t>());
    outcome.reduction = comm.sent() - outcome.gather;
  });
  return outcomes;
}

}  // namespace

TEST_CASE("pieces that touch on both sides are sent as one part") {
  for (const Outcome& outcome : run(0, 0)) {
    CHECK(outcome.gather == 1);
    CHECK(outcome.reduction == 2);  // what the other owns, and what this rank owns
  }
}

TEST_CASE("pieces that lie apart on either side are not") {
  const std::vector<Outcome> together = run(0, 0), apart = run(0, 16);
  for (std::size_t r : {0u, 1u}) {
    CHECK(apart[r].gather == 2);
    CHECK(apart[r].bytes == together[r].bytes);
  }
  // Into staging, where pieces touch, rank 0 sends one part; the means go to and from rank 1's
  // gradients, which do not.
  CHECK(apart[0].reduction == 3);
  CHECK(apart[1].reduction == 4);
}

}  // namespace octet::test
