// SPDX-License-Identifier: Apache-2.0
#include "octet/optim/adamw.hpp"

#include <sstream>

#include "support/adamw_model.hpp"
#include "support/catch.hpp"
#include "support/compare.hpp"
#include "support/random.hpp"

namespace octet::test {
namespace {

std::string describe(const StateFormats& f, DType gradient) {
  std::ostringstream text;
  text << "weight " << name_of(f.weight) << ", master " << name_of(f.master) << ", m "
       << name_of(f.m) << ", v " << name_of(f.v) << ", gradient " << name_of(gradient);
  return text.str();
}

std::vector<StateFormats> all_formats() {
  std::vector<StateFormats> list;
  for (DType weight : kWeightFormats) {
    for (DType master : kMasterFormats) {
      if (weight == DType::f32 && master != DType::f32) continue;
      for (DType m : kMFormats) {
        for (DType v : kVFormats) list.push_back({weight, master, m, v});
      }
    }
  }
  return list;
}

/// Distance that one stored value may have from the exact one: the gap of codes it lies in (either
/// neighbour may have been drawn), on top of the FP32 error.
double allowed(const Stored& stored, std::size_t i, double exact, double fp32_error) {
  if (stored.dtype == DType::f32) return fp32_error;
  const double largest = std::max(std::abs(exact), std::abs(stored.values[i]));
  const double scale = static_cast<double>(stored.scale.scale);
  return fp32_error + table_of(stored.dtype).gap_at(largest * scale) / scale * (1 + 1e-6);
}

/// What holds for every stored tensor: a power-of-two scale with its exact inverse that fits the
/// bound, the true amax, no code that is not finite.
std::string scale_error(const Stored& stored, double bound, const char* what) {
  std::ostringstream text;
  const TensorScale& s = stored.scale;
  if (static_cast<double>(s.amax) != amax_of(stored.values)) {
    text << what << ": amax is " << s.amax << ", stored is " << amax_of(stored.values);
  } else if (!is_fp8(stored.dtype) && stored.dtype != DType::f16) {
    if (s.scale != 1.0f || s.scale_inv != 1.0f) text << what << ": an unscaled dtype has a scale";
  } else if (std::ilogb(s.scale) + std::ilogb(s.scale_inv) != 0 ||
             s.scale != std::ldexp(1.0f, std::ilogb(s.scale))) {
    text << what << ": scale " << s.scale << " and scale_inv " << s.scale_inv;
  } else if (bound > 0) {
    const double top = table_of(stored.dtype).max();
    const double scaled = bound * static_cast<double>(s.scale);
    const bool at_limit = s.scale == std::ldexp(1.0f, 126);
    if (scaled > top * (1 + 1e-5) || (scaled < top / 2 * (1 - 1e-5) && !at_limit)) {
      text << what << ": bound " << bound << " and scale " << s.scale << " do not fit";
    }
  }
  for (double value : stored.values) {
    if (!std::isfinite(value)) return std::string(what) + ": a stored value is not finite";
  }
  return text.str();
}

/// One step of one parameter, element by element against the double formulas run on the decoded
/// states of before. Returns the first violation.
class StepChecker {
 public:
  StepChecker(const AdamwModel& model, int i, const AdamwReference& reference, const Doubles& g,
              double gradient_amax)
      : model_(model), i_(i), reference_(reference), g_(g), gradient_amax_(gradient_amax) {
    old_w_ = model.master(i);
    old_m_ = model.m(i);
    old_v_ = model.v(i);
  }

  std::string check(std::int64_t t) const {
    const Stored w = model_.master(i_), m = model_.m(i_), v = model_.v(i_);
    const double limit = reference_.bound(t);
    const double clipped = reference_.clip * gradient_amax_;
    const double bound_w = std::abs(1 - reference_.lr * reference_.weight_decay) *
                               static_cast<double>(old_w_.scale.amax) +
                           reference_.lr * limit;
    std::string error = scale_error(m,
                                    reference_.beta1 * static_cast<double>(old_m_.scale.amax) +
                                        (1 - reference_.beta1) * clipped,
                                    "m");
    if (error.empty()) {
      error = scale_error(v,
                          reference_.beta2 * static_cast<double>(old_v_.scale.amax) +
                              (1 - reference_.beta2) * clipped * clipped,
                          "v");
    }
    if (error.empty()) error = scale_error(w, bound_w, "master");
    for (std::size_t i = 0; i < g_.size() && error.empty(); ++i)
      error = element(t, limit, i, w, m, v);
    return error.empty() ? weight_error(w, bound_w) : error;
  }

