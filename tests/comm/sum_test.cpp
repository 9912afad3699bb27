// SPDX-License-Identifier: Apache-2.0
#include "octet/comm/sum_reducer.hpp"

#include <limits>

#include "octet/ops/quantize.hpp"
#include "octet/optim/adamw.hpp"
#include "support/catch.hpp"
#include "support/errors.hpp"
#include "support/random.hpp"
#include "support/ranks.hpp"
#include "support/sum_ranks.hpp"

namespace octet::test {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();

std::size_t at(std::int64_t i) { return static_cast<std::size_t>(i); }
Contribution stored(const std::vector<float>& values) { return contribute(DType::e4m3, values); }

std::vector<SumResult> reduce(const SumCase& bucket, DeviceType device, int runs = 1) {
  std::vector<SumResult> results(at(bucket.ranks()));
  run_ranks(
      bucket.ranks(),
      [&](Communicator& comm) { results[at(comm.rank())] = sum_on_rank(comm, bucket, runs); },
      device);
  return results;
}

void check(const SumCase& bucket, DeviceType device, int runs = 1) {
  const auto results = reduce(bucket, device, runs);
  for (int r = 0; r < bucket.ranks(); ++r) {
    CAPTURE(bucket.ranks(), bucket.mu_exponent, r);
    CHECK(wrong_in(bucket, results[at(r)], runs) == "");
  }
}

SumCase random_case(int ranks, const std::vector<std::size_t>& counts) {
  SumCase bucket;
  for (int r = 0; r < ranks; ++r) {
    std::vector<Contribution> own;
    for (std::size_t t = 0; t < counts.size(); ++t) {
      const auto seed = static_cast<std::uint32_t>(100 * r + static_cast<int>(t));
      own.push_back(stored(wide_values(counts[t], seed, -12 - r, 2 * r)));
    }
    bucket.gradients.push_back(own);
  }
  return bucket;
}

SumCase equal_case(int ranks, const std::vector<float>& values) {
  SumCase bucket;
  bucket.gradients.assign(at(ranks), {stored(values)});
  return bucket;
}

float mean_of(const SumResult& result, std::size_t i) {
  const Contribution& means = result.means[0];
  return static_cast<float>(table_of(DType::e4m3).decode(means.bytes[i])) * means.scale.scale_inv;
}

// The state of an AutoScale after so many updates of a step with these counts.
std::int32_t updated(const Context& ctx, std::int32_t exponent, int ranks, std::uint64_t saturated,
                     std::uint64_t values, int steps = 1) {
  AutoScale mu(ctx, ranks);
  for (int i = 0; i < steps; ++i) {
    const std::int32_t now = i == 0 ? exponent : mu.exponent_sync();
    write_one(ctx, mu.state(), AutoScaleState{now, 0, saturated, values});
    mu.update();
  }
  const auto left = download_one<AutoScaleState>(ctx, mu.state());
  CHECK(left.saturated + left.values == 0);
  return left.mu_exponent;
}

}  // namespace

TEST_CASE("a hop adds any two codes as NCCL does, in half precision, rounded at once") {
  const FormatTable& fp8 = table_of(DType::e4m3);
  const FormatTable& half = table_of(DType::f16);
  std::vector<std::uint8_t> a, b, expected;
  for (std::uint32_t pair = 0; pair < 65536; ++pair) {
    a.push_back(static_cast<std::uint8_t>(pair >> 8));
    b.push_back(static_cast<std::uint8_t>(pair));
    const double sum = half.round(fp8.decode(a.back()) + fp8.decode(b.back()));
    expected.push_back(static_cast<std::uint8_t>(fp8.encode(sum)));
  }
  for (const Context& ctx : test_contexts()) {
    for (int rank : {0, 1}) {
      const Buffer own = upload(ctx, rank == 0 ? a : b);
      std::vector<std::uint8_t> blocks(2 * 65536, 0x7F);  // the own one is not read
      const auto& theirs = rank == 0 ? b : a;
      std::copy(theirs.begin(), theirs.end(), blocks.begin() + (1 - rank) * 65536);
      const Buffer staging = upload(ctx, blocks);
      add_codes(ctx, own.as<std::uint8_t>(), 65536, staging.as<std::uint8_t>(), 65536, 2, rank);
      CHECK(first_difference(download<std::uint8_t>(ctx, own.data(), 65536), expected) == "");
    }
  }
}

