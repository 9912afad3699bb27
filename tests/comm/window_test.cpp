// SPDX-License-Identifier: Apache-2.0
// Reductions in one kernel over the memory of all ranks: the bits of send and receive, and no hang.
// The ranks are threads; on CUDA they share one GPU, where kernels of all of them run together.
#include <atomic>
#include <limits>
#include <thread>

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
const char* name_of(DeviceType device) { return device == DeviceType::cpu ? "cpu" : "cuda"; }
const char* name_of(Path path) { return path == Path::sharded ? "sharded" : "two_shot"; }

std::vector<MeanResult> reduce(const MeanCase& bucket, Path path, DeviceType device,
                               std::size_t shift = 0, int runs = 1) {
  std::vector<MeanResult> results(at(bucket.ranks()));
  run_ranks(bucket.ranks(),
            [&](Communicator& comm) {
              BucketWindow window(comm, bucket, shift);
              results[at(comm.rank())] = reduce_on_rank(comm, bucket, path, runs, &window);
            },
            {device, true});
  return results;
}

void check_path(const MeanCase& bucket, Path path, DeviceType device, std::size_t shift, int runs) {
  const auto results = reduce(bucket, path, device, shift, runs);
  for (int r = 0; r < bucket.ranks(); ++r) {
    CAPTURE(octet::name_of(bucket.dtype), bucket.ranks(), name_of(path),
            static_cast<int>(bucket.shard), r, shift, name_of(device));
    CHECK(wrong_in(bucket, path, r, results[at(r)]) == "");
    CHECK(results[at(r)].wire.payload == at(runs) * results[at(r)].planned);
  }
}

void check_case(MeanCase bucket, DeviceType device, std::size_t shift = 0, int runs = 1) {
  check_path(bucket, Path::two_shot, device, shift, runs);
  for (Shard shard : kShards) {
    bucket.shard = shard;
    check_path(bucket, Path::sharded, device, shift, runs);
  }
}

}  // namespace

TEST_CASE("over windows means are exact to the bit for every dtype, world size and cut") {
  for (DeviceType device : rank_devices()) {
    for (DType dtype : kDTypes) {
      for (int n : {2, 3, 4, 5, 8}) {
        MeanCase bucket = random_case(dtype, n, kOddSizes);
        bucket.owners = deal(bucket, 37, [n](int k) { return (k * 7 + 1) % n; });
        check_case(bucket, device);
        bucket.owners = deal(bucket, 5008, [n](int k) { return k % n; });
        check_case(bucket, device, 0, 3);
        bucket.owners = deal(bucket, 128, [n](int) { return n - 1; });  // empty shards
        check_case(bucket, device);
        check_case(bucket, device, 4);
      }
    }
  }
}