 private:
  std::string element(std::int64_t t, double limit, std::size_t i, const Stored& w, const Stored& m,
                      const Stored& v) const {
    const double exact_m = reference_.next_m(old_m_.values[i], g_[i]);
    const double exact_v = reference_.next_v(old_v_.values[i], g_[i]);
    const double exact_w =
        reference_.next_weight(old_w_.values[i], reference_.ratio(exact_m, exact_v, t, limit));
    // m' may cancel: its FP32 error goes by the size of its terms.
    const double terms = std::abs(reference_.beta1 * old_m_.values[i]) +
                         std::abs((1 - reference_.beta1) * reference_.clip * g_[i]);
    const double error_m = 3e-7 * terms + 1e-44;
    const double error_v = 4e-7 * exact_v + 1e-44;
    const double error_w =
        2e-7 * std::abs(old_w_.values[i]) +
        reference_.lr * (3e-6 * reference_.ratio(terms, exact_v, t, 1e30) + 1e-6);
    std::ostringstream text;
    text.precision(10);
    const auto compare = [&](const char* what, const Stored& stored, double exact, double error) {
      if (std::abs(stored.values[i] - exact) <= allowed(stored, i, exact, error)) return;
      text << what << "[" << i << "] at step " << t << ": " << stored.values[i] << " instead of "
           << exact << " (g " << g_[i] << ", scale " << stored.scale.scale << "); ";
    };
    compare("m", m, exact_m, error_m);
    compare("v", v, exact_v, error_v);
    compare("master", w, exact_w, error_w);
    if (exact_v > 1e-44 && v.codes[i] == 0) text << "v[" << i << "] > 0 was stored as 0";
    return text.str();
  }

  /// The compute weight is the nearest code to the decoded stored master.
  std::string weight_error(const Stored& master, double bound) const {
    const Stored weight = model_.weight(i_);
    if (weight.dtype == DType::f32) return {};
    for (std::size_t i = 0; i < g_.size(); ++i) {
      const double scaled = master.values[i] * static_cast<double>(weight.scale.scale);
      const std::uint32_t nearest = table_of(weight.dtype).encode(scaled);
      if (weight.codes[i] != nearest) {
        return "weight[" + std::to_string(i) + "] has code " + std::to_string(weight.codes[i]) +
               " instead of " + std::to_string(nearest);
      }
    }
    return scale_error(weight, bound, "weight");
  }

