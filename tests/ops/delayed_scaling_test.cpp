// SPDX-License-Identifier: Apache-2.0
// Scales from the amaxes of earlier steps, against a history kept by hand.
#include "octet/ops/delayed_scaling.hpp"

#include <algorithm>
#include <deque>
#include <limits>

#include "octet/ops/quantize.hpp"
#include "support/catch.hpp"
#include "support/compare.hpp"
#include "support/devices.hpp"
#include "support/errors.hpp"
#include "support/random.hpp"
#include "support/reference.hpp"

namespace octet::test {
namespace {

/// The recipe by its definition: the amaxes of the last steps, the newest first.
class Reference {
 public:
  Reference(const DelayedScalingConfig& config, DType dtype) : config_(config), dtype_(dtype) {}

  void step(float amax) {
    if (amax == 0.0f || !std::isfinite(amax)) return;
    history_.push_front(amax);
    if (history_.size() > static_cast<std::size_t>(config_.amax_history_len)) history_.pop_back();
    const float a = config_.amax_compute_algo == AmaxComputeAlgo::max
                        ? *std::max_element(history_.begin(), history_.end())
                        : history_.front();
    const double of_amax = reference_scale(static_cast<double>(a), table_of(dtype_).max());
    const int exponent = std::clamp(std::ilogb(of_amax) - config_.margin, -126, 126);
    scale_ = std::ldexp(1.0f, exponent);
  }
  float scale() const { return scale_; }

