// SPDX-License-Identifier: Apache-2.0
#include "octet/engine/engine.hpp"

#include <sstream>

#include "support/catch.hpp"
#include "support/compare.hpp"
#include "support/engine_model.hpp"
#include "support/errors.hpp"

namespace octet::test {
namespace {

constexpr Level kLevels[] = {Level::O0, Level::O1, Level::O2, Level::O3};
constexpr Sharding kShardings[] = {Sharding::none, Sharding::optimizer};

EngineConfig config_of(Level level, std::optional<Sharding> sharding = {}) {
  return {.level = level, .sharding = sharding, .adamw = {.weight_decay = 0.1f, .seed = 5}};
}

std::string describe(const RunOptions& options) {
  std::ostringstream text;
  text << name_of(options.config.level) << ", sharding "
       << name_of(options.config.sharding.value_or(sharding_of(options.config.level))) << ", "
       << options.ranks << " ranks, max_norm " << options.max_norm;
  return text.str();
}

/// Mean over the ranks of the gradients as they are stored.
Doubles mean_gradient(const Formats& formats, std::size_t p, int step, int ranks,
                      const GradientFn& gradient) {
  Doubles mean(numel_of(model_params()[p]), 0.0);
  for (int rank = 0; rank < ranks; ++rank) {
    const Encoded encoded = encode_values(formats.gradient, gradient(rank, p, step));
    for (std::size_t i = 0; i < mean.size(); ++i) mean[i] += encoded.decoded[i] / ranks;
  }
  return mean;
}

}  // namespace

TEST_CASE("any number of ranks fed the same gradient ends with the same bits") {
  for (Level level : kLevels) {
    for (Sharding sharding : kShardings) {
      for (float max_norm : {0.0f, 0.5f}) {
        RunOptions options;
        options.config = config_of(level, sharding);
        options.max_norm = max_norm;
        const std::vector<RankResult> single = train(options);
        REQUIRE(single[0].step == options.steps);
        const Bytes expected = everything(single);
        for (int ranks : {2, 3, 4}) {
          options.ranks = ranks;
          const std::vector<RankResult> results = train(options);
          INFO(describe(options));
          CHECK(rank_difference(results) == "");
          CHECK(first_difference(everything(results), expected) == "");
          for (const RankResult& result : results) {
            CHECK(result.step == options.steps);
            CHECK(first_difference(result.norms, single[0].norms) == "");
          }
        }
      }
    }
  }
}

TEST_CASE("sharding does not change a bit when the ranks' gradients are equal") {
  RunOptions options;
  options.ranks = 3;
  for (Level level : kLevels) {
    std::vector<Bytes> bytes;
    for (Sharding sharding : kShardings) {
      options.config = config_of(level, sharding);
      bytes.push_back(everything(train(options)));
    }
    INFO(name_of(level));
    CHECK(first_difference(bytes[1], bytes[0]) == "");
  }
}

TEST_CASE("O3 is O2 with a sharded optimizer") {
  RunOptions options;
  options.ranks = 2;
  options.gradient = own_gradient;
  options.config = config_of(Level::O3);
  const std::vector<RankResult> o3 = train(options);
  options.config = config_of(Level::O2, Sharding::optimizer);
  const std::vector<RankResult> o2 = train(options);
  CHECK(first_difference(everything(o2), everything(o3)) == "");
  CHECK(o3[0].plan.sharding == Sharding::optimizer);
  CHECK(o2[0].plan.formats == o3[0].plan.formats);
  options.config = config_of(Level::O2);
  CHECK(train(options)[0].plan.sharding == Sharding::none);
}

TEST_CASE("ranks agree when their gradients differ, whatever the bucket size") {
  RunOptions options;
  options.gradient = own_gradient;
  options.max_norm = 0.5f;
  for (Level level : kLevels) {
    for (Sharding sharding : kShardings) {
      for (int ranks : {2, 3}) {
        options.ranks = ranks;
        options.config = config_of(level, sharding);
        const std::vector<RankResult> one_bucket = train(options);
        INFO(describe(options));
        CHECK(rank_difference(one_bucket) == "");
        const Bytes expected = everything(one_bucket);
        for (std::int64_t elements : {1, 20000}) {
          options.config.bucket_elements = elements;
          const std::vector<RankResult> results = train(options);
          INFO("buckets of " << elements << " elements");
          CHECK(results[0].plan.buckets > one_bucket[0].plan.buckets);
          CHECK(rank_difference(results) == "");
          CHECK(first_difference(everything(results), expected) == "");
          CHECK(first_difference(results[0].norms, one_bucket[0].norms) == "");
        }
      }
    }
  }
}

TEST_CASE("the first step's m is the mean gradient, rounded once or twice as documented") {
  // m = (1 - beta1) * mean in FP32 at O0 and O1, so the mean can be read off.
  for (Level level : {Level::O0, Level::O1}) {
    for (Sharding sharding : kShardings) {
      RunOptions options;
      options.config = config_of(level, sharding);
      options.gradient = own_gradient;
      options.ranks = 3;
      options.steps = 1;
      const std::vector<RankResult> results = train(options);
      for (std::size_t p = 0; p < model_params().size(); ++p) {
        INFO(describe(options) << ", \"" << model_params()[p].name << "\"");
        const Formats formats = formats_of_param(results[0], p);
        const Bytes bytes = gather_state(results, p, &RankResult::m, 4);
        std::vector<float> m(numel_of(model_params()[p]));
        std::memcpy(m.data(), bytes.data(), bytes.size());
        const Doubles mean = mean_gradient(formats, p, 1, 3, own_gradient);
        // two_shot rounds the mean to the gradient's format once more.
        const bool rounded = sharding == Sharding::none && formats.gradient != DType::f32;
        const double step = formats.gradient == DType::e4m3 ? 1.0 / 16 : 1.0 / 256;
        const double amax = amax_of(mean);
        double worst = 0;
        for (std::size_t i = 0; i < m.size(); ++i) {
          const double error = std::abs(static_cast<double>(m[i]) / 0.1 - mean[i]);
          const double fp32 = 1e-6 * std::abs(mean[i]) + 1e-7 * amax;
          // Below E4M3's normal range the step is absolute: 2^-10 of half the scaled maximum.
          const double code = rounded ? step * std::abs(mean[i]) + amax * 0x1p-17 : 0.0;
          worst = std::max(worst, error - fp32 - code);
          if (rounded && i == 0) CHECK(error >= 0.0);
        }
        CHECK(worst <= 0.0);
      }
    }
  }
}

TEST_CASE("a replicated and a sharded O2 step differ by the second rounding only") {
  RunOptions options;
  options.gradient = own_gradient;
  options.ranks = 2;
  options.steps = 1;
  options.config = config_of(Level::O1, Sharding::none);
  const std::vector<RankResult> replicated = train(options);
  options.config = config_of(Level::O1, Sharding::optimizer);
  const std::vector<RankResult> sharded = train(options);
  const Bytes a = gather_state(replicated, 0, &RankResult::m, 4);
  const Bytes b = gather_state(sharded, 0, &RankResult::m, 4);
  CHECK(first_difference(a, b) != "");
  // Parameters in FP32 are not rounded by either.
  CHECK(first_difference(gather_state(replicated, 7, &RankResult::m, 4),
                         gather_state(sharded, 7, &RankResult::m, 4)) == "");
}

TEST_CASE("the norm is that of the mean of the ranks' gradients") {
  for (Level level : kLevels) {
    RunOptions options;
    options.config = config_of(level);
    options.gradient = own_gradient;
    options.ranks = 2;
    options.steps = 2;
    options.max_norm = 0.25f;
    const std::vector<RankResult> results = train(options);
    for (int step : {1, 2}) {
      double squares = 0;
      for (std::size_t p = 0; p < model_params().size(); ++p) {
        const Formats formats = formats_of_param(results[0], p);
        squares += std::pow(norm_of(mean_gradient(formats, p, step, 2, own_gradient)), 2);
      }
      const double norm = static_cast<double>(results[0].norms[static_cast<std::size_t>(step - 1)]);
      INFO(name_of(level) << ", step " << step << ": " << norm << " and " << std::sqrt(squares));
      // A second rounding to E4M3 adds noise to the sum of squares: 1/16 of each, at random.
      const double tolerance = level == Level::O3 ? 1e-6 : 1e-3;
      CHECK(std::abs(norm / std::sqrt(squares) - 1) < tolerance);
    }
  }
}

TEST_CASE("a non-finite gradient on one rank skips the step on all, as if it had not been") {
  struct Poison {
    int rank;
    std::size_t p;
    float value;
  };
  const Poison poisons[] = {{1, 0, NAN}, {2, 7, INFINITY}, {0, 3, -INFINITY}, {2, 2, -NAN}};
  for (Level level : kLevels) {
    for (Sharding sharding : kShardings) {
      for (const Poison& poison : poisons) {
        RunOptions options;
        options.config = config_of(level, sharding);
        options.ranks = 3;
        options.steps = 3;
        options.gradient = own_gradient;
        options.max_norm = 0.5f;
        const std::vector<RankResult> clean = train(options);
        options.steps = 4;
        options.gradient = [&](int rank, std::size_t p, int step) {
          std::vector<float> g = own_gradient(rank, p, step < 3 ? step : step - 1);
          if (step == 3 && rank == poison.rank && p == poison.p) g[g.size() / 2] = poison.value;
          return g;
        };
        const std::vector<RankResult> results = train(options);
        INFO(describe(options) << ", " << poison.value << " on rank " << poison.rank << " in \""
                               << model_params()[poison.p].name << "\"");
        CHECK(rank_difference(results) == "");
        CHECK(first_difference(everything(results), everything(clean)) == "");
        for (const RankResult& result : results) {
          CHECK(result.step == 3);
          CHECK(result.skipped == 1);
        }
      }
    }
  }
}

TEST_CASE("a skipped step leaves every byte on every rank; the trainer's own flag skips too") {
  for (Sharding sharding : kShardings) {
    std::vector<std::string> errors(3);
    run_ranks(3, [&](Communicator& comm) {
      const Context ctx = comm.context();
      Engine engine(ctx, comm, config_of(Level::O2, sharding));
      std::vector<Buffer> keep;
      add_parameters(engine, ctx, keep);
      engine.freeze();
      hand_over(engine, ctx, own_gradient, comm.rank(), 1);
      engine.step({.lr = 1e-3f});
      const RankResult before = read_back(engine, ctx);
      hand_over(engine, ctx, own_gradient, comm.rank(), 2);
      if (comm.rank() == 1) write_one(ctx, engine.nonfinite_flag(), std::uint32_t{1});
      const StepResult done = engine.step({.lr = 1e-3f});
      const RankResult after = read_back(engine, ctx);
      std::string& error = errors[static_cast<std::size_t>(comm.rank())];
      if (done.skipped.read_sync() != 1 || done.step.read_sync() != 1) error += "not skipped;";
      if (after.weights != before.weights) error += "weights;";
      if (after.master != before.master) error += "master;";
      if (after.m != before.m) error += "m;";
      if (after.v != before.v) error += "v;";
      if (bytes_of(after.scales) != bytes_of(before.scales)) error += "scales;";
      hand_over(engine, ctx, own_gradient, comm.rank(), 2);
      if (engine.step({.lr = 1e-3f}).step.read_sync() != 2) error += "the flag stayed up;";
    });
    for (const std::string& error : errors) CHECK(error == "");
  }
}

TEST_CASE("a parameter without a gradient counts as zero gradient") {
  for (Level level : {Level::O0, Level::O3}) {
    std::vector<Bytes> bytes;
    for (bool handed_over : {false, true}) {
      RunOptions options;
      options.config = config_of(level);
      options.ranks = 2;
      options.gradient = [&](int rank, std::size_t p, int step) {
        std::vector<float> g = own_gradient(rank, p, step);
        if (step != 2 || (p != 0 && p != 1)) return g;
        return handed_over ? std::vector<float>(g.size(), 0.0f) : std::vector<float>();
      };
      bytes.push_back(everything(train(options)));
    }
    CHECK(first_difference(bytes[1], bytes[0]) == "");
  }
}

TEST_CASE("a learning rate on the device is read in stream order") {
  for (DeviceType device : rank_devices()) {
    std::vector<Bytes> weights;
    for (bool on_device : {false, true}) {
      run_ranks(
          1,
          [&](Communicator& comm) {
            const Context ctx = comm.context();
            Engine engine(ctx, comm, config_of(Level::O2));
            std::vector<Buffer> keep;
            add_parameters(engine, ctx, keep);
            engine.freeze();
            const Buffer lr = upload<float>(ctx, {0.0f});
            for (int step : {1, 2}) {
              hand_over(engine, ctx, common_gradient, 0, step);
              const float rate = 0.01f * static_cast<float>(step);
              write_one(ctx, lr.data(), rate);
              StepOptions options{.lr = rate};
              if (on_device) options = {.lr = 123.0f, .lr_device = lr.as<float>()};
              engine.step(options);
            }
            weights.push_back(download_bytes(ctx, engine.weight({0}).data));
          },
          device);
    }
    CHECK(first_difference(weights[1], weights[0]) == "");
  }
}

TEST_CASE("every level finds the minimum of a quadratic with noise") {
  for (Level level : kLevels) {
    std::vector<double> before(2), after(2);
    run_ranks(2, [&](Communicator& comm) {
      const Context ctx = comm.context();
      Engine engine(ctx, comm, {.level = level});
      const Shape shape = {128, 64};
      const std::vector<float> target = normal_values(8192, 1, 0.1f);
      const Buffer init = upload(ctx, normal_values(8192, 2, 0.1f));
      const ParamId id =
          engine.add({.name = "w", .shape = shape, .init = view_of(ctx, init, DType::f32, shape)});
      engine.freeze();
      const Tensor decoded(ctx, DType::f32, shape);
      const auto distance = [&](bool keep_gradient, std::uint32_t step) {
        engine.weight_as(id, decoded);
        std::vector<float> g = download<float>(ctx, decoded.view().data, 8192);
        const auto rank = static_cast<std::uint32_t>(comm.rank());
        const std::vector<float> noise = normal_values(8192, 10 * step + rank, 0.02f);
        double sum = 0;
        for (std::size_t i = 0; i < g.size(); ++i) {
          g[i] -= target[i];
          sum += static_cast<double>(g[i]) * static_cast<double>(g[i]);
          g[i] += noise[i];
        }
        if (keep_gradient) write(ctx, decoded.view().data, g);
        return sum;
      };
      const auto rank = static_cast<std::size_t>(comm.rank());
      before[rank] = distance(false, 0);
      for (std::uint32_t step = 1; step <= 150; ++step) {
        distance(true, step);
        engine.add_gradient(id, decoded);
        engine.step({.lr = 5e-3f * (1.0f - static_cast<float>(step) / 151.0f)});
      }
      after[rank] = distance(false, 0);
    });
    INFO(name_of(level) << ": " << before[0] << " to " << after[0]);
    CHECK(before[0] == before[1]);
    CHECK(after[0] == after[1]);
    CHECK(after[0] < 0.02 * before[0]);
  }
}

TEST_CASE("whole runs on CPU and CUDA have equal bits at every level") {
  if (cuda_device_count() == 0) {
    WARN("no CUDA device: nothing to compare with");
    return;
  }
  for (Level level : kLevels) {
    for (Sharding sharding : kShardings) {
      for (int ranks : {1, 2, 3}) {
        RunOptions options;
        options.config = config_of(level, sharding);
        options.config.bucket_elements = 20000;
        options.ranks = ranks;
        options.gradient = own_gradient;
        options.max_norm = 0.5f;
        const std::vector<RankResult> cpu = train(options);
        options.device = DeviceType::cuda;
        const std::vector<RankResult> cuda = train(options);
        INFO(describe(options));
        CHECK(rank_difference(cuda) == "");
        CHECK(first_difference(cuda[0].norms, cpu[0].norms) == "");
        CHECK(first_difference(everything(cuda), everything(cpu)) == "");
      }
    }
  }
}

}  // namespace octet::test
