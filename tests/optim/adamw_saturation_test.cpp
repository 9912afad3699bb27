// SPDX-License-Identifier: Apache-2.0
// 10,000 steps of gradients made to break the scales: no value may need the clamp of its encoding.
// The new values are computed here, from the codes of before and with the library's FP32 formulas,
// and compared with the new scales.
#include "support/adamw_model.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"

namespace octet::test {
namespace {

using S = StateFormat;
const StateFormats kBf16Moments = {WeightFormat::e4m3, S::f16, S::bf16, S::bf16};
const StateFormats kBlocksAndHalf = {WeightFormat::bf16, S::f16, S::e4m3_block, S::f16};
const StateFormats kMixed = {WeightFormat::e4m3, S::f32, S::e4m3, S::sqrt_e4m3_block};

double format_max(S format) {
  return format == S::bf16 ? table_of(DType::bf16).max() : format == S::f16 ? 65504.0 : 448.0;
}

std::uint32_t largest_code(S format) {
  switch (format) {
    case S::f32: return 0x7F7FFFFF;
    case S::bf16: return 0x7F7F;
    case S::f16: return 0x7BFF;
    case S::split: return 0x7E00;
    default: return 0x7E;
  }
}

std::uint32_t magnitude(S format, std::uint32_t code) {
  // Halves of a split code that make no number have more than 16 bits.
  if (format == S::split) return code > 0xFFFF ? code : code & 0x7FFF;
  return format == S::f32 ? code & 0x7FFFFFFF
                          : code & (table_of(table_dtype(format)).sign_bit() - 1);
}

/// How many values (of a root format the roots) would be rounded to above the largest finite code
/// of what was stored, and how many codes are above it.
int saturated(const std::vector<float>& values, const Stored& stored) {
  int count = 0;
  const double top = format_max(stored.format);
  for (std::size_t i = 0; i < values.size(); ++i) {
    const double value = std::abs(static_cast<double>(values[i]));
    if (stored.format == S::f32) {
      count += !std::isfinite(value);
    } else if (!stored.blocks.empty()) {
      // The block's scale to encode is not stored; it is 448 / amax rounded down, so at most 1 /
      // inv but for inv's own rounding.
      count += !(value <= top * (1 + 0x1p-22) * static_cast<double>(stored.blocks[i / 128]));
    } else {
      count += !(value * static_cast<double>(stored.scale.scale) <= top);
    }
    count += magnitude(stored.format, stored.codes[i]) > largest_code(stored.format);
  }
  return count;
}

/// The codes of a state as FP32, before any scale.
std::vector<float> raw_values(const Stored& stored) {
  std::vector<float> values;
  for (std::uint32_t code : stored.codes) {
    double value = 0;
    switch (stored.format) {
      case S::f32: value = static_cast<double>(float_from_bits(code)); break;
      case S::split: value = split_value(code); break;
      default: value = stored.table().decode(code);
    }
    values.push_back(static_cast<float>(value));
  }
  return values;
}

/// A state, and the values of one step that it was rounded from.
struct Values {
  std::vector<float> m, second, w;
};

/// States of parameter 0 before a step.
struct Before {
  Stored m, v, w;
  explicit Before(const AdamwModel& model) : m(model.m(0)), v(model.v(0)), w(model.master(0)) {}

