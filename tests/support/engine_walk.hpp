// SPDX-License-Identifier: Apache-2.0
// One combination on one rank: refused, or trained for two steps and compared with its plan.
#pragma once

#include <map>
#include <mutex>
#include <sstream>

#include "octet/ops/quantize.hpp"
#include "support/devices.hpp"
#include "support/engine_combinations.hpp"
#include "support/ranks.hpp"

namespace octet::test {

struct WalkParam {
  std::string name;
  Shape shape;
  int unit;
  bool fp8 = true;
};

/// Three units; matrices of nine panels, of two with three tiles each and of one; vectors, one
/// element, a matrix kept out of FP8.
inline std::vector<WalkParam> walk_params(Shapes shapes) {
  std::vector<WalkParam> list = {
      {"embedding", {1104, 16}, 0}, {"up", {shapes == Shapes::odd ? 150 : 144, 272}, 1},
      {"bias", {272}, 1},           {"one", {1}, 2},
      {"kept", {48, 48}, 2, false}, {"down", {80, 40}, 2}};
  if (shapes == Shapes::cube) list.push_back({"cube", {3, 16, 40}, 2});
  return list;
}
inline constexpr int kWalkUnits = 3;

/// What one rank says of a combination.
struct WalkResult {
  std::string error = "no error";     ///< from the constructor, add() or freeze()
  std::string wrong;                  ///< where plan and measurement differ
  std::vector<std::uint8_t> weights;  ///< after the steps, decoded
};

/// Weights by what they must follow from alone: formats, reduced gradient and shapes.
class WeightTable {
 public:
  /// Empty, or the combination that ended with other weights.
  std::string compare(const Combination& c, const std::vector<std::uint8_t>& weights) {
    Formats f = c.formats();
    f.state.weight = without_transpose(f.state.weight);
    std::ostringstream key;
    key << name_of(f.gradient) << name_of(f.state.weight) << name_of(f.state.master)
        << name_of(f.state.m) << name_of(f.state.v) << name_of(c.reduced_gradient())
        << static_cast<int>(c.shapes);
    const auto [at, is_new] = table_.try_emplace(key.str(), describe(c), weights);
    return is_new || at->second.second == weights ? "" : at->second.first;
  }

 private:
  std::map<std::string, std::pair<std::string, std::vector<std::uint8_t>>> table_;
};

/// One rank's engine, its trainer and what is measured around them.
class Walker {
 public:
  /// Throws what the engine is refused with. `ctx` is the engine's.
  Walker(const Context& ctx, Communicator& comm, const Combination& c)
      : ctx_(ctx), comm_(comm), c_(c), params_(walk_params(c.shapes)) {
    for (std::size_t p = 0; p < params_.size(); ++p) {
      const auto count = static_cast<std::size_t>(params_[p].shape.numel());
      const auto seed = static_cast<std::uint32_t>(p);
      initial_.push_back(upload(ctx_, normal_values(count, 77 + seed, 0.02f)));
      for (int step = 0; step < kSteps; ++step) {
        const auto s = static_cast<std::uint32_t>(100 * step);
        gradients_.push_back(upload(ctx_, normal_values(count, 1000 + s + seed, 0.01f)));
      }
    }
    out_ = Buffer(ctx_, 150 * 272 * sizeof(float));
    held_before_ = held();
    engine_ = std::make_unique<Engine>(ctx, comm, c.config());
    for (std::size_t p = 0; p < params_.size(); ++p) {
      engine_->add({.name = params_[p].name,
                    .shape = params_[p].shape,
                    .init = view_of(ctx_, initial_[p], DType::f32, params_[p].shape),
                    .fp8 = params_[p].fp8,
                    .unit = params_[p].unit});
    }
    engine_->freeze();
    sent_before_ = comm.wire_bytes().payload;
  }