TEST_CASE("over windows large buckets of several blocks are exact") {
  for (DeviceType device : rank_devices()) {
    for (DType dtype : kDTypes) {
      for (int n : {2, 3, 8}) {
        MeanCase bucket = random_case(dtype, n, {300'007, 5, 1 << 19, 4096});
        bucket.owners = deal(bucket, 16'384, [n](int k) { return k % n; });
        check_case(bucket, device, 0, 2);
      }
    }
  }
}

TEST_CASE("over windows 64 ranks are exact") {
  // On one GPU the kernels of so many ranks do not get a queue each.
  MeanCase bucket = random_case(DType::e4m3, 64, {1, 4099, 128});
  bucket.owners = deal(bucket, 64, [](int k) { return k % 64; });
  check_case(bucket, DeviceType::cpu);
}

TEST_CASE("over windows a value that is not finite on one rank reaches every rank") {
  const float inf = std::numeric_limits<float>::infinity();
  for (DeviceType device : rank_devices()) {
    for (float bad : {NAN, inf, -inf}) {
      MeanCase bucket = random_case(DType::bf16, 3, {64, 64});
      auto values = normal_values(64, 5);
      values[17] = bad;
      bucket.gradients[1][1] = contribute(DType::bf16, values);
      bucket.gradients[1][1].scale.amax = bad;  // as measure_amax() has it
      bucket.owners = deal(bucket, 32, [](int k) { return k % 3; });
      for (Path path : kPaths) {
        for (const MeanResult& result : reduce(bucket, path, device)) {
          CAPTURE(bad, name_of(path), name_of(device));
          CHECK(result.nonfinite == 1);
          CHECK(!std::isfinite(result.scales[1].amax));
          CHECK(std::isfinite(result.scales[0].amax));
        }
      }
    }
  }
}

TEST_CASE("a kernel whose peers do not come gives up at the deadline and says whom it missed") {
  using namespace std::chrono_literals;
  for (DeviceType device : rank_devices()) {
    const MeanCase bucket = [] {
      MeanCase b = random_case(DType::e4m3, 3, {4096});
      b.owners = deal(b, 1024, [](int k) { return k % 3; });
      return b;
    }();
    std::vector<std::string> failures(3);
    std::vector<double> seconds(3);
    std::vector<std::uint32_t> flags(3);
    std::atomic<int> given_up = 0;
    run_ranks(
        3,
        [&](Communicator& comm) {
          BucketWindow window(comm, bucket, 0);
          const Context& ctx = comm.context();
          const TensorView gradient{window.take(4096), DType::e4m3, {4096}, ctx.device()};
          const Buffer flag = upload(ctx, std::vector<std::uint32_t>{0});
          MeanReducer reducer(comm, Path::two_shot, {{gradient, {}}}, window.scales(),
                              bucket.owners, 4, window.get());
          window.meet(comm);
          const auto begin = std::chrono::steady_clock::now();
          if (comm.rank() != 1) {
            reducer.run(flag.as<std::uint32_t>());
            failures[at(comm.rank())] = error_of([&] { comm.synchronize(); });
            flags[at(comm.rank())] = download_one<std::uint32_t>(ctx, flag.data());
            ++given_up;
          }
          while (given_up < 2) std::this_thread::sleep_for(1ms);
          if (comm.rank() == 1) failures[1] = error_of([&] { comm.check(); });
          seconds[at(comm.rank())] =
              std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
        },
        {device, true}, 700ms);
    CAPTURE(name_of(device));
    CHECK(missing(failures[0], {"two_shot of bucket 4", "on rank 0 of 3",
                                "rank 1 did not come to the kernel within 700 ms"}) == "");
    CHECK(missing(failures[2], {"two_shot of bucket 4", "on rank 2 of 3",
                                "rank 1 did not come to the kernel within 700 ms"}) == "");
    CHECK(missing(failures[1], {"rank 1 of 3: rank ", " gave up: two_shot of bucket 4",
                                "rank 1 did not come to the kernel within 700 ms"}) == "");
    CHECK(flags == std::vector<std::uint32_t>{1, 0, 1});
    CHECK(seconds[0] < 10);
  }
}

TEST_CASE("gradients and scales outside of the window are refused") {
  std::vector<std::string> errors;
  run_ranks(2, [&](Communicator& comm) {
    const Context& ctx = comm.context();
    const Buffer outside(ctx, 4096);
    WindowOffer offer = comm.make_window(4096);
    auto* inside = static_cast<std::uint8_t*>(offer.window->data());
    const auto make = [&](void* data, void* scales) {
      MeanReducer(comm, Path::two_shot, {{{data, DType::e4m3, {512}, ctx.device()}, {}}},
                  static_cast<TensorScale*>(scales), Owners{{{0, 0, 256}}, {{0, 256, 256}}}, -1,
                  offer.window.get());
    };
    const auto result = [&](void* data, void* scales) {
      return error_of([&] { make(data, scales); });
    };
    if (comm.rank() != 0) return;
    errors = {result(inside, inside + 1024), result(outside.data(), inside),
              result(inside + 4096 - 256, inside), result(inside, outside.data())};
  });
  CHECK(errors[0] == "no error");
  CHECK(errors[1] == "MeanReducer: gradient 0 does not lie in the window");
  CHECK(errors[2] == "MeanReducer: gradient 0 does not lie in the window");
  CHECK(errors[3] == "MeanReducer: the scales do not lie in the window");
}

TEST_CASE("ranks that ask for windows of different sizes are told so") {
  std::vector<std::string> errors(2);
  run_ranks(2, [&](Communicator& comm) {
    errors[at(comm.rank())] = error_of([&] { comm.make_window(comm.rank() == 0 ? 100 : 200); });
  });
  for (const std::string& error : errors) {
    CHECK(error ==
          "make_window: rank 0 asks for 100 bytes, rank 1 for 200; all ranks must ask for "
          "the same");
  }
}

}  // namespace octet::test
