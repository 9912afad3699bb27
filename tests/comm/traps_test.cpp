// SPDX-License-Identifier: Apache-2.0
// Mistakes of other libraries that no other test would notice: many ranks, traffic that meets,
// mixed devices, buckets of very different sizes, memory that is read before it is written.
#include "octet/comm/collectives.hpp"
#include "octet/comm/sum_reducer.hpp"
#include "support/catch.hpp"
#include "support/engine_model.hpp"
#include "support/errors.hpp"
#include "support/forwarding_rank.hpp"
#include "support/mean_ranks.hpp"
#include "support/sum_ranks.hpp"

namespace octet::test {
namespace {

using Path = MeanReducer::Path;
constexpr Path kPaths[] = {Path::sharded, Path::two_shot};

std::size_t at(std::int64_t i) { return static_cast<std::size_t>(i); }

std::vector<MeanResult> reduce(const MeanCase& bucket, Path path, int runs = 1) {
  std::vector<MeanResult> results(at(bucket.ranks()));
  run_ranks(bucket.ranks(), [&](Communicator& comm) {
    results[at(comm.rank())] = reduce_on_rank(comm, bucket, path, runs);
  });
  return results;
}

// Empty, or what is wrong on the first rank where something is.
std::string wrong_in(const MeanCase& bucket, Path path, const std::vector<MeanResult>& results) {
  for (int r = 0; r < bucket.ranks(); ++r) {
    const std::string wrong = wrong_in(bucket, path, r, results[at(r)]);
    if (!wrong.empty()) return "rank " + std::to_string(r) + ": " + wrong;
  }
  return {};
}

}  // namespace

TEST_CASE("64 ranks: means are exact to the bit on every path") {
  for (DType dtype : {DType::e4m3, DType::bf16, DType::f32}) {
    MeanCase bucket = random_case(dtype, 64, {1, 0, 129, 6401});
    bucket.owners = deal(bucket, 50, [](int k) { return (k * 7 + 1) % 64; });
    for (Path path : kPaths) {
      CAPTURE(name_of(dtype), path == Path::sharded);
      CHECK(wrong_in(bucket, path, reduce(bucket, path)) == "");
    }
  }
}

TEST_CASE("64 equal contributions are their own mean: nothing stagnates or saturates") {
  const Contribution one = contribute(DType::e4m3, {1.0f, 448.0f, -300.0f, -0x1p-9f, 0x1p-6f});
  MeanCase bucket;
  bucket.gradients.assign(64, {one});
  bucket.owners = deal(bucket, 1, [](int k) { return k * 13; });
  for (const MeanResult& result : reduce(bucket, Path::two_shot)) {
    CHECK(result.gradients[0] == one.bytes);
    CHECK(result.scales[0].scale == one.scale.scale);
  }
  CHECK(wrong_in(bucket, Path::sharded, reduce(bucket, Path::sharded)) == "");
}

TEST_CASE("bytes on the wire are the formula's, tensor by tensor and pass by pass") {
  constexpr int kPasses = 3;
  for (int n : {2, 3, 8, 64}) {
    const std::vector<std::size_t> counts = {1, 127, 24000};
    for (std::size_t count : counts) {
      MeanCase tensor = random_case(DType::e4m3, n, {count});
      tensor.owners = deal(tensor, 100, [n](int k) { return k % n; });
      for (Path path : kPaths) {
        std::uint64_t payload = 0, metadata = 0;
        for (const MeanResult& result : reduce(tensor, path, kPasses)) {
          payload += result.wire.payload;
          metadata += result.wire.metadata;
        }
        // N ranks times 2 (N-1)/N bytes an element, or half of it where only shards are wanted.
        const std::uint64_t peers = at(n - 1);
        CAPTURE(n, count, path == Path::sharded);
        CHECK(payload == kPasses * peers * count * (path == Path::two_shot ? 2 : 1));
        CHECK(metadata == kPasses * at(n) * peers * sizeof(TensorScale));
      }
    }
  }
}

TEST_CASE("reductions in FP8 and FP32 from several threads at once do not touch one another") {
  constexpr int kRuns = 300;
  MeanCase fp8 = random_case(DType::e4m3, 3, {5000, 333});
  MeanCase fp32 = random_case(DType::f32, 3, {5000, 333});
  for (MeanCase* bucket : {&fp8, &fp32}) {
    bucket->owners = deal(*bucket, 100, [](int k) { return k % 3; });
  }
  std::string wrong[3];
  const auto start = [&](std::size_t i, const MeanCase& bucket, Path path) {
    return std::thread([&wrong, &bucket, i, path] {
      wrong[i] = "did not end";
      wrong[i] = error_of([&] { wrong[i] = wrong_in(bucket, path, reduce(bucket, path, kRuns)); }) +
                 ": " + wrong[i];
    });
  };
  std::thread threads[] = {start(0, fp8, Path::two_shot), start(1, fp32, Path::two_shot),
                           start(2, fp32, Path::sharded)};
  for (std::thread& thread : threads) thread.join();
  for (const std::string& text : wrong) CHECK(text == "no error: ");
}

TEST_CASE("two engines of one process have the bits that each has alone") {
  RunOptions one, other;
  one.config.level = Level::O3;
  other.config.level = Level::O0;
  one.ranks = other.ranks = 2;
  one.gradient = other.gradient = own_gradient;
  const Bytes alone[] = {everything(train(one)), everything(train(other))};
  Bytes together[2];
  std::string errors[2];
  std::thread threads[] = {
      std::thread([&] { errors[0] = error_of([&] { together[0] = everything(train(one)); }); }),
      std::thread([&] { errors[1] = error_of([&] { together[1] = everything(train(other)); }); })};
  for (std::thread& thread : threads) thread.join();
  for (std::size_t i = 0; i < 2; ++i) {
    CHECK(errors[i] == "no error");
    CHECK(first_difference(together[i], alone[i]) == "");
  }
}

namespace {

// Ranks of several kinds of device: thread ranks whose transport would add FP8 itself, but not on
// rank 1.
class MixedDevices final : public ForwardingRank {
 public:
  using ForwardingRank::ForwardingRank;
  std::string name() const override { return "mixed"; }
  bool has_sum_e4m3() const override { return true; }
  std::string sum_e4m3_refusal() const override { return rank() == 1 ? "it has 8.9" : ""; }
};

}  // namespace

TEST_CASE("one rank that cannot add FP8: all ranks refuse nccl_sum, and the means still work") {
  MeanCase bucket = random_case(DType::e4m3, 3, {300, 40});
  bucket.owners = deal(bucket, 64, [](int k) { return k % 3; });
  std::vector<std::string> refusals(3), wrong(3);
  run_ranks(3, [&](Communicator& inner) {
    MixedDevices comm(inner);
    const auto rank = at(comm.rank());
    const Tensor codes(comm.context(), DType::e4m3, {8});
    TensorScale scale;
    refusals[rank] = error_of([&] { SumReducer(comm, {codes}, &scale); });
    const MeanResult result = reduce_on_rank(comm, bucket, Path::two_shot);
    wrong[rank] = wrong_in(bucket, Path::two_shot, comm.rank(), result);
  });
  for (std::size_t r = 0; r < 3; ++r) {
    CHECK(missing(refusals[r], {"rank 1", "it has 8.9", "two_shot"}) == "");
    CHECK(wrong[r] == "");
  }
}

namespace {

struct Trained {
  int buckets = 0;
  Bytes bytes;  ///< weights and the optimizer's scales
};

// Six matrices of 0.6 million elements, trained for two steps; what every rank ends with.
std::vector<Trained> train_large(const EngineConfig& config, int ranks) {
  constexpr int kParams = 6;
  const Shape shape = {1000, 601};
  const auto values = normal_values(at(shape.numel()), 5, 0.02f);
  std::vector<Trained> results(at(ranks));
  run_ranks(ranks, [&](Communicator& comm) {
    const Context& ctx = comm.context();
    const Buffer memory = upload(ctx, values);
    const TensorView init = view_of(ctx, memory, DType::f32, shape);
    Engine engine(ctx, comm, config);
    for (int p = 0; p < kParams; ++p) {
      engine.add({.name = "p" + std::to_string(p), .shape = shape, .init = init});
    }
    engine.freeze();
    for (int step = 0; step < 2; ++step) {
      for (int p = 0; p < kParams; ++p) {
        const auto seed = static_cast<std::uint32_t>(100 * step + 10 * p + comm.rank());
        const Buffer gradient = upload(ctx, normal_values(values.size(), seed));
        engine.add_gradient({p}, view_of(ctx, gradient, DType::f32, shape));
      }
      engine.step({.lr = 1e-3f, .max_norm = 0.5f});
    }
    Trained& result = results[at(comm.rank())];
    result.buckets = engine.plan().buckets;
    const auto count = static_cast<std::size_t>(engine.optimizer().scale_count());
    result.bytes = bytes_of(download<TensorScale>(ctx, engine.optimizer().scales(), count));
    for (int p = 0; p < kParams; ++p) {
      const Bytes weight = download_bytes(ctx, engine.weight({p}).data);
      result.bytes.insert(result.bytes.end(), weight.begin(), weight.end());
    }
  });
  return results;
}

}  // namespace

TEST_CASE("buckets of 1 MiB and of 1 GiB give the same bits on every rank") {
  for (Level level : {Level::O2, Level::O3}) {
    const auto small = train_large({.level = level, .bucket_elements = std::int64_t{1} << 20}, 3);
    const auto large = train_large({.level = level, .bucket_elements = std::int64_t{1} << 30}, 3);
    CAPTURE(name_of(level));
    CHECK(small[0].buckets == 3);
    CHECK(large[0].buckets == 1);
    for (std::size_t r = 0; r < 3; ++r) {
      CHECK(first_difference(small[r].bytes, small[0].bytes) == "");
      CHECK(first_difference(large[r].bytes, small[0].bytes) == "");
    }
  }
}

namespace {

// Compute weights of three ranks after three steps, without the vectors and what else is its own
// master. With poison, a NaN stands in every byte of them before each step.
std::vector<std::vector<Bytes>> weights_after(const EngineConfig& config, bool poison) {
  std::vector<std::vector<Bytes>> weights(3);
  run_ranks(3, [&](Communicator& comm) {
    const Context& ctx = comm.context();
    Engine engine(ctx, comm, config);
    std::vector<Buffer> keep;
    add_parameters(engine, ctx, keep);
    engine.freeze();
    const auto for_managed = [&](const auto& fn) {
      for (std::size_t p = 0; p < model_params().size(); ++p) {
        if (is_managed(p)) fn(engine.weight({static_cast<int>(p)}));
      }
    };
    for (int step = 1; step <= 3; ++step) {
      hand_over(engine, ctx, own_gradient, comm.rank(), step);
      if (poison) {
        for_managed(
            [&](const ScaledView& w) { write(ctx, w.data.data, Bytes(w.data.bytes(), 0x7F)); });
      }
      engine.step({.lr = 1e-3f});
    }
    for_managed([&](const ScaledView& w) {
      weights[at(comm.rank())].push_back(download_bytes(ctx, w.data));
      const auto scale =
          w.scale != nullptr ? download_one<TensorScale>(ctx, w.scale) : TensorScale{};
      require(scale.scale * scale.scale_inv == 1.0f, "scale ", scale.scale, ", its inverse ",
              scale.scale_inv);
      weights[at(comm.rank())].push_back(bytes_of(std::vector<TensorScale>{scale}));
    });
  });
  return weights;
}

}  // namespace

TEST_CASE("a step writes every byte of the weights on every rank and reads none before") {
  for (Level level : {Level::O0, Level::O2, Level::O3}) {
    std::vector<std::vector<Bytes>> first;
    for (Schedule schedule : {Schedule::after_backward, Schedule::fused}) {
      if (schedule == Schedule::fused && level != Level::O3) continue;
      for (bool windows : {false, true}) {
        const EngineConfig config = {.level = level,
                                     .bucket_elements = 9000,
                                     .schedule = schedule,
                                     .windows = windows,
                                     .clipping = false};
        const auto clean = weights_after(config, false);
        const auto poisoned = weights_after(config, true);
        if (first.empty()) first = clean;
        CAPTURE(name_of(level), name_of(schedule), windows);
        for (std::size_t r = 0; r < 3; ++r) {
          CHECK(clean[r] == first[0]);
          CHECK(poisoned[r] == first[0]);
        }
      }
    }
  }
}

namespace {

// What two ranks are told of their windows, or why there is no engine.
std::string windows_of(std::optional<bool> windows, bool mixed) {
  std::string text;
  run_ranks(2, [&](Communicator& inner) {
    MixedDevices other(inner);
    Communicator& comm = mixed ? static_cast<Communicator&>(other) : inner;
    Engine engine(comm.context(), comm, {.level = Level::O2, .windows = windows});
    std::vector<Buffer> keep;
    add_parameters(engine, comm.context(), keep);
    const std::string error = error_of([&] { engine.freeze(); });
    if (comm.rank() == 1) text = error == "no error" ? engine.plan().to_markdown() : error;
  });
  return text;
}

}  // namespace

TEST_CASE("the plan says whether ranks reach one another's memory, and why not") {
  CHECK(missing(windows_of({}, false), {"send/receive", "the default with NCCL only"}) == "");
  CHECK(missing(windows_of(false, false), {"send/receive", "EngineConfig::windows is false"}) ==
        "");
  CHECK(missing(windows_of(true, false), {"one kernel over memory windows", "lie in a window"}) ==
        "");
  CHECK(missing(windows_of(true, true), {"EngineConfig::windows is true", "mixed"}) == "");
}

namespace {

// Steps of an engine with these vectors only, on ranks of which most own nothing.
std::vector<Bytes> train_vectors(const std::vector<Shape>& shapes, Sharding sharding, int ranks) {
  std::vector<Bytes> results(at(ranks));
  run_ranks(ranks, [&](Communicator& comm) {
    const Context& ctx = comm.context();
    Engine engine(ctx, comm, {.level = Level::O2, .sharding = sharding});
    std::vector<Tensor> values;
    for (const Shape& shape : shapes) {
      values.emplace_back(ctx, DType::f32, shape);
      write(ctx, values.back().view().data, normal_values(at(shape.numel()), 3));
      engine.add({.name = to_string(shape), .shape = shape, .init = values.back()});
    }
    engine.freeze();
    require(engine.plan().fp8_parameters == 0, "FP8-managed");
    for (int step = 1; step <= 2; ++step) {
      for (std::size_t p = 0; p < shapes.size(); ++p) {
        engine.add_gradient({static_cast<int>(p)}, values[p]);
      }
      const StepResult done = engine.step({.lr = 1e-2f, .max_norm = 1.0f});
      require(done.step.read_sync() == step, "the step was skipped");
    }
    for (std::size_t p = 0; p < shapes.size(); ++p) {
      const Bytes weight = download_bytes(ctx, engine.weight({static_cast<int>(p)}).data);
      results[at(comm.rank())].insert(results[at(comm.rank())].end(), weight.begin(), weight.end());
    }
  });
  return results;
}

}  // namespace

TEST_CASE(
    "engines without FP8, without elements and without parameters step on ranks with nothing") {
  const std::vector<std::vector<Shape>> models = {{}, {{3}}, {{5}, {0}, {0, 7}, {17000}}};
  for (const auto& shapes : models) {
    const auto alone = train_vectors(shapes, Sharding::none, 1);
    for (Sharding sharding : {Sharding::none, Sharding::optimizer}) {
      for (const Bytes& bytes : train_vectors(shapes, sharding, 5)) CHECK(bytes == alone[0]);
    }
  }
}

}  // namespace octet::test
