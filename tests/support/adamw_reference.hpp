// SPDX-License-Identifier: Apache-2.0
// AdamW in double precision as PyTorch defines it, plus the bound of numerics section 3.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "octet/ops/adamw.hpp"

namespace octet::test {

using Doubles = std::vector<double>;

inline double norm_of(const Doubles& values) {
  double sum = 0;
  for (double value : values) sum += value * value;
  return std::sqrt(sum);
}

inline double amax_of(const Doubles& values) {
  double amax = 0;
  for (double value : values) amax = std::max(amax, std::abs(value));
  return amax;
}

/// The hyper-parameters as the library sees them (FP32 values), in double.
struct AdamwReference {
  double beta1, beta2, eps, lr, weight_decay;
  double clip = 1.0;
  bool maximize = false, decoupled = true;

  AdamwReference(const AdamWConfig& config, float rate, float decay)
      : beta1(static_cast<double>(config.beta1)),
        beta2(static_cast<double>(config.beta2)),
        eps(static_cast<double>(config.eps)),
        lr(static_cast<double>(rate)),
        weight_decay(static_cast<double>(decay)),
        maximize(config.maximize),
        decoupled(config.decoupled_weight_decay) {}

  /// The modes of a configuration with the hyper-parameters of a group.
  AdamwReference(const AdamWConfig& config, const AdamWGroup& group, float rate)
      : beta1(static_cast<double>(config.of(group).beta1)),
        beta2(static_cast<double>(config.of(group).beta2)),
        eps(static_cast<double>(config.of(group).eps)),
        lr(static_cast<double>(rate) * static_cast<double>(group.lr_factor)),
        weight_decay(static_cast<double>(config.of(group).weight_decay)),
        maximize(config.maximize),
        decoupled(config.decoupled_weight_decay) {}

  double k1(std::int64_t t) const { return 1 / (1 - std::pow(beta1, static_cast<double>(t))); }
  double k2(std::int64_t t) const {
    return 1 / std::sqrt(1 - std::pow(beta2, static_cast<double>(t)));
  }

  /// Largest ratio of exact Adam at step t: the maximum of sum(a_i g_i) / sqrt(sum(b_i g_i^2)) over
  /// all g is sqrt(sum(a_i^2 / b_i)), summed here term by term.
  double bound(std::int64_t t) const {
    const double scale_a = (1 - beta1) * k1(t);
    const double scale_b = (1 - beta2) * k2(t) * k2(t);
    double sum = 0;
    for (std::int64_t age = 0; age < t; ++age) {
      const double a = scale_a * std::pow(beta1, static_cast<double>(age));
      const double b = scale_b * std::pow(beta2, static_cast<double>(age));
      if (a == 0 || b == 0) break;
      sum += a * a / b;
    }
    return std::sqrt(sum);
  }

  /// What the moments see: clipped, its sign flipped to maximize, then the L2 term.
  double effective(double g, double w) const {
    return (maximize ? -clip : clip) * g + (decoupled ? 0.0 : weight_decay * w);
  }
  double next_m(double m, double g, double w = 0) const {
    return beta1 * m + (1 - beta1) * effective(g, w);
  }
  double next_v(double v, double g, double w = 0) const {
    return beta2 * v + (1 - beta2) * effective(g, w) * effective(g, w);
  }
  double ratio(double m, double v, std::int64_t t, double limit) const {
    return std::clamp(m * k1(t) / (std::sqrt(v) * k2(t) + eps), -limit, limit);
  }
  double next_weight(double w, double r) const {
    return (decoupled ? 1 - lr * weight_decay : 1.0) * w - lr * r;
  }

  /// One step without any rounding.
  void step(std::int64_t t, const Doubles& g, Doubles& w, Doubles& m, Doubles& v) const {
    const double limit = bound(t);
    for (std::size_t i = 0; i < g.size(); ++i) {
      m[i] = next_m(m[i], g[i], w[i]);
      v[i] = next_v(v[i], g[i], w[i]);
      w[i] = next_weight(w[i], ratio(m[i], v[i], t, limit));
    }
  }
};

}  // namespace octet::test
