// SPDX-License-Identifier: Apache-2.0
// Weights that are cut over the ranks: units of parameters, gathered before use and released after.
//
// Collectives of gather() and those of gradients share a communicator, so all ranks must launch
// them in one order. add_gradient() may come in different orders on different ranks, or not at all;
// hence a unit's gradients are not launched when the last of them comes: release() does, which all
// ranks call in the same order, when the unit is the next in line and a parameter of it has its
// gradient. Where release() did not, the first gradient of the unit two further on does
// (open_gradient()), because it wants the memory. Both ask whether a unit has a gradient, which by
// the rule of release() is the same on all ranks between two calls.
#include <algorithm>
#include <sstream>

#include "engine/engine_impl.hpp"

namespace octet {

void Engine::gather(int unit) {
  Impl& e = *impl_;
  e.require_frozen("gather");
  if (e.units == nullptr) return;
  e.comm.check();
  e.units->gather(unit);
}

// What may be gathered ahead now is wanted sooner than the means.
void Engine::release(int unit) {
  Impl& e = *impl_;
  e.require_frozen("release");
  if (e.units == nullptr) return;
  e.comm.check();
  e.units->release(unit);
  e.reduce_unit(unit);
}

std::int64_t Engine::unit_gathers(int unit) const {
  impl_->require_frozen("unit_gathers");
  return impl_->units == nullptr ? 0 : impl_->units->gathers(unit);
}

void Engine::Impl::reduce_unit(int unit) {
  const int group = group_of_unit(unit);
  const auto of_group = [group](const Bucket& bucket) { return bucket.group == group; };
  const auto first = std::find_if(buckets.begin(), buckets.end(), of_group);
  if (reducer->launched() != first - buckets.begin()) return;
  const auto end = std::find_if_not(first, buckets.end(), of_group);
  const bool has_any = std::any_of(first, end, [this](const Bucket& bucket) {
    return std::any_of(bucket.params.begin(), bucket.params.end(), [this](int i) {
      return params[static_cast<std::size_t>(i)].gradients == config.micro_batches;
    });
  });
  if (!has_any) return;
  for (auto bucket = first; bucket != end; ++bucket) store_sums_of(*bucket);
  reducer->launch_through(static_cast<int>(end - buckets.begin()) - 1);
}

void Engine::Impl::check_units() const {
  if (!shards_weights()) return;
  std::vector<bool> seen(params.size(), false);
  int largest = -1;
  for (const Param& p : params) {
    largest = std::max(largest, p.spec.unit);
    if (static_cast<std::size_t>(p.spec.unit) < seen.size()) {
      seen[static_cast<std::size_t>(p.spec.unit)] = true;
    }
  }
  for (int u = 0; u <= largest; ++u) {
    require(static_cast<std::size_t>(u) < seen.size() && seen[static_cast<std::size_t>(u)],
            "Engine::freeze: unit ", u, " has no parameter, but there is a unit ", largest,
            "; units count from 0 without gaps");
  }
}

// The last unit first, as its gradients come.
std::vector<std::vector<int>> Engine::Impl::runs_of_units() const {
  std::vector<std::vector<int>> runs;
  for (int i = static_cast<int>(params.size()) - 1; i >= 0; --i) {
    const auto unit = static_cast<std::size_t>(params[static_cast<std::size_t>(i)].spec.unit);
    if (runs.size() <= unit) runs.resize(unit + 1);
    runs[unit].push_back(i);
  }
  std::reverse(runs.begin(), runs.end());
  return runs;
}

void Engine::Impl::make_units() {
  if (!shards_weights()) return;
  std::vector<WeightUnits::Weight> weights;
  for (const Param& p : params) {
    weights.push_back({p.formats.state.weight, p.spec.shape, p.managed});
  }
  std::vector<WeightUnits::Part> parts;
  for (const Bucket& bucket : buckets) {
    parts.push_back({params[static_cast<std::size_t>(bucket.params[0])].spec.unit, bucket.params,
                     bucket.owners});
  }
  // A forward and a backward pass of every micro-batch, and as much again.
  const std::size_t gathers =
      4 * static_cast<std::size_t>(group_count()) * static_cast<std::size_t>(config.micro_batches);
  units = std::make_unique<WeightUnits>(ctx, comm, std::move(weights), parts, gathers, plan);
  for (int u = 0; u < units->count(); ++u) {
    plan.unit_gather_bytes.push_back(units->payload_bytes(u));
  }
}

void Engine::Impl::require_whole(const Param& p, const char* call) const {
  require(units->is_whole(p.spec.unit), "Engine::", call, ": parameter \"", p.spec.name,
          "\" is in unit ", p.spec.unit, ", which is not whole; gather(", p.spec.unit,
          ") comes first, and release() after its last use");
}

TensorView Engine::Impl::whole_weight(ParamId id, const char* call) const {
  const Param& p = frozen_param(id, call);
  if (units == nullptr) return p.weight.view();
  require_whole(p, call);
  return units->weight(id.index);
}

TensorView Engine::Impl::whole_transposed(ParamId id, const char* call) const {
  const Param& p = frozen_param(id, call);
  if (units == nullptr) return p.weight_transposed.view();
  require_whole(p, call);
  return units->transposed(id.index);
}

std::string Engine::Impl::describe_weights() const {
  std::ostringstream text;
  text << "cut: " << units->count() << (units->count() == 1 ? " unit is" : " units are")
       << " gathered by gather() as stored, by send/receive, into "
       << (units->slot_count() == 1 ? "one slot" : "two slots") << " of " << units->slot_bytes()
       << " bytes, the next one ahead "
       << (streams.is_apart() ? "on the communicator's own stream"
                              : "on the one stream, because the communicator shares the engine's");
  const WeightFormat format = plan.formats.state.weight;
  if (has_block_scales(format)) text << ", scales included";
  if (is_transposed(format)) text << ", transposed copies made by every rank";
  return text.str();
}

}  // namespace octet
