// SPDX-License-Identifier: Apache-2.0
// Sharded weights: units are whole when they were gathered, hold the bits of every other sharding,
// are gathered ahead, and never read before they are there.
#include <algorithm>
#include <utility>

#include "support/catch.hpp"
#include "support/compare.hpp"
#include "support/engine_model.hpp"
#include "support/errors.hpp"

namespace octet::test {
namespace {

/// Weights of all parameters after every step, the initial ones first.
using History = std::vector<std::vector<Bytes>>;

/// One rank's passes over the model, as a GPT whose embedding is its head too makes them: unit 0 is
/// the first and the last that the forward pass uses, and the backward pass likewise.
/// One that holds two gathers a unit before it releases the one before.
class Trainer {
 public:
  Trainer(Communicator& comm, const Context& ctx, const RunOptions& options, const History& history,
          bool holds_two)
      : comm_(comm), ctx_(ctx), options_(options), history_(history), holds_two_(holds_two) {
    engine_ = std::make_unique<Engine>(ctx, comm, options.config);
    add_parameters(*engine_, ctx, keep_);
    engine_->freeze();
  }

  void step(int step) {
    step_ = step;
    for (int m = 0; m < options_.config.micro_batches; ++m) {
      const int at = micro_step(step, m);
      for (int u = 0; u < kModelUnits; ++u) use(u, [] {});
      use(0, [] {});
      use(0, [] {});
      for (int u = kModelUnits - 1; u >= 0; --u) use(u, [&] { hand_over(u, at); });
    }
    if (held_ >= 0) engine_->release(std::exchange(held_, -1));
    poison();
    const float max_norm = step % options_.clip_every == 0 ? options_.max_norm : 0.0f;
    const StepResult done = engine_->step({.lr = options_.lr, .max_norm = max_norm});
    result_.norms.push_back(done.norm.read_sync());
  }

  RankResult result() {
    const std::vector<float> norms = result_.norms;
    result_ = read_back(*engine_, ctx_);
    result_.norms = norms;
    return result_;
  }
  int wrong() const { return wrong_; }
  Engine& engine() { return *engine_; }

 private:
  /// Gathers a unit, compares what is in it with the weights that the step begins with.
  template <class Work>
  void use(int unit, const Work& work) {
    if (unit != held_) engine_->gather(unit);
    if (held_ >= 0 && held_ != unit) engine_->release(held_);
    held_ = unit;
    for (std::size_t p = 0; p < model_params().size(); ++p) {
      if (unit_of(p) != unit) continue;
      const ScaledView weight = engine_->weight({static_cast<int>(p)});
      const auto at = static_cast<std::size_t>(step_ - 1);
      if (at < history_.size()) wrong_ += download_bytes(ctx_, weight.data) != history_[at][p];
      seen_.push_back(weight.data);
    }
    work();
    if (!holds_two_) engine_->release(std::exchange(held_, -1));
  }

  /// In another order on every rank.
  void hand_over(int unit, int at) {
    std::vector<std::size_t> params;
    for (std::size_t p = 0; p < model_params().size(); ++p) {
      if (unit_of(p) == unit) params.push_back(p);
    }
    const auto shift =
        static_cast<std::ptrdiff_t>(static_cast<std::size_t>(comm_.rank() + at) % params.size());
    std::rotate(params.begin(), params.begin() + shift, params.end());
    for (std::size_t p : params) {
      const std::vector<float> values = options_.gradient(comm_.rank(), p, at);
      if (values.empty()) continue;
      const Buffer buffer = upload(ctx_, values);
      engine_->add_gradient({static_cast<int>(p)},
                            view_of(ctx_, buffer, DType::f32, model_params()[p].shape));
      ctx_.synchronize();  // the buffer goes away
    }
  }

  /// NaN everywhere that weights have been: whoever reads before the next gather gets it.
  void poison() {
    if (comm_.size() == 1 || options_.config.sharding != Sharding::parameters) return;
    for (const TensorView& view : seen_) {
      write(ctx_, view.data, std::vector<std::uint8_t>(view.bytes(), 0xFF));
    }
    seen_.clear();
  }