  const AdamwModel& model_;
  int i_;
  AdamwReference reference_;
  Doubles g_;
  double gradient_amax_;
  Stored old_w_, old_m_, old_v_;
};

/// Sets the gradient, steps and checks every element.
std::string checked_step(AdamwModel& model, const AdamwReference& reference,
                         const std::vector<float>& gradient, std::int64_t t) {
  const Doubles g = model.set_gradient(0, gradient);
  const StepChecker checker(model, 0, reference, g, amax_of(g));
  model.step(static_cast<float>(reference.lr));
  return checker.check(t);
}

}  // namespace

TEST_CASE("the initial state is the rounded values, zeros and exact scales") {
  for (const Context& ctx : test_contexts()) {
    for (const StateFormats& formats : all_formats()) {
      INFO(to_string(ctx.device()) << ", " << describe(formats, DType::f32));
      AdamwModel model(ctx, {}, {{{17, 61}, formats}});
      std::vector<float> values = normal_values(1037, 1, 0.02f);
      values[5] = 1e-30f;
      model.initialise(0, values);
      const Stored master = model.master(0), m = model.m(0), v = model.v(0);
      const double amax = amax_of(Doubles(values.begin(), values.end()));
      int wrong = 0;
      for (std::size_t i = 0; i < values.size(); ++i) {
        const double value = static_cast<double>(values[i]);
        const double expected =
            formats.master == DType::f32
                ? value
                : table_of(DType::f16).round(value * static_cast<double>(master.scale.scale)) /
                      static_cast<double>(master.scale.scale);
        wrong += master.values[i] != expected;
        wrong += m.codes[i] != 0;
        wrong += v.codes[i] != 0;
      }
      CHECK(wrong == 0);
      CHECK(scale_error(master, amax, "master") == "");
      CHECK(scale_error(m, 0, "m") == "");
      CHECK(scale_error(v, 0, "v") == "");
      const Stored weight = model.weight(0);
      CHECK(scale_error(weight, amax, "weight") == "");
      if (weight.dtype == DType::f32) continue;
      for (std::size_t i = 0; i < values.size(); ++i) {
        wrong += weight.codes[i] !=
                 table_of(weight.dtype)
                     .encode(master.values[i] * static_cast<double>(weight.scale.scale));
      }
      CHECK(wrong == 0);
    }
  }
}

TEST_CASE("initial values may be f32, bf16 or f16") {
  for (const Context& ctx : test_contexts()) {
    for (DType dtype : {DType::f32, DType::bf16, DType::f16}) {
      AdamwModel model(ctx, {}, {{{129}, kO2}});
      const Encoded encoded = encode_values(dtype, normal_values(129, 2));
      const Buffer buffer = upload(ctx, encoded.bytes);
      model.optimizer().initialise(0, view_of(ctx, buffer, dtype, {129}));
      const Stored master = model.master(0);
      for (std::size_t i = 0; i < 129; ++i) {
        const double scale = static_cast<double>(master.scale.scale);
        REQUIRE(master.values[i] == table_of(DType::f16).round(encoded.decoded[i] * scale) / scale);
      }
    }
  }
}

TEST_CASE("every combination of formats takes the steps of double-precision AdamW") {
  const AdamWConfig config{.beta1 = 0.9f, .beta2 = 0.95f, .eps = 1e-8f, .seed = 3};
  for (const Context& ctx : test_contexts()) {
    for (const StateFormats& formats : all_formats()) {
      for (DType gradient : kGradientFormats) {
        INFO(to_string(ctx.device()) << ", " << describe(formats, gradient));
        AdamwModel model(ctx, config, {{{17, 61}, formats, gradient, 0.1f}});
        model.initialise(0, normal_values(1037, 4, 0.02f));
        const AdamwReference reference(config, 1e-3f, 0.1f);
        for (std::int64_t t = 1; t <= 6; ++t) {
          std::vector<float> g = normal_values(1037, static_cast<std::uint32_t>(t), 1e-3f);
          g[0] = 0.0f;
          g[1] = 1e-25f;
          g[2] = 0.5f * std::abs(g[3]);
          REQUIRE(checked_step(model, reference, g, t) == "");
        }
        const AdamwScalars s = model.scalars();
        CHECK(s.step == 6);
        CHECK(s.skipped == 0);
        CHECK(s.skip == 0);
      }
    }
  }
}

TEST_CASE("the first step moves every weight by the learning rate against its gradient") {
  for (const Context& ctx : test_contexts()) {
    AdamwModel model(ctx, {}, {{{1001}, kPlain}});
    const std::vector<float> start = normal_values(1001, 5);
    model.initialise(0, start);
    const std::vector<float> g = wide_values(1001, 6, -12, 12);
    model.set_gradient(0, g);
    model.step(0.125f);
    const Stored w = model.master(0);
    for (std::size_t i = 0; i < g.size(); ++i) {
      const double sign = g[i] > 0 ? 1.0 : g[i] < 0 ? -1.0 : 0.0;
      const double expected = static_cast<double>(start[i]) - 0.125 * sign;
      REQUIRE(std::abs(w.values[i] - expected) < 1e-5);
    }
  }
}

TEST_CASE("many steps stay near the double-precision run") {
  struct Row {
    StateFormats formats;
    DType gradient;
    double tolerance;  ///< of the displacement, relative in the 2-norm
  };
  // FP32 rounding; bf16 and E4M3 gradients are decoded before the comparison, so what remains is
  // the rounding of the states: 2^-11 steps of master and v, 2^-4 steps of m, averaged.
  const Row rows[] = {{kPlain, DType::f32, 2e-6},
                      {kPlain, DType::e4m3, 2e-6},
                      {kO0, DType::bf16, 2e-6},
                      {{DType::bf16, DType::f32, DType::f32, DType::f16}, DType::f32, 4e-4},
                      {{DType::bf16, DType::f32, DType::e4m3, DType::f32}, DType::f32, 0.05},
                      {kO1, DType::e4m3, 0.003},
                      {kO2, DType::e4m3, 0.05}};
  const AdamWConfig config{.seed = 7};
  for (const Context& ctx : test_contexts()) {
    for (const Row& row : rows) {
      AdamwModel model(ctx, config, {{{31, 67}, row.formats, row.gradient, 0.05f}});
      model.initialise(0, normal_values(2077, 8, 0.02f));
      const AdamwReference reference(config, 2e-3f, 0.05f);
      Doubles w = model.master(0).values;
      const Doubles start = w;
      Doubles m(w.size(), 0.0), v(w.size(), 0.0);
      for (std::int64_t t = 1; t <= 60; ++t) {
        std::vector<float> g = normal_values(2077, static_cast<std::uint32_t>(100 + t), 1e-3f);
        for (std::size_t i = 0; i < g.size(); i += 2) g[i] += 1e-3f;  // half of them drift
        reference.step(t, model.set_gradient(0, g), w, m, v);
        model.step(2e-3f);
      }
      const Doubles end = model.master(0).values;
      Doubles difference(w.size()), displacement(w.size());
      for (std::size_t i = 0; i < w.size(); ++i) {
        difference[i] = end[i] - w[i];
        displacement[i] = w[i] - start[i];
      }
      INFO(to_string(ctx.device()) << ", " << describe(row.formats, row.gradient));
      CHECK(norm_of(difference) < row.tolerance * norm_of(displacement));
    }
  }
}

TEST_CASE("clipping scales the gradients down to the norm, on the device") {
  for (const Context& ctx : test_contexts()) {
    for (DType gradient : {DType::f32, DType::bf16, DType::e4m3}) {
      const AdamWConfig config{};
      AdamwModel model(ctx, config, {{{129, 131}, kPlain, gradient}, {{40000}, kPlain, gradient}});
      model.initialise(0, normal_values(16899, 9));
      model.initialise(1, normal_values(40000, 10));
      Doubles all = model.set_gradient(0, normal_values(16899, 11, 0.5f));
      const Doubles first = all;
      const Doubles second = model.set_gradient(1, normal_values(40000, 12, 2.0f));
      all.insert(all.end(), second.begin(), second.end());
      const double norm = norm_of(all);
      model.step(1e-3f, 1.0f);
      const AdamwScalars s = model.scalars();
      INFO(to_string(ctx.device()) << ", gradient " << name_of(gradient));
      CHECK(std::abs(static_cast<double>(s.norm) / norm - 1) < 1e-5);
      CHECK(std::abs(s.sum_squares / (norm * norm) - 1) < 2e-5);
      CHECK(std::abs(static_cast<double>(s.clip) * norm - 1) < 1e-5);
      const Stored m = model.m(0), v = model.v(0);
      for (std::size_t i = 0; i < first.size(); i += 97) {
        const double g = first[i] / norm;
        REQUIRE(std::abs(m.values[i] - 0.1 * g) < 1e-5 * std::abs(g));
        REQUIRE(std::abs(v.values[i] - 0.05 * g * g) < 3e-5 * g * g);
      }
    }
  }
}

TEST_CASE("a norm below the limit, and no limit, leave the gradients alone") {
  for (const Context& ctx : test_contexts()) {
    AdamwModel model(ctx, {}, {{{1000}, kPlain}});
    model.initialise(0, normal_values(1000, 13));
    const Doubles g = model.set_gradient(0, normal_values(1000, 14));
    model.step(1e-3f, 1e6f);
    CHECK(model.scalars().clip == 1.0f);
    CHECK(std::abs(static_cast<double>(model.scalars().norm) / norm_of(g) - 1) < 1e-6);
    model.step(1e-3f);
    CHECK(model.scalars().clip == 1.0f);
    CHECK(model.scalars().norm == 0.0f);
    CHECK(model.scalars().step == 2);
  }
}

TEST_CASE("a skipped step changes no byte of the state and is counted") {
  for (const Context& ctx : test_contexts()) {
    for (const StateFormats& formats : {kPlain, kO0, kO1, kO2}) {
      const DType gradient = formats == kPlain ? DType::f32 : DType::e4m3;
      const AdamWConfig config{.seed = 1};
      AdamwModel model(ctx, config, {{{17, 61}, formats, gradient}, {{9}, kPlain, DType::f32}});
      model.initialise(0, normal_values(1037, 15, 0.02f));
      model.initialise(1, normal_values(9, 16));
      model.set_gradient(0, normal_values(1037, 17));
      model.set_gradient(1, normal_values(9, 18));
      for (int i = 0; i < 3; ++i) model.step(1e-3f);
      const auto before = model.all_bytes();
      INFO(to_string(ctx.device()) << ", " << describe(formats, gradient));

      write_one(ctx, model.flag(), std::uint32_t{1});
      model.step(1e-3f);
      CHECK(first_difference(model.all_bytes(), before) == "");
      CHECK(download_one<std::uint32_t>(ctx, model.flag()) == 0);
      CHECK(model.scalars().skip == 1);

      // Without the flag a gradient that is not finite shows in its amax.
      TensorScale scale = download_one<TensorScale>(ctx, model.gradient_view(1).scale);
      const TensorScale good = scale;
      for (float bad : {NAN, INFINITY}) {
        scale.amax = bad;
        write_one(ctx, model.gradient_view(1).scale, scale);
        model.step(1e-3f);
        CHECK(first_difference(model.all_bytes(), before) == "");
      }
      write_one(ctx, model.gradient_view(1).scale, good);
      CHECK(model.scalars().step == 3);
      CHECK(model.scalars().skipped == 3);

      model.step(1e-3f);
      CHECK(first_difference(model.all_bytes(), before) != "");
      CHECK(model.scalars().step == 4);
      CHECK(model.scalars().skipped == 3);
      CHECK(model.scalars().skip == 0);
    }
  }
}

TEST_CASE("a step that would overflow, and a learning rate that is no number, are skipped") {
  for (const Context& ctx : test_contexts()) {
    AdamwModel model(ctx, {}, {{{100}, kO2, DType::f32}});
    model.initialise(0, normal_values(100, 19));
    std::vector<float> g(100, 1.0f);
    g[50] = 1e30f;  // its square is not finite
    model.set_gradient(0, g);
    const auto before = model.all_bytes();
    model.step(1e-3f);
    model.step(1e-3f, 1.0f);
    const Buffer lr = upload<float>(ctx, {NAN});
    model.set_gradient(0, std::vector<float>(100, 1.0f));
    model.optimizer().step({.lr = 1e-3f, .lr_device = lr.as<float>()});
    CHECK(first_difference(model.all_bytes(), before) == "");
    CHECK(model.scalars().step == 0);
    CHECK(model.scalars().skipped == 3);
  }
}

TEST_CASE("a learning rate on the device takes the place of the argument") {
  for (const Context& ctx : test_contexts()) {
    std::vector<std::vector<std::uint8_t>> bytes;
    const Buffer lr = upload<float>(ctx, {1e-2f});
    for (bool on_device : {false, true}) {
      AdamwModel model(ctx, {}, {{{1037}, kO2, DType::e4m3, 0.1f}});
      model.initialise(0, normal_values(1037, 20));
      model.set_gradient(0, normal_values(1037, 21));
      AdamWStep step{.lr = 1e-2f};
      if (on_device) step = {.lr = 77.0f, .lr_device = lr.as<float>()};
      model.optimizer().step(step);
      CHECK(model.scalars().lr == 1e-2f);
      bytes.push_back(model.all_bytes());
    }
    CHECK(first_difference(bytes[1], bytes[0]) == "");
  }
}

TEST_CASE("a learning rate of zero changes the moments and keeps the weights") {
  for (const Context& ctx : test_contexts()) {
    AdamwModel model(ctx, {}, {{{1037}, kO2, DType::f32, 0.1f}});
    model.initialise(0, normal_values(1037, 22));
    model.set_gradient(0, normal_values(1037, 23));
    const Stored weight = model.weight(0), master = model.master(0);
    for (int i = 0; i < 3; ++i) model.step(0.0f);
    CHECK(first_difference(model.weight(0).values, weight.values) == "");
    CHECK(first_difference(model.master(0).values, master.values) == "");
    CHECK(model.m(0).scale.amax > 0.0f);
  }
}

TEST_CASE("seed and step decide the rounding, and runs repeat") {
  for (const Context& ctx : test_contexts()) {
    std::vector<std::vector<std::uint8_t>> bytes;
    for (std::uint64_t seed : {1u, 1u, 2u}) {
      AdamwModel model(ctx, {.seed = seed}, {{{64, 65}, kO2, DType::e4m3}});
      model.initialise(0, normal_values(4160, 24));
      for (std::uint32_t t = 0; t < 3; ++t) {
        model.set_gradient(0, normal_values(4160, 25 + t));
        model.step(1e-3f);
      }
      bytes.push_back(model.all_bytes());
    }
    CHECK(first_difference(bytes[1], bytes[0]) == "");
    CHECK(first_difference(bytes[2], bytes[0]) != "");
  }
}

}  // namespace octet::test
