// SPDX-License-Identifier: Apache-2.0
// States in pinned host memory: the bits of states on the device, and what the plan says of them.
#include <algorithm>
#include <cstring>
#include <set>

#include "support/catch.hpp"
#include "support/compare.hpp"
#include "support/engine_model.hpp"
#include "support/errors.hpp"

namespace octet::test {
namespace {

EngineConfig config_of(Level level) {
  return {.level = level, .adamw = {.weight_decay = 0.1f, .seed = 5}};
}

std::vector<EngineConfig> configs() {
  std::vector<EngineConfig> list;
  for (Level level : {Level::O0, Level::O1, Level::O2, Level::O3}) list.push_back(config_of(level));
  list.push_back(config_of(Level::O3));
  list.back().formats = small_formats();
  return list;
}

bool is_state_of_optimizer(const std::string& what) {
  return what == "master" || what == "m" || what == "v";
}

/// Bytes of a row, of all kinds of parameters.
std::uint64_t bytes_of_row(const Plan& plan, const std::string& what) {
  std::uint64_t bytes = 0;
  for (const MemoryRow& row : plan.memory) {
    if (row.what == what) bytes += row.measured;
  }
  return bytes;
}

}  // namespace

TEST_CASE("states in host memory have the bits of states on the device") {
  for (DeviceType device : rank_devices()) {
    for (const EngineConfig& config : configs()) {
      for (int ranks : {1, 3}) {
        RunOptions options;
        options.config = config;
        options.ranks = ranks;
        options.device = device;
        options.gradient = own_gradient;
        options.max_norm = 0.5f;
        options.clip_every = 2;
        const std::vector<RankResult> expected = train(options);
        options.config.offload_states = true;
        const std::vector<RankResult> results = train(options);
        INFO(name_of(config.level) << ", " << ranks << " ranks");
        CHECK(results[0].step == options.steps);
        CHECK(rank_difference(results) == "");
        CHECK(first_difference(everything(results), everything(expected)) == "");
        CHECK(first_difference(results[0].norms, expected[0].norms) == "");
      }
    }
  }
}

TEST_CASE("the plan counts states in host memory apart from the device's") {
  for (const EngineConfig& config : configs()) {
    for (int ranks : {1, 2}) {
      RunOptions options;
      options.config = config;
      options.ranks = ranks;
      options.steps = 1;
      const std::vector<RankResult> near = train(options);
      options.config.offload_states = true;
      const std::vector<RankResult> far = train(options);
      for (std::size_t r = 0; r < far.size(); ++r) {
        INFO(name_of(config.level) << ", rank " << r << " of " << ranks);
        const Plan& plan = far[r].plan;
        std::uint64_t moved = 0;
        for (const MemoryRow& row : near[r].plan.memory) {
          INFO(row.what);
          CHECK(!row.host);
          const bool moves = is_state_of_optimizer(row.what);
          const std::string what = moves ? row.what + " (host)" : row.what;
          CHECK(bytes_of_row(plan, what) == bytes_of_row(near[r].plan, row.what));
          if (moves) {
            CHECK(bytes_of_row(plan, row.what) == 0);
            moved += row.measured;
          }
        }
        CHECK(moved > 0);
        for (const MemoryRow& row : plan.memory) {
          INFO(row.what);
          CHECK(row.predicted == row.measured);
          CHECK(row.host == (row.what.find("(host)") != std::string::npos));
        }
        for (bool measured : {false, true}) {
          CHECK(plan.host_state_bytes(false, measured) == moved);
          CHECK(plan.state_bytes(false, measured) + moved ==
                near[r].plan.state_bytes(false, measured));
          CHECK(near[r].plan.host_state_bytes(false, measured) == 0);
          CHECK(plan.host_state_bytes(true, measured) < moved);
        }
        CHECK(plan.optimizer.find("pinned host memory") != std::string::npos);
        CHECK(plan.to_markdown().find("| m (host) |") != std::string::npos);
      }
    }
  }
}

TEST_CASE("the engine's context gives up what lies in host memory, and the host can read that") {
  for (const Context& ctx : test_contexts()) {
    const auto comm = make_single(ctx);
    EngineConfig config = config_of(Level::O2);
    config.formats = small_formats();
    std::vector<Buffer> keep;
    std::size_t held[2] = {};
    std::uint64_t host = 0;
    for (bool offload : {false, true}) {
      config.offload_states = offload;
      const std::size_t before = ctx.memory_use().current;
      Engine engine(ctx, *comm, config);
      std::vector<Buffer> values;
      add_parameters(engine, ctx, values);
      engine.freeze();
      values.clear();
      held[offload ? 1 : 0] = ctx.memory_use().current - before;
      host = engine.plan().host_state_bytes(false, true);
      if (!offload) continue;
      hand_over(engine, ctx, common_gradient, 0, 1);
      engine.step({.lr = 1e-3f});
      ctx.synchronize();
      const StateView m = engine.optimizer().m(0);
      Bytes seen(static_cast<std::size_t>(m.count));
      std::memcpy(seen.data(), m.data, seen.size());
      CHECK(first_difference(seen, codes_of(ctx, m)) == "");
      CHECK(std::set<std::uint8_t>(seen.begin(), seen.end()).size() > 10);
    }
    CHECK(host > 0);
    CHECK(held[0] == held[1] + host);
  }
}

TEST_CASE("the optimizer's states come from a context of its device") {
  if (cuda_device_count() == 0) {
    WARN("no CUDA device: there is one kind of device only");
    return;
  }
  const Context ctx = Context::cpu(), other = Context::cuda(0, nullptr);
  CHECK(missing(error_of([&] { AdamW(ctx, {}, {}, other); }), {"cuda:0", "cpu"}) == "");
}

}  // namespace octet::test
