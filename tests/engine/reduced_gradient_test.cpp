// SPDX-License-Identifier: Apache-2.0
// EngineConfig::reduced_gradient: one value gives one set of bits, however the optimizer is cut.
#include "support/catch.hpp"
#include "support/compare.hpp"
#include "support/engine_model.hpp"
#include "support/errors.hpp"

namespace octet::test {
namespace {

RunOptions options_of(Level level, Sharding sharding, int ranks) {
  RunOptions options;
  options.config = {
      .level = level, .sharding = sharding, .adamw = {.weight_decay = 0.1f, .seed = 5}};
  options.ranks = ranks;
  options.max_norm = 0.5f;
  options.clip_every = 2;
  return options;
}

std::uint64_t row(const Plan& plan, const std::string& what) {
  std::uint64_t bytes = 0;
  for (const MemoryRow& r : plan.memory) {
    if (r.what == what) bytes += r.measured;
  }
  return bytes;
}

}  // namespace

TEST_CASE("a sharded optimizer with rounded means has the bits of a whole one") {
  for (Level level : {Level::O0, Level::O1, Level::O2}) {
    for (int ranks : {1, 2, 3, 5, 8}) {
      RunOptions options = options_of(level, Sharding::none, ranks);
      options.gradient = own_gradient;
      const std::vector<RankResult> whole = train(options);
      options.config.sharding = Sharding::optimizer;
      options.config.reduced_gradient = formats_of(level).gradient;
      for (bool windows : {false, true}) {
        for (std::int64_t elements : {std::int64_t{1}, std::int64_t{1} << 40}) {
          options.config.windows = windows;
          options.config.bucket_elements = elements;
          INFO(name_of(level) << ", " << ranks << " ranks, windows " << windows << ", buckets of "
                              << elements);
          const std::vector<RankResult> cut = train(options);
          CHECK(rank_difference(cut) == "");
          CHECK(first_difference(everything(cut), everything(whole)) == "");
          CHECK(first_difference(cut[0].norms, whole[0].norms) == "");
          for (const RankResult& rank : cut) {
            CHECK(row(rank.plan, "reduced gradient shard") == 0);
            CHECK(rank.payload_per_step == rank.plan.wire_bytes_per_step);
          }
        }
      }
    }
  }
}

TEST_CASE("means in f32 are not those that were rounded once more") {
  RunOptions options = options_of(Level::O3, Sharding::optimizer, 3);
  options.gradient = own_gradient;
  const Bytes wide = everything(train(options));
  options.config.reduced_gradient = DType::f32;
  CHECK(first_difference(everything(train(options)), wide) == "");
  options.config.reduced_gradient = DType::e4m3;
  CHECK(first_difference(everything(train(options)), wide) != "");
}

TEST_CASE("a non-finite gradient skips the step where means are rounded in place") {
  for (bool windows : {false, true}) {
    RunOptions options = options_of(Level::O3, Sharding::optimizer, 3);
    options.config.reduced_gradient = DType::e4m3;
    options.config.windows = windows;
    options.clip_every = 1;
    options.steps = 2;
    const Bytes clean = everything(train(options));
    options.steps = 3;
    options.gradient = [](int rank, std::size_t p, int step) {
      std::vector<float> g = common_gradient(rank, p, step < 2 ? step : step - 1);
      if (step == 2 && rank == 1 && p == 2) g[g.size() / 2] = NAN;
      return g;
    };
    const std::vector<RankResult> results = train(options);
    INFO("windows " << windows);
    CHECK(first_difference(everything(results), clean) == "");
    for (const RankResult& result : results) {
      CHECK(result.step == 2);
      CHECK(result.skipped == 1);
    }
  }
}

TEST_CASE("the plan says what the optimizer reads and where it lies") {
  for (int ranks : {1, 3}) {
    RunOptions options = options_of(Level::O3, Sharding::optimizer, ranks);
    const Plan wide = train(options)[0].plan;
    CHECK(wide.reduced_gradient == DType::f32);
    const std::string text = wide.to_markdown();
    CHECK(missing(text, {"| reduced gradient | f32 |"}) == "");
    CHECK((text.find("reads its gradient as stored") != std::string::npos) == (ranks == 1));
    options.config.reduced_gradient = DType::e4m3;
    const Plan rounded = train(options)[0].plan;
    CHECK(missing(rounded.to_markdown(), {"| reduced gradient | e4m3 |"}) == "");
    if (ranks == 1) continue;
    CHECK(missing(wide.reduction, {"sharded", "FP32 means"}) == "");
    CHECK(row(wide, "reduced gradient shard") > 0);
    CHECK(missing(rounded.reduction, {"sharded", "e4m3 means", "common scale",
                                      "where the owner's gradient was"}) == "");
  }
}

TEST_CASE("what an optimizer cannot be given as its gradient is refused with the reason") {
  const auto refusal = [](const EngineConfig& config, int ranks) {
    std::string error;
    run_ranks(ranks, [&](Communicator& comm) {
      const std::string mine = error_of([&] { Engine(comm.context(), comm, config); });
      if (comm.rank() == 0) error = mine;
    });
    return error;
  };
  const auto config = [](Level level, Sharding sharding, DType reduced) {
    return EngineConfig{.level = level, .sharding = sharding, .reduced_gradient = reduced};
  };
  CHECK(missing(refusal(config(Level::O2, Sharding::none, DType::f32), 2),
                {"reduced_gradient is f32", "sharding is none", "e4m3"}) == "");
  CHECK(missing(refusal(config(Level::O2, Sharding::optimizer, DType::bf16), 2),
                {"reduced_gradient is bf16", "formats.gradient is e4m3", "f32 or e4m3"}) == "");
  CHECK(missing(refusal(config(Level::O0, Sharding::optimizer, DType::e4m3), 2),
                {"reduced_gradient is e4m3", "formats.gradient is bf16", "f32 or bf16"}) == "");
  EngineConfig fused = config(Level::O3, Sharding::optimizer, DType::e4m3);
  fused.schedule = Schedule::fused;
  CHECK(missing(refusal(fused, 2), {"reduced_gradient is e4m3", "fused", "f32"}) == "");
  CHECK(refusal(config(Level::O2, Sharding::none, DType::e4m3), 2) == "no error");
  CHECK(refusal(config(Level::O0, Sharding::optimizer, DType::bf16), 2) == "no error");
}

TEST_CASE("ranks that would read different gradients are told so by freeze") {
  std::vector<std::string> errors(2);
  run_ranks(2, [&](Communicator& comm) {
    EngineConfig config{.level = Level::O3};
    if (comm.rank() == 1) config.reduced_gradient = DType::e4m3;
    std::vector<Buffer> keep;
    Engine engine(comm.context(), comm, config);
    add_parameters(engine, comm.context(), keep);
    errors[static_cast<std::size_t>(comm.rank())] = error_of([&] { engine.freeze(); });
  });
  for (const std::string& error : errors) {
    CHECK(missing(error, {"reduced_gradient f32;", "rank 1 has reduced_gradient e4m3"}) == "");
  }
}

}  // namespace octet::test
