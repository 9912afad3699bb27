// SPDX-License-Identifier: Apache-2.0
// Thousands of small tensors of several formats with hundreds of groups: tables that are longer
// than any block of threads, clipping over all of it, and a step that is skipped.
#include <limits>

#include "octet/optim/adamw.hpp"
#include "support/adamw_model.hpp"
#include "support/adamw_step.hpp"
#include "support/catch.hpp"
#include "support/compare.hpp"
#include "support/random.hpp"
#include "support/ranks.hpp"

namespace octet::test {
namespace {

constexpr int kTensors = 5000;
constexpr int kGroupCount = 300;
constexpr float kRate = 1e-2f;
/// The first and last tensors and groups, and those around powers of two; tensor i is of group i %
/// kGroupCount.
constexpr int kSample[] = {0,    1,    2,    254,  255,  256,  257,  298,  299,  300,
                           1023, 1024, 2047, 2048, 4094, 4095, 4096, 4097, 4998, 4999};

struct Hyper {
  float lr_factor, beta1, beta2, weight_decay;
};

/// Of tensor i: no two groups share any of them.
Hyper hyper_of(int i) {
  const auto group = static_cast<float>(i % kGroupCount);
  return {0.25f + group / 128, 0.7f + group / 2048, 0.95f + group / 8192, group / 1024};
}

std::size_t count_of(int i) { return 1 + static_cast<std::size_t>(i) * 7 % 40; }

/// The last tensor has an FP32 gradient, which can hold a NaN.
ParamCase case_of(int i) {
  const StateFormats formats[] = {kO2, kSmall, kPlain};
  const DType gradients[] = {DType::e4m3, DType::f32, DType::bf16, DType::f32};
  const Hyper hyper = hyper_of(i);
  return {.shape = {static_cast<std::int64_t>(count_of(i))},
          .formats = formats[i % 3],
          .gradient = gradients[i % 4],
          .group = AdamWGroup{.lr_factor = hyper.lr_factor,
                              .beta1 = hyper.beta1,
                              .beta2 = hyper.beta2,
                              .weight_decay = hyper.weight_decay}};
}

/// Tensors [begin, end) of the list, initialised.
class Part {
 public:
  Part(const Context& ctx, const AdamWConfig& config, int begin, int end)
      : begin_(begin), end_(end), model_(ctx, config, cases(begin, end)) {
    for (int i = begin; i < end; ++i) {
      model_.initialise(i - begin,
                        normal_values(count_of(i), static_cast<std::uint32_t>(i), 0.02f));
    }
  }

  /// Gradients of a step; those of the sample as stored.
  std::vector<Doubles> set_gradients(int step) {
    std::vector<Doubles> stored(static_cast<std::size_t>(kTensors));
    for (int i = begin_; i < end_; ++i) {
      const auto seed = static_cast<std::uint32_t>(kTensors * step + i);
      stored[static_cast<std::size_t>(i)] =
          model_.set_gradient(i - begin_, normal_values(count_of(i), seed, 0.01f));
    }
    return stored;
  }

  AdamwModel& model() { return model_; }

 private:
  static std::vector<ParamCase> cases(int begin, int end) {
    std::vector<ParamCase> list;
    for (int i = begin; i < end; ++i) list.push_back(case_of(i));
    return list;
  }