  Communicator& comm_;
  Context ctx_;
  const RunOptions& options_;
  const History& history_;
  std::unique_ptr<Engine> engine_;
  std::vector<Buffer> keep_;
  std::vector<TensorView> seen_;
  RankResult result_;
  bool holds_two_;
  int held_ = -1, step_ = 0, wrong_ = 0;
};

Context engine_context(const RunOptions& options, Communicator& comm) {
  return options.engine_context ? options.engine_context(comm) : comm.context();
}

/// The weights of one rank without sharding, after every step.
History history_of(RunOptions options) {
  History history;
  options.ranks = 1;
  options.config.windows = false;
  const History none;
  run_ranks(1, [&](Communicator& comm) {
    Trainer trainer(comm, comm.context(), options, none, false);
    history.push_back(read_back(trainer.engine(), comm.context()).weights);
    for (int step = 1; step <= options.steps; ++step) {
      trainer.step(step);
      history.push_back(read_back(trainer.engine(), comm.context()).weights);
    }
  });
  return history;
}

/// Trains by units; where a history is given every use of a weight is compared with it.
std::vector<RankResult> train_units(const RunOptions& options, const History& history = {},
                                    bool holds_two = false) {
  std::vector<RankResult> results(static_cast<std::size_t>(options.ranks));
  std::vector<int> wrong(results.size(), 0);
  run_ranks(
      options.ranks,
      [&](Communicator& comm) {
        Trainer trainer(comm, engine_context(options, comm), options, history, holds_two);
        for (int step = 1; step <= options.steps; ++step) trainer.step(step);
        results[static_cast<std::size_t>(comm.rank())] = trainer.result();
        wrong[static_cast<std::size_t>(comm.rank())] = trainer.wrong();
      },
      options.device);
  CHECK(wrong == std::vector<int>(results.size(), 0));
  return results;
}

RunOptions options_of(Level level, Sharding sharding, int ranks) {
  RunOptions options;
  options.config = {.level = level,
                    .sharding = sharding,
                    .adamw = {.weight_decay = 0.1f, .seed = 5},
                    .bucket_elements = 20000};
  options.ranks = ranks;
  return options;
}

void check_equal(const std::vector<RankResult>& results, const std::vector<RankResult>& expected) {
  CHECK(rank_difference(results) == "");
  CHECK(first_difference(everything(results), everything(expected)) == "");
  CHECK(first_difference(results[0].norms, expected[0].norms) == "");
}

const std::function<Context(const Communicator&)> kApart = [](const Communicator&) {
  return Context::cpu();
};

}  // namespace

TEST_CASE("50 steps: sharded weights have the bits of whole ones on 1 to 8 ranks") {
  for (DType reduced : {DType::e4m3, DType::f32}) {
    RunOptions options =
        options_of(Level::O2, reduced == DType::e4m3 ? Sharding::none : Sharding::optimizer, 1);
    options.config.reduced_gradient = reduced;
    options.steps = 50;
    options.max_norm = 0.5f;
    options.clip_every = 2;
    const History history = history_of(options);
    const std::vector<RankResult> expected = train_units(options, history);
    options.config.sharding = Sharding::parameters;
    for (int ranks = 1; ranks <= 8; ++ranks) {
      INFO(ranks << " ranks, means in " << name_of(reduced));
      options.ranks = ranks;
      check_equal(train_units(options, history), expected);
    }
  }
}

TEST_CASE("sharded weights have the bits of a sharded optimizer where ranks differ") {
  for (Level level : {Level::O0, Level::O1, Level::O2}) {
    for (int ranks : {2, 3, 5}) {
      for (int micro_batches : {1, 3}) {
        RunOptions options = options_of(level, Sharding::optimizer, ranks);
        options.config.micro_batches = micro_batches;
        options.steps = 3;
        options.max_norm = 0.5f;
        options.clip_every = 2;
        // Not every parameter has a gradient on every rank, or all micro-batches; of every unit one
        // has, not everywhere the same.
        options.gradient = [](int rank, std::size_t p, int at) {
          const bool is_third = at > micro_step(0, 2);
          const bool is_cut = is_third && (p == 6 || p == 7) && p % 2 == std::size_t(rank) % 2;
          const bool used = p != 2 && !(p == 5 && rank == 1) && !is_cut;
          return used ? own_gradient(rank, p, at) : std::vector<float>();
        };
        for (const std::optional<Formats>& formats :
             {std::optional<Formats>{}, std::optional<Formats>{small_formats()}}) {
          if (formats.has_value() && level != Level::O2) continue;
          options.config.formats = formats;
          options.config.sharding = Sharding::optimizer;
          options.config.windows = false;
          options.engine_context = {};
          const std::vector<RankResult> expected = train_units(options);
          options.config.sharding = Sharding::parameters;
          for (bool windows : {false, true}) {
            for (bool apart : {false, true}) {
              INFO(name_of(level) << ", " << ranks << " ranks, micro-batches " << micro_batches
                                  << ", windows " << windows << ", two contexts " << apart);
              options.config.windows = windows;
              options.engine_context = apart ? kApart : nullptr;
              check_equal(train_units(options), expected);
              check_equal(train_units(options, {}, true), expected);
            }
          }
        }
      }
    }
  }
}

TEST_CASE("the next unit is gathered ahead, and what is there is not gathered again") {
  constexpr int kRanks = 3;
  std::vector<std::string> wrong(kRanks);
  run_ranks(kRanks, [&](Communicator& comm) {
    const Context& ctx = comm.context();
    Engine engine(ctx, comm, {.sharding = Sharding::parameters});
    std::vector<Buffer> keep;
    add_parameters(engine, ctx, keep);
    engine.freeze();
    const std::vector<std::uint64_t> bytes = engine.plan().unit_gather_bytes;
    std::uint64_t before = comm.wire_bytes().payload;
    std::vector<std::int64_t> gathers(kModelUnits, 0);
    std::string& text = wrong[static_cast<std::size_t>(comm.rank())];
    // What travels because of a call: these units.
    const auto expect = [&](const std::string& call, const std::vector<int>& units) {
      std::uint64_t expected = 0;
      for (int u : units) {
        expected += bytes[static_cast<std::size_t>(u)];
        ++gathers[static_cast<std::size_t>(u)];
      }
      for (int u = 0; u < kModelUnits; ++u) {
        const std::int64_t counted = engine.unit_gathers(u);
        if (counted == gathers[static_cast<std::size_t>(u)]) continue;
        text += call + ": " + std::to_string(counted) + " gathers of " + std::to_string(u) + "; ";
      }
      const std::uint64_t sent = comm.wire_bytes().payload - before;
      if (sent != expected) {
        text += call + ": " + std::to_string(sent) + " bytes instead of " +
                std::to_string(expected) + "; ";
      }
      before = comm.wire_bytes().payload;
    };
    const auto gather = [&](int u, const std::vector<int>& units) {
      engine.gather(u);
      expect("gather(" + std::to_string(u) + ")", units);
    };
    const auto release = [&](int u, const std::vector<int>& units) {
      engine.release(u);
      expect("release(" + std::to_string(u) + ")", units);
    };
    const auto step = [&] {
      engine.step({.lr = 1e-3f});
      before = comm.wire_bytes().payload;
    };
    // Forth and back.
    gather(0, {0, 1});
    release(0, {});
    gather(1, {2});
    release(1, {});
    gather(2, {3});
    release(2, {});
    gather(3, {4});
    release(3, {});
    gather(4, {});
    release(4, {});
    gather(4, {});
    release(4, {});
    gather(3, {2});
    // The next is gathered before the last is released: ahead as soon as there is a place.
    gather(2, {});
    release(3, {1});
    release(2, {});
    gather(1, {0});
    release(1, {});
    gather(0, {});
    release(0, {});
    step();
    // A jump that nobody could tell, then nothing ahead.
    gather(3, {3, 4});
    release(3, {});
    gather(0, {0});
    release(0, {});
    step();
    // The same way once more: what came next then is gathered ahead.
    gather(3, {3, 0});
    release(3, {});
    gather(0, {});
    release(0, {});
    step();
  });
  for (const std::string& text : wrong) CHECK(text == "");
}

TEST_CASE("evaluations and loaded states between steps make no step gather more") {
  using Gathers = std::vector<std::int64_t>;
  std::vector<std::vector<Gathers>> steps(2);
  run_ranks(2, [&](Communicator& comm) {
    Engine engine(comm.context(), comm, {.sharding = Sharding::parameters});
    std::vector<Buffer> keep;
    add_parameters(engine, comm.context(), keep);
    engine.freeze();
    Gathers before(kModelUnits, 0);
    const auto made = [&] {
      Gathers counts;
      for (int u = 0; u < kModelUnits; ++u) {
        const auto at = static_cast<std::size_t>(u);
        counts.push_back(engine.unit_gathers(u) - before[at]);
        before[at] += counts.back();
      }
      return counts;
    };
    // A unit is used twice on the way, so that the direction alone tells too little.
    const auto use = [&](std::initializer_list<int> units) {
      for (int u : units) {
        engine.gather(u);
        engine.release(u);
      }
    };
    const auto evaluate = [&] { use({0, 1, 2, 0, 3, 4}); };
    const auto step = [&] {
      evaluate();
      use({4, 3, 0, 2, 1, 0});
      engine.step({.lr = 1e-3f});
      steps[static_cast<std::size_t>(comm.rank())].push_back(made());
    };
    step();
    step();
    step();
    evaluate();
    evaluate();
    made();
    step();
    step();
    engine.state_loaded();
    step();
  });
  for (const std::vector<Gathers>& each : steps) {
    const Gathers& usual = each[2];
    CHECK(each[1] == usual);
    // What is in memory since the evaluation is not gathered again.
    for (std::size_t u = 0; u < usual.size(); ++u) CHECK(each[3][u] <= usual[u]);
    CHECK(each[4] == usual);
    CHECK(each[5] == usual);
  }
}

TEST_CASE("weights that are not cut are never gathered") {
  for (int ranks : {1, 2}) {
    std::vector<std::int64_t> gathers(static_cast<std::size_t>(ranks), -1);
    run_ranks(ranks, [&](Communicator& comm) {
      const Sharding sharding = ranks == 1 ? Sharding::parameters : Sharding::gradients;
      Engine engine(comm.context(), comm, {.sharding = sharding});
      std::vector<Buffer> keep;
      add_parameters(engine, comm.context(), keep);
      engine.freeze();
      engine.gather(0);
      engine.release(0);
      gathers[static_cast<std::size_t>(comm.rank())] = engine.unit_gathers(0);
    });
    CHECK(gathers == std::vector<std::int64_t>(gathers.size(), 0));
  }
}

TEST_CASE("units: what is refused is named, and changes nothing") {
  std::vector<std::vector<std::string>> errors(2);
  run_ranks(2, [&](Communicator& comm) {
    const Context& ctx = comm.context();
    Engine engine(ctx, comm, {.sharding = Sharding::parameters});
    std::vector<Buffer> keep;
    add_parameters(engine, ctx, keep);
    std::vector<std::string>& list = errors[static_cast<std::size_t>(comm.rank())];
    const auto keep_error = [&](auto call) { list.push_back(error_of(call)); };
    keep_error([&] { engine.gather(0); });
    keep_error([&] { engine.unit_gathers(0); });
    engine.freeze();
    const Buffer out(ctx, 300 * 97 * 4);
    keep_error([&] { engine.weight({0}); });
    keep_error([&] { engine.weight_as({0}, view_of(ctx, out, DType::f32, {300, 97})); });
    keep_error([&] { engine.gather(5); });
    keep_error([&] { engine.gather(-1); });
    keep_error([&] { engine.unit_gathers(5); });
    keep_error([&] { engine.release(0); });
    engine.gather(0);
    engine.gather(2);
    keep_error([&] { engine.gather(0); });
    keep_error([&] { engine.gather(1); });
    keep_error([&] { engine.step({.lr = 1e-3f}); });
    engine.weight_as({0}, view_of(ctx, out, DType::f32, {300, 97}));
    engine.release(0);
    keep_error([&] { engine.weight({0}); });
    engine.release(2);
    engine.step({.lr = 1e-3f});
    keep_error([&] { engine.weight({0}); });
    // Unit 4 is released with a gradient of one parameter: the other one comes too late.
    const Buffer gradient = upload(ctx, common_gradient(0, 9, 1));
    const auto add = [&](int p) {
      engine.add_gradient({p}, view_of(ctx, gradient, DType::f32,
                                       model_params()[static_cast<std::size_t>(p)].shape));
    };
    engine.gather(4);
    add(9);
    engine.release(4);
    keep_error([&] { add(8); });
    engine.step({.lr = 1e-3f});
  });
  const std::vector<std::vector<std::string>> expected = {
      {"gather", "before freeze"},
      {"unit_gathers", "before freeze"},
      {"weight", "\"embedding\"", "unit 0", "gather(0)"},
      {"weight", "\"embedding\"", "unit 0", "gather(0)"},
      {"gather", "no unit 5", "0 to 4"},
      {"gather", "no unit -1"},
      {"unit_gathers", "no unit 5", "0 to 4"},
      {"release", "unit 0 is not whole"},
      {"gather", "unit 0 is whole already"},
      {"gather", "unit 1", "units 0, 2 are whole", "at most two"},
      {"Engine::step", "0, 2", "released"},
      {"\"embedding\"", "gather(0)"},
      {"\"embedding\"", "gather(0)"},
      {"\"opted out\"", "released", "unit by unit"}};
  for (const std::vector<std::string>& list : errors) {
    REQUIRE(list.size() == expected.size());
    for (std::size_t i = 0; i < list.size(); ++i) {
      for (const std::string& word : expected[i]) CHECK(missing(list[i], {word}) == "");
    }
  }
}

TEST_CASE("units with gaps and formats that cannot be cut are refused") {
  std::vector<std::vector<std::string>> errors(2);
  run_ranks(2, [&](Communicator& comm) {
    const Context& ctx = comm.context();
    std::vector<std::string>& list = errors[static_cast<std::size_t>(comm.rank())];
    const Buffer values = upload(ctx, std::vector<float>(200 * 64, 0.5f));
    const TensorView init = view_of(ctx, values, DType::f32, {200, 64});
    const auto config_of = [](WeightFormat format, Sharding sharding = Sharding::parameters) {
      Formats formats = formats_of(Level::O2);
      formats.state.weight = format;
      return EngineConfig{.sharding = sharding, .formats = formats};
    };
    Engine gap(ctx, comm, {.sharding = Sharding::parameters});
    gap.add({.name = "a", .shape = {200, 64}, .init = init});
    gap.add({.name = "b", .shape = {200, 64}, .init = init, .unit = 2});
    list.push_back(error_of([&] { gap.freeze(); }));
    list.push_back(error_of([&] {
      gap.add({.name = "c", .shape = {200, 64}, .init = init, .unit = -1});
    }));
    list.push_back(error_of([&] { Engine(ctx, comm, config_of(WeightFormat::e4m3_row_block)); }));
    for (Sharding sharding : {Sharding::optimizer, Sharding::gradients, Sharding::parameters}) {
      Engine turned(ctx, comm, config_of(WeightFormat::e4m3_and_transpose, sharding));
      list.push_back(error_of([&] {
        turned.add({.name = "a", .shape = {200, 64}, .init = init});
      }));
    }
  });
  for (const std::vector<std::string>& list : errors) {
    CHECK(missing(list[0], {"unit 1 has no parameter", "unit 2"}) == "");
    CHECK(missing(list[1], {"\"c\"", "unit is -1"}) == "");
    CHECK(missing(list[2], {"e4m3_row_block", "parameters", "e4m3_tile"}) == "");
    const char* shardings[] = {"optimizer over 2", "gradients over 2", "parameters over 2"};
    for (std::size_t i = 0; i < 3; ++i) {
      CHECK(missing(list[3 + i], {"\"a\"", "e4m3_and_transpose", shardings[i], "multiple of 16",
                                  "[200, 64]"}) == "");
    }
  }
}

}  // namespace octet::test