  /// The FP32 formulas of docs/numerics.md section 3.
  Values stepped(const AdamwGroupScalars& s, const Doubles& gradients) const {
    const std::vector<float> raw_m = raw_values(m), raw_v = raw_values(v), raw_w = raw_values(w);
    Values values;
    for (std::size_t i = 0; i < gradients.size(); ++i) {
      const float g = static_cast<float>(gradients[i]);
      const float m_inv = static_cast<float>(m.inv(i)), v_inv = static_cast<float>(v.inv(i));
      const bool root = is_root(v.format);
      const float code = root ? raw_v[i] * raw_v[i] : raw_v[i];
      const float inv = root ? v_inv * v_inv : v_inv;
      const float new_m = std::fma(s.beta1 * m_inv, raw_m[i], s.one_minus_beta1 * g);
      const float new_v = std::fma(s.beta2 * inv, code, s.one_minus_beta2 * (g * g));
      const float new_root = std::sqrt(new_v);
      const float quotient = new_m / std::fma(new_root, s.root_factor, s.root_eps);
      const float ratio = std::clamp(quotient, -s.bound, s.bound);
      const float w_inv = static_cast<float>(w.inv(i));
      values.m.push_back(new_m);
      values.second.push_back(root ? new_root : new_v);
      values.w.push_back(std::fma(-s.lr, ratio, (s.weight_factor * w_inv) * raw_w[i]));
    }
    return values;
  }
};

std::vector<float> decoded_floats(const Stored& stored) {
  return {stored.values.begin(), stored.values.end()};
}

/// How many elements are not stored as a neighbour of their value: whether the values here are the
/// library's.
int not_neighbours(const std::vector<float>& values, const Stored& stored) {
  int count = 0;
  for (std::size_t i = 0; i < values.size(); ++i) {
    double value = static_cast<double>(values[i]);
    if (is_root(stored.format)) value *= value;
    // FP32's last digit, and its subnormals through a root.
    const double fp32 = 2.5e-7 * std::abs(value) + (is_root(stored.format) ? 3e-45 : 0);
    const bool lifted = value > 0 && stored.codes[i] == 1;
    count += !lifted && std::abs(stored.values[i] - value) > stored.allowed(i, value, fp32);
  }
  return count;
}

/// Gradients of another kind at every step, drawn at random.
class Adversary {
 public:
  explicit Adversary(std::size_t count) : count_(count), draws_(99) {}

  std::vector<float> next() {
    const std::uint32_t seed = draws_();
    const std::size_t place = draws_() % count_;
    std::vector<float> g = normal_values(count_, seed);
    switch (draws_() % 10) {
      case 0:  // one outlier
        g[place] = seed % 2 == 0 ? 1e6f : -1e6f;
        break;
      case 1:  // a constant whose sign flips
        sign_ = -sign_;
        g.assign(count_, sign_);
        break;
      case 2:  // sudden growth by 1e4, up to 1e16, then back
        size_ = size_ < 1e13f ? size_ * 1e4f : 1e-12f;
        for (float& x : g) x *= size_;
        break;
      case 3: g.assign(count_, 0.0f); break;
      case 4: g = wide_values(count_, seed, -149, -126); break;  // subnormals
      case 5: g = wide_values(count_, seed, -149, 50); break;
      case 6:  // the worst case of the bound
        growth_ = growth_ < 1e15f ? growth_ * 1.11f : 1e-15f;
        g.assign(count_, growth_);
        break;
      case 7:  // zeros but for one
        g.assign(count_, 0.0f);
        g[place] = 1.0f;
        break;
      case 8:
        for (float& x : g) x *= 1e-8f;
        break;
      default: break;
    }
    return g;
  }