TEST_CASE("sums in FP8 are exact to the bit for every world size and mu") {
  for (DeviceType device : rank_devices()) {
    for (int n : {1, 2, 3, 5, 8}) {
      SumCase bucket = random_case(n, {1, 2, 3, 0, 127, 129, 16384 + 1});
      for (std::int32_t mu : {0, 999, 1000, 2500, 16000, -1, -1000, -3001}) {
        bucket.mu_exponent = mu;
        check(bucket, device, 2);
      }
    }
  }
}

TEST_CASE("equal gradients in the top binade: exact for two ranks, near for more, none clipped") {
  for (DeviceType device : rank_devices()) {
    auto values = normal_values(1000, 3);
    values.insert(values.end(), {300.0f, -448.0f, 0.0f});
    for (int n : {1, 2, 3, 8}) {
      const SumCase bucket = equal_case(n, values);
      check(bucket, device);
      const SumResult result = reduce(bucket, device)[0];
      const Contribution& own = bucket.gradients[0][0];
      // A hop is off by at most 1/16 of its sum; adding two halves by nothing.
      const double allowed = n <= 2 ? 0.0 : (n - 1) / 16.0;
      for (std::size_t i = 0; i < values.size(); ++i) {
        const double expected = table_of(DType::e4m3).decode(own.bytes[i]) * own.scale.scale_inv;
        if (std::abs(expected) < 1) continue;  // may become subnormal on the way
        CAPTURE(n, i);
        CHECK(std::abs(mean_of(result, i) - expected) <= allowed * std::abs(expected));
      }
    }
  }
}

TEST_CASE("the division by the number of ranks is exact, not a code") {
  // One rank has a value and the others none, so nothing but the division can be off.
  for (DeviceType device : rank_devices()) {
    for (int n : {2, 3, 5, 6, 7, 12, 24}) {
      SumCase bucket = equal_case(n, {0.0f, 0.0f});
      bucket.gradients[at(n / 2)][0] = stored({448.0f, 1.0f});
      check(bucket, device);
      for (const SumResult& result : reduce(bucket, device)) {
        CAPTURE(n);
        CHECK(std::abs(mean_of(result, 0) * static_cast<float>(n) - 448.0f) <= 448.0f * 0x1p-22f);
        CHECK(std::abs(mean_of(result, 1) * static_cast<float>(n) - 1.0f) <= 0x1p-22f);
      }
    }
  }
}

TEST_CASE("amaxes 2^20 apart, zeros on one rank, tiny and huge amaxes") {
  for (DeviceType device : rank_devices()) {
    const auto zeros = std::vector<float>(200, 0.0f);
    const auto small = normal_values(200, 1);
    SumCase bucket;
    bucket.gradients = {{stored(small)}, {stored(normal_values(200, 2, 0x1p20f))}, {stored(zeros)}};
    check(bucket, device);
    // The rank of zeros has scale 1, which would bury what is small.
    bucket.gradients = {{stored(normal_values(200, 2, 0x1p-40f))}, {stored(zeros)}};
    check(bucket, device);
    CHECK(reduce(bucket, device)[1].means[0].scale.amax > 0x1p-41f);
    for (float amax : {1e-45f, 1e-38f, 1.3e-36f, 3e38f}) {
      for (int n : {1, 2, 3, 8}) {
        bucket = equal_case(n, {amax, -amax / 2, 0.0f});
        for (std::int32_t mu : {0, 16000}) {
          bucket.mu_exponent = mu;
          check(bucket, device);
          const TensorScale scale = reduce(bucket, device)[0].means[0].scale;
          CAPTURE(amax, n, mu, scale.scale, scale.scale_inv);
          CHECK(std::isnormal(scale.scale));
          CHECK(std::isnormal(scale.scale_inv));
          CHECK(scale.scale * scale.scale_inv == 1.0f);
        }
      }
    }
  }
}

