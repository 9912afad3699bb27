// SPDX-License-Identifier: Apache-2.0
// Gradients summed over micro-batches, against plain loops and against single gradients.
#include "octet/ops/accumulate.hpp"
#include "octet/ops/quantize.hpp"
#include "support/catch.hpp"
#include "support/compare.hpp"
#include "support/engine_model.hpp"
#include "support/errors.hpp"
#include "support/reference.hpp"

namespace octet::test {
namespace {

RunOptions options_of(Level level, int ranks, int micro_batches, DType accumulator) {
  RunOptions options;
  options.config = {.level = level,
                    .adamw = {.weight_decay = 0.1f, .seed = 5},
                    .bucket_elements = 20000,
                    .micro_batches = micro_batches,
                    .accumulator = accumulator};
  options.ranks = ranks;
  options.steps = 2;
  options.gradient = own_gradient;
  options.max_norm = 0.5f;
  return options;
}

/// A value as a sum of this dtype holds it.
float rounded(DType dtype, float value, double scale) {
  if (dtype == DType::f32) return value;
  return static_cast<float>(table_of(dtype).round(static_cast<double>(value) * scale) / scale);
}

/// The sum of the micro-batches before it is stored for the last time, by a plain loop; without the
/// gradients that a function leaves empty.
GradientFn summed(const GradientFn& gradient, int micro_batches, DType accumulator) {
  return [=](int rank, std::size_t p, int step) {
    const DType dtype = is_managed(p) ? accumulator : DType::f32;
    std::vector<float> sum;
    for (int m = 0; m < micro_batches; ++m) {
      const std::vector<float> g = gradient(rank, p, micro_step(step, m));
      if (g.empty()) continue;
      if (sum.empty()) {
        sum = g;
        continue;
      }
      double amax = 0;
      for (float value : sum) amax = std::max(amax, std::abs(static_cast<double>(value)));
      const double scale = dtype == DType::e4m3 ? reference_scale(amax, 448.0) : 1.0;
      for (std::size_t i = 0; i < g.size(); ++i) sum[i] = rounded(dtype, sum[i], scale) + g[i];
    }
    // A bf16 accumulator rounds the whole sum before the cast does; there is none for one.
    if (dtype == DType::bf16 && micro_batches > 1) {
      for (float& value : sum) value = rounded(dtype, value, 1.0);
    }
    return sum;
  };
}

void check_equal(const RunOptions& options, const RunOptions& single) {
  const std::vector<RankResult> results = train(options), expected = train(single);
  INFO(name_of(options.config.level)
       << ", " << options.ranks << " ranks, " << options.config.micro_batches
       << " micro-batches in " << name_of(*options.config.accumulator));
  CHECK(rank_difference(results) == "");
  CHECK(first_difference(everything(results), everything(expected)) == "");
  CHECK(first_difference(results[0].norms, expected[0].norms) == "");
  CHECK(results[0].step == options.steps);
  // One reduction a step, not one a micro-batch.
  for (std::size_t rank = 0; rank < results.size(); ++rank) {
    CHECK(results[rank].payload_per_step == expected[rank].payload_per_step);
    CHECK(results[rank].payload_per_step == results[rank].plan.wire_bytes_per_step);
  }
}

RunOptions single_of(RunOptions options) {
  const EngineConfig& config = options.config;
  options.gradient = summed(options.gradient, config.micro_batches, *config.accumulator);
  options.config.micro_batches = 1;
  return options;
}

}  // namespace

TEST_CASE("micro-batches have the bits of one gradient that is their sum") {
  const struct {
    Level level;
    std::vector<DType> accumulators;
  } cases[] = {{Level::O0, {DType::f32, DType::bf16}},
               {Level::O2, {DType::f32, DType::bf16, DType::e4m3}},
               {Level::O3, {DType::f32, DType::e4m3}}};
  for (const auto& c : cases) {
    for (DType accumulator : c.accumulators) {
      for (int micro_batches : {1, 2, 4}) {
        for (int ranks : {1, 2, 3}) {
          RunOptions options = options_of(c.level, ranks, micro_batches, accumulator);
          check_equal(options, single_of(options));
          options.engine_context = [](const Communicator&) { return Context::cpu(); };
          check_equal(options, single_of(options));
        }
      }
    }
  }
}

TEST_CASE("a parameter with fewer gradients than micro-batches has the sum of those") {
  for (DType accumulator : {DType::f32, DType::bf16, DType::e4m3}) {
    for (bool overlapped : {false, true}) {
      RunOptions options = options_of(Level::O2, 2, 4, accumulator);
      options.steps = 3;
      if (overlapped) options.engine_context = [](const Communicator&) { return Context::cpu(); };
      options.gradient = [](int rank, std::size_t p, int step) {
        // 0 to 4 of the 4, different ones on every rank.
        const std::size_t draw = static_cast<std::size_t>(step / 100 + step + rank) + p;
        return draw % 4 < p % 5 ? own_gradient(rank, p, step) : std::vector<float>();
      };
      check_equal(options, single_of(options));
    }
  }
}

TEST_CASE("a non-finite value in any micro-batch skips the step, and not the next one") {
  for (DType accumulator : {DType::f32, DType::bf16, DType::e4m3}) {
    for (float bad : {NAN, INFINITY}) {
      for (int at : {0, 1, 2}) {
        RunOptions options = options_of(Level::O2, 2, 3, accumulator);
        const Bytes clean = everything(train(options));
        options.steps = 3;
        options.gradient = [&](int rank, std::size_t p, int step) {
          const int micro = step / 100, in_step = step % 100;
          std::vector<float> g =
              own_gradient(rank, p, micro_step(in_step < 2 ? in_step : in_step - 1, micro));
          if (in_step == 2 && micro == at && rank == 1 && (p == 2 || p == 7)) g[5] = bad;
          return g;
        };
        const std::vector<RankResult> results = train(options);
        INFO(name_of(accumulator) << ", " << bad << " in micro-batch " << at);
        CHECK(first_difference(everything(results), clean) == "");
        CHECK(results[0].skipped == 1);
        CHECK(results[0].step == 2);
      }
    }
  }
}

TEST_CASE("one gradient too many is refused, naming the count, and changes nothing") {
  std::vector<Bytes> weights;
  for (bool provoked : {false, true}) {
    const Context ctx = Context::cpu();
    const auto comm = make_single(ctx);
    Engine engine(ctx, *comm, {.micro_batches = 2});
    const Buffer init = upload(ctx, normal_values(4096, 1, 0.02f));
    const Buffer g = upload(ctx, normal_values(4096, 2));
    const TensorView gradient = view_of(ctx, g, DType::f32, {64, 64});
    const ParamId id = engine.add(
        {.name = "w", .shape = {64, 64}, .init = view_of(ctx, init, DType::f32, {64, 64})});
    engine.freeze();
    for (int step = 0; step < 2; ++step) {
      for (int m = 0; m < 2; ++m) engine.add_gradient(id, gradient);
      if (provoked) {
        CHECK(missing(error_of([&] { engine.add_gradient(id, gradient); }),
                      {"\"w\"", "2 gradients", "already", "micro_batches is 2"}) == "");
      }
      engine.step({.lr = 1e-2f});
    }
    weights.push_back(download_bytes(ctx, engine.weight(id).data));
  }
  CHECK(first_difference(weights[1], weights[0]) == "");
}

TEST_CASE("the plan shows what accumulators take and how sums are made") {
  std::uint64_t managed = 0;
  for (std::size_t p = 0; p < model_params().size(); ++p) {
    if (is_managed(p)) managed += numel_of(model_params()[p]);
  }
  const struct {
    Level level;
    int micro_batches;
    DType accumulator;
    std::uint64_t bytes;  ///< per FP8-managed parameter
    const char* text;
  } cases[] = {{Level::O2, 1, DType::f32, 0, "nothing to sum"},
               {Level::O2, 2, DType::f32, 4, "f32 accumulators and cast once"},
               {Level::O2, 2, DType::bf16, 2, "bf16 accumulators and cast once"},
               {Level::O2, 2, DType::e4m3, 0, "e4m3 where they are"},
               {Level::O0, 2, DType::f32, 4, "f32 accumulators"},
               {Level::O0, 2, DType::bf16, 0, "bf16 where they are"}};
  for (const auto& c : cases) {
    RunOptions options = options_of(c.level, 1, c.micro_batches, c.accumulator);
    options.steps = 1;
    const Plan plan = train(options)[0].plan;
    CAPTURE(name_of(c.level), c.micro_batches, name_of(c.accumulator), plan.accumulation);
    std::uint64_t bytes = 0;
    for (const MemoryRow& row : plan.memory) {
      if (row.what != "gradient accumulator") continue;
      CHECK(row.predicted == row.measured);
      CHECK_FALSE(row.state);
      CHECK(row.fp8_managed);
      bytes += row.measured;
    }
    CHECK(bytes == c.bytes * managed);
    CHECK(missing(plan.accumulation, {c.text}) == "");
    CHECK(missing(plan.to_markdown(), {plan.accumulation, plan.schedule}) == "");
  }
}

TEST_CASE("the error of a sum grows with the micro-batches in e4m3 only") {
  // Gradients of micro-batches that share a tenth of their variance; error of the stored sum
  // relative to the exact one, root mean square.
  constexpr std::size_t kCount = 20000;
  const Context ctx = Context::cpu();
  const auto error_with = [&](DType accumulator, int micro_batches) {
    const std::vector<float> common = normal_values(kCount, 1, std::sqrt(0.1f));
    std::vector<double> exact(kCount, 0.0);
    const Tensor wide(ctx, accumulator, {kCount});
    const ScaledTensor codes(ctx, DType::e4m3, {kCount});
    for (int m = 0; m < micro_batches; ++m) {
      std::vector<float> g = normal_values(kCount, static_cast<std::uint32_t>(m) + 2, 0.95f);
      for (std::size_t i = 0; i < kCount; ++i) {
        g[i] += common[i];
        exact[i] += static_cast<double>(g[i]);
      }
      const Buffer buffer = upload(ctx, g);
      const TensorView in = view_of(ctx, buffer, DType::f32, {kCount});
      if (accumulator == DType::e4m3) {
        m == 0 ? quantize(ctx, {.in = in, .out = codes}) : accumulate(ctx, {in, codes});
      } else {
        m == 0 ? convert(ctx, {in, nullptr}, wide) : accumulate(ctx, {in, {wide.view(), nullptr}});
      }
    }
    if (accumulator != DType::e4m3) quantize(ctx, {.in = wide, .out = codes});
    const Tensor decoded(ctx, DType::f32, {kCount});
    convert(ctx, codes, decoded);
    double wrong = 0, size = 0;
    for (std::size_t i = 0; i < kCount; ++i) {
      wrong += std::pow(static_cast<double>(decoded.as<float>()[i]) - exact[i], 2);
      size += exact[i] * exact[i];
    }
    return std::sqrt(wrong / size);
  };
  const double once = error_with(DType::f32, 1);
  CHECK(once > 0.02);
  CHECK(once < 0.03);
  for (int micro_batches : {2, 8, 64}) {
    CAPTURE(micro_batches);
    const double f32 = error_with(DType::f32, micro_batches);
    const double bf16 = error_with(DType::bf16, micro_batches);
    const double e4m3 = error_with(DType::e4m3, micro_batches);
    CAPTURE(f32, bf16, e4m3);
    CHECK(f32 < 1.1 * once);
    CHECK(bf16 < 1.1 * once);
    CHECK(e4m3 > 1.15 * once);
    CHECK(e4m3 < once * std::sqrt(static_cast<double>(micro_batches)));
  }
}

}  // namespace octet::test
