// SPDX-License-Identifier: Apache-2.0
// What an engine refuses: by name, before anything has changed, on every rank.
#include <algorithm>
#include <array>
#include <limits>
#include <new>
#include <thread>

#include "support/catch.hpp"
#include "support/compare.hpp"
#include "support/engine_model.hpp"
#include "support/errors.hpp"

namespace octet::test {
namespace {

/// An engine on one CPU rank with a parameter "w" of 64 x 64.
struct Small {
  Context ctx = Context::cpu();
  std::unique_ptr<Communicator> comm = make_single(ctx);
  Tensor init{ctx, DType::f32, {64, 64}};
  Engine engine;
  ParamId id;

  explicit Small(const EngineConfig& config = {}) : engine(ctx, *comm, config) {
    write(ctx, init.view().data, normal_values(4096, 1, 0.02f));
    id = engine.add(spec("w"));
  }
  ParamSpec spec(const std::string& name) const {
    return {.name = name, .shape = {64, 64}, .init = init};
  }
};

/// Adds parameters on one rank; the errors of freeze() on all ranks.
template <class Add>
std::vector<std::string> freeze_errors(int ranks, const Add& add) {
  std::vector<std::string> errors(static_cast<std::size_t>(ranks));
  run_ranks(ranks, [&](Communicator& comm) {
    const Context ctx = comm.context();
    EngineConfig config;
    std::vector<Tensor> keep;
    std::vector<ParamSpec> specs;
    add(comm.rank(), ctx, config, keep, specs);
    Engine engine(ctx, comm, config);
    for (const ParamSpec& spec : specs) engine.add(spec);
    errors[static_cast<std::size_t>(comm.rank())] = error_of([&] { engine.freeze(); });
  });
  return errors;
}

ParamSpec made(const Context& ctx, std::vector<Tensor>& keep, const std::string& name,
               const Shape& shape, std::uint32_t seed = 1) {
  keep.emplace_back(ctx, DType::f32, shape);
  write(ctx, keep.back().view().data,
        normal_values(static_cast<std::size_t>(shape.numel()), seed, 0.02f));
  return {.name = name, .shape = shape, .init = keep.back().view()};
}

}  // namespace

/// Memory up to a limit, then none.
struct Limited {
  std::size_t left = 0;
  static void* allocate(std::size_t bytes, CUstream_st*, void* user) {
    auto& self = *static_cast<Limited*>(user);
    if (bytes > self.left) return nullptr;
    self.left -= bytes;
    return ::operator new (bytes, std::align_val_t{256});
  }
  static void deallocate(void* data, std::size_t bytes, CUstream_st*, void* user) {
    static_cast<Limited*>(user)->left += bytes;
    ::operator delete (data, std::align_val_t{256});
  }
};

TEST_CASE("a rank without memory ends freeze on every rank, and the engine is spent") {
  ThreadGroup group(2, std::chrono::seconds(30));
  std::array<std::string, 2> first, second, added;
  std::vector<std::thread> ranks;
  for (int rank = 0; rank < 2; ++rank) {
    ranks.emplace_back([&, rank] {
      const auto at = static_cast<std::size_t>(rank);
      // 16 KiB of initial values, 16 KiB of weight and gradient, then 48 KiB of states.
      Limited memory{rank == 1 ? std::size_t{50} << 10 : std::size_t{1} << 20};
      const Context ctx = Context::cpu({Limited::allocate, Limited::deallocate, &memory});
      const auto comm = group.join(rank, ctx);
      const Tensor init(ctx, DType::f32, {64, 64});
      write(ctx, init.view().data, normal_values(4096, 1, 0.02f));
      Engine engine(ctx, *comm, {.level = Level::O0});
      engine.add({.name = "w", .shape = {64, 64}, .init = init});
      first[at] = error_of([&] { engine.freeze(); });
      second[at] = error_of([&] { engine.freeze(); });
      added[at] = error_of([&] { engine.add({.name = "v", .shape = {64, 64}, .init = init}); });
    });
  }
  for (std::thread& rank : ranks) rank.join();
  for (std::size_t rank = 0; rank < 2; ++rank) {
    CHECK(missing(first[rank], {"rank 1", "out of memory"}) == "");
    CHECK(missing(second[rank], {"failed before"}) == "");
    CHECK(missing(added[rank], {"after freeze"}) == "");
  }
}

// The ranks meet several times in freeze(): wherever one of them stops, the others must not take
// its words for something else, nor wait for it.
TEST_CASE("wherever memory ends on one rank, every rank throws its reason") {
  for (const bool windows : {false, true}) {
    int failures = 0;
    for (std::size_t kib = 80; kib <= 420; kib += 10) {
      ThreadGroup group(3, std::chrono::seconds(5));
      std::array<std::string, 3> errors;
      std::vector<std::thread> ranks;
      for (int rank = 0; rank < 3; ++rank) {
        ranks.emplace_back([&, rank] {
          Limited memory{(rank == 1 ? kib : std::size_t{10'000}) << 10};
          const Context ctx = Context::cpu({Limited::allocate, Limited::deallocate, &memory});
          const auto comm = group.join(rank, ctx);
          std::vector<Tensor> keep;
          Engine engine(ctx, *comm, {.level = Level::O3, .bucket_elements = 1, .windows = windows});
          engine.add(made(ctx, keep, "first", {300, 40}, 1));
          engine.add(made(ctx, keep, "second", {64, 100}, 2));
          errors[static_cast<std::size_t>(rank)] = error_of([&] { engine.freeze(); });
        });
      }
      for (std::thread& rank : ranks) rank.join();
      CAPTURE(windows, kib);
      if (errors[0] == "no error") {
        CHECK((errors[1] == "no error" && errors[2] == "no error"));
        continue;
      }
      ++failures;
      for (const std::string& error : errors) {
        CHECK(missing(error, {"Engine::freeze: rank 1: ", "out of memory"}) == "");
      }
    }
    CHECK(failures > 5);
  }
}

TEST_CASE("hyper-parameters that no step could use are refused at once") {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (float bad : {nan, -0.1f, std::numeric_limits<float>::infinity()}) {
    CHECK(missing(error_of([&] { Small s({.adamw = {.weight_decay = bad}}); }), {"weight_decay"}) ==
          "");
    Small s;
    ParamSpec spec = s.spec("v");
    spec.group = AdamWGroup{.weight_decay = bad};
    CHECK(missing(error_of([&] { s.engine.add(spec); }), {"\"v\"", "weight_decay"}) == "");
  }
  const struct {
    const char* field;
    AdamWGroup group;
  } bad_groups[] = {{"lr_factor", {.lr_factor = -1.0f}},
                    {"lr_factor", {.lr_factor = nan}},
                    {"beta1", {.beta1 = 1.0f}},
                    {"beta2", {.beta2 = -0.1f}},
                    {"eps", {.eps = 0.0f}},
                    {"eps", {.eps = 1e19f}},
                    {"beta1^2", {.beta1 = 0.9f, .beta2 = 0.8f}}};
  for (const auto& bad : bad_groups) {
    Small s;
    ParamSpec spec = s.spec("v");
    spec.group = bad.group;
    INFO(bad.field);
    CHECK(missing(error_of([&] { s.engine.add(spec); }), {"\"v\"", bad.field}) == "");
  }
  const Formats unusable{.gradient = DType::f32, .state = {.weight = WeightFormat::none}};
  CHECK(missing(error_of([&] { Small s({.formats = unusable}); }), {"formats", "weight", "none"}) ==
        "");
  CHECK(missing(error_of([&] { Small s({.adamw = {.eps = 0.0f}}); }), {"eps", "0"}) == "");
  CHECK(missing(error_of([&] { Small s({.adamw = {.beta1 = 0.99f}}); }), {"beta1", "0.99"}) == "");
  const Formats formats{.gradient = DType::f16, .state = {}};
  CHECK(missing(error_of([&] { Small s({.formats = formats}); }), {"gradient", "f16"}) == "");
}

TEST_CASE("parameters that cannot be added are refused by name") {
  Small s;
  CHECK(missing(error_of([&] { s.engine.add(s.spec("w")); }), {"\"w\""}) == "");
  CHECK(missing(error_of([&] { s.engine.add(s.spec("")); }), {"name"}) == "");
  const auto error_with = [&](auto change) {
    ParamSpec spec = s.spec("layer.7");
    change(spec);
    return error_of([&] { s.engine.add(spec); });
  };
  CHECK(missing(error_with([](ParamSpec& p) { p.init = {}; }), {"layer.7"}) == "");
  CHECK(missing(error_with([](ParamSpec& p) {
                  p.shape = {64, 63};
                }),
                {"layer.7", "[64, 63]", "[64, 64]"}) == "");
  CHECK(missing(error_with([](ParamSpec& p) { p.init.dtype = DType::e4m3; }),
                {"layer.7", "e4m3"}) == "");
  CHECK(missing(error_with([](ParamSpec& p) {
                  p.init.device = {DeviceType::cuda, 3};
                }),
                {"layer.7", "cuda:3"}) == "");
  CHECK(error_with([](ParamSpec&) {}) == "no error");
  s.engine.freeze();
  CHECK(missing(error_of([&] { s.engine.add(s.spec("late")); }), {"late", "freeze"}) == "");
}

TEST_CASE("calls before freeze are refused by the call's name") {
  Small s;
  const Tensor g(s.ctx, DType::f32, {64, 64});
  CHECK(missing(error_of([&] { s.engine.step({.lr = 1e-3f}); }), {"step", "freeze"}) == "");
  CHECK(missing(error_of([&] { s.engine.add_gradient(s.id, g); }), {"add_gradient", "freeze"}) ==
        "");
  CHECK(missing(error_of([&] { s.engine.weight(s.id); }), {"weight", "freeze"}) == "");
  CHECK(missing(error_of([&] { s.engine.weight_as(s.id, g); }), {"weight", "freeze"}) == "");
  CHECK(missing(error_of([&] { s.engine.plan(); }), {"plan", "freeze"}) == "");
  CHECK(missing(error_of([&] { s.engine.optimizer(); }), {"optimizer", "freeze"}) == "");
  s.engine.freeze();
  CHECK(missing(error_of([&] { s.engine.freeze(); }), {"freeze"}) == "");
}

TEST_CASE("gradients and steps that do not fit are refused and change nothing") {
  std::vector<Bytes> weights;
  for (bool provoked : {false, true}) {
    Small s;
    s.engine.freeze();
    const Tensor g(s.ctx, DType::f32, {64, 64}), turned(s.ctx, DType::f32, {32, 128});
    const Tensor narrow(s.ctx, DType::e4m3, {64, 64});
    write(s.ctx, g.view().data, normal_values(4096, 2));
    if (provoked) {
      Engine& engine = s.engine;
      CHECK(missing(error_of([&] { engine.add_gradient(s.id, turned); }),
                    {"\"w\"", "[32, 128]", "[64, 64]"}) == "");
      CHECK(missing(error_of([&] { engine.add_gradient(s.id, narrow); }), {"\"w\"", "e4m3"}) == "");
      CHECK(missing(error_of([&] { engine.add_gradient({7}, g); }), {"7"}) == "");
      CHECK(missing(error_of([&] { engine.add_gradient({}, g); }), {"-1"}) == "");
      TensorView elsewhere = g.view();
      elsewhere.device = {DeviceType::cuda, 5};
      CHECK(missing(error_of([&] { engine.add_gradient(s.id, elsewhere); }), {"\"w\"", "cuda:5"}) ==
            "");
      CHECK(missing(error_of([&] {
                      engine.add_gradient(s.id, {nullptr, DType::f32, {64, 64}, {}});
                    }),
                    {"\"w\"", "null"}) == "");
      CHECK(missing(error_of([&] { engine.weight({1}); }), {"1"}) == "");
      CHECK(missing(error_of([&] { engine.weight_as(s.id, turned); }), {"[32, 128]"}) == "");
      CHECK(missing(error_of([&] { engine.step({.lr = -1.0f}); }), {"lr", "-1"}) == "");
      CHECK(missing(error_of([&] { engine.step({.lr = NAN}); }), {"lr", "nan"}) == "");
      CHECK(missing(error_of([&] { engine.step({.lr = 1.0f, .max_norm = -2.0f}); }),
                    {"max_norm", "-2"}) == "");
    }
    s.engine.add_gradient(s.id, g);
    if (provoked) {
      CHECK(missing(error_of([&] { s.engine.add_gradient(s.id, g); }), {"\"w\"", "already"}) == "");
    }
    const StepResult done = s.engine.step({.lr = 1e-2f});
    CHECK(done.step.read_sync() == 1);
    CHECK(done.skipped.read_sync() == 0);
    CHECK(error_of([&] { s.engine.add_gradient(s.id, g); }) == "no error");
    weights.push_back(download_bytes(s.ctx, s.engine.weight(s.id).data));
  }
  CHECK(first_difference(weights[1], weights[0]) == "");
}

TEST_CASE("configurations that cannot work are refused by field") {
  const auto freeze_error = [](const EngineConfig& config) {
    return error_of([&] {
      Small s(config);
      s.engine.freeze();
    });
  };
  CHECK(freeze_error({}) == "no error");
  CHECK(missing(freeze_error({.bucket_elements = 0}), {"bucket_elements", "0"}) == "");
  CHECK(missing(freeze_error({.fp8_min_elements = -1}), {"fp8_min_elements", "-1"}) == "");
  CHECK(missing(freeze_error({.micro_batches = 0}), {"micro_batches", "0"}) == "");
  const auto accumulator_error = [&](Level level, DType dtype) {
    return freeze_error({.level = level, .micro_batches = 2, .accumulator = dtype});
  };
  for (DType dtype : {DType::f32, DType::bf16, DType::e4m3}) {
    CHECK(accumulator_error(Level::O2, dtype) == "no error");
  }
  CHECK(accumulator_error(Level::O0, DType::bf16) == "no error");
  CHECK(missing(accumulator_error(Level::O2, DType::f16), {"accumulator", "f16", "e4m3"}) == "");
  CHECK(missing(accumulator_error(Level::O0, DType::e4m3),
                {"accumulator", "e4m3", "formats.gradient", "bf16"}) == "");
  CHECK(missing(freeze_error({.adamw = {.eps = 0.0f}}), {"eps"}) == "");
  CHECK(missing(freeze_error({.adamw = {.beta1 = 0.9f, .beta2 = 0.5f}}),
                {"formats", "beta1", "beta2"}) == "");
  Formats formats = formats_of(Level::O2);
  formats.state.v = StateFormat::e4m3;
  CHECK(missing(freeze_error({.formats = formats}), {"formats", "v ", "e4m3"}) == "");
  formats = formats_of(Level::O2);
  formats.gradient = DType::e5m2;
  CHECK(missing(freeze_error({.formats = formats}), {"formats", "gradient", "e5m2"}) == "");
  CHECK(missing(error_of([] { parse_level("O4"); }), {"O4", "O0", "O3"}) == "");
  CHECK(missing(error_of([] { parse_level(""); }), {"O0"}) == "");
  CHECK(parse_level("O1") == Level::O1);
  CHECK(missing(error_of([] { parse_sharding("zero"); }), {"zero", "none", "optimizer"}) == "");
  for (Sharding sharding :
       {Sharding::none, Sharding::optimizer, Sharding::gradients, Sharding::parameters}) {
    CHECK(parse_sharding(name_of(sharding)) == sharding);
  }
}

TEST_CASE("a communicator of another device is refused") {
  if (cuda_device_count() == 0) {
    WARN("no CUDA device: there is one kind of device only");
    return;
  }
  const auto comm = make_single(Context::cpu());
  CHECK(missing(error_of([&] { Engine(Context::cuda(0, nullptr), *comm); }),
                {"communicator", "cpu", "cuda:0"}) == "");
}

TEST_CASE("overlap needs a communicator with a stream of its own") {
  const Context ctx = Context::cpu();
  const auto shared = make_single(ctx), apart = make_single(Context::cpu());
  const auto error = [&](Communicator& comm, Schedule schedule) {
    return error_of([&] { Engine(ctx, comm, {.schedule = schedule}); });
  };
  CHECK(missing(error(*shared, Schedule::overlap), {"schedule", "overlap", "stream"}) == "");
  CHECK(error(*shared, Schedule::after_backward) == "no error");
  CHECK(error(*apart, Schedule::overlap) == "no error");
  CHECK(error(*apart, Schedule::after_backward) == "no error");
}

TEST_CASE("fused needs an optimizer that is cut over several ranks") {
  for (int ranks : {1, 2}) {
    for (Sharding sharding : {Sharding::none, Sharding::optimizer}) {
      std::vector<std::string> errors(static_cast<std::size_t>(ranks));
      run_ranks(ranks, [&](Communicator& comm) {
        errors[static_cast<std::size_t>(comm.rank())] = error_of([&] {
          Engine(Context::cpu(), comm, {.sharding = sharding, .schedule = Schedule::fused});
        });
      });
      for (const std::string& error : errors) {
        CAPTURE(ranks, name_of(sharding));
        if (ranks > 1 && sharding == Sharding::optimizer) {
          CHECK(error == "no error");
        } else {
          CHECK(
              missing(error, {"schedule is fused", "sharding is " + std::string(name_of(sharding)),
                              ranks == 1 ? "over 1 rank;" : "over 2 ranks;"}) == "");
        }
      }
    }
  }
}

TEST_CASE("ranks with different schedules all throw") {
  std::vector<std::string> errors(3);
  run_ranks(3, [&](Communicator& comm) {
    EngineConfig config;
    if (comm.rank() == 2) config.schedule = Schedule::after_backward;
    Engine engine(Context::cpu(), comm, config);
    errors[static_cast<std::size_t>(comm.rank())] = error_of([&] { engine.freeze(); });
  });
  for (const std::string& error : errors) {
    CHECK(missing(error, {"rank 0 has schedule overlap;", "rank 2 has schedule after_backward"}) ==
          "");
  }
}

TEST_CASE("initial values that are not finite are refused by name") {
  for (float bad : {NAN, INFINITY}) {
    Small s;
    const Tensor init(s.ctx, DType::f32, {5});
    write(s.ctx, init.view().data, std::vector<float>{1, 2, bad, 4, 5});
    s.engine.add({.name = "poisoned", .shape = {5}, .init = init});
    CHECK(missing(error_of([&] { s.engine.freeze(); }), {"poisoned"}) == "");
  }
}

TEST_CASE("an engine without parameters steps") {
  const Context ctx = Context::cpu();
  const auto comm = make_single(ctx);
  Engine engine(ctx, *comm);
  engine.freeze();
  CHECK(engine.step({.lr = 1e-3f, .max_norm = 1.0f}).step.read_sync() == 1);
  CHECK(engine.plan().parameters == 0);
}

TEST_CASE("ranks with different lists all throw, naming the first difference") {
  struct Difference {
    const char* what;
    std::initializer_list<std::string> named;
    std::function<void(const Context&, EngineConfig&, std::vector<Tensor>&,
                       std::vector<ParamSpec>&)>
        change;  ///< on rank 1 only
  };
  using Specs = std::vector<ParamSpec>;
  using Keep = std::vector<Tensor>;
  const Difference differences[] = {
      {"name",
       {"second", "other"},
       [](const Context&, EngineConfig&, Keep&, Specs& specs) { specs[1].name = "other"; }},
      {"shape",
       {"second", "[64, 70]", "[70, 64]"},
       [](const Context& ctx, EngineConfig&, Keep& keep, Specs& specs) {
         specs[1] = made(ctx, keep, "second", {70, 64});
       }},
      {"unit",
       {"second", "unit 0", "unit 1"},
       [](const Context&, EngineConfig&, Keep&, Specs& specs) { specs[1].unit = 1; }},
      {"missing",
       {"third"},
       [](const Context&, EngineConfig&, Keep&, Specs& specs) { specs.pop_back(); }},
      {"order",
       {"first", "second"},
       [](const Context&, EngineConfig&, Keep&, Specs& specs) { std::swap(specs[0], specs[1]); }},
      {"initial values",
       {"second"},
       [](const Context& ctx, EngineConfig&, Keep& keep, Specs& specs) {
         specs[1] = made(ctx, keep, "second", {64, 70}, 99);
       }},
      {"fp8",
       {"second"},
       [](const Context&, EngineConfig&, Keep&, Specs& specs) { specs[1].fp8 = false; }},
      {"group",
       {"second", "lr_factor 0.5"},
       [](const Context&, EngineConfig&, Keep&, Specs& specs) {
         specs[1].group = AdamWGroup{.lr_factor = 0.5f};
       }},
      {"eps of the configuration",
       {"first", "eps"},
       [](const Context&, EngineConfig& config, Keep&, Specs&) { config.adamw.eps = 1e-6f; }},
      {"level",
       {"O2", "O1"},
       [](const Context&, EngineConfig& config, Keep&, Specs&) { config.level = Level::O1; }},
      {"sharding",
       {"none", "optimizer"},
       [](const Context&, EngineConfig& config, Keep&, Specs&) {
         config.sharding = Sharding::optimizer;
       }},
      {"buckets",
       {"bucket_elements", "77"},
       [](const Context&, EngineConfig& config, Keep&, Specs&) { config.bucket_elements = 77; }},
      {"micro-batches",
       {"micro_batches 1;", "micro_batches 4"},
       [](const Context&, EngineConfig& config, Keep&, Specs&) { config.micro_batches = 4; }},
      {"accumulator",
       {"accumulator f32;", "accumulator bf16"},
       [](const Context&, EngineConfig& config, Keep&, Specs&) {
         config.accumulator = DType::bf16;
       }},
      {"place of the states",
       {"offload_states 0;", "offload_states 1"},
       [](const Context&, EngineConfig& config, Keep&, Specs&) { config.offload_states = true; }},
      {"one format",
       {"format of v f16;", "format of v f32"},
       [](const Context&, EngineConfig& config, Keep&, Specs&) {
         config.formats = formats_of(Level::O2);
         config.formats->state.v = StateFormat::f32;
       }},
      {"seed",
       {"seed", "123"},
       [](const Context&, EngineConfig& config, Keep&, Specs&) { config.adamw.seed = 123; }},
      {"L2",
       {"decoupled_weight_decay"},
       [](const Context&, EngineConfig& config, Keep&, Specs&) {
         config.adamw.decoupled_weight_decay = false;
       }},
      {"maximize",
       {"maximize"},
       [](const Context&, EngineConfig& config, Keep&, Specs&) { config.adamw.maximize = true; }},
      {"clipping",
       {"clipping 1;", "clipping 0"},
       [](const Context&, EngineConfig& config, Keep&, Specs&) { config.clipping = false; }},
      {"rounding",
       {"stochastic_rounding"},
       [](const Context&, EngineConfig& config, Keep&, Specs&) {
         config.adamw.stochastic_rounding = false;
       }},
  };
  for (const Difference& difference : differences) {
    const auto errors = freeze_errors(
        3, [&](int rank, const Context& ctx, EngineConfig& config, Keep& keep, Specs& specs) {
          specs = {made(ctx, keep, "first", {64, 64}), made(ctx, keep, "second", {64, 70}),
                   made(ctx, keep, "third", {10})};
          if (rank == 1) difference.change(ctx, config, keep, specs);
        });
    INFO("difference in " << difference.what);
    for (const std::string& error : errors) {
      CHECK(missing(error, {"rank 1"}) == "");
      CHECK(missing(error, difference.named) == "");
    }
  }
}

TEST_CASE("one rank's initial values that are not finite are every rank's error") {
  const auto errors =
      freeze_errors(2, [](int rank, const Context& ctx, EngineConfig&, std::vector<Tensor>& keep,
                          std::vector<ParamSpec>& specs) {
        specs = {made(ctx, keep, "first", {64, 64})};
        if (rank == 1) keep[0].as<float>()[9] = NAN;
      });
  for (const std::string& error : errors) CHECK(missing(error, {"first"}) == "");
}

}  // namespace octet::test
