// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "octet/optim/adamw.hpp"

namespace octet {

// The tables of contributions and copies, of all parameters one after the other.
void AdamW::make_exchanges() {
  const bool any = std::any_of(params_.begin(), params_.end(), [](const AdamWParam& p) {
    return p.contributions.has_value() || !p.weight_copies.empty();
  });
  if (!any) return;
  std::vector<RankGradient> gradients;
  std::vector<WeightCopy> copies;
  for (const AdamWParam& param : params_) {
    if (param.contributions.has_value()) {
      const std::vector<RankGradient>& ranks = param.contributions->ranks;
      gradients.insert(gradients.end(), ranks.begin(), ranks.end());
    }
    copies.insert(copies.end(), param.weight_copies.begin(), param.weight_copies.end());
  }
  rank_gradients_ = upload_sync<RankGradient>(ctx_, gradients);
  weight_copies_ = upload_sync<WeightCopy>(ctx_, copies);
  const RankGradient* gradient = rank_gradients_.as<RankGradient>();
  const WeightCopy* copy = weight_copies_.as<WeightCopy>();
  const auto is_aligned = [](const void* data) {
    return reinterpret_cast<std::uintptr_t>(data) % 16 == 0;
  };
  for (const AdamWParam& param : params_) {
    AdamwExchange x;
    if (param.contributions.has_value()) {
      const RankGradients& from = *param.contributions;
      x.gradients = gradient;
      x.scales = from.scales;
      x.scale_stride = from.scale_stride;
      x.ranks = static_cast<std::int32_t>(from.ranks.size());
      x.dtype = from.dtype;
      for (const RankGradient& g : from.ranks) x.is_aligned = x.is_aligned && is_aligned(g.data);
      gradient += x.ranks;
    }
    x.copies = copy;
    x.copy_count = static_cast<std::int32_t>(param.weight_copies.size());
    for (const WeightCopy& c : param.weight_copies)
      x.is_aligned = x.is_aligned && is_aligned(c.data);
    copy += x.copy_count;
    exchanges_host_.push_back(x);
  }
  exchanges_ = upload_sync<AdamwExchange>(ctx_, exchanges_host_);
}

}  // namespace octet
