// SPDX-License-Identifier: Apache-2.0
// What the plan says about bytes, against the allocator, the communicator and the design's figures.
#include <cstdlib>
#include <map>

#include "support/catch.hpp"
#include "support/engine_model.hpp"

namespace octet::test {
namespace {

constexpr Level kLevels[] = {Level::O0, Level::O1, Level::O2, Level::O3};

/// Matrices whose panels do not divide evenly among ranks, and a vector.
const std::vector<Shape> kShapes = {{1000, 64}, {515, 80}, {128, 64}, {2000}};
constexpr double kManaged = 1000 * 64 + 515 * 80 + 128 * 64;
constexpr double kAll = kManaged + 2000;
constexpr double kLargestPanel = 128 * 80;

struct RankMemory {
  Plan plan;
  std::size_t held = 0;            ///< by the context, for the engine
  std::size_t grown_in_steps = 0;  ///< beyond that, at any time in a step
  std::uint64_t payload = 0;       ///< of one step
};

std::vector<RankMemory> measure(const EngineConfig& config, int ranks, float max_norm = 1.0f,
                                const std::vector<Shape>& shapes = kShapes) {
  std::vector<RankMemory> results(static_cast<std::size_t>(ranks));
  run_ranks(ranks, [&](Communicator& comm) {
    Context ctx = comm.context();
    RankMemory& result = results[static_cast<std::size_t>(comm.rank())];
    std::vector<Tensor> values;
    for (const Shape& shape : shapes) {
      values.emplace_back(ctx, DType::f32, shape);
      const auto count = static_cast<std::size_t>(shape.numel());
      write(ctx, values.back().view().data, normal_values(count, 1));
    }
    const std::size_t before = ctx.memory_use().current;
    Engine engine(ctx, comm, config);
    for (std::size_t i = 0; i < shapes.size(); ++i) {
      engine.add({.name = "p" + std::to_string(i), .shape = shapes[i], .init = values[i]});
    }
    engine.freeze();
    result.held = ctx.memory_use().current - before;
    ctx.reset_peak();
    for (int step = 0; step < 2; ++step) {
      const std::uint64_t sent = comm.wire_bytes().payload;
      for (std::size_t i = shapes.size(); i-- > 0;) {
        engine.add_gradient({static_cast<int>(i)}, values[i]);
      }
      engine.step({.lr = 1e-3f, .max_norm = max_norm});
      result.payload = comm.wire_bytes().payload - sent;
    }
    result.grown_in_steps = ctx.memory_use().peak - before - result.held;
    result.plan = engine.plan();
  });
  return results;
}

double per_parameter(const Plan& plan, bool measured = true) {
  return static_cast<double>(plan.state_bytes(true, measured)) / kManaged;
}

std::uint64_t row(const Plan& plan, const std::string& what, bool managed) {
  std::uint64_t bytes = 0;
  for (const MemoryRow& r : plan.memory) {
    if (r.what == what && r.fp8_managed == managed) bytes += r.measured;
  }
  return bytes;
}

}  // namespace

TEST_CASE("every row of the plan is what the allocator gave") {
  for (Level level : kLevels) {
    for (int ranks : {1, 2, 3}) {
      for (std::int64_t bucket : {std::int64_t{1}, std::int64_t{32} << 20}) {
        for (const RankMemory& rank : measure({.level = level, .bucket_elements = bucket}, ranks)) {
          INFO(name_of(level) << ", " << ranks << " ranks, buckets of " << bucket);
          std::uint64_t sum = 0;
          for (const MemoryRow& r : rank.plan.memory) {
            INFO(r.what << (r.fp8_managed ? ", FP8-managed" : ", other"));
            CHECK(r.predicted == r.measured);
            sum += r.measured;
          }
          CHECK(sum == rank.held);
          CHECK(rank.plan.parameters == static_cast<std::int64_t>(kAll));
          CHECK(rank.plan.fp8_parameters == static_cast<std::int64_t>(kManaged));
          CHECK(rank.plan.ranks == ranks);
        }
      }
    }
  }
}

TEST_CASE("with a window every row of the plan is what the allocator gave") {
  for (Level level : kLevels) {
    for (Sharding sharding : {Sharding::none, Sharding::optimizer}) {
      const EngineConfig sent = {.level = level, .sharding = sharding, .windows = false};
      EngineConfig read = sent;
      read.windows = true;
      const auto without = measure(sent, 3), with = measure(read, 3);
      for (std::size_t r = 0; r < with.size(); ++r) {
        INFO(name_of(level) << ", sharding " << name_of(sharding) << ", rank " << r);
        std::uint64_t sum = 0;
        for (const MemoryRow& each : with[r].plan.memory) {
          INFO(each.what << (each.fp8_managed ? ", FP8-managed" : ", other"));
          CHECK(each.predicted == each.measured);
          if (each.state) {
            CHECK(each.measured == row(without[r].plan, each.what, each.fp8_managed));
          }
          sum += each.measured;
        }
        CHECK(sum == with[r].held);
        CHECK(with[r].grown_in_steps == 0);
        CHECK(with[r].payload == without[r].payload);
        CHECK(with[r].payload == with[r].plan.wire_bytes_per_step);
      }
    }
  }
}

TEST_CASE("with the schedule fused the plan counts a buffer of the means where steps may clip") {
  for (Level level : kLevels) {
    for (int ranks : {2, 3}) {
      const auto run = [&](Schedule schedule, bool clipping) {
        return measure({.level = level,
                        .sharding = Sharding::optimizer,
                        .schedule = schedule,
                        .clipping = clipping},
                       ranks, clipping ? 1.0f : 0.0f);
      };
      const auto after = run(Schedule::after_backward, true);
      for (bool clipping : {false, true}) {
        const auto fused = run(Schedule::fused, clipping);
        for (std::size_t r = 0; r < fused.size(); ++r) {
          INFO(name_of(level) << ", rank " << r << " of " << ranks << ", clipping " << clipping);
          const RankMemory& rank = fused[r];
          std::uint64_t sum = 0;
          for (const MemoryRow& row : rank.plan.memory) {
            INFO(row.what << (row.fp8_managed ? ", FP8-managed" : ", other"));
            CHECK(row.predicted == row.measured);
            sum += row.measured;
          }
          CHECK(sum == rank.held);
          CHECK(rank.grown_in_steps == 0);
          CHECK(rank.payload == after[r].payload);
          CHECK(rank.plan.wire_bytes_per_step == after[r].plan.wire_bytes_per_step);
          for (bool managed : {false, true}) {
            const std::uint64_t kept = row(after[r].plan, "reduced gradient shard", managed);
            CHECK((kept > 0 || !managed));
            CHECK(row(rank.plan, "reduced gradient shard", managed) == (clipping ? kept : 0));
          }
        }
      }
    }
  }
}

TEST_CASE("a step takes no memory") {
  for (Level level : kLevels) {
    for (int ranks : {1, 3}) {
      for (const RankMemory& rank : measure({.level = level}, ranks)) {
        INFO(name_of(level) << ", " << ranks << " ranks");
        CHECK(rank.grown_in_steps == 0);
      }
    }
  }
}

TEST_CASE("state bytes per FP8-managed parameter are the design's") {
  for (int ranks : {1, 2}) {
    const double o0 = per_parameter(measure({.level = Level::O0}, ranks)[0].plan);
    const double o1 = per_parameter(measure({.level = Level::O1}, ranks)[0].plan);
    const double o2 = per_parameter(measure({.level = Level::O2}, ranks)[0].plan);
    CHECK(o0 >= 16.0);
    CHECK(o0 <= 16.01);
    CHECK(o1 >= 12.0);
    CHECK(o1 <= 12.1);
    CHECK(o2 >= 7.0);
    CHECK(o2 <= 7.1);
  }
}

TEST_CASE("the rows of O2 are 1 + 1 + 2 + 1 + 2 bytes") {
  const Plan plan = measure({.level = Level::O2}, 1)[0].plan;
  const auto managed = static_cast<std::uint64_t>(kManaged);
  const std::map<std::string, std::uint64_t> expected = {
      {"weight", 1}, {"gradient", 1}, {"master", 2}, {"m", 1}, {"v", 2}};
  for (const auto& [what, bytes] : expected) {
    INFO(what);
    CHECK(row(plan, what, true) == bytes * managed);
  }
  // FP32 weights are their own masters.
  for (const char* what : {"weight", "gradient", "m", "v"}) CHECK(row(plan, what, false) == 8000);
  CHECK(row(plan, "master", false) == 0);
}

TEST_CASE("block states with a split master are 5.1 bytes") {
  const Formats formats{.gradient = DType::e4m3, .state = kSmall};
  const auto managed = static_cast<std::uint64_t>(kManaged);
  for (int ranks : {1, 3}) {
    const EngineConfig config{.level = Level::O2, .formats = formats};
    const Plan plan = measure(config, ranks)[0].plan;
    CHECK(per_parameter(plan) >= 5.0625);
    CHECK(per_parameter(plan) <= 5.1);
    CHECK(row(plan, "weight", true) == managed);
    CHECK(row(plan, "master", true) == managed);
    for (const MemoryRow& r : plan.memory) CHECK(r.predicted == r.measured);
  }
  // 1000 * 64, 515 * 80 and 128 * 64 elements: 500, 322 and 64 blocks with a scale each.
  const Plan plan = measure({.level = Level::O2, .formats = formats}, 1)[0].plan;
  for (const char* what : {"m", "v"}) CHECK(row(plan, what, true) == managed + 4 * 886);
}

TEST_CASE("weights of matrices have rows for transposed copies and scales") {
  const auto managed = static_cast<std::uint64_t>(kManaged);
  // Tiles of [1000, 64], [515, 80], [128, 64]: 8, 5 and 1 lines of one scale padded to 4. Of the
  // transposes one line each, of 8, 5 and 1 scales padded to 8, 8 and 4. Blocks of rows: one of
  // each row, rows padded to 1008, 528, 128.
  constexpr std::uint64_t kTileScales = 4 * 4 * (8 + 5 + 1);
  const struct {
    WeightFormat weight;
    std::uint64_t transposed, scales;
  } cases[] = {{WeightFormat::e4m3, 0, 0},
               {WeightFormat::e4m3_and_transpose, managed, 0},
               {WeightFormat::e4m3_row_block, 0, 4 * (1008 + 528 + 128)},
               {WeightFormat::e4m3_tile, 0, kTileScales},
               {WeightFormat::e4m3_tile_and_transpose, managed, kTileScales + 4 * (8 + 8 + 4)}};
  for (const auto& c : cases) {
    for (int ranks : {1, 2}) {
      EngineConfig config{.level = Level::O2, .formats = formats_of(Level::O2)};
      config.formats->state.weight = c.weight;
      for (const RankMemory& rank : measure(config, ranks)) {
        INFO(name_of(c.weight) << ", " << ranks << " ranks");
        std::uint64_t sum = 0;
        for (const MemoryRow& r : rank.plan.memory) {
          INFO(r.what << (r.fp8_managed ? ", FP8-managed" : ", other"));
          CHECK(r.predicted == r.measured);
          sum += r.measured;
        }
        CHECK(sum == rank.held);
        CHECK(row(rank.plan, "weight", true) == managed);
        CHECK(row(rank.plan, "transposed weight", true) == c.transposed);
        CHECK(row(rank.plan, "weight scales", true) == c.scales);
        const double own = static_cast<double>(c.transposed + c.scales) / kManaged;
        CHECK(per_parameter(rank.plan) >= 7.0 + own);
        CHECK(per_parameter(rank.plan) <= 7.01 + own);
        CHECK(rank.grown_in_steps == 0);
        const std::string text = rank.plan.to_markdown();
        CHECK(text.find(name_of(c.weight)) != std::string::npos);
        CHECK((text.find("transposed weight") != std::string::npos) == (c.transposed != 0));
        CHECK((text.find("weight scales") != std::string::npos) == (c.scales != 0));
      }
    }
  }
}

TEST_CASE("transposed copies of a sharded optimizer are in the plan, and send nothing") {
  // Tiles of [1008, 64], [528, 80]: 8 and 5 lines of one scale padded to 4; of the transposes one
  // line each, of 8 and 5 scales padded to 8.
  const std::vector<Shape> shapes = {{1008, 64}, {2000}, {528, 80}};
  constexpr std::uint64_t kCodes = 1008 * 64 + 528 * 80;
  const struct {
    WeightFormat with, without;
    std::uint64_t scales;
  } cases[] = {
      {WeightFormat::e4m3_and_transpose, WeightFormat::e4m3, 0},
      {WeightFormat::e4m3_tile_and_transpose, WeightFormat::e4m3_tile, 4 * (4 * (8 + 5) + 8 + 8)}};
  for (const auto& c : cases) {
    for (Sharding sharding : {Sharding::optimizer, Sharding::gradients}) {
      for (const bool windows : {false, true}) {
        EngineConfig config{
            .sharding = sharding, .formats = formats_of(Level::O2), .windows = windows};
        config.formats->state.weight = c.without;
        const auto without = measure(config, 3, 1.0f, shapes);
        config.formats->state.weight = c.with;
        const auto with = measure(config, 3, 1.0f, shapes);
        for (std::size_t r = 0; r < with.size(); ++r) {
          INFO(name_of(c.with) << ", sharding " << name_of(sharding) << ", windows " << windows);
          std::uint64_t sum = 0;
          for (const MemoryRow& each : with[r].plan.memory) {
            INFO(each.what << (each.fp8_managed ? ", FP8-managed" : ", other"));
            CHECK(each.predicted == each.measured);
            sum += each.measured;
          }
          CHECK(sum <= with[r].held);
          CHECK(with[r].held - sum < 1024);
          CHECK(row(with[r].plan, "transposed weight", true) == kCodes);
          CHECK(row(with[r].plan, "weight scales", true) == c.scales);
          CHECK(with[r].grown_in_steps == 0);
          CHECK(with[r].payload == with[r].plan.wire_bytes_per_step);
          CHECK(with[r].payload == without[r].payload);
          CHECK(with[r].plan.weight_gather.find("copies made by every rank") != std::string::npos);
        }
      }
    }
  }
}

TEST_CASE("a gather of tiles sends their scales too, and the plan counts them") {
  for (int ranks : {2, 3}) {
    EngineConfig config{.level = Level::O3, .formats = formats_of(Level::O3)};
    const auto sent = [&](WeightFormat weight) {
      config.formats->state.weight = weight;
      std::uint64_t sum = 0;
      for (const RankMemory& rank : measure(config, ranks)) {
        CHECK(rank.payload == rank.plan.wire_bytes_per_step);
        for (const MemoryRow& r : rank.plan.memory) CHECK(r.predicted == r.measured);
        CHECK(rank.grown_in_steps == 0);
        CHECK((rank.plan.weight_gather.find("scales") != std::string::npos) ==
              (weight == WeightFormat::e4m3_tile));
        sum += rank.payload;
      }
      return sum;
    };
    const std::uint64_t scales = 4 * 4 * (8 + 5 + 1);
    CHECK(sent(WeightFormat::e4m3_tile) ==
          sent(WeightFormat::e4m3) + static_cast<std::uint64_t>(ranks - 1) * scales);
  }
}

TEST_CASE("O3 holds 2 + 5/N bytes on average and no rank more than one panel per bucket above") {
  for (int ranks : {2, 3, 4}) {
    for (std::int64_t bucket : {std::int64_t{1}, std::int64_t{32} << 20}) {
      const auto results = measure(
          {.level = Level::O3, .reduced_gradient = DType::e4m3, .bucket_elements = bucket}, ranks);
      const double share = 2 + 5.0 / ranks;
      double mean = 0;
      std::int64_t owned = 0;
      for (const RankMemory& rank : results) {
        mean += per_parameter(rank.plan) / ranks;
        owned += rank.plan.owned_fp8_parameters;
        CHECK(row(rank.plan, "reduced gradient shard", true) == 0);
        const double spare = 5 * kLargestPanel * rank.plan.buckets / kManaged;
        CHECK(per_parameter(rank.plan) <= share + spare + 0.01);
      }
      INFO(ranks << " ranks, buckets of " << bucket);
      CHECK(mean >= share);
      CHECK(mean <= share + 0.01);
      CHECK(owned == static_cast<std::int64_t>(kManaged));
    }
  }
}

TEST_CASE("sharded gradients: 1 + 6/N bytes with E4M3 shards, 1 + 9/N with FP32, and two slots") {
  for (int ranks : {2, 3, 4}) {
    for (bool windows : {false, true}) {
      for (DType reduced : {DType::e4m3, DType::f32}) {
        for (std::int64_t bucket : {std::int64_t{1}, std::int64_t{32} << 20}) {
          const auto results = measure({.level = Level::O2,
                                        .sharding = Sharding::gradients,
                                        .reduced_gradient = reduced,
                                        .bucket_elements = bucket,
                                        .windows = windows},
                                       ranks);
          INFO(ranks << " ranks, windows " << windows << ", " << name_of(reduced) << ", buckets of "
                     << bucket);
          double mean = 0;
          for (const RankMemory& rank : results) {
            std::uint64_t sum = 0;
            for (const MemoryRow& r : rank.plan.memory) {
              INFO(r.what << (r.fp8_managed ? ", FP8-managed" : ", other"));
              CHECK(r.predicted == r.measured);
              sum += r.measured;
            }
            CHECK(sum == rank.held);
            CHECK(rank.grown_in_steps == 0);
            CHECK(rank.payload == rank.plan.wire_bytes_per_step);
            for (bool managed : {false, true}) CHECK(row(rank.plan, "gradient", managed) == 0);
            // A parameter each, or all in one.
            const std::uint64_t slots = bucket == 1 ? 2 * 64000 : 64000 + 41216 + 8192 + 8192;
            CHECK(row(rank.plan, "gradient slots", true) == slots);
            mean += per_parameter(rank.plan) / ranks;
          }
          const double share = 1 + (reduced == DType::e4m3 ? 6.0 : 9.0) / ranks;
          CHECK(mean >= share);
          CHECK(mean <= 1.01 * share);
        }
      }
    }
  }
}

TEST_CASE("wire bytes are what the plan says and what the paths cost") {
  const double vector_bytes = 2000 * 4;
  for (Level level : kLevels) {
    for (Sharding sharding : {Sharding::none, Sharding::optimizer, Sharding::gradients}) {
      for (int ranks : {1, 2, 3, 8, 64}) {
        if (ranks == 64 && level != Level::O3) continue;  // the time of 64 threads
        const auto results = measure({.level = level, .sharding = sharding}, ranks);
        double sum = 0;
        for (const RankMemory& rank : results) {
          CHECK(rank.payload == rank.plan.wire_bytes_per_step);
          sum += static_cast<double>(rank.payload);
        }
        const double gradient = level == Level::O0 ? 2 : 1;
        const double weight = level == Level::O0 ? 2 : 1;
        // Reduction: everything once to each other rank's share. Then the means, or the weights.
        const double back = sharding == Sharding::none ? gradient : weight;
        const double expected = (ranks - 1) * (kManaged * (gradient + back) + 2 * vector_bytes);
        INFO(name_of(level) << ", sharding " << name_of(sharding) << ", " << ranks << " ranks");
        CHECK(sum == expected);
      }
    }
  }
}

TEST_CASE("clipping costs no payload") {
  const auto without = measure({.level = Level::O3}, 3, 0.0f);
  const auto with = measure({.level = Level::O3}, 3, 1.0f);
  for (std::size_t rank = 0; rank < 3; ++rank) CHECK(with[rank].payload == without[rank].payload);
}

TEST_CASE("all of an engine's memory comes from the caller's allocator and goes back") {
  struct Pool {
    std::size_t held = 0;
    std::size_t most = 0;
  } pool;
  const Allocator allocator = {[](std::size_t bytes, CUstream_st*, void* user) -> void* {
                                 Pool& p = *static_cast<Pool*>(user);
                                 p.held += bytes;
                                 p.most = std::max(p.most, p.held);
                                 return std::aligned_alloc(256, (bytes + 255) / 256 * 256);
                               },
                               [](void* data, std::size_t bytes, CUstream_st*, void* user) {
                                 static_cast<Pool*>(user)->held -= bytes;
                                 std::free(data);
                               },
                               &pool};
  {
    const Context ctx = Context::cpu(allocator);
    const auto comm = make_single(ctx);
    Engine engine(ctx, *comm, {.level = Level::O2});
    {
      const Tensor init(ctx, DType::f32, {128, 64});
      write(ctx, init.view().data, normal_values(8192, 1));
      engine.add({.name = "w", .shape = {128, 64}, .init = init});
      engine.freeze();
    }
    // The initial values may go after freeze().
    CHECK(pool.held == ctx.memory_use().current);
    CHECK(pool.held >= 7 * 8192);
    CHECK(engine.step({.lr = 1e-3f}).step.read_sync() == 1);
  }
  CHECK(pool.held == 0);
  CHECK(pool.most > 0);
}

TEST_CASE("the plan as text names what runs") {
  const std::string text = measure({.level = Level::O3}, 2)[0].plan.to_markdown();
  for (const char* word :
       {"O3", "optimizer", "2 over threads", "e4m3", "f16", "sharded", "master", "communication"}) {
    INFO(word);
    CHECK(text.find(word) != std::string::npos);
  }
  const Plan single = measure({.level = Level::O3}, 1)[0].plan;
  CHECK_FALSE(single.notes.empty());
  CHECK(single.wire_bytes_per_step == 0);
}

}  // namespace octet::test
