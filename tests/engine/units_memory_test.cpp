// SPDX-License-Identifier: Apache-2.0
// What sharded weights take and send: the plan against the allocator, the communicator and the
// design's figures, on a GPT of 21 million parameters.
#include "support/catch.hpp"
#include "support/engine_model.hpp"

namespace octet::test {
namespace {

constexpr std::int64_t kWidth = 512, kLayers = 6, kVocabulary = 4096;

struct GptParam {
  std::string name;
  Shape shape;
  int unit;
};

std::vector<GptParam> gpt() {
  std::vector<GptParam> list = {{"embedding", {kVocabulary, kWidth}, 0}};
  for (int l = 0; l < kLayers; ++l) {
    const std::string layer = "h." + std::to_string(l) + ".";
    for (const char* what : {"norm.1", "norm.2", "bias"}) {
      list.push_back({layer + what, {kWidth}, l + 1});
    }
    list.push_back({layer + "qkv", {3 * kWidth, kWidth}, l + 1});
    list.push_back({layer + "out", {kWidth, kWidth}, l + 1});
    list.push_back({layer + "up", {4 * kWidth, kWidth}, l + 1});
    list.push_back({layer + "down", {kWidth, 4 * kWidth}, l + 1});
  }
  return list;
}

constexpr double kLayerManaged = 12.0 * kWidth * kWidth;
constexpr double kManaged = kVocabulary * kWidth + kLayers * kLayerManaged;

struct RankMemory {
  Plan plan;
  std::size_t held = 0;   ///< by the context, for the engine
  std::size_t grown = 0;  ///< beyond that, in two passes over the units
  bool sends_what_it_says = true;
};

std::vector<RankMemory> measure(const EngineConfig& config, int ranks) {
  std::vector<RankMemory> results(static_cast<std::size_t>(ranks));
  const std::vector<float> values(static_cast<std::size_t>(kVocabulary * kWidth), 0.01f);
  run_ranks(ranks, [&](Communicator& comm) {
    Context ctx = comm.context();
    RankMemory& result = results[static_cast<std::size_t>(comm.rank())];
    const Buffer init = upload(ctx, values);
    const std::size_t before = ctx.memory_use().current;
    Engine engine(ctx, comm, config);
    for (const GptParam& p : gpt()) {
      engine.add({.name = p.name,
                  .shape = p.shape,
                  .init = view_of(ctx, init, DType::f32, p.shape),
                  .unit = p.unit});
    }
    engine.freeze();
    result.held = ctx.memory_use().current - before;
    result.plan = engine.plan();
    ctx.reset_peak();
    for (int u : {0, 1, 2, 3, 4, 5, 6, 6, 5, 4, 3, 2, 1, 0}) {
      engine.gather(u);
      engine.release(u);
    }
    std::uint64_t sum = 0;
    for (std::uint64_t bytes : result.plan.unit_gather_bytes) sum += bytes;
    // Forth every unit, back all but the two that are there.
    const std::vector<std::uint64_t>& bytes = result.plan.unit_gather_bytes;
    result.sends_what_it_says =
        ranks == 1 ? bytes.empty()
                   : comm.wire_bytes().payload == 2 * sum - bytes[kLayers] - bytes[kLayers - 1];
    result.grown = ctx.memory_use().peak - before - result.held;
  });
  return results;
}

std::uint64_t row(const Plan& plan, const std::string& what, bool managed) {
  std::uint64_t bytes = 0;
  for (const MemoryRow& r : plan.memory) {
    if (r.what == what && r.fp8_managed == managed) bytes += r.measured;
  }
  return bytes;
}

}  // namespace

TEST_CASE("sharded weights: 7/N bytes, 10/N with FP32 gradient shards, 5.1/N with block states") {
  const Formats small = small_formats();
  const struct {
    std::optional<Formats> formats;
    DType reduced;
    double bytes;
  } cases[] = {{std::nullopt, DType::e4m3, 7.0},
               {std::nullopt, DType::f32, 10.0},
               {small, DType::e4m3, 5.0625}};
  for (const auto& c : cases) {
    for (int ranks : {2, 3, 8}) {
      const auto results = measure({.level = Level::O3,
                                    .sharding = Sharding::parameters,
                                    .formats = c.formats,
                                    .reduced_gradient = c.reduced,
                                    .windows = false},
                                   ranks);
      double mean = 0, owned = 0;
      for (const RankMemory& rank : results) {
        INFO(c.bytes << " bytes, " << ranks << " ranks");
        std::uint64_t sum = 0, state = 0;
        for (const MemoryRow& r : rank.plan.memory) {
          INFO(r.what << (r.fp8_managed ? ", FP8-managed" : ", other"));
          CHECK(r.predicted == r.measured);
          sum += r.measured;
          if (r.state) state += r.measured;
        }
        CHECK(sum == rank.held);
        CHECK(rank.grown == 0);
        CHECK(rank.sends_what_it_says);
        const double own = static_cast<double>(rank.plan.state_bytes(true, true));
        const double share = c.bytes * static_cast<double>(rank.plan.owned_fp8_parameters);
        CHECK(own >= share);
        CHECK(own <= 1.01 * share);
        CHECK(own <= 1.02 * c.bytes * kManaged / ranks);
        mean += own / kManaged / ranks;
        owned += static_cast<double>(rank.plan.owned_fp8_parameters);
        // Beside what is its own a rank holds two units, once as weights and once as gradients: the
        // largest, which is a layer (3 vectors in FP32).
        const double unit = kLayerManaged + 3 * 4 * kWidth;
        const auto slots = static_cast<double>(row(rank.plan, "weight slots", true));
        CHECK(slots == 2 * unit);
        const auto gradients = static_cast<double>(row(rank.plan, "gradient slots", true));
        CHECK(gradients >= slots);
        CHECK(gradients <= 1.01 * slots);
      }
      CHECK(owned == kManaged);
      CHECK(mean >= c.bytes / ranks);
      CHECK(mean <= 1.01 * c.bytes / ranks);
    }
  }
}

TEST_CASE("the plan of sharded weights tells of units, slots and what a gather sends") {
  const auto results = measure({.level = Level::O3, .sharding = Sharding::parameters}, 3);
  std::uint64_t sent = 0;
  for (const RankMemory& rank : results) {
    CHECK(rank.plan.unit_gather_bytes.size() == kLayers + 1);
    for (std::uint64_t bytes : rank.plan.unit_gather_bytes) sent += bytes;
    // The step itself sends gradients alone.
    const std::string text = rank.plan.to_markdown();
    for (const char* part : {"| sharding | parameters |", "cut: 7 units are gathered",
                             "send/receive", "two slots of", "reduced when it is released",
                             "wire bytes of gathering all 7 units once", "| weight slots |"}) {
      INFO(part);
      CHECK(text.find(part) != std::string::npos);
    }
  }
  const double vectors = kLayers * 3 * 4 * kWidth;
  CHECK(static_cast<double>(sent) == 2 * (kManaged + vectors));
  const auto alone = measure({.level = Level::O3, .sharding = Sharding::parameters}, 1);
  CHECK(alone[0].sends_what_it_says);
  CHECK(alone[0].plan.weight_gather.find("written by the update") != std::string::npos);
}

TEST_CASE("a single unit, where parameters name none, has one slot") {
  std::vector<Plan> plans(2);
  run_ranks(2, [&](Communicator& comm) {
    const Context& ctx = comm.context();
    Engine engine(ctx, comm, {.sharding = Sharding::parameters});
    const Buffer init = upload(ctx, std::vector<float>(256 * 128, 0.01f));
    for (const char* name : {"a", "b"}) {
      engine.add(
          {.name = name, .shape = {256, 128}, .init = view_of(ctx, init, DType::f32, {256, 128})});
    }
    engine.freeze();
    engine.gather(0);
    engine.release(0);
    plans[static_cast<std::size_t>(comm.rank())] = engine.plan();
  });
  for (const Plan& plan : plans) {
    CHECK(row(plan, "weight slots", true) == 2 * 256 * 128);
    CHECK(plan.weight_gather.find("one slot of 65536 bytes") != std::string::npos);
  }
}

}  // namespace octet::test