TEST_CASE("zeros stay zeros with scale 1 over many steps") {
  std::vector<TensorScale> last(3);
  std::vector<std::vector<std::uint8_t>> codes(3);
  run_ranks(3, [&](Communicator& comm) {
    const Context& ctx = comm.context();
    const Tensor gradient(ctx, DType::e4m3, {100});
    zero_bytes(ctx, gradient.as<void>(), 100);
    const Buffer scale = upload(ctx, std::vector<TensorScale>(1));
    const Buffer flag = upload(ctx, std::vector<std::uint32_t>{0});
    AutoScale mu(ctx, 3);
    SumReducer reducer(comm, {gradient}, scale.as<TensorScale>(), &mu);
    for (int step = 0; step < 1000; ++step) {
      reducer.run(flag.as<std::uint32_t>());
      mu.update();
    }
    last[at(comm.rank())] = download_one<TensorScale>(ctx, scale.data());
    codes[at(comm.rank())] = download<std::uint8_t>(ctx, gradient.as<void>(), 100);
  });
  for (std::size_t r = 0; r < 3; ++r) {
    CHECK(last[r].scale == 1.0f);
    CHECK(last[r].scale_inv == 1.0f);
    CHECK(last[r].amax == 0.0f);
    CHECK(codes[r] == std::vector<std::uint8_t>(100, 0));
  }
}

TEST_CASE("a NaN or infinity on one rank is known to all, and NaN survives the sum") {
  for (DeviceType device : rank_devices()) {
    for (float bad : {kNan, kInf, -kInf}) {
      for (int who : {0, 2}) {
        SumCase bucket = random_case(3, {300, 40});
        Contribution& spoilt = bucket.gradients[at(who)][1];
        spoilt.scale.amax = bad;
        spoilt.bytes[7] = std::isnan(bad) ? 0x7F : bad > 0 ? 0x7E : 0xFE;  // as casts store them
        for (const SumResult& result : reduce(bucket, device)) {
          CAPTURE(bad, who);
          CHECK(result.nonfinite == 1);
          CHECK(result.intact);
          CHECK(std::isfinite(result.means[0].scale.amax));
          CHECK(std::isnan(result.means[1].scale.amax) == std::isnan(bad));
          if (std::isnan(bad)) CHECK((result.means[1].bytes[7] & 0x7F) == 0x7F);
          CHECK(std::isnormal(result.means[1].scale.scale));
        }
      }
    }
  }
}

TEST_CASE("a NaN that no amax tells of is found in the sum") {
  for (DeviceType device : rank_devices()) {
    SumCase bucket = random_case(2, {300, 40});
    bucket.gradients[1][0].bytes[299] = 0xFF;
    for (const SumResult& result : reduce(bucket, device)) {
      CHECK(result.nonfinite == 1);
      CHECK(std::isnan(result.means[0].scale.amax));
      CHECK(std::isfinite(result.means[1].scale.amax));
      CHECK((result.means[0].bytes[299] & 0x7F) == 0x7F);
    }
  }
}

TEST_CASE("overflow of the sum alone is counted per tensor and halves mu on every rank") {
  for (DeviceType device : rank_devices()) {
    // With mu = 4 of 4 ranks there is no headroom: three of a kind pass the maximum.
    SumCase bucket;
    for (int r = 0; r < 4; ++r) {
      std::vector<float> loud(1000, 1.0f), quiet(1000, 0.25f);
      loud[0] = quiet[0] = 448.0f;
      for (std::size_t i = 10; i < 30; ++i) loud[i] = r == 3 ? 1.0f : -160.0f;
      quiet[5] = 200.0f;
      bucket.gradients.push_back({stored(loud), stored(quiet)});
    }
    bucket.mu_exponent = 2000;
    check(bucket, device);
    for (const SumResult& result : reduce(bucket, device)) {
      CHECK(result.saturated == std::vector<std::uint64_t>{21, 2});
      CHECK(result.mu_exponent == 1000);
      CHECK(result.nonfinite == 0);
    }
    bucket.mu_exponent = -1000;
    for (const SumResult& result : reduce(bucket, device)) {
      CHECK(result.saturated == std::vector<std::uint64_t>{0, 0});
      CHECK(result.mu_exponent == -999);
    }
  }
}