  WalkResult run() {
    const std::size_t frozen = held();
    ctx_.reset_peak();
    side().reset_peak();
    for (int step = 0; step < kSteps; ++step) train(step);
    const std::vector<std::uint8_t> weights = read_weights();
    check_memory(frozen);
    check_wire();
    check_text();
    return {.wrong = wrong_.str(), .weights = weights};
  }

 private:
  static constexpr int kSteps = 2;

  Context side() const { return comm_.context(); }
  bool is_apart() const { return side().state() != ctx_.state(); }
  std::size_t held() const {
    return ctx_.memory_use().current + (is_apart() ? side().memory_use().current : 0);
  }

  /// As a trainer does: forth and back by units, gradients in the order of a backward pass.
  void train(int step) {
    for (int u = 0; u < kWalkUnits; ++u) {
      engine_->gather(u);
      engine_->release(u);
    }
    for (int u = kWalkUnits - 1; u >= 0; --u) {
      engine_->gather(u);
      for (std::size_t p = params_.size(); p-- > 0;) {
        if (params_[p].unit != u) continue;
        const Buffer& gradient = gradients_[p * kSteps + static_cast<std::size_t>(step)];
        engine_->add_gradient({static_cast<int>(p)},
                              view_of(ctx_, gradient, DType::f32, params_[p].shape));
      }
      engine_->release(u);
    }
    const StepResult done = engine_->step({.lr = 1e-3f, .max_norm = step == 1 ? 0.5f : 0.0f});
    check("steps applied", done.step.read_sync(), std::int64_t{step + 1});
    check("steps skipped", done.skipped.read_sync(), std::int64_t{0});
  }

  /// Of all parameters, in f32; transposed copies are compared with what they are of.
  std::vector<std::uint8_t> read_weights() {
    std::vector<std::uint8_t> all;
    for (std::size_t p = 0; p < params_.size(); ++p) {
      const ParamId id{static_cast<int>(p)};
      engine_->gather(params_[p].unit);
      const TensorView out = view_of(ctx_, out_, DType::f32, params_[p].shape);
      engine_->weight_as(id, out);
      const std::vector<std::uint8_t> values = download_bytes(ctx_, out);
      all.insert(all.end(), values.begin(), values.end());
      check_transposed(id);
      engine_->release(params_[p].unit);
    }
    return all;
  }

  void check_transposed(ParamId id) {
    const WeightFormat format = engine_->weight_format(id);
    if (!is_transposed(format)) return;
    const bool tiles = has_block_scales(format);
    const TensorView codes = tiles ? engine_->block_weight(id).data : engine_->weight(id).data;
    const TensorView turned =
        tiles ? engine_->block_weight_transposed(id).data : engine_->weight_transposed(id);
    const auto is = download_bytes(ctx_, codes), other = download_bytes(ctx_, turned);
    const auto rows = static_cast<std::size_t>(codes.shape[0]);
    const auto columns = static_cast<std::size_t>(codes.shape[1]);
    std::size_t different = 0;
    for (std::size_t i = 0; i < is.size(); ++i) {
      different += is[i] != other[i % columns * rows + i / columns] ? 1 : 0;
    }
    check("codes of a transposed copy", different, std::size_t{0});
  }

  // Everything is in a row, and a step takes no more.
  void check_memory(std::size_t frozen) {
    std::uint64_t device = 0, host = 0;
    for (const MemoryRow& row : engine_->plan().memory) {
      check("row " + row.what + (row.fp8_managed ? ", FP8-managed" : ""), row.measured,
            row.predicted);
      check("place of " + row.what, row.host, row.what.find("(host)") != std::string::npos);
      (row.host ? host : device) += row.measured;
    }
    check("sum of the rows", device, std::uint64_t{held() - held_before_});
    check("memory in host rows", host > 0, c_.offload);
    check("memory after the steps", held(), frozen);
    const std::size_t peak =
        ctx_.memory_use().peak + (is_apart() ? side().memory_use().peak : std::size_t{0});
    check("most memory in the steps", peak, frozen);
  }

