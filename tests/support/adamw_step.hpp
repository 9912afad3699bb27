// SPDX-License-Identifier: Apache-2.0
// One step of one parameter of an AdamwModel against the double formulas, element by element, and
// what holds for everything that is stored.
#pragma once

#include <sstream>
#include <string>
#include <vector>

#include "support/adamw_model.hpp"
#include "support/compare.hpp"

namespace octet::test {

/// Of a block format: inv is amax / 448 in FP32, not below 2^-126, so the largest code of a block
/// is the top one or the next; A is what the top code would stand for with the largest inv.
inline std::string block_error(const Stored& stored, const std::string& what) {
  std::ostringstream text;
  float largest = 0;
  for (std::size_t block = 0; block < stored.blocks.size(); ++block) {
    const float inv = stored.blocks[block];
    largest = std::max(largest, inv);
    std::uint32_t top = 0;
    const std::size_t end = std::min(128 * block + 128, stored.codes.size());
    for (std::size_t i = 128 * block; i < end; ++i) top = std::max(top, stored.codes[i] & 0x7Fu);
    if (!(inv >= 0x1p-126f && inv < INFINITY)) {
      text << what << ": block " << block << " has inv " << inv;
    } else if (top < 0x7D && inv > 0x1p-126f) {
      text << what << ": block " << block << " has the largest code " << top << ", inv " << inv;
    }
  }
  const float root = 448.0f * largest;
  const float expected = is_root(stored.format) ? root * root : root;
  if (stored.scale.amax != expected) {
    text << what << ": A is " << stored.scale.amax << " instead of " << expected;
  }
  if (amax_of(stored.values) > static_cast<double>(expected) * (1 + 1e-6)) {
    text << what << ": " << amax_of(stored.values) << " is stored, above A " << expected;
  }
  return text.str();
}

/// What holds for every stored tensor: a power-of-two scale with its exact inverse that fits the
/// bound, the true amax, no code that is not finite.
inline std::string scale_error(const Stored& stored, double bound, const std::string& what) {
  std::ostringstream text;
  const TensorScale& s = stored.scale;
  for (double value : stored.values) {
    if (!std::isfinite(value)) return what + ": a stored value is not finite";
  }
  if (stored.blocks.empty() && static_cast<double>(s.amax) != amax_of(stored.values)) {
    text << what << ": amax is " << s.amax << ", stored is " << amax_of(stored.values);
  } else if (!is_scaled(stored.format)) {
    if (s.scale != 1.0f || s.scale_inv != 1.0f) text << what << ": an unscaled format has a scale";
  } else if (std::ilogb(s.scale) + std::ilogb(s.scale_inv) != 0 ||
             s.scale != std::ldexp(1.0f, std::ilogb(s.scale))) {
    text << what << ": scale " << s.scale << " and scale_inv " << s.scale_inv;
  } else if (bound > 0) {
    const double top = stored.table().max();
    const double scaled = bound * static_cast<double>(s.scale);
    const bool at_limit = s.scale == std::ldexp(1.0f, 126);
    if (scaled > top * (1 + 1e-5) || (scaled < top / 2 * (1 - 1e-5) && !at_limit)) {
      text << what << ": bound " << bound << " and scale " << s.scale << " do not fit";
    }
  }
  return stored.blocks.empty() ? text.str() : text.str() + block_error(stored, what);
}

/// A weight in blocks is what a cast with scales of blocks makes of the decoded master, and the
/// transposed copy what it makes of the transpose.
inline std::string block_weight_error(const AdamwModel& model, int i, WeightFormat format,
                                      const Shape& shape) {
  const BlockKind kind{granularity_of(format)};
  const auto difference = [&](const Doubles& values, const Shape& of, const Blocks& actual) {
    CastCounters counters;
    const Blocks expected = reference_blocks(values, of, of, kind, DType::e4m3, counters);
    const std::string codes = first_difference(actual.codes, expected.codes);
    if (!codes.empty()) return "codes of the weight: " + codes;
    const std::string scales = first_difference(actual.scales, expected.scales);
    return scales.empty() ? scales : "scales of the weight's blocks: " + scales;
  };
  const Doubles master = model.master(i).values;
  const std::string error = difference(master, shape, model.block_weight(i));
  if (!error.empty() || !is_transposed(format)) return error;
  const std::string of_copy =
      difference(turned(master, shape), {shape[1], shape[0]}, model.block_weight_transposed(i));
  return of_copy.empty() ? of_copy : "transposed: " + of_copy;
}

/// The compute weight is the nearest code to the stored master, ties to even, of a split master
/// away from zero; the transposed one is the same plane with rows and columns exchanged.
inline std::string weight_error(const AdamwModel& model, int i, const StateFormats& f,
                                const Shape& shape) {
  if (f.weight == WeightFormat::none || f.weight == WeightFormat::f32) return {};
  if (has_block_scales(f.weight)) return block_weight_error(model, i, f.weight, shape);
  const Stored weight = model.weight(i), master = model.master(i);
  const FormatTable& table = weight.table();
  const bool split = f.master == StateFormat::split;
  if (split && weight.scale.scale != master.scale.scale) return "the halves have two scales";
  for (std::size_t k = 0; k < weight.codes.size(); ++k) {
    const double y = master.values[k] * static_cast<double>(weight.scale.scale);
    std::uint32_t nearest = table.encode(y);
    if (split && std::abs(y) < table.max()) {
      const std::uint32_t low = table.floor_code(y);
      const bool up = 2 * std::abs(y) >= table.values()[low] + table.values()[low + 1];
      nearest = (nearest & 0x80u) | (low + (up ? 1 : 0));
    }
    if (weight.codes[k] != nearest) {
      return "weight[" + std::to_string(k) + "] has code " + std::to_string(weight.codes[k]) +
             " instead of " + std::to_string(nearest);
    }
  }
  if (f.weight != WeightFormat::e4m3_and_transpose) return {};
  const std::vector<std::uint8_t> transposed = model.transposed_weight(i);
  const auto rows = static_cast<std::size_t>(shape[0]), columns = weight.codes.size() / rows;
  if (transposed.size() != weight.codes.size()) return "the transposed weight has another size";
  for (std::size_t row = 0; row < rows; ++row) {
    for (std::size_t column = 0; column < columns; ++column) {
      if (transposed[column * rows + row] != weight.codes[row * columns + column]) {
        return "transposed[" + std::to_string(column) + ", " + std::to_string(row) + "] is wrong";
      }
    }
  }
  return {};
}

/// Takes the states of before, then checks those of after. Bounds per element: FP32's error, by the
/// size of the terms where they may cancel, and one gap of the stored format (Stored::allowed).
class StepChecker {
 public:
  StepChecker(const AdamwModel& model, int i, const StateFormats& formats, const Shape& shape,
              const Doubles& g)
      : model_(model), i_(i), formats_(formats), shape_(shape), g_(g) {
    old_w_ = model.master(i);
    old_m_ = model.m(i);
    old_v_ = model.v(i);
  }