 private:
  std::size_t count_;
  Draws draws_;
  float sign_ = 1.0f, size_ = 1e-12f, growth_ = 1e-15f;
};

/// Counters of a run.
struct Run {
  int saturated = 0, wrong = 0;
  std::int64_t steps = 0, skipped = 0;
  double largest = 0;  ///< largest share of the maximum that a scaled m, v or w took
};

double largest_share(const std::vector<float>& values, const Stored& stored) {
  if (!is_scaled(stored.format)) return 0;
  double largest = 0;
  for (float x : values) largest = std::max(largest, std::abs(static_cast<double>(x)));
  return largest * static_cast<double>(stored.scale.scale) / format_max(stored.format);
}

Run run(const Context& ctx, const StateFormats& formats, DType gradient, float beta2, int steps) {
  constexpr std::size_t kCount = 261;  // three blocks, the last one short
  const AdamWConfig config{.beta2 = beta2, .seed = 31};
  AdamwModel model(ctx, config, {{{kCount}, formats, gradient, 0.1f}});
  model.initialise(0, normal_values(kCount, 1, 0.02f));
  Adversary adversary(kCount);
  Run result;
  for (int t = 1; t <= steps; ++t) {
    const Doubles g = model.set_gradient(0, adversary.next());
    const Before before(model);
    model.step(t % 100 == 0 ? 0.1f : 1e-3f);
    const Values values = before.stepped(model.group_scalars(0), g);
    const Stored m = model.m(0), v = model.v(0), w = model.master(0);
    result.saturated += saturated(values.m, m) + saturated(values.second, v);
    result.saturated += saturated(values.w, w);
    // The weight is made of the stored master.
    result.saturated += saturated(decoded_floats(w), model.weight(0));
    for (const auto& [of, stored] :
         {std::pair{&values.m, &m}, std::pair{&values.second, &v}, std::pair{&values.w, &w}}) {
      result.largest = std::max(result.largest, largest_share(*of, *stored));
      if (t % 16 == 0) result.wrong += not_neighbours(*of, *stored);
    }
  }
  result.steps = model.scalars().step;
  result.skipped = model.scalars().skipped;
  return result;
}

}  // namespace

TEST_CASE("10,000 steps of adversarial gradients need no clamp in any state format") {
  constexpr int kSteps = 10000;
  const struct {
    StateFormats formats;
    DType gradient;
    float beta2;
  } rows[] = {{kO2, DType::e4m3, 0.95f},
              {kO2, DType::f32, 0.999f},
              {kSmall, DType::f32, 0.95f},
              {kSmall, DType::e4m3, 0.999f},
              {kO1, DType::e4m3, 0.95f},
              {kBf16Moments, DType::f32, 0.95f},
              {kBlocksAndHalf, DType::bf16, 0.95f},
              {kMixed, DType::bf16, 0.999f}};
  for (const Context& ctx : test_contexts()) {
    for (const auto& row : rows) {
      const Run result = run(ctx, row.formats, row.gradient, row.beta2, kSteps);
      INFO(to_string(ctx.device())
           << ", " << describe(row.formats, row.gradient) << ", beta2 " << row.beta2
           << ": largest share of a maximum " << result.largest);
      CHECK(result.saturated == 0);
      CHECK(result.wrong == 0);
      CHECK(result.steps == kSteps);
      CHECK(result.skipped == 0);
      // The scales leave little room: the counter was close to counting.
      CHECK(result.largest > 0.9);
    }
  }
}

TEST_CASE("the counter of saturated values counts") {
  const auto stored_as = [](S format, std::uint32_t code, float scale) {
    Stored stored;
    stored.format = format;
    stored.codes = {code};
    stored.scale.scale = scale;
    return stored;
  };
  for (S format : {S::e4m3, S::f16, S::split, S::bf16}) {
    const float top = static_cast<float>(format_max(format));
    const std::uint32_t code = largest_code(format);
    INFO(name_of(format));
    CHECK(saturated({top}, stored_as(format, code, 1.0f)) == 0);
    CHECK(saturated({-top}, stored_as(format, code, 1.0f)) == 0);
    CHECK(saturated({next_up(top)}, stored_as(format, code, 1.0f)) == 1);
    CHECK(saturated({-next_up(top)}, stored_as(format, code, 1.0f)) == 1);
    CHECK(saturated({top}, stored_as(format, code, 2.0f)) == 1);
    CHECK(saturated({NAN}, stored_as(format, code, 1.0f)) == 1);
    CHECK(saturated({0.0f}, stored_as(format, code + 1, 1.0f)) == 1);
  }
  CHECK(saturated({INFINITY}, stored_as(S::f32, 0, 1.0f)) == 1);
  CHECK(saturated({1.0f}, stored_as(S::f32, 0x7F800000, 1.0f)) == 1);
  CHECK(saturated({1.0f}, stored_as(S::split, joined_split(0x7F, 0), 1.0f)) == 1);
  for (S format : {S::e4m3_block, S::sqrt_e4m3_block}) {
    Stored block = stored_as(format, 0x7E, 1.0f);
    block.blocks = {3.0f / 448.0f};
    CHECK(saturated({3.0f}, block) == 0);
    CHECK(saturated({3.00001f}, block) == 1);
    block.codes = {0x7F};
    CHECK(saturated({3.0f}, block) == 1);
  }
  // A true step whose scale is a power of two too large.
  for (const StateFormats& formats : {kO2, kSmall, kMixed}) {
    AdamwModel model(Context::cpu(), {}, {{{261}, formats, DType::f32}});
    model.initialise(0, normal_values(261, 1, 0.02f));
    const Doubles g = model.set_gradient(0, normal_values(261, 2));
    const Before before(model);
    model.step(1e-3f);
    const Values values = before.stepped(model.group_scalars(0), g);
    for (const auto& [of, state] :
         {std::pair{&values.m, model.m(0)}, std::pair{&values.second, model.v(0)},
          std::pair{&values.w, model.master(0)}}) {
      Stored stored = state;
      INFO(name_of(stored.format));
      CHECK(saturated(*of, stored) == 0);
      CHECK(not_neighbours(*of, stored) == 0);
      if (stored.format == S::f32) continue;
      stored.scale.scale *= 4;  // a bound may be up to twice the largest value
      for (float& inv : stored.blocks) inv *= 0.999f;
      CHECK(saturated(*of, stored) > 0);
    }
  }
}

}  // namespace octet::test
