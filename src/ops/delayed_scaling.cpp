// SPDX-License-Identifier: Apache-2.0
#include "octet/ops/delayed_scaling.hpp"

#include <unordered_map>

#include "backend.hpp"

namespace octet {
namespace {

void check(const DelayedScalingConfig& config) {
  require(config.amax_history_len >= 1, "delayed scaling: amax_history_len is ",
          config.amax_history_len, "; it must be 1 or more");
  require(config.margin >= -64 && config.margin <= 64, "delayed scaling: margin is ", config.margin,
          "; it must be -64 to 64");
  require(config.amax_compute_algo == AmaxComputeAlgo::max ||
              config.amax_compute_algo == AmaxComputeAlgo::most_recent,
          "delayed scaling: amax_compute_algo is ", static_cast<int>(config.amax_compute_algo),
          "; it must be max or most_recent");
}

void check(const std::vector<DelayedScaling::Entry>& entries) {
  std::unordered_map<const TensorScale*, std::size_t> seen;
  for (std::size_t i = 0; i < entries.size(); ++i) {
    require(entries[i].scale != nullptr, "delayed scaling: entry ", i, " has no scale");
    require(is_fp8(entries[i].dtype), "delayed scaling: entry ", i, " is ",
            name_of(entries[i].dtype), "; e4m3 and e5m2 are allowed");
    const auto [other, is_new] = seen.emplace(entries[i].scale, i);
    require(is_new, "delayed scaling: entries ", other->second, " and ", i,
            " have one scale; each must have its own");
  }
}

}  // namespace

void delayed_update(const Context& ctx, const DelayedArgs& args) {
  check(args.config);
  require(args.tensor_count >= 0, "delayed_update: there are ", args.tensor_count,
          " tensors; the count must not be negative");
  require(args.tensor_count == 0 || args.tensors != nullptr,
          "delayed_update: the table of tensors is missing");
  if (args.tensor_count != 0) detail::backend_of(ctx).delayed_update(ctx, args);
}

DelayedScaling::DelayedScaling(const Context& ctx, const DelayedScalingConfig& config,
                               const std::vector<Entry>& entries)
    : ctx_(ctx), config_(config), count_(static_cast<std::int64_t>(entries.size())) {
  check(config);
  check(entries);
  const auto length = static_cast<std::size_t>(config.amax_history_len);
  history_ = upload_sync<float>(ctx_, std::vector<float>(entries.size() * length));
  next_ = upload_sync<std::uint32_t>(ctx_, std::vector<std::uint32_t>(entries.size()));
  std::vector<DelayedTensor> tensors;
  for (std::size_t i = 0; i < entries.size(); ++i) {
    tensors.push_back({entries[i].scale, history() + i * length, next() + i, entries[i].dtype});
  }
  tensors_ = upload_sync<DelayedTensor>(ctx_, tensors);
}

void DelayedScaling::update() {
  delayed_update(ctx_, {tensors_.as<const DelayedTensor>(), count_, config_});
}

}  // namespace octet
