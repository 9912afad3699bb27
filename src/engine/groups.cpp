// SPDX-License-Identifier: Apache-2.0
// Which gradients are reduced together and, where no rank keeps them, which share memory.
//
// With sharded gradients a run of parameters is a group: its gradients lie in one of two slots,
// those of group g in slot g % 2, until they are reduced. A group that gets a gradient while the
// one two before it still waits for some has that one reduced without them.
#include <algorithm>
#include <sstream>

#include "engine/engine_impl.hpp"

namespace octet {

// In reverse order of registration, which is about the order in which a backward pass produces the
// gradients; of one kind, or of both.
std::vector<std::vector<int>> Engine::Impl::runs_of(std::optional<bool> managed) const {
  std::vector<std::vector<int>> runs;
  std::int64_t elements = config.bucket_elements;  // full: the first parameter opens a run
  for (int i = static_cast<int>(params.size()) - 1; i >= 0; --i) {
    const Param& p = params[static_cast<std::size_t>(i)];
    if (managed.has_value() && p.managed != *managed) continue;
    if (elements >= config.bucket_elements) {
      runs.emplace_back();
      elements = 0;
    }
    runs.back().push_back(i);
    elements += p.spec.shape.numel();
  }
  return runs;
}

// One dtype per bucket: groups have one for each kind.
void Engine::Impl::make_buckets() {
  const auto add = [&](std::vector<int> list, int group, int after) {
    if (list.empty()) return;
    for (int i : list) params[static_cast<std::size_t>(i)].bucket = buckets.size();
    buckets.push_back({.params = std::move(list), .owners = {}, .group = group, .after = after});
  };
  if (!shards_gradients()) {
    for (const bool managed : {true, false}) {
      for (std::vector<int>& run : runs_of(managed)) add(std::move(run), -1, -1);
    }
  } else {
    std::vector<int> last;  // bucket of every group
    for (std::vector<int>& run : shards_weights() ? runs_of_units() : runs_of({})) {
      const auto others = std::stable_partition(run.begin(), run.end(), [&](int i) {
        return params[static_cast<std::size_t>(i)].managed;
      });
      const int group = static_cast<int>(last.size());
      const int after = group < kSlots ? -1 : last[static_cast<std::size_t>(group - kSlots)];
      add({run.begin(), others}, group, after);
      add({others, run.end()}, group, after);
      last.push_back(static_cast<int>(buckets.size()) - 1);
    }
  }
  cut_buckets();
}

void Engine::Impl::cut_buckets() {
  std::vector<Shape> shapes;
  for (const Param& p : params) shapes.push_back(p.spec.shape);
  ShardPlan shards(comm.size());
  for (Bucket& bucket : buckets) {
    bucket.owners = shards.cut(shapes, bucket.params);
    for (const Piece& piece : bucket.owners[static_cast<std::size_t>(comm.rank())]) {
      params[static_cast<std::size_t>(piece.tensor)].pieces.push_back(piece);
    }
  }
}

int Engine::Impl::group_count() const { return buckets.empty() ? 0 : buckets.back().group + 1; }

// Gradients of a group one after the other.
Engine::Impl::SlotLayout Engine::Impl::slot_layout() const {
  SlotLayout layout{.offsets = std::vector<std::size_t>(params.size()),
                    .count = std::min(kSlots, group_count())};
  std::vector<std::size_t> used(static_cast<std::size_t>(group_count()));
  for (const Bucket& bucket : buckets) {
    std::size_t& at = used[static_cast<std::size_t>(bucket.group)];
    for (int i : bucket.params) {
      const Param& p = params[static_cast<std::size_t>(i)];
      layout.offsets[static_cast<std::size_t>(i)] = at;
      at += WorkspaceScope::padded(static_cast<std::size_t>(p.spec.shape.numel()) *
                                   size_of(p.formats.gradient));
    }
    layout.bytes = std::max(layout.bytes, at);
  }
  return layout;
}

void Engine::Impl::allocate_slots() {
  const SlotLayout layout = slot_layout();
  const std::size_t before = ctx.memory_use().current, taken = window_taken;
  std::byte* slots[kSlots] = {};
  for (int s = 0; s < layout.count; ++s) {
    if (window == nullptr) gradient_slots.emplace_back(ctx, layout.bytes);
    slots[s] = window != nullptr ? static_cast<std::byte*>(take_from_window(layout.bytes))
                                 : gradient_slots.back().as<std::byte>();
  }
  plan.count("gradient slots", true, false, static_cast<std::size_t>(layout.count) * layout.bytes,
             ctx.memory_use().current - before + window_taken - taken);
  for (const Bucket& bucket : buckets) {
    for (int i : bucket.params) {
      Param& p = params[static_cast<std::size_t>(i)];
      p.gradient =
          Tensor::over({slots[bucket.group % kSlots] + layout.offsets[static_cast<std::size_t>(i)],
                        p.formats.gradient, p.spec.shape, ctx.device()});
    }
  }
}

// What the gradient of a parameter takes to be written: the group that had the slot before is
// reduced, with what there is of its sums over micro-batches.
void Engine::Impl::open_gradient(int i) {
  if (!shards_gradients()) return;
  const std::size_t b = params[static_cast<std::size_t>(i)].bucket;
  for (int before = reducer->launched(); before <= buckets[b].after; ++before) {
    store_sums_of(buckets[static_cast<std::size_t>(before)]);
  }
  reducer->open(i);
}

// Of parameters that had some of their micro-batches.
void Engine::Impl::store_sums_of(const Bucket& bucket) {
  for (int i : bucket.params) {
    Param& p = params[static_cast<std::size_t>(i)];
    if (p.gradients == 0 || p.gradients == config.micro_batches || !reducer->is_open(i)) continue;
    if (shards_gradients()) reducer->open(i);
    store_sum(p);
    reducer->ready(i);
  }
}

void Engine::Impl::require_open(int i) const {
  if (!shards_gradients()) return;
  const Param& p = params[static_cast<std::size_t>(i)];
  require(reducer->is_open(i), "parameter \"", p.spec.name, "\": its gradient comes when those of ",
          "its group (", buckets[p.bucket].group, " of ", group_count(),
          ") have been reduced, because ", shards_weights() ? "its unit was released or " : "",
          "a gradient of the group two behind it has come; with sharding = ",
          name_of(plan.sharding), " gradients come ",
          shards_weights() ? "unit by unit, the last unit first"
                           : "group by group, in about the reverse order of registration");
}

std::string Engine::Impl::describe_slots() const {
  const SlotLayout layout = slot_layout();
  std::ostringstream text;
  text << "no rank keeps gradients: those of " << group_count()
       << (group_count() == 1 ? " group lie" : " groups lie") << " in " << layout.count
       << (layout.count == 1 ? " slot of " : " slots of ") << layout.bytes
       << " bytes until they are reduced";
  return text.str();
}

}  // namespace octet