TEST_CASE("mu halves above 0.001 % of a step's values, not at it, and grows to double in 1000") {
  for (const Context& ctx : test_contexts()) {
    CHECK(updated(ctx, 500, 8, 1, 100000) == 501);
    CHECK(updated(ctx, 500, 8, 2, 100000) == -500);
    CHECK(updated(ctx, 500, 8, 1, 99999) == -500);
    CHECK(updated(ctx, 500, 8, 10'000'000, 1'000'000'000'000) == 501);
    CHECK(updated(ctx, 500, 8, 10'000'001, 1'000'000'000'000) == -500);
    CHECK(updated(ctx, 500, 8, 0, 0) == 500);  // no sum in this step
    CHECK(updated(ctx, -500, 8, 0, 100000, 1000) == 500);
    CHECK(updated(ctx, -500, 8, 1, 100000, 999) == 499);
    CHECK(updated(ctx, 2999, 8, 0, 1, 5) == 3000);  // the headroom of 8 ranks
    CHECK(updated(ctx, 0, 1, 0, 1, 5) == 0);
    CHECK(updated(ctx, 2000, 3, 0, 1) == 2000);
    CHECK(updated(ctx, -15500, 8, 1, 1) == -16000);
  }
}

TEST_CASE("mu goes through a checkpoint, and what it cannot be is refused") {
  for (const Context& ctx : test_contexts()) {
    AutoScale mu(ctx, 2);
    CHECK(mu.exponent_sync() == 0);
    mu.set_exponent_sync(-1234);
    CHECK(mu.exponent_sync() == -1234);
    CHECK(missing(error_of([&] { mu.set_exponent_sync(16001); }), {"mu", "16001", "16000"}) == "");
    CHECK(mu.exponent_sync() == -1234);
  }
  CHECK(missing(error_of([] { AutoScale(Context::cpu(), 0); }), {"ranks", "0"}) == "");
}

namespace {

// What a trainer of its own writes: cast, sum, mu, AdamW with the states of O2. `wide`: the update
// gets the means decoded instead, in f32.
std::vector<std::uint8_t> train_with_sums(Communicator& comm, int steps, bool wide) {
  const Context& ctx = comm.context();
  const Shape shape = {96, 64};
  const auto count = at(shape.numel());
  const Tensor codes(ctx, DType::e4m3, shape), means(ctx, DType::f32, shape);
  const Tensor weight(ctx, DType::e4m3, shape);
  const Buffer scales = upload(ctx, std::vector<TensorScale>(2));
  const Buffer flag = upload(ctx, std::vector<std::uint32_t>{0});
  auto *scale = scales.as<TensorScale>(), *wide_scale = scale + 1;
  AutoScale mu(ctx, comm.size());
  SumReducer reducer(comm, {codes}, scale, &mu);
  AdamWParam param = {
      .shape = shape,
      .formats = {WeightFormat::e4m3, StateFormat::f16, StateFormat::e4m3, StateFormat::f16},
      .gradient = wide ? means : codes,
      .gradient_scale = wide ? wide_scale : scale,
      .weight = weight};
  AdamW optimizer(ctx, {}, {param});
  const Buffer init = upload(ctx, normal_values(count, 1, 0.02f));
  optimizer.initialise(0, view_of(ctx, init, DType::f32, shape));
  for (int step = 0; step < steps; ++step) {
    const auto seed = static_cast<std::uint32_t>(10 * step + comm.rank());
    const Buffer gradient = upload(ctx, normal_values(count, seed));
    quantize(ctx, {.in = view_of(ctx, gradient, DType::f32, shape),
                   .out = {codes, scale},
                   .nonfinite = flag.as<std::uint32_t>()});
    reducer.run(flag.as<std::uint32_t>());
    mu.update();
    if (wide) {
      convert(ctx, {codes, scale}, means);
      const float amax = download_one<TensorScale>(ctx, scale).amax;
      write_one(ctx, wide_scale, TensorScale{1.0f, 1.0f, amax});
    }
    optimizer.step({.lr = 1e-3f, .nonfinite = flag.as<std::uint32_t>()});
  }
  require(mu.exponent_sync() == steps, "mu is 2^(", mu.exponent_sync(), " / 1000)");
  auto result = download_bytes(ctx, weight);
  const auto states = download<std::uint8_t>(ctx, optimizer.scales(), 4 * sizeof(TensorScale));
  result.insert(result.end(), states.begin(), states.end());
  return result;
}

}  // namespace