  /// Returns the first violation.
  std::string check(const AdamwReference& r, std::int64_t t) const {
    const Stored w = model_.master(i_), m = model_.m(i_), v = model_.v(i_);
    const double limit = r.bound(t);
    const auto amax = [](const Stored& stored) { return static_cast<double>(stored.scale.amax); };
    const double decay = r.decoupled ? 0.0 : r.weight_decay * amax(old_w_);
    const double g = r.clip * amax_of(g_) + decay;
    const double factor = r.decoupled ? std::abs(1 - r.lr * r.weight_decay) : 1.0;
    const double bound_w = factor * amax(old_w_) + r.lr * limit;
    std::string error = scale_error(m, r.beta1 * amax(old_m_) + (1 - r.beta1) * g, "m");
    error += scale_error(v, r.beta2 * amax(old_v_) + (1 - r.beta2) * g * g, "v");
    error += scale_error(w, bound_w, "master");
    const bool has_blocks = has_block_scales(formats_.weight);
    if (has_weight()) error += scale_error(model_.weight(i_), has_blocks ? 0 : bound_w, "weight");
    Doubles tops_m(m.blocks.size(), 0.0), errors_m = tops_m;
    Doubles tops_v(v.blocks.size(), 0.0), errors_v = tops_v;
    for (std::size_t k = 0; k < g_.size() && error.empty(); ++k) {
      const Exact exact = exact_of(r, t, limit, k);
      error = element_error(t, k, exact, w, m, v);
      if (!tops_m.empty()) raise(tops_m, errors_m, k, std::abs(exact.m), exact.error_m);
      if (!tops_v.empty()) raise(tops_v, errors_v, k, exact.v, exact.error_v);
    }
    if (error.empty()) error = inv_error(m, tops_m, errors_m, "m");
    if (error.empty()) error = inv_error(v, tops_v, errors_v, "v");
    return error.empty() ? weight_error(model_, i_, formats_, shape_) : error;
  }