  void check_wire() {
    const Plan& plan = engine_->plan();
    std::uint64_t planned = plan.wire_bytes_per_step * kSteps;
    for (std::size_t u = 0; u < plan.unit_gather_bytes.size(); ++u) {
      const std::int64_t gathers = engine_->unit_gathers(static_cast<int>(u));
      check("unit " + std::to_string(u) + " gathered", gathers > 0, true);
      planned += plan.unit_gather_bytes[u] * static_cast<std::uint64_t>(gathers);
    }
    check("payload sent", comm_.wire_bytes().payload - sent_before_, planned);
    check("payload planned", planned > 0, c_.ranks > 1);
    check("units of the plan", plan.unit_gather_bytes.size(),
          c_.cuts_weights() ? std::size_t{kWalkUnits} : std::size_t{0});
  }

  void check_text() {
    const Plan& plan = engine_->plan();
    check("level", plan.level, c_.level);
    check("sharding", plan.sharding, c_.cut());
    check("formats", plan.formats == c_.formats(), true);
    check("reduced gradient", plan.reduced_gradient, c_.reduced_gradient());
    check("ranks", plan.ranks, c_.ranks);
    check("transport", plan.transport, std::string(comm_.name()));
    const StateFormats f = c_.formats().state;
    const std::string text = plan.to_markdown();
    const auto expect = [&](const std::string& part, bool is_there = true) {
      check("\"" + part + "\" in the plan", text.find(part) != std::string::npos, is_there);
    };
    const auto text_of = [](auto value) { return std::string(name_of(value)); };
    expect("| level | " + text_of(c_.level) + " |");
    expect("| sharding | " + text_of(c_.cut()) + " |");
    expect("| ranks | " + std::to_string(c_.ranks) + " over " + std::string(comm_.name()) + " |");
    expect("weight " + text_of(f.weight) + ", gradient " + text_of(c_.formats().gradient) +
           ", master " + text_of(f.master) + ", m " + text_of(f.m) + ", v " + text_of(f.v) + " |");
    expect("| reduced gradient | " + text_of(c_.reduced_gradient()) + " |");
    expect("formats set by hand", c_.formats() != formats_of(c_.level));
    expect("lie in a window", c_.has_windows() && c_.ranks > 1);
    expect("send/receive, because EngineConfig::windows is false",
           !c_.has_windows() && c_.ranks > 1);
    expect("fused: ", c_.schedule == Schedule::fused);
    expect("no rank keeps gradients", c_.is_cut() && c_.cut() >= Sharding::gradients);
    expect("cut: 3 units are gathered", c_.cuts_weights());
    expect("sharding has nothing to cut", c_.ranks == 1 && c_.cut() != Sharding::none);
    expect("pinned host memory", c_.offload);
    expect("transposed weight", is_transposed(f.weight) && !c_.cuts_weights());
    expect("transposed copies made by every rank", is_transposed(f.weight) && c_.is_cut());
  }

  template <class T>
  void check(const std::string& what, const T& is, const T& expected) {
    if (is == expected) return;
    wrong_ << what;
    if constexpr (std::is_arithmetic_v<T>) {
      wrong_ << " is " << is << " instead of " << expected;
    }
    wrong_ << "; ";
  }

  Context ctx_;
  Communicator& comm_;
  Combination c_;
  std::vector<WalkParam> params_;
  std::vector<Buffer> initial_, gradients_;
  Buffer out_;
  std::size_t held_before_ = 0;
  std::unique_ptr<Engine> engine_;
  std::uint64_t sent_before_ = 0;
  std::ostringstream wrong_;
};

/// All of a combination on one rank.
inline WalkResult walk(const Context& ctx, Communicator& comm, const Combination& c) {
  std::unique_ptr<Walker> walker;
  const std::string error = error_of([&] { walker = std::make_unique<Walker>(ctx, comm, c); });
  if (walker == nullptr) return {.error = error, .wrong = {}, .weights = {}};
  return walker->run();
}

}  // namespace octet::test
