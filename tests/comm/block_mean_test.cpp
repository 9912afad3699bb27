// SPDX-License-Identifier: Apache-2.0
// Gradients with a scale for every 128 of a row over ranks as threads, against plain loops.
#include "octet/comm/block_mean_reducer.hpp"

#include <limits>

#include "support/block_ranks.hpp"
#include "support/catch.hpp"
#include "support/errors.hpp"
#include "support/ranks.hpp"

namespace octet::test {
namespace {

using namespace blocks;
using Path = MeanReducer::Path;
constexpr Path kPaths[] = {Path::sharded, Path::two_shot};

std::vector<BlockOutcome> reduce(const BlockBucket& bucket, Path path, DeviceType device,
                                 int runs = 1) {
  std::vector<BlockOutcome> outcomes(at(bucket.ranks()));
  run_ranks(
      bucket.ranks(),
      [&](Communicator& comm) {
        outcomes[at(comm.rank())] = reduce_on_rank(comm, bucket, path, runs);
      },
      device);
  return outcomes;
}

void check(const BlockBucket& bucket, DeviceType device, int runs = 1) {
  for (Path path : kPaths) {
    const auto outcomes = reduce(bucket, path, device, runs);
    for (int r = 0; r < bucket.ranks(); ++r) {
      CAPTURE(bucket.ranks(), path == Path::sharded, r);
      CHECK(wrong_in(bucket, path, r, outcomes[at(r)]) == "");
    }
  }
}

const std::vector<Shape> kOddShapes = {{1, 1}, {3, 127},   {5, 128},   {0, 128}, {130, 129},
                                       {4, 0}, {257, 264}, {16, 1000}, {2, 3}};

}  // namespace

TEST_CASE("means of blocks are exact to the bit on both paths, for every world size and cut") {
  for (DeviceType device : rank_devices()) {
    for (int n : {1, 2, 3, 5, 8}) {
      BlockBucket bucket = random_bucket(n, kOddShapes);
      const Owners cuts[] = {deal_rows(bucket, 1, [n](int k) { return (k * 7 + 1) % n; }),
                             deal_rows(bucket, 128, [n](int k) { return k % n; }),
                             deal_rows(bucket, 50, [n](int k) { return std::min(k / 2, n - 1); }),
                             deal_rows(bucket, 128, [n](int) { return n - 1; })};
      for (const Owners& owners : cuts) {
        bucket.owners = owners;
        check(bucket, device);
      }
    }
  }
}

TEST_CASE("runs repeat to the bit") {
  for (DeviceType device : rank_devices()) {
    BlockBucket bucket = random_bucket(3, {{200, 300}, {128, 256}});
    bucket.owners = deal_rows(bucket, 64, [](int k) { return k % 3; });
    check(bucket, device, 10);
  }
}

TEST_CASE("equal gradients in blocks give exactly that gradient, however many ranks") {
  for (DeviceType device : rank_devices()) {
    auto values = normal_values(600, 5);
    values[3] = 448.0f;
    const Blocks one = stored(values, {3, 200});
    for (int n : {1, 2, 3, 7, 17, 32}) {
      BlockBucket bucket;
      bucket.shapes = {{3, 200}};
      bucket.blocks.assign(at(n), {one});
      bucket.flags.assign(at(n), 0);
      bucket.owners = deal_rows(bucket, 1, [n](int k) { return k % n; });
      for (const BlockOutcome& outcome : reduce(bucket, Path::two_shot, device)) {
        CAPTURE(n);
        CHECK(first_difference(decoded(outcome.blocks[0], {3, 200}), decoded(one, {3, 200})) == "");
      }
    }
  }
}

TEST_CASE("blocks of zeros, amaxes 2^20 and 2^200 apart") {
  for (DeviceType device : rank_devices()) {
    const Shape shape = {4, 256};
    auto mixed = normal_values(1024, 1);
    for (std::size_t i = 0; i < 128; ++i) mixed[i] = 0.0f;
    for (std::size_t i = 128; i < 256; ++i) mixed[i] *= 0x1p-100f;
    for (std::size_t i = 256; i < 384; ++i) mixed[i] *= 0x1p100f;
    for (std::size_t i = 384; i < 512; ++i) mixed[i] = 0x1p-149f;
    BlockBucket bucket;
    bucket.shapes = {shape};
    bucket.blocks = {{stored(mixed, shape)},
                     {stored(std::vector<float>(1024, 0.0f), shape)},
                     {stored(normal_values(1024, 2, 0x1p20f), shape)}};
    bucket.flags.assign(3, 0);
    bucket.owners = deal_rows(bucket, 1, [](int k) { return k % 3; });
    check(bucket, device);
    bucket.blocks.assign(3, {stored(std::vector<float>(1024, 0.0f), shape)});
    check(bucket, device);
  }
}

TEST_CASE("a flag of one rank's casts or a NaN among its codes is known to all") {
  for (DeviceType device : rank_devices()) {
    for (int who : {0, 2}) {
      for (Path path : kPaths) {
        BlockBucket bucket = random_bucket(3, {{5, 300}, {40, 128}});
        bucket.owners = deal_rows(bucket, 3, [](int k) { return k % 3; });
        bucket.flags[at(who)] = 1;  // infinity: stored as 448
        for (const BlockOutcome& outcome : reduce(bucket, path, device)) {
          CHECK(outcome.nonfinite == 1);
          CHECK(std::isfinite(outcome.scales[1].amax));
        }
        bucket.flags[at(who)] = 0;
        bucket.blocks[at(who)][1].codes[777] = 0x7F;
        for (const BlockOutcome& outcome : reduce(bucket, path, device)) {
          CHECK(outcome.nonfinite == 1);
          CHECK(std::isfinite(outcome.scales[0].amax));
          CHECK(std::isnan(outcome.scales[1].amax));
          CHECK(outcome.intact);
          if (path == Path::two_shot) CHECK((outcome.blocks[1].codes[777] & 0x7F) == 0x7F);
        }
      }
    }
  }
}

TEST_CASE("what stands in the padding of the scales reaches nothing") {
  for (DeviceType device : rank_devices()) {
    const Shape shape = {5, 300};  // 3 blocks a row; rows of scales padded from 5 to 16
    BlockBucket bucket = random_bucket(3, {shape});
    bucket.owners = deal_rows(bucket, 1, [](int k) { return k % 3; });
    BlockBucket spoilt = bucket;
    const float nan = std::numeric_limits<float>::quiet_NaN();
    for (auto& own : spoilt.blocks) {
      REQUIRE(own[0].scales.size() == 3 * 16 * sizeof(float));
      for (std::size_t i = 0; i < 3 * 16; ++i) {
        if (i % 16 >= 5) std::memcpy(own[0].scales.data() + i * sizeof(float), &nan, sizeof(nan));
      }
    }
    for (Path path : kPaths) {
      const auto clean = reduce(bucket, path, device), after = reduce(spoilt, path, device);
      for (std::size_t r = 0; r < 3; ++r) {
        CHECK(after[r].nonfinite == 0);
        CHECK(after[r].scales[0].amax == clean[r].scales[0].amax);
        CHECK(after[r].shards == clean[r].shards);
        CHECK(after[r].blocks[0].codes == clean[r].blocks[0].codes);
      }
    }
  }
}

TEST_CASE("sums beyond FP32 raise the flag") {
  for (DeviceType device : rank_devices()) {
    BlockBucket bucket;
    bucket.shapes = {{1, 8}};
    bucket.blocks.assign(3, {stored(std::vector<float>(8, 3e38f), {1, 8})});
    bucket.flags.assign(3, 0);
    bucket.owners = {{}, {{0, 0, 8}}, {}};
    for (Path path : kPaths) {
      for (const BlockOutcome& outcome : reduce(bucket, path, device)) {
        CHECK(outcome.nonfinite == 1);
        CHECK(std::isinf(outcome.scales[0].amax));
      }
    }
  }
}

TEST_CASE("codes are payload, scales and amaxes metadata") {
  const std::vector<Shape> shapes = {{256, 512}, {3, 130}};
  const std::uint64_t codes = 256 * 512 + 3 * 130;
  const std::uint64_t scales = 4 * (256 * 4 + 3 * 2);
  for (int n : {1, 2, 3, 8}) {
    BlockBucket bucket = random_bucket(n, shapes);
    bucket.owners = deal_rows(bucket, 32, [n](int k) { return k % n; });
    for (Path path : kPaths) {
      const std::uint64_t halves = path == Path::two_shot ? 2 : 1;
      std::uint64_t payload = 0, metadata = 0;
      for (const BlockOutcome& outcome : reduce(bucket, path, DeviceType::cpu)) {
        CHECK(outcome.wire.payload == outcome.planned);
        payload += outcome.wire.payload;
        metadata += outcome.wire.metadata;
      }
      CAPTURE(n, halves);
      const std::uint64_t peers = at(n - 1);
      CHECK(payload == halves * peers * codes);
      CHECK(metadata == halves * peers * scales + at(n) * peers * 4 * (shapes.size() + 1));
    }
  }
}

TEST_CASE("gradients, shards and owners that do not fit are refused by name") {
  const Context ctx = Context::cpu();
  const auto comm = make_single(ctx);
  const Tensor codes(ctx, DType::e4m3, {4, 256}), wide(ctx, DType::f32, {4, 256});
  const Buffer scales(ctx, at(scale_bytes(Granularity::row_block, 4, 256)));
  const Owners whole = {{{0, 0, 1024}}};
  TensorScale common;
  const BlockScaledView good = {codes, Granularity::row_block, MxLayout::gemm_ready, scales.data()};
  const auto refusal = [&](const BlockScaledView& gradient, const Owners& owners,
                           const TensorView& shard = {}, Path path = Path::two_shot) {
    return error_of([&] { BlockMeanReducer(*comm, path, {{gradient, shard}}, &common, owners); });
  };
  CHECK(refusal(good, whole) == "no error");
  BlockScaledView bad = good;
  bad.data = wide;
  CHECK(missing(refusal(bad, whole), {"gradient 0", "f32", "e4m3"}) == "");
  bad = good;
  bad.granularity = Granularity::tile;
  CHECK(missing(refusal(bad, whole), {"gradient 0", "tile", "row_block"}) == "");
  bad = good;
  bad.scales = nullptr;
  CHECK(missing(refusal(bad, whole), {"gradient 0", "null", "scales"}) == "");
  bad = good;
  bad.data.shape = {1024};
  CHECK(missing(refusal(bad, whole), {"gradient 0", "[1024]", "matrix"}) == "");
  CHECK(missing(refusal(good, {{{0, 0, 128}, {0, 128, 896}}}), {"rank 0", "256", "whole rows"}) ==
        "");
  CHECK(missing(refusal(good, {{{0, 0, 512}}}), {"element 512", "no piece"}) == "");
  CHECK(missing(refusal(good, whole, wide), {"tensor 0", "two_shot"}) == "");
  CHECK(missing(refusal(good, whole, codes, Path::sharded), {"shard of tensor 0", "e4m3"}) == "");
  CHECK(missing(refusal(good, whole, {}, Path::contributions), {"path", "contributions"}) == "");
  CHECK(missing(error_of([&] {
                  BlockMeanReducer(*comm, Path::two_shot, {{good, {}}}, nullptr, whole);
                }),
                {"scales is null"}) == "");
  BlockMeanReducer reducer(*comm, Path::two_shot, {{good, {}}}, &common, whole);
  CHECK(missing(error_of([&] { reducer.run(nullptr); }), {"nonfinite", "null"}) == "");
  CHECK(reducer.buffer_bytes() >= 8 * sizeof(float));
}

}  // namespace octet::test