 private:
  struct Exact {
    double m, v, w;
    double error_m, error_v, error_w;  ///< what FP32 may add
  };

  bool has_weight() const {
    return formats_.weight != WeightFormat::none && formats_.weight != WeightFormat::f32;
  }

  Exact exact_of(const AdamwReference& r, std::int64_t t, double limit, std::size_t k) const {
    Exact e;
    const double old = old_w_.values[k];
    e.m = r.next_m(old_m_.values[k], g_[k], old);
    e.v = r.next_v(old_v_.values[k], g_[k], old);
    const double ratio = r.ratio(e.m, e.v, t, limit);
    e.w = r.next_weight(old, ratio);
    const double decay = r.decoupled ? 0.0 : r.weight_decay * std::abs(old);
    const double terms_g = r.clip * std::abs(g_[k]) + decay;
    const double terms_m = r.beta1 * std::abs(old_m_.values[k]) + (1 - r.beta1) * terms_g;
    const double effective = std::abs(r.effective(g_[k], old));
    e.error_m = 3e-7 * terms_m + 1e-44;
    e.error_v =
        5e-7 * e.v + 1e-44 + (1 - r.beta2) * (2 * effective + 2e-7 * terms_g) * 2e-7 * terms_g;
    const double error_ratio =
        3e-6 * r.ratio(terms_m, e.v, t, 1e30) + std::abs(ratio) * e.error_v / (e.v + 1e-44) + 1e-6;
    e.error_w = 2e-7 * std::abs(old) + r.lr * error_ratio;
    return e;
  }

  std::string element_error(std::int64_t t, std::size_t k, const Exact& exact, const Stored& w,
                            const Stored& m, const Stored& v) const {
    std::string error;
    const auto compare = [&](const char* what, const Stored& stored, double value, double fp32) {
      if (std::abs(stored.values[k] - value) <= stored.allowed(k, value, fp32)) return;
      std::ostringstream text;
      text.precision(10);
      text << what << "[" << k << "] at step " << t << ": " << stored.values[k] << " instead of "
           << value << " (g " << g_[k] << ", w " << old_w_.values[k] << ", inv " << stored.inv(k)
           << "); ";
      error += text.str();
    };
    compare("m", m, exact.m, exact.error_m);
    compare("v", v, exact.v, exact.error_v);
    compare("master", w, exact.w, exact.error_w);
    if (exact.v > 1e-44 && v.codes[k] == 0) {
      error += "v[" + std::to_string(k) + "] > 0 was stored as 0; ";
    }
    return error;
  }

  static void raise(Doubles& tops, Doubles& errors, std::size_t k, double value, double error) {
    tops[k / 128] = std::max(tops[k / 128], value);
    errors[k / 128] = std::max(errors[k / 128], error);
  }

  /// 448 inv of every block is the exact amax, but for FP32's errors.
  static std::string inv_error(const Stored& stored, const Doubles& tops, const Doubles& errors,
                               const char* what) {
    for (std::size_t block = 0; block < tops.size(); ++block) {
      const bool root = is_root(stored.format);
      const double top = root ? std::sqrt(tops[block]) : tops[block];
      // d(sqrt v) = dv / (2 sqrt v); tiny v may have lost all its bits.
      const double error = !root                 ? errors[block]
                           : tops[block] > 1e-37 ? errors[block] / top
                                                 : std::sqrt(errors[block]);
      const double smallest = 448 * std::ldexp(1.0, -126);
      const double stored_top = 448 * static_cast<double>(stored.blocks[block]);
      if (std::abs(stored_top - std::max(top, smallest)) <= error + 3e-7 * stored_top) continue;
      std::ostringstream text;
      text.precision(10);
      text << what << ": block " << block << " stands for " << stored_top << " instead of " << top;
      return text.str();
    }
    return {};
  }

  const AdamwModel& model_;
  int i_;
  StateFormats formats_;
  Shape shape_;
  Doubles g_;
  Stored old_w_, old_m_, old_v_;
};

}  // namespace octet::test
