// SPDX-License-Identifier: Apache-2.0
#include "octet/comm/collectives.hpp"

#include <limits>

#include "support/catch.hpp"
#include "support/errors.hpp"
#include "support/mean_ranks.hpp"
#include "support/random.hpp"
#include "support/ranks.hpp"

namespace octet::test {
namespace {

using Path = MeanReducer::Path;
constexpr Path kPaths[] = {Path::sharded, Path::two_shot};
constexpr DType kDTypes[] = {DType::e4m3, DType::bf16, DType::f32};

std::size_t at(std::int64_t i) { return static_cast<std::size_t>(i); }
const char* name_of(Path path) { return path == Path::sharded ? "sharded" : "two_shot"; }

std::vector<MeanResult> reduce(const MeanCase& bucket, Path path, DeviceType device, int runs = 1) {
  std::vector<MeanResult> results(at(bucket.ranks()));
  run_ranks(
      bucket.ranks(),
      [&](Communicator& comm) {
        results[at(comm.rank())] = reduce_on_rank(comm, bucket, path, runs);
      },
      device);
  return results;
}

}  // namespace

TEST_CASE("means are exact to the bit on every path, for every dtype, world size and cut") {
  for (DeviceType device : rank_devices()) {
    for (DType dtype : kDTypes) {
      for (int n : {2, 3, 4, 5, 8}) {
        MeanCase bucket = random_case(dtype, n, kOddSizes);
        for (const Owners& owners : cuts_of(bucket)) {
          bucket.owners = owners;
          for (Path path : kPaths) {
            const auto results = reduce(bucket, path, device);
            for (int r = 0; r < n; ++r) {
              CAPTURE(octet::name_of(dtype), n, name_of(path), r);
              CHECK(wrong_in(bucket, path, r, results[at(r)]) == "");
            }
          }
        }
      }
    }
  }
}

TEST_CASE("a sharded mean is rounded as two_shot rounds it, apart or where the gradient was") {
  for (DeviceType device : rank_devices()) {
    for (DType dtype : kDTypes) {
      for (int n : {1, 2, 3, 8}) {
        MeanCase bucket = random_case(dtype, n, kOddSizes);
        for (const Owners& owners : cuts_of(bucket)) {
          bucket.owners = owners;
          for (Shard shard : {Shard::rounded, Shard::in_place}) {
            bucket.shard = shard;
            const auto results = reduce(bucket, Path::sharded, device, 2);
            for (int r = 0; r < n; ++r) {
              CAPTURE(octet::name_of(dtype), n, shard == Shard::in_place, r);
              CHECK(wrong_in(bucket, Path::sharded, r, results[at(r)]) == "");
            }
          }
        }
      }
    }
  }
}

TEST_CASE("one rank: sharded decodes, two_shot only replaces amax") {
  for (DeviceType device : rank_devices()) {
    for (DType dtype : kDTypes) {
      MeanCase bucket = random_case(dtype, 1, kOddSizes);
      bucket.owners = deal(bucket, 128, [](int) { return 0; });
      CAPTURE(octet::name_of(dtype));
      const auto sharded = reduce(bucket, Path::sharded, device);
      CHECK(wrong_in(bucket, Path::sharded, 0, sharded[0]) == "");
      const auto kept = reduce(bucket, Path::two_shot, device);
      for (std::size_t t = 0; t < bucket.tensors(); ++t) {
        const Contribution& own = bucket.gradients[0][t];
        CHECK(first_difference(kept[0].gradients[t], own.bytes) == "");
        CHECK(kept[0].scales[t].scale == own.scale.scale);
        CHECK(kept[0].scales[t].scale_inv == own.scale.scale_inv);
        CHECK(kept[0].scales[t].amax == reference_bound(dtype, bucket.of_tensor(t)));
      }
      CHECK(kept[0].wire.payload + kept[0].wire.metadata == 0);
    }
  }
}

TEST_CASE("one rank keeps a scale that the stored maximum alone would not give") {
  // 455 is cast with scale 1/2 but stored as 448: the bound A alone would give scale 1.
  MeanCase bucket;
  bucket.gradients = {{contribute(DType::e4m3, {455.0f, 3.0f})}};
  bucket.owners = {{{0, 0, 2}}};
  REQUIRE(bucket.gradients[0][0].scale.scale == 0.5f);
  const auto kept = reduce(bucket, Path::two_shot, DeviceType::cpu);
  CHECK(kept[0].scales[0].scale == 0.5f);
  CHECK(kept[0].scales[0].amax == 448.0f);
}

TEST_CASE("equal gradients on all ranks give exactly that gradient") {
  for (DeviceType device : rank_devices()) {
    for (DType dtype : kDTypes) {
      auto values = normal_values(1000, 3);
      values.insert(values.end(), {300.0f, -448.0f, 0.0f, -0.0f});  // the top binade
      const Contribution one = contribute(dtype, values);
      for (int n : {2, 3, 6, 7, 8}) {
        MeanCase bucket;
        bucket.dtype = dtype;
        bucket.gradients.assign(at(n), {one});
        bucket.owners = deal(bucket, 100, [n](int k) { return k % n; });
        const auto kept = reduce(bucket, Path::two_shot, device);
        const auto wide = reduce(bucket, Path::sharded, device);
        for (int r = 0; r < n; ++r) {
          CAPTURE(octet::name_of(dtype), n, r);
          CHECK(first_difference(kept[at(r)].gradients[0], one.bytes) == "");
          CHECK(kept[at(r)].scales[0].scale == one.scale.scale);
          CHECK(wrong_in(bucket, Path::sharded, r, wide[at(r)]) == "");
        }
      }
    }
  }
}

TEST_CASE("many equal values do not stagnate") {
  for (int n : {17, 32}) {
    for (DType dtype : {DType::e4m3, DType::bf16}) {
      const Contribution one = contribute(dtype, {1.0f, 448.0f, -0.0078125f});
      MeanCase bucket;
      bucket.dtype = dtype;
      bucket.gradients.assign(at(n), {one});
      bucket.owners = deal(bucket, 1, [](int k) { return k; });
      const auto kept = reduce(bucket, Path::two_shot, DeviceType::cpu);
      for (const MeanResult& result : kept) CHECK(result.gradients[0] == one.bytes);
    }
  }
}

TEST_CASE("amaxes 2^20 apart, zeros on one rank, zeros everywhere") {
  for (DeviceType device : rank_devices()) {
    const auto check = [&](const std::vector<std::vector<float>>& values) {
      MeanCase bucket;
      for (const auto& rank : values) {
        bucket.gradients.push_back({contribute(DType::e4m3, rank)});
      }
      const int n = bucket.ranks();
      bucket.owners = deal(bucket, 50, [n](int k) { return k % n; });
      for (Path path : kPaths) {
        const auto results = reduce(bucket, path, device, 3);
        for (int r = 0; r < n; ++r) {
          CAPTURE(name_of(path), r);
          CHECK(wrong_in(bucket, path, r, results[at(r)]) == "");
        }
      }
    };
    const std::vector<float> zeros(200, 0.0f);
    check({normal_values(200, 1), normal_values(200, 2, std::ldexp(1.0f, 20)), zeros});
    check({zeros, normal_values(200, 3)});
    check({zeros, zeros, zeros});
  }
}

TEST_CASE("zeros stay zeros with scale 1 over many steps") {
  MeanCase bucket;
  bucket.gradients.assign(2, {contribute(DType::e4m3, std::vector<float>(10, 0.0f))});
  bucket.owners = {{{0, 0, 5}}, {{0, 5, 5}}};
  std::vector<TensorScale> last(2);
  run_ranks(2, [&](Communicator& comm) {
    const Context& ctx = comm.context();
    Tensor gradient(ctx, DType::e4m3, {10});
    zero_bytes(ctx, gradient.as<void>(), 10);
    const Buffer scale = upload(ctx, std::vector<TensorScale>(1));
    const Buffer flag = upload(ctx, std::vector<std::uint32_t>{0});
    MeanReducer reducer(comm, Path::two_shot, {{gradient, {}}}, scale.as<TensorScale>(),
                        bucket.owners);
    for (int step = 0; step < 1000; ++step) reducer.run(flag.as<std::uint32_t>());
    last[at(comm.rank())] = download_one<TensorScale>(ctx, scale.data());
  });
  for (const TensorScale& scale : last) {
    CHECK(scale.scale == 1.0f);
    CHECK(scale.scale_inv == 1.0f);
    CHECK(scale.amax == 0.0f);
  }
}

TEST_CASE("a NaN or infinity on one rank is known to all") {
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  constexpr float kInf = std::numeric_limits<float>::infinity();
  for (DeviceType device : rank_devices()) {
    for (float bad : {kNan, kInf, -kInf}) {
      for (int who : {0, 2}) {
        for (Path path : kPaths) {
          MeanCase bucket = random_case(DType::e4m3, 3, {300, 40});
          bucket.owners = deal(bucket, 64, [](int k) { return k % 3; });
          Contribution& spoilt = bucket.gradients[at(who)][1];
          spoilt.scale = {1.0f, 1.0f, bad};
          spoilt.bytes[7] = std::isnan(bad) ? 0x7F : bad > 0 ? 0x7E : 0xFE;
          const auto results = reduce(bucket, path, device);
          for (int r = 0; r < 3; ++r) {
            CAPTURE(bad, who, name_of(path), r);
            CHECK(results[at(r)].nonfinite == 1);
            CHECK(std::isfinite(results[at(r)].scales[0].amax));
            CHECK_FALSE(std::isfinite(results[at(r)].scales[1].amax));
            CHECK(std::isnan(results[at(r)].scales[1].amax) == std::isnan(bad));
            CHECK(results[at(r)].scales[1].scale == 1.0f);
            CHECK(results[at(r)].intact);
          }
        }
      }
    }
  }
}

TEST_CASE("two_shot is the sharded mean rounded once with the common scale, never saturating") {
  for (DeviceType device : rank_devices()) {
    for (int n : {2, 3, 8}) {
      // Every rank's largest value in the top binade and of the same sign.
      MeanCase bucket;
      for (int r = 0; r < n; ++r) {
        auto values = normal_values(3000, static_cast<std::uint32_t>(r), 120.0f);
        values[5] = 400.0f + static_cast<float>(6 * r);
        bucket.gradients.push_back({contribute(DType::e4m3, values)});
      }
      bucket.owners = deal(bucket, 256, [n](int k) { return k % n; });
      const auto wide = reduce(bucket, Path::sharded, device);
      const auto kept = reduce(bucket, Path::two_shot, device);
      for (int r = 0; r < n; ++r) {
        const TensorScale scale = kept[at(r)].scales[0];
        const auto& pieces = bucket.owners[at(r)];
        const auto& shard = wide[at(r)].shards[0];
        CHECK(first_difference(pieces_of(pieces, 0, kept[at(r)].gradients[0]),
                               reference_rounded(DType::e4m3, shard, scale.scale)) == "");
        for (float mean : shard) CHECK(std::abs(mean) * scale.scale <= 448.0f);
        CHECK(scale.amax == wide[at(r)].scales[0].amax);
      }
    }
  }
}

TEST_CASE("the payload is the sum of the pieces times the peers") {
  const std::vector<std::size_t> counts = {1000, 129, 1, 24000};
  for (DType dtype : kDTypes) {
    for (int n : {1, 2, 3, 8}) {
      MeanCase bucket = random_case(dtype, n, counts);
      bucket.owners = deal(bucket, 100, [n](int k) { return k % n; });
      const std::uint64_t all = (1000 + 129 + 1 + 24000) * size_of(dtype);
      for (Path path : kPaths) {
        const auto results = reduce(bucket, path, DeviceType::cpu, 2);
        std::uint64_t total = 0;
        for (int r = 0; r < n; ++r) {
          CAPTURE(octet::name_of(dtype), n, name_of(path), r);
          const std::uint64_t own = owned_bytes(bucket, r);
          const std::uint64_t gather = path == Path::two_shot ? own * at(n - 1) : 0;
          CHECK(results[at(r)].planned == (n == 1 ? 0 : all - own + gather));
          CHECK(results[at(r)].wire.payload == 2 * results[at(r)].planned);
          CHECK(results[at(r)].wire.metadata ==
                2 * at(n - 1) * counts.size() * sizeof(TensorScale));
          total += results[at(r)].planned;
        }
        // 2 (N-1)/N bytes of every element and rank for the two halves of two_shot, half for one.
        CHECK(total == at(n - 1) * all * (path == Path::two_shot ? 2 : 1));
      }
    }
  }
}

TEST_CASE("runs repeat to the bit") {
  MeanCase bucket = random_case(DType::e4m3, 4, {5000, 333});
  bucket.owners = deal(bucket, 128, [](int k) { return k % 4; });
  for (DeviceType device : rank_devices()) {
    for (Path path : kPaths) {
      const auto results = reduce(bucket, path, device, 20);
      for (int r = 0; r < 4; ++r) CHECK(wrong_in(bucket, path, r, results[at(r)]) == "");
    }
  }
}

TEST_CASE("a gather gives every rank every piece") {
  const std::vector<std::int64_t> counts = {1, 0, 127, 16385, 3};
  for (DeviceType device : rank_devices()) {
    for (DType dtype : {DType::e4m3, DType::bf16, DType::f16, DType::f32}) {
      for (int n : {1, 2, 3, 5, 6, 7}) {
        MeanCase bucket;
        bucket.dtype = dtype;
        std::vector<Contribution> whole;
        for (std::int64_t count : counts) {
          Contribution bytes;
          for (std::size_t i = 0; i < at(count) * size_of(dtype); ++i) {
            bytes.bytes.push_back(static_cast<std::uint8_t>(i * 31 + i / 256));
          }
          whole.push_back(bytes);
        }
        bucket.gradients.assign(at(n), whole);
        bucket.owners = deal(bucket, 113, [n](int k) { return (k * k) % n; });
        std::vector<std::string> wrong(at(n), "did not run");
        run_ranks(
            n,
            [&](Communicator& comm) {
              const Context& ctx = comm.context();
              std::vector<Guarded> memory;
              std::vector<TensorView> views;
              memory.reserve(counts.size());
              for (std::size_t t = 0; t < counts.size(); ++t) {
                memory.emplace_back(ctx, whole[t].bytes.size());
                views.push_back(memory[t].view(dtype, {counts[t]}));
              }
              const std::size_t element = size_of(dtype);
              for (const Piece& piece : bucket.owners[at(comm.rank())]) {
                const auto t = at(piece.tensor);
                copy_bytes(ctx, views[t].as<char>() + at(piece.begin) * element,
                           whole[t].bytes.data() + at(piece.begin) * element,
                           at(piece.count) * element);
              }
              PieceGather gather(comm, views, bucket.owners);
              gather.run();
              std::string& text = wrong[at(comm.rank())];
              text.clear();
              for (std::size_t t = 0; t < counts.size(); ++t) {
                if (text.empty()) {
                  text = first_difference(memory[t].values<std::uint8_t>(), whole[t].bytes);
                }
                if (!memory[t].intact()) text += "bytes outside were written";
              }
              const std::uint64_t expected = owned_bytes(bucket, comm.rank()) * at(n - 1);
              if (gather.payload_bytes() != expected || comm.wire_bytes().payload != expected) {
                text += "payload";
              }
            },
            device);
        for (int r = 0; r < n; ++r) {
          CAPTURE(octet::name_of(dtype), n, r);
          CHECK(wrong[at(r)] == "");
        }
      }
    }
  }
}

TEST_CASE("owners that do not cover every element once are refused by name") {
  const Context ctx = Context::cpu();
  const auto comm = make_single(ctx);
  const Tensor a(ctx, DType::e4m3, {100}), b(ctx, DType::e4m3, {4, 5});
  const auto refusal = [&](const Owners& owners) {
    const std::string message = error_of([&] { PieceGather(*comm, {a, b}, owners); });
    TensorScale scales[2];
    CHECK(error_of([&] {
            MeanReducer(*comm, Path::two_shot, {{a, {}}, {b, {}}}, scales, owners);
          }).substr(12) == message.substr(12));
    return message;
  };
  const Piece all_b{1, 0, 20};
  CHECK(error_of([&] { PieceGather(*comm, {a, b}, {{{0, 0, 100}, all_b}}); }) == "no error");
  CHECK(missing(refusal({}), {"0 lists", "1 ranks"}) == "");
  CHECK(missing(refusal({{all_b}, {{0, 0, 100}}}), {"2 lists", "1 ranks"}) == "");
  CHECK(missing(refusal({{all_b}}), {"element 0 of tensor 0", "no piece"}) == "");
  CHECK(missing(refusal({{{0, 0, 99}, all_b}}), {"element 99 of tensor 0", "no piece"}) == "");
  CHECK(missing(refusal({{{0, 0, 10}, {0, 11, 89}, all_b}}), {"element 10", "no piece"}) == "");
  CHECK(missing(refusal({{{0, 0, 50}, {0, 49, 51}, all_b}}), {"element 49", "another"}) == "");
  CHECK(missing(refusal({{{0, 0, 101}, all_b}}), {"101", "tensor 0 has 100"}) == "");
  CHECK(missing(refusal({{{0, -1, 101}, all_b}}), {"-1", "tensor 0 has 100"}) == "");
  CHECK(missing(refusal({{{0, 0, 100}, {1, 30, -10}, all_b}}), {"-10", "tensor 1 has 20"}) == "");
  CHECK(missing(refusal({{{2, 0, 100}, all_b}}), {"tensor 2 of 2"}) == "");
}

TEST_CASE("tensors that do not fit are refused by name") {
  const Context ctx = Context::cpu();
  const auto comm = make_single(ctx);
  const Tensor fp8(ctx, DType::e4m3, {10}), fp8b(ctx, DType::e4m3, {10}),
      bf16(ctx, DType::bf16, {10});
  const Tensor f16(ctx, DType::f16, {10}), f32(ctx, DType::f32, {10}),
      short32(ctx, DType::f32, {9});
  TensorScale scales[2];
  const Owners one = {{{0, 0, 10}}};
  const Owners two = {{{0, 0, 10}, {1, 0, 10}}};
  const auto refusal = [&](Path path, const std::vector<ReduceTensor>& tensors,
                           const Owners& owners) {
    return error_of([&] { MeanReducer(*comm, path, tensors, scales, owners); });
  };
  CHECK(refusal(Path::sharded, {{fp8, f32}}, one) == "no error");
  CHECK(missing(refusal(Path::two_shot, {{f16, {}}}, one), {"f16", "e4m3, bf16, f32"}) == "");
  CHECK(missing(refusal(Path::two_shot, {{fp8, {}}, {bf16, {}}}, two), {"bf16", "e4m3"}) == "");
  CHECK(missing(refusal(Path::two_shot, {{fp8, f32}}, one), {"two_shot", "shard"}) == "");
  CHECK(refusal(Path::sharded, {{fp8, fp8}}, one) == "no error");
  CHECK(missing(refusal(Path::sharded, {{fp8, bf16}}, one), {"bf16", "f32", "e4m3"}) == "");
  const TensorView start{fp8.view().data, DType::e4m3, {5}, ctx.device()};
  CHECK(missing(refusal(Path::sharded, {{fp8, start}}, one), {"[5]", "[10]"}) == "");
  CHECK(missing(refusal(Path::sharded, {{fp8, f32}, {fp8b, fp8b}}, two),
                {"tensor 1", "e4m3", "f32"}) == "");
  CHECK(missing(refusal(Path::sharded, {{fp8, short32}}, one), {"9", "10"}) == "");
  CHECK(missing(refusal(Path::sharded, {{fp8, {}}}, one), {"shard"}) == "");
  CHECK(missing(error_of([&] {
                  MeanReducer(*comm, Path::two_shot, {{fp8, {}}}, nullptr, one);
                }),
                {"scales is null"}) == "");
  MeanReducer reducer(*comm, Path::two_shot, {{fp8, {}}}, scales, one);
  CHECK(missing(error_of([&] { reducer.run(nullptr); }), {"nonfinite"}) == "");
}

TEST_CASE("different lists on two ranks end in an error on both") {
  std::vector<std::string> errors(2);
  run_ranks(2, [&](Communicator& comm) {
    const Context& ctx = comm.context();
    const Tensor tensor(ctx, DType::e4m3, {10});
    const std::int64_t cut = comm.rank() == 0 ? 5 : 6;
    PieceGather gather(comm, {tensor}, {{{0, 0, cut}}, {{0, cut, 10 - cut}}});
    errors[at(comm.rank())] = error_of([&] { gather.run(); });
  });
  CHECK(missing(errors[0], {"part 0", "5 bytes on rank 0", "6 on rank 1"}) == "");
  CHECK(missing(errors[1], {"part 0", "5 bytes on rank 0", "6 on rank 1"}) == "");
}

TEST_CASE("an empty bucket does nothing and meets nobody") {
  const auto comm = make_single(Context::cpu());
  std::uint32_t flag = 0;
  MeanReducer reducer(*comm, Path::sharded, {}, nullptr, {{}});
  reducer.run(&flag);
  CHECK(flag == 0);
  CHECK(reducer.payload_bytes() == 0);
  CHECK(reducer.buffer_bytes() == 0);
}

}  // namespace octet::test
