// SPDX-License-Identifier: Apache-2.0
// Whole tensors from the ranks' shards: every byte, nothing else, no byte sent twice.
#include <numeric>

#include "octet/comm/shard_gather.hpp"
#include "support/catch.hpp"
#include "support/counting_rank.hpp"
#include "support/devices.hpp"
#include "support/errors.hpp"
#include "support/ranks.hpp"

namespace octet::test {
namespace {

struct Case {
  DType dtype;
  Shape shape;
  bool is_shard = true;
};
// Matrices with short last panels, a vector, something smaller than the number of ranks, nothing,
// and one that ranks keep at its place in a whole tensor.
const std::vector<Case> kCases = {{DType::e4m3, {700, 24}}, {DType::e4m3, {256, 16}},
                                  {DType::bf16, {40000}},   {DType::f32, {3}},
                                  {DType::f32, {0, 7}},     {DType::f32, {300, 5}, false}};
constexpr std::uint8_t kPoison = 0xFF;  // a NaN in every format

std::size_t bytes_of(const Case& c, std::int64_t elements) {
  return static_cast<std::size_t>(elements) * size_of(c.dtype);
}

std::vector<std::uint8_t> values_of(std::size_t tensor) {
  std::vector<std::uint8_t> bytes(bytes_of(kCases[tensor], kCases[tensor].shape.numel()));
  for (std::size_t i = 0; i < bytes.size(); ++i) {
    bytes[i] = static_cast<std::uint8_t>((i * 7 + i / 251 + tensor * 31) % 255);
  }
  return bytes;
}

/// Panels in runs of unequal length, the last rank without any.
Owners owners_of(int ranks) {
  Owners owners(static_cast<std::size_t>(ranks));
  std::size_t dealt = 0;
  for (std::size_t t = 0; t < kCases.size(); ++t) {
    for (const Piece& panel : panels_of(static_cast<std::int32_t>(t), kCases[t].shape)) {
      const std::size_t among = ranks > 2 ? static_cast<std::size_t>(ranks - 1) : owners.size();
      owners[dealt++ / 2 % among].push_back(panel);
    }
  }
  return owners;
}

/// What a rank has of a tensor: its pieces, or a whole tensor of poison but for them.
std::vector<std::uint8_t> held_by(const std::vector<Piece>& own, std::size_t tensor) {
  const Case& c = kCases[tensor];
  const std::vector<std::uint8_t> whole = values_of(tensor);
  std::vector<std::uint8_t> held(c.is_shard ? 0 : whole.size(), kPoison);
  for (const Piece& piece : own) {
    if (static_cast<std::size_t>(piece.tensor) != tensor) continue;
    const auto begin = whole.begin() + static_cast<std::ptrdiff_t>(bytes_of(c, piece.begin));
    const auto end = begin + static_cast<std::ptrdiff_t>(bytes_of(c, piece.count));
    if (c.is_shard) {
      held.insert(held.end(), begin, end);
    } else {
      std::copy(begin, end, held.begin() + (begin - whole.begin()));
    }
  }
  return held;
}

struct Outcome {
  std::vector<std::uint8_t> first, second;  ///< destinations
  std::uint64_t payload = 0, sent = 0, owned = 0;
};

Outcome gather_on(Communicator& comm, std::size_t gap) {
  const Context& ctx = comm.context();
  const Owners owners = owners_of(comm.size());
  const std::vector<Piece>& own = owners[static_cast<std::size_t>(comm.rank())];
  Outcome outcome;
  std::vector<ShardedTensor> tensors;
  std::vector<Buffer> memory;
  std::size_t bytes = 0;
  for (std::size_t t = 0; t < kCases.size(); ++t) {
    const std::vector<std::uint8_t> held = held_by(own, t);
    memory.push_back(upload(ctx, held));
    tensors.push_back(
        {kCases[t].dtype, kCases[t].shape, memory.back().data(), kCases[t].is_shard, bytes});
    bytes += bytes_of(kCases[t], kCases[t].shape.numel()) + gap;
  }
  for (const Piece& piece : own) {
    outcome.owned += bytes_of(kCases[static_cast<std::size_t>(piece.tensor)], piece.count);
  }
  const std::vector<std::uint8_t> poison(bytes, kPoison);
  const Buffer first = upload(ctx, poison), second = upload(ctx, poison);
  ShardGather gather(comm, tensors, owners, {first.data(), second.data()}, bytes);
  outcome.payload = gather.payload_bytes();
  const std::uint64_t before = comm.wire_bytes().payload;
  gather.run(1);
  outcome.sent = comm.wire_bytes().payload - before;
  outcome.first = download<std::uint8_t>(ctx, first.data(), bytes);
  outcome.second = download<std::uint8_t>(ctx, second.data(), bytes);
  return outcome;
}

}  // namespace

TEST_CASE("shards are gathered into the destination that is named, exactly, for 1 to 5 ranks") {
  for (DeviceType device : rank_devices()) {
    for (int ranks = 1; ranks <= 5; ++ranks) {
      for (std::size_t gap : {std::size_t{0}, std::size_t{16}}) {
        INFO(ranks << " ranks, gap " << gap);
        std::vector<std::uint8_t> expected;
        for (std::size_t t = 0; t < kCases.size(); ++t) {
          const std::vector<std::uint8_t> whole = values_of(t);
          expected.insert(expected.end(), whole.begin(), whole.end());
          expected.insert(expected.end(), gap, kPoison);
        }
        std::vector<Outcome> outcomes(static_cast<std::size_t>(ranks));
        run_ranks(
            ranks,
            [&](Communicator& comm) {
              outcomes[static_cast<std::size_t>(comm.rank())] = gather_on(comm, gap);
            },
            device);
        for (const Outcome& outcome : outcomes) {
          CHECK(outcome.second == expected);
          CHECK(outcome.first == std::vector<std::uint8_t>(expected.size(), kPoison));
          CHECK(outcome.payload == outcome.owned * static_cast<std::uint64_t>(ranks - 1));
          CHECK(outcome.sent == outcome.payload);
        }
      }
    }
  }
}

TEST_CASE("tensors that lie together in shard and destination travel as one part") {
  std::vector<std::size_t> parts(2);
  std::vector<std::uint8_t> seen(2);
  run_ranks(2, [&](Communicator& inner) {
    CountingRank comm(inner);
    const Context& ctx = comm.context();
    constexpr std::int64_t kCount = 64, kTensors = 6;
    // Rank 0 owns the first three, rank 1 the others; each has its own one after the other.
    const Buffer shard(ctx, 3 * kCount), destination(ctx, kTensors * kCount);
    std::fill_n(shard.as<std::uint8_t>(), 3 * kCount, static_cast<std::uint8_t>(comm.rank() + 1));
    Owners owners(2);
    std::vector<ShardedTensor> tensors;
    for (int t = 0; t < kTensors; ++t) {
      owners[static_cast<std::size_t>(t / 3)].push_back({t, 0, kCount});
      tensors.push_back({DType::e4m3,
                         {kCount},
                         shard.as<std::uint8_t>() + t % 3 * kCount,
                         true,
                         static_cast<std::size_t>(t * kCount)});
    }
    ShardGather gather(comm, tensors, owners, {destination.data()}, kTensors * kCount);
    gather.run(0);
    const auto rank = static_cast<std::size_t>(comm.rank());
    parts[rank] = comm.sent();
    seen[rank] = destination.as<std::uint8_t>()[rank == 0 ? 3 * kCount : 3 * kCount - 1];
  });
  CHECK(parts == std::vector<std::size_t>{1, 1});
  CHECK(seen == std::vector<std::uint8_t>{2, 1});
}

TEST_CASE("what ShardGather refuses is named") {
  const Context ctx = Context::cpu();
  const std::unique_ptr<Communicator> comm = make_single(ctx);
  const Buffer shard(ctx, 64), destination(ctx, 64);
  const ShardedTensor good{DType::f32, {4}, shard.data(), true, 0};
  const auto error_with = [&](std::vector<ShardedTensor> tensors, const Owners& owners,
                              std::vector<void*> destinations, std::size_t bytes) {
    return error_of([&] { ShardGather(*comm, tensors, owners, destinations, bytes); });
  };
  const std::vector<void*> to = {destination.data()};
  const Owners all = {{{0, 0, 4}}}, two = {{{0, 0, 4}, {1, 0, 4}}};
  CHECK(error_with({good}, all, to, 64) == "no error");
  CHECK(missing(error_with({good}, {{{0, 0, 3}}}, to, 64), {"ShardGather", "element 3"}) == "");
  CHECK(missing(error_with({good}, all, {}, 64), {"no destination"}) == "");
  CHECK(missing(error_with({good}, all, {nullptr}, 64), {"destination 0", "null"}) == "");
  CHECK(missing(error_with({good}, all, to, 15), {"tensor 0", "16 bytes", "15"}) == "");
  ShardedTensor other = good;
  other.data = nullptr;
  CHECK(missing(error_with({other}, all, to, 64), {"tensor 0", "null"}) == "");
  other = good;
  other.offset = 12;
  CHECK(missing(error_with({good, other}, two, to, 64), {"tensor 1", "byte 12", "tensor 0"}) == "");
  ShardGather gather(*comm, {good}, all, to, 64);
  for (int d : {-1, 1}) {
    CHECK(missing(error_of([&] { gather.run(d); }), {"destination " + std::to_string(d)}) == "");
  }
}

}  // namespace octet::test