TEST_CASE("a trainer with sums, mu and AdamW: equal weights on all ranks, those of the means") {
  for (DeviceType device : rank_devices()) {
    std::vector<std::vector<std::uint8_t>> sums(3), means(3);
    run_ranks(
        3,
        [&](Communicator& comm) {
          sums[at(comm.rank())] = train_with_sums(comm, 5, false);
          means[at(comm.rank())] = train_with_sums(comm, 5, true);
        },
        device);
    for (std::size_t r = 0; r < 3; ++r) {
      CHECK(first_difference(sums[r], sums[0]) == "");
      CHECK(first_difference(sums[r], means[0]) == "");
    }
  }
}

TEST_CASE("the payload is that of a ring, scales are metadata") {
  const std::vector<std::size_t> counts = {1024, 64, 16, 24000};
  const std::uint64_t all = 1024 + 64 + 16 + 24000;
  for (int n : {1, 2, 3, 8}) {
    std::uint64_t total = 0;
    for (const SumResult& result : reduce(random_case(n, counts), DeviceType::cpu, 2)) {
      CHECK(result.wire.payload == 2 * result.planned);
      CHECK(result.wire.metadata == 2 * at(n - 1) * counts.size() * sizeof(TensorScale));
      total += result.planned;
    }
    CHECK(total == 2 * at(n - 1) * all);
    CHECK(sum_e4m3_bytes(24000, n) == 2 * 24000 * at(n - 1) / at(n));
  }
}

namespace {

// A transport with a sum of its own that does not work here.
class OldTransport final : public Communicator {
 public:
  using Communicator::Communicator;
  int rank() const override { return 0; }
  int size() const override { return 1; }
  std::string name() const override { return "old"; }
  bool has_sum_e4m3() const override { return true; }
  std::string sum_e4m3_refusal() const override { return "cuda:0 has 8.9"; }

 protected:
  void do_exchange(std::span<const SendPart>, std::span<const RecvPart>) override {}
  void do_all_gather(const void* send, void* recv, std::size_t bytes) override {
    copy_bytes(context(), recv, send, bytes);
  }
};

}  // namespace

TEST_CASE("gradients that do not fit and transports that cannot add are refused by name") {
  const Context ctx = Context::cpu();
  const auto comm = make_single(ctx);
  const Tensor codes(ctx, DType::e4m3, {8}), wide(ctx, DType::bf16, {8});
  TensorScale scale;
  const auto refusal = [&](Communicator& over, const TensorView& gradient, TensorScale* scales) {
    return error_of([&] { SumReducer(over, {gradient}, scales); });
  };
  CHECK(refusal(*comm, codes, &scale) == "no error");
  CHECK(missing(refusal(*comm, wide, &scale), {"gradient 0", "bf16", "e4m3"}) == "");
  CHECK(missing(refusal(*comm, codes, nullptr), {"scales is null"}) == "");
  TensorView lost = codes;
  lost.data = nullptr;
  CHECK(missing(refusal(*comm, lost, &scale), {"gradient 0", "[8]", "null"}) == "");
  OldTransport old(ctx);
  CHECK(missing(refusal(old, codes, &scale), {"rank 0", "cuda:0 has 8.9", "two_shot"}) == "");
  SumReducer reducer(*comm, {codes}, &scale);
  CHECK(missing(error_of([&] { reducer.run(nullptr); }), {"nonfinite", "null"}) == "");
  CHECK(missing(error_of([&] { comm->sum_e4m3(codes.as<void>(), 8); }), {"single"}) == "");
  CHECK(missing(error_of([&] { comm->sum_e4m3(codes.as<void>(), -8); }), {"count", "-8"}) == "");
}

}  // namespace octet::test
