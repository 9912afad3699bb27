// SPDX-License-Identifier: Apache-2.0
// Initial values that are made when they are needed (ParamSpec::fill).
#include <limits>
#include <map>
#include <stdexcept>

#include "support/catch.hpp"
#include "support/compare.hpp"
#include "support/engine_model.hpp"
#include "support/errors.hpp"

namespace octet::test {
namespace {

/// What one rank has after freeze() and a step.
struct Filled {
  RankResult result;
  std::map<std::string, int> calls;
  std::string wrong;  ///< views that do not fit
  std::size_t held = 0, peak = 0;
};

using Chooses = bool (*)(std::size_t p);

/// Parameters that `has_fill` chooses come with a function, the others with their values.
std::vector<Filled> train_filled(const EngineConfig& config, int ranks, DeviceType device,
                                 Chooses has_fill) {
  std::vector<Filled> results(static_cast<std::size_t>(ranks));
  run_ranks(
      ranks,
      [&](Communicator& comm) {
        Context ctx = comm.context();
        Filled& out = results[static_cast<std::size_t>(comm.rank())];
        std::vector<Buffer> keep;
        for (std::size_t p = 0; p < model_params().size(); ++p) {
          keep.push_back(upload(ctx, normal_values(numel_of(model_params()[p]),
                                                   77 + static_cast<std::uint32_t>(p), 0.02f)));
        }
        ctx.reset_peak();
        const std::size_t before = ctx.memory_use().current;
        Engine engine(ctx, comm, config);
        for (std::size_t p = 0; p < model_params().size(); ++p) {
          const ModelParam& param = model_params()[p];
          ParamSpec spec{.name = param.name, .shape = param.shape, .fp8 = param.fp8};
          if (has_fill(p)) {
            spec.fill = [&out, &param, data = keep[p].data(), bytes = keep[p].bytes()](
                            const Context& context, const TensorView& values) {
              ++out.calls[param.name];
              if (values.dtype != DType::f32 || values.shape != param.shape ||
                  values.device != context.device()) {
                out.wrong += param.name + ";";
              }
              copy_bytes(context, values.data, data, bytes);
            };
          } else {
            spec.init = view_of(ctx, keep[p], DType::f32, param.shape);
          }
          engine.add(spec);
        }
        engine.freeze();
        out.held = ctx.memory_use().current - before;
        out.peak = ctx.memory_use().peak - before;
        hand_over(engine, ctx, common_gradient, comm.rank(), 1);
        engine.step({.lr = 1e-3f});
        out.result = read_back(engine, ctx);
      },
      device);
  return results;
}

std::vector<RankResult> results_of(const std::vector<Filled>& filled) {
  std::vector<RankResult> results;
  for (const Filled& each : filled) results.push_back(each.result);
  return results;
}

/// freeze() of ranks whose parameter "w" is filled by `fill`, which is told the rank and the call.
template <class Fill>
std::vector<std::string> freeze_errors(int ranks, const Fill& fill) {
  std::vector<std::string> errors(static_cast<std::size_t>(ranks));
  run_ranks(ranks, [&](Communicator& comm) {
    Engine engine(comm.context(), comm, {});
    int call = 0;
    engine.add(
        {.name = "w", .shape = {3, 5}, .fill = [&](const Context& ctx, const TensorView& values) {
           write(ctx, values.data, std::vector<float>(15, fill(comm.rank(), ++call)));
         }});
    errors[static_cast<std::size_t>(comm.rank())] = error_of([&] { engine.freeze(); });
  });
  return errors;
}

}  // namespace

TEST_CASE("values made by fill are as good as values that were there") {
  const Chooses none = [](std::size_t) { return false; };
  const Chooses some = [](std::size_t p) { return p % 2 == 1; };
  const Chooses all = [](std::size_t) { return true; };
  for (DeviceType device : rank_devices()) {
    for (Level level : {Level::O0, Level::O2, Level::O3}) {
      for (int ranks : {1, 3}) {
        INFO(name_of(level) << ", " << ranks << " ranks");
        const EngineConfig config{.level = level, .adamw = {.seed = 5}};
        const auto given = train_filled(config, ranks, device, none);
        for (const Chooses chooses : {some, all}) {
          const auto made = train_filled(config, ranks, device, chooses);
          CHECK(rank_difference(results_of(made)) == "");
          CHECK(first_difference(everything(results_of(made)), everything(results_of(given))) ==
                "");
          for (std::size_t r = 0; r < made.size(); ++r) {
            std::size_t largest = 0;
            for (std::size_t p = 0; p < model_params().size(); ++p) {
              const ModelParam& param = model_params()[p];
              if (chooses(p)) largest = std::max(largest, numel_of(param) * sizeof(float));
              const auto calls = made[r].calls.find(param.name);
              CHECK((calls == made[r].calls.end() ? 0 : calls->second) == (chooses(p) ? 2 : 0));
            }
            CHECK(made[r].wrong == "");
            CHECK(made[r].held == given[r].held);
            CHECK(made[r].peak == given[r].peak + largest);
          }
        }
      }
    }
  }
}

TEST_CASE("initial values come from one of init and fill") {
  const Context ctx = Context::cpu();
  const auto comm = make_single(ctx);
  Engine engine(ctx, *comm, {});
  const Tensor init(ctx, DType::f32, {3, 5});
  const auto fill = [](const Context& context, const TensorView& values) {
    zero_bytes(context, values.data, values.bytes());
  };
  CHECK(missing(error_of([&] {
                  engine.add({.name = "w", .shape = {3, 5}});
                }),
                {"\"w\"", "init", "fill"}) == "");
  CHECK(missing(error_of([&] {
                  engine.add({.name = "w", .shape = {3, 5}, .init = init, .fill = fill});
                }),
                {"\"w\"", "init", "fill"}) == "");
  engine.add({.name = "w", .shape = {3, 5}, .fill = fill});
  // Nothing to fill.
  bool called = false;
  engine.add({.name = "empty",
              .shape = {0, 5},
              .fill = [&called](const Context&, const TensorView&) { called = true; }});
  engine.freeze();
  CHECK(!called);
}

TEST_CASE("a fill that fails, differs or changes its mind is every rank's error, by name") {
  for (int ranks : {1, 3}) {
    const auto check_all = [&](const std::vector<std::string>& errors,
                               std::initializer_list<std::string> named) {
      for (const std::string& error : errors) CHECK(missing(error, named) == "");
    };
    INFO(ranks << " ranks");
    const int last = ranks - 1;
    check_all(freeze_errors(ranks, [](int, int) { return 0.5f; }), {"no error"});
    for (int bad : {1, 2}) {
      check_all(freeze_errors(ranks,
                              [&](int rank, int call) {
                                if (rank == last && call == bad)
                                  throw std::runtime_error("no luck");
                                return 0.5f;
                              }),
                {"no luck"});
    }
    check_all(
        freeze_errors(ranks,
                      [&](int rank, int call) { return rank == last && call == 2 ? 0.25f : 0.5f; }),
        {"\"w\"", "0.5", "0.25", "fill"});
    check_all(
        freeze_errors(ranks, [](int, int) { return std::numeric_limits<float>::quiet_NaN(); }),
        {"\"w\"", "NaN"});
  }
  for (const std::string& error :
       freeze_errors(3, [](int rank, int) { return rank == 1 ? 0.25f : 0.5f; })) {
    CHECK(missing(error, {"\"w\"", "rank 1", "0.5", "0.25"}) == "");
  }
}

}  // namespace octet::test