 private:
  DelayedScalingConfig config_;
  DType dtype_;
  std::deque<float> history_;
  float scale_ = 1.0f;
};

void set_amax(const Context& ctx, TensorScale* scale, float amax) {
  TensorScale s = download_one<TensorScale>(ctx, scale);
  CHECK(s.amax == 0.0f);
  s.amax = amax;
  write_one(ctx, scale, s);
}

}  // namespace

TEST_CASE("scales follow the history: lengths, algorithms, margins, steps without a tensor") {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  for (const Context& ctx : test_contexts()) {
    for (int length : {1, 2, 5, 32, 33, 1024}) {
      for (AmaxComputeAlgo algo : {AmaxComputeAlgo::max, AmaxComputeAlgo::most_recent}) {
        for (int margin : {0, 2, -1, 64}) {
          const DelayedScalingConfig config{
              .amax_history_len = length, .amax_compute_algo = algo, .margin = margin};
          // More tensors than a block of threads takes.
          std::vector<Reference> references;
          std::vector<DelayedScaling::Entry> entries;
          const Buffer scales = upload<TensorScale>(ctx, std::vector<TensorScale>(7));
          for (int i = 0; i < 7; ++i) {
            const DType dtype = i % 2 == 0 ? DType::e4m3 : DType::e5m2;
            references.emplace_back(config, dtype);
            entries.push_back({scales.as<TensorScale>() + i, dtype});
          }
          DelayedScaling scaling(ctx, config, entries);
          Draws draws(3);
          for (int t = 0; t < 80; ++t) {
            for (std::size_t i = 0; i < entries.size(); ++i) {
              // A falling amax leaves the window; some steps have none, or one that is not finite.
              float amax = std::ldexp(1.0f + static_cast<float>(draws() % 1000) / 1000.0f,
                                      static_cast<int>(draws() % 40) - 20 - t / 4);
              if ((t + static_cast<int>(i)) % 7 == 3) amax = 0.0f;
              if ((t + static_cast<int>(i)) % 11 == 5) amax = t % 2 == 0 ? kInf : NAN;
              set_amax(ctx, entries[i].scale, amax);
              references[i].step(amax);
            }
            scaling.update();
            for (std::size_t i = 0; i < entries.size(); ++i) {
              INFO(to_string(ctx.device()) << ", length " << length << ", margin " << margin
                                           << ", step " << t << ", tensor " << i);
              const auto s = download_one<TensorScale>(ctx, entries[i].scale);
              REQUIRE(s.scale == references[i].scale());
              REQUIRE(s.scale * s.scale_inv == 1.0f);
              REQUIRE(s.amax == 0.0f);
            }
          }
        }
      }
    }
  }
}

TEST_CASE("amaxes at the ends of the range give normal scales") {
  for (const Context& ctx : test_contexts()) {
    for (int margin : {0, 64, -64}) {
      for (float amax : {1e-45f, 1e-38f, 1.3e-36f, 448.0f, 3.4e38f}) {
        const Buffer scale = upload<TensorScale>(ctx, {{}});
        auto* at = scale.as<TensorScale>();
        DelayedScaling scaling(ctx, {.amax_history_len = 3, .margin = margin}, {{at, DType::e4m3}});
        set_amax(ctx, at, amax);
        scaling.update();
        const auto s = download_one<TensorScale>(ctx, at);
        INFO(amax << ", margin " << margin);
        // Clamped before the margin and after.
        const int exponent =
            std::ilogb(reference_scale(static_cast<double>(amax), table_of(DType::e4m3).max()));
        CHECK(s.scale == std::ldexp(1.0f, std::clamp(exponent - margin, -126, 126)));
        CHECK(download_one<float>(ctx, scaling.history()) == amax);
        CHECK(download_one<std::uint32_t>(ctx, scaling.next()) == 1);
        CHECK(std::isnormal(s.scale));
        CHECK(std::isnormal(s.scale_inv));
        CHECK(s.scale * s.scale_inv == 1.0f);
      }
    }
  }
}

TEST_CASE("several casts of a step record their largest amax once, all with one scale") {
  for (const Context& ctx : test_contexts()) {
    const ScaledTensor out(ctx, DType::e4m3, {100});
    DelayedScaling scaling(ctx, {.amax_history_len = 2}, {{out.view().scale, DType::e4m3}});
    Reference reference({.amax_history_len = 2}, DType::e4m3);
    for (int t = 1; t <= 6; ++t) {
      float largest = 0.0f;
      for (int micro = 0; micro < 3; ++micro) {
        const std::vector<float> values =
            normal_values(100, static_cast<std::uint32_t>(10 * t + micro), std::ldexp(1.0f, -t));
        for (float value : values) largest = std::max(largest, std::abs(value));
        const Buffer in = upload(ctx, values);
        quantize(ctx, {.in = view_of(ctx, in, DType::f32, {100}),
                       .out = out.view(),
                       .scaling = Scaling::given});
        const auto s = download_one<TensorScale>(ctx, out.view().scale);
        CHECK(s.scale == reference.scale());
        CHECK(s.amax == largest);
      }
      scaling.update();
      reference.step(largest);
    }
  }
}

TEST_CASE("casts and updates that are enqueued in a row wait for one another") {
  constexpr int kSteps = 16;
  constexpr std::int64_t kCount = 1 << 17;
  for (const Context& ctx : test_contexts()) {
    const DelayedScalingConfig config{.amax_history_len = kSteps,
                                      .amax_compute_algo = AmaxComputeAlgo::most_recent};
    const ScaledTensor out(ctx, DType::e4m3, {kCount});
    DelayedScaling scaling(ctx, config, {{out.view().scale, DType::e4m3}});
    Reference reference(config, DType::e4m3);
    std::vector<float> all, amaxes, scales;
    for (int t = 0; t < kSteps; ++t) {
      const std::vector<float> values =
          normal_values(kCount, static_cast<std::uint32_t>(t), std::ldexp(1.0f, t * 5 % 13));
      float largest = 0.0f;
      for (float value : values) largest = std::max(largest, std::abs(value));
      all.insert(all.end(), values.begin(), values.end());
      amaxes.push_back(largest);
      scales.push_back(reference.scale());
      reference.step(largest);
    }
    const Buffer in = upload(ctx, all);
    const Buffer taken = upload<TensorScale>(ctx, std::vector<TensorScale>(kSteps));
    for (int t = 0; t < kSteps; ++t) {
      quantize(ctx, {.in = {in.as<float>() + t * kCount, DType::f32, {kCount}, ctx.device()},
                     .out = out.view(),
                     .scaling = Scaling::given,
                     .scale_copy = taken.as<TensorScale>() + t});
      scaling.update();
    }
    INFO(to_string(ctx.device()));
    CHECK(first_difference(download<float>(ctx, scaling.history(), kSteps), amaxes) == "");
    const auto copies = download<TensorScale>(ctx, taken.data(), kSteps);
    for (int t = 0; t < kSteps; ++t) {
      INFO("step " << t);
      CHECK(copies[static_cast<std::size_t>(t)].scale == scales[static_cast<std::size_t>(t)]);
    }
    CHECK(download_one<TensorScale>(ctx, out.view().scale).scale == reference.scale());
  }
}

TEST_CASE("delayed scaling that could not work is refused by name") {
  for (const Context& ctx : test_contexts()) {
    const Buffer scale = upload<TensorScale>(ctx, {{}});
    const auto error_with = [&](const DelayedScalingConfig& config, DelayedScaling::Entry entry) {
      return error_of([&] { DelayedScaling(ctx, config, {entry}); });
    };
    auto* at = scale.as<TensorScale>();
    CHECK(error_with({}, {at, DType::e5m2}) == "no error");
    CHECK(missing(error_with({.amax_history_len = 0}, {at, DType::e4m3}),
                  {"amax_history_len", "0"}) == "");
    CHECK(missing(error_with({.margin = 65}, {at, DType::e4m3}), {"margin", "65"}) == "");
    CHECK(missing(error_with({}, {nullptr, DType::e4m3}), {"entry 0", "scale"}) == "");
    CHECK(missing(error_with({}, {at, DType::bf16}), {"bf16", "e4m3"}) == "");
    CHECK(missing(error_of([&] { delayed_update(ctx, {.tensor_count = 1}); }), {"table"}) == "");
    CHECK(missing(error_of([&] {
                    DelayedScaling(ctx, {}, {{at, DType::e4m3}, {at, DType::e5m2}});
                  }),
                  {"entries 0 and 1", "one scale"}) == "");
    CHECK(missing(
              error_with({.amax_compute_algo = static_cast<AmaxComputeAlgo>(2)}, {at, DType::e4m3}),
              {"amax_compute_algo", "2", "most_recent"}) == "");
    DelayedScaling none(ctx, {}, {});
    none.update();
  }
}

}  // namespace octet::test