  int begin_, end_;
  AdamwModel model_;
};

/// A step with the flag of measure(), as after a gradient that may not be finite.
void take_step(AdamwModel& model, float max_norm) {
  model.optimizer().measure(model.flag());
  model.optimizer().step({.lr = kRate, .max_norm = max_norm, .nonfinite = model.flag()});
}

/// A step of the sample against the formulas.
void check_sample(Part& part, std::int64_t t, float max_norm) {
  const AdamWConfig config{.seed = 3};
  const std::vector<Doubles> g = part.set_gradients(static_cast<int>(t));
  std::vector<StepChecker> checkers;
  for (int i : kSample) {
    const ParamCase what = case_of(i);
    checkers.emplace_back(part.model(), i, what.formats, what.shape,
                          g[static_cast<std::size_t>(i)]);
  }
  take_step(part.model(), max_norm);
  double squares = 0;
  for (const Doubles& values : g) squares += norm_of(values) * norm_of(values);
  const double clip = static_cast<double>(max_norm) / std::sqrt(squares);
  CHECK(clip < 1);
  const AdamwScalars scalars = part.model().scalars();
  CHECK(std::abs(static_cast<double>(scalars.clip) / clip - 1) < 1e-5);
  for (std::size_t k = 0; k < checkers.size(); ++k) {
    const int i = kSample[k];
    INFO("tensor " << i << ", group " << i % kGroupCount << ", step " << t);
    const Hyper hyper = hyper_of(i);
    AdamWConfig own = config;
    own.beta1 = hyper.beta1;
    own.beta2 = hyper.beta2;
    AdamwReference reference(own, kRate * hyper.lr_factor, hyper.weight_decay);
    reference.clip = static_cast<double>(scalars.clip);
    CHECK(checkers[k].check(reference, t) == "");
    CHECK(part.model().group_scalars(i).beta1 == hyper.beta1);
  }
}

/// A step with a NaN in the last gradient alone.
void check_skip(AdamwModel& model) {
  const auto before = model.all_bytes();
  const std::int64_t applied = model.scalars().step;
  const ScaledView last = model.gradient_view(kTensors - 1);
  auto* values = static_cast<float*>(last.data.data);
  write_one(model.context(), values + last.data.numel() - 1,
            std::numeric_limits<float>::quiet_NaN());
  take_step(model, 0.0f);  // without a norm, which would be a NaN too
  CHECK(model.scalars().step == applied);
  CHECK(model.scalars().skipped == 1);
  CHECK(model.scalars().skip == 1);
  CHECK(first_difference(model.all_bytes(), before) == "");
}

/// All bytes after each of three steps with clipping, one skipped before the last.
std::vector<std::vector<std::uint8_t>> checked_run(const Context& ctx) {
  Part part(ctx, {.seed = 3}, 0, kTensors);
  std::vector<std::vector<std::uint8_t>> bytes;
  for (std::int64_t t = 1; t <= 3; ++t) {
    if (t == 3) check_skip(part.model());
    check_sample(part, t, 0.5f);
    CHECK(part.model().scalars().step == t);
    bytes.push_back(part.model().all_bytes());
  }
  return bytes;
}

/// All bytes after three steps to nearest (random bits go by the position in the list).
std::vector<std::uint8_t> bytes_after(const Context& ctx, int begin, int end) {
  Part part(ctx, {.stochastic_rounding = false}, begin, end);
  for (int t = 1; t <= 3; ++t) {
    part.set_gradients(t);
    take_step(part.model(), 0.0f);
  }
  CHECK(part.model().scalars().step == 3);
  return part.model().all_bytes();
}

}  // namespace

TEST_CASE("5,000 tensors of 300 groups follow the formulas, with equal bits on all devices") {
  std::vector<std::vector<std::uint8_t>> expected;
  for (const Context& ctx : test_contexts()) {
    INFO(to_string(ctx.device()));
    const auto bytes = checked_run(ctx);
    if (expected.empty()) expected = bytes;
    for (std::size_t t = 0; t < bytes.size(); ++t) {
      CHECK(first_difference(bytes[t], expected[t]) == "");
    }
  }
}

TEST_CASE("5,000 tensors have the bits of two optimizers that share them") {
  for (const Context& ctx : test_contexts()) {
    INFO(to_string(ctx.device()));
    constexpr int kCut = 1777;
    auto parts = bytes_after(ctx, 0, kCut);
    const auto second = bytes_after(ctx, kCut, kTensors);
    parts.insert(parts.end(), second.begin(), second.end());
    CHECK(first_difference(bytes_after(ctx, 0, kTensors), parts) == "");
  }
}

TEST_CASE("one tensor of many whose bound is not finite skips the step of all") {
  struct Case {
    int count;  ///< more than two blocks of threads take; more than all blocks take at once
    std::vector<int> bad;
  };
  const Case cases[] = {{200, {0, 63, 64, 127, 128, 199}}, {4200, {4095, 4096, 4199}}};
  for (const Context& ctx : test_contexts()) {
    for (const Case& c : cases) {
      Part part(ctx, {.seed = 3}, 0, c.count);
      AdamwModel& model = part.model();
      part.set_gradients(1);
      std::int64_t skipped = 0;
      std::vector<std::int64_t> named(static_cast<std::size_t>(c.count));
      for (int i : c.bad) {
        INFO("tensor " << i << " of " << c.count << " on " << to_string(ctx.device()));
        const auto before = model.all_bytes();
        TensorScale* scale = model.gradient_view(i).scale;
        const auto usual = download_one<TensorScale>(ctx, scale);
        TensorScale infinite = usual;
        infinite.amax = std::numeric_limits<float>::infinity();
        write_one(ctx, scale, infinite);
        model.step(kRate);
        CHECK(model.scalars().skipped == ++skipped);
        ++named[static_cast<std::size_t>(i)];
        CHECK(read_sync<std::int64_t>(ctx, model.optimizer().nonfinite_counts(), named.size()) ==
              named);
        CHECK(first_difference(model.all_bytes(), before) == "");
        write_one(ctx, scale, usual);
        model.step(kRate);
        CHECK(model.scalars().step == skipped);
        CHECK(first_difference(model.all_bytes(), before) != "");
      }
    }
  }
}

TEST_CASE("steps with and without clipping by turns have the CPU's bits") {
  if (cuda_device_count() == 0) {
    WARN("skipped: no CUDA device");
    return;
  }
  // So many segments that the sum of squares takes more blocks than the one tensor.
  constexpr std::int64_t kSegments = 1030;
  const std::int64_t count = kSegments * kSegmentElements;
  const auto bytes = [&](const Context& ctx) {
    AdamwModel model(ctx, {.seed = 3},
                     {{.shape = {count}, .formats = kO2, .gradient = DType::e4m3}});
    const std::vector<float> block = normal_values(kSegmentElements, 5, 0.1f);
    std::vector<float> values;
    for (int i = 0; i < kSegments; ++i) values.insert(values.end(), block.begin(), block.end());
    model.initialise(0, values);
    model.set_gradient(0, values);
    for (int t = 1; t <= 4; ++t) model.step(kRate, t % 2 == 0 ? 1.0f : 0.0f);
    CHECK(model.scalars().step == 4);
    return model.all_bytes();
  };
  CHECK(first_difference(bytes(Context::cuda(0, nullptr)), bytes(Context::cpu())) == "");
}

TEST_CASE("ranks that share a device step at the same time") {
  constexpr int kRanks = 4, kCount = 500;
  for (DeviceType device : rank_devices()) {
    const auto steps = [](const Context& ctx) {
      Part part(ctx, {.seed = 3}, 0, kCount);
      for (int t = 1; t <= 20; ++t) {
        part.set_gradients(t);
        take_step(part.model(), 0.5f);
      }
      return part.model().all_bytes();
    };
    std::vector<std::vector<std::uint8_t>> bytes(kRanks);
    run_ranks(
        kRanks,
        [&](Communicator& comm) {
          bytes[static_cast<std::size_t>(comm.rank())] = steps(comm.context());
        },
        device);
    const auto alone = steps(Context::cpu());
    for (const auto& of_rank : bytes) CHECK(first_difference(of_rank, alone) == "");
  }
}

}  // namespace octet::test
