// SPDX-License-Identifier: Apache-2.0
#include "engine/weight_units.hpp"

#include <algorithm>
#include <exception>

#include "backend.hpp"
#include "comm/owners.hpp"
#include "engine/make_transposed.hpp"
#include "engine/tiles.hpp"
#include "octet/ops/state_format.hpp"

namespace octet {
namespace {

std::size_t index(int i) { return static_cast<std::size_t>(i); }

/// Takes memory of the end of what is laid out so far, aligned like memory of its own.
std::size_t take(std::size_t& end, std::size_t bytes) {
  const std::size_t begin = end;
  end += WorkspaceScope::padded(bytes);
  return begin;
}

}  // namespace

WeightUnits::WeightUnits(const Context& ctx, Communicator& comm, std::vector<Weight> weights,
                         const std::vector<Part>& parts, std::size_t gathers, Plan& plan)
    : ctx_(ctx),
      comm_(comm),
      streams_(ctx, comm.context()),
      weights_(std::move(weights)),
      places_(weights_.size()) {
  before_.reserve(gathers);
  now_.reserve(gathers);
  lay_out(parts, plan);
  allocate_slots(plan);
  std::vector<void*> destinations;
  for (const Slot& slot : slots_) destinations.push_back(slot.memory.data());
  for (Unit& unit : units_) {
    unit.gather =
        std::make_unique<ShardGather>(comm_, unit.tensors, unit.owners, destinations, unit.bytes);
  }
}

WeightUnits::~WeightUnits() {
  try {
    streams_.join();
  } catch (const std::exception&) {  // the device has failed; freeing memory will not wait for it
  }
}

// Codes come first, in the order in which they were cut, so that what a rank owns of several lies
// together in its memory and in a slot.
void WeightUnits::lay_out(const std::vector<Part>& parts, Plan& plan) {
  for (const Part& part : parts) {
    if (units_.size() <= index(part.unit)) units_.resize(index(part.unit) + 1);
    units_[index(part.unit)].owners.resize(index(comm_.size()));
    add_part(part, plan);
  }
  for (const Part& part : parts) add_scales(units_[index(part.unit)], part, plan);
  for (Unit& unit : units_) add_transposed(unit);
}

void WeightUnits::add_part(const Part& part, Plan& plan) {
  Unit& unit = units_[index(part.unit)];
  std::size_t bytes = 0;
  const std::vector<std::int64_t> owned =
      numels_by_tensor(part.owners[index(comm_.rank())], weights_.size());
  std::vector<std::int32_t> tensor_of(weights_.size(), -1);
  for (int i : part.params) {
    const Weight& w = weights_[index(i)];
    const std::size_t size = size_of(dtype_of(w.format));
    Place& place = places_[index(i)];
    place.unit = part.unit;
    place.owned = owned[index(i)];
    place.shard = take(bytes, static_cast<std::size_t>(place.owned) * size);
    place.codes = take(unit.bytes, static_cast<std::size_t>(w.shape.numel()) * size);
    tensor_of[index(i)] = static_cast<std::int32_t>(unit.tensors.size());
    unit.params.push_back(i);
    unit.tensors.push_back({dtype_of(w.format), w.shape, nullptr, true, place.codes});
  }
  const std::size_t before = ctx_.memory_use().current;
  shards_.push_back(std::make_unique<Buffer>(ctx_, bytes));
  plan.count("weight", weights_[index(part.params[0])].managed, true, bytes,
             ctx_.memory_use().current - before);
  for (int i : part.params) {
    places_[index(i)].memory = shards_.back().get();
    unit.tensors[index(tensor_of[index(i)])].data = shard(i).data;
  }
  for (std::size_t r = 0; r < part.owners.size(); ++r) {
    for (Piece piece : part.owners[r]) {
      piece.tensor = tensor_of[index(piece.tensor)];
      unit.owners[r].push_back(piece);
    }
  }
}

// Every rank has memory for all scales, but of what others own nothing is in it.
void WeightUnits::add_scales(Unit& unit, const Part& part, Plan& plan) {
  std::vector<std::int32_t> tensor_of(weights_.size(), -1);
  for (int i : part.params) {
    const Weight& w = weights_[index(i)];
    if (!has_block_scales(w.format)) continue;
    Place& place = places_[index(i)];
    const std::int64_t scales = tile_count(w.shape[0], w.shape[1]);
    const std::size_t bytes = static_cast<std::size_t>(scales) * sizeof(float);
    const std::size_t before = ctx_.memory_use().current;
    place.blocks = Buffer(ctx_, bytes);
    plan.count("weight scales", w.managed, true, bytes, ctx_.memory_use().current - before);
    place.scales = take(unit.bytes, bytes);
    tensor_of[index(i)] = static_cast<std::int32_t>(unit.tensors.size());
    unit.tensors.push_back({DType::f32, {scales}, place.blocks.data(), false, place.scales});
  }
  const auto columns_of = [this](std::int32_t i) { return weights_[index(i)].shape[1]; };
  for (std::size_t r = 0; r < part.owners.size(); ++r) {
    append_tiles(unit.owners[r], part.owners[r], tensor_of, columns_of);
  }
}

// What does not travel: the transposed copies that every rank makes for itself.
void WeightUnits::add_transposed(Unit& unit) {
  for (int i : unit.params) {
    const Weight& w = weights_[index(i)];
    if (!is_transposed(w.format)) continue;
    Place& place = places_[index(i)];
    place.transposed = take(unit.bytes, static_cast<std::size_t>(w.shape.numel()));
    if (!has_block_scales(w.format)) continue;
    place.transposed_scales = take(
        unit.bytes, static_cast<std::size_t>(tile_count(w.shape[1], w.shape[0])) * sizeof(float));
  }
}

void WeightUnits::allocate_slots(Plan& plan) {
  for (const Unit& unit : units_) slot_bytes_ = std::max(slot_bytes_, unit.bytes);
  const std::size_t before = ctx_.memory_use().current;
  slots_.resize(index(std::min(kSlots, count())));
  for (Slot& slot : slots_) {
    slot.memory = Buffer(ctx_, slot_bytes_);
    slot.arrived = std::make_unique<Event>(comm_.context());
  }
  plan.count("weight slots", true, false, slots_.size() * slot_bytes_,
             ctx_.memory_use().current - before);
}

TensorView WeightUnits::shard(int param) const {
  const Place& place = places_[index(param)];
  return {place.owned > 0 ? place.memory->as<std::byte>() + place.shard : nullptr,
          dtype_of(weights_[index(param)].format), Shape{place.owned}, ctx_.device()};
}

float* WeightUnits::blocks(int param) const { return places_[index(param)].blocks.as<float>(); }

void WeightUnits::check_unit(int unit, const char* call) const {
  require(unit >= 0 && unit < count(), "Engine::", call, ": there is no unit ", unit,
          "; they are 0 to ", count() - 1);
}

// See the class: the host does not see what replays leave in slots, nor that they change weights.
void WeightUnits::forget_uncertain() {
  capture_ = detail::backend_of(ctx_).capture(ctx_);
  was_captured_ = was_captured_ || capture_ != 0;
  if (!was_captured_) return;
  for (Slot& slot : slots_) {
    const bool is_certain = capture_ != 0 && slot.capture == capture_;
    if (!slot.is_held && !is_certain) slot.unit = -1;
  }
}

int WeightUnits::slot_of(int unit) const {
  for (int s = 0; s < slot_count(); ++s) {
    if (slots_[index(s)].unit == unit) return s;
  }
  return -1;
}

// Of two the one that was taken longer ago: what went through last is wanted first on the way back.
int WeightUnits::free_slot() const {
  int found = -1;
  for (int s = 0; s < slot_count(); ++s) {
    const Slot& slot = slots_[index(s)];
    if (slot.is_held) continue;
    if (found < 0 || slot.used < slots_[index(found)].used) found = s;
  }
  return found;
}

std::string WeightUnits::held_units() const {
  std::string text;
  for (const Slot& slot : slots_) {
    if (slot.is_held) text += (text.empty() ? "" : ", ") + std::to_string(slot.unit);
  }
  return text;
}

bool WeightUnits::is_whole(int unit) const {
  const int s = slot_of(unit);
  return s >= 0 && slots_[index(s)].is_held;
}

void WeightUnits::require_none_whole(const char* call) const {
  const std::string held = held_units();
  require(held.empty(), call, ": of the units, ", held,
          " are whole; all must have been released first, because what they hold changes");
}

void WeightUnits::gather(int unit) {
  check_unit(unit, "gather");
  require(!is_whole(unit), "Engine::gather: unit ", unit,
          " is whole already; release() comes first");
  forget_uncertain();
  int s = slot_of(unit);
  if (s < 0) s = free_slot();
  require(s >= 0, "Engine::gather: unit ", unit, " has no place, because units ", held_units(),
          " are whole; at most two are at a time, so release() one first");
  if (slots_[index(s)].unit != unit) fetch(unit, s);
  Slot& slot = slots_[index(s)];
  slot.is_held = true;
  slot.used = ++clock_;
  slot.arrived->make_wait(ctx_);
  ahead_ = wanted_after(unit);
  fetch_ahead();
}

void WeightUnits::release(int unit) {
  check_unit(unit, "release");
  require(is_whole(unit), "Engine::release: unit ", unit, " is not whole; gather() comes first");
  slots_[index(slot_of(unit))].is_held = false;
  forget_uncertain();
  fetch_ahead();
}

void WeightUnits::invalidate() {
  for (Slot& slot : slots_) slot.unit = -1;
  if (!now_.empty()) before_.swap(now_);
  now_.clear();
  position_ = 0;
  follows_ = true;
  last_ = -1;
  direction_ = 1;
  ahead_ = -1;
}

// The side waits for all that the engine's stream has been given: the update that wrote the shards,
// and whoever read what was in the slot.
void WeightUnits::fetch(int unit, int s) {
  Slot& slot = slots_[index(s)];
  streams_.fork();
  slot.unit = -1;  // until the gather is on its way
  units_[index(unit)].gather->run(s);
  ++units_[index(unit)].gathers;
  transpose(unit, s);
  slot.arrived->record();
  slot.unit = unit;
  slot.capture = capture_;
}

void WeightUnits::transpose(int unit, int s) {
  auto* const data = slots_[index(s)].memory.as<std::byte>();
  for (int i : units_[index(unit)].params) {
    const Weight& w = weights_[index(i)];
    const Place& place = places_[index(i)];
    if (place.transposed == kNowhere || w.shape.numel() == 0) continue;
    const auto view = [&](std::size_t codes, const Shape& shape, std::size_t scales) {
      return BlockScaledView{.data = {data + codes, DType::e4m3, shape, ctx_.device()},
                             .granularity = granularity_of(w.format),
                             .scales = scales == kNowhere ? nullptr : data + scales};
    };
    make_transposed(comm_.context(), view(place.codes, w.shape, place.scales),
                    view(place.transposed, {w.shape[1], w.shape[0]}, place.transposed_scales));
  }
}

// Where the step goes as the one before did, what came next there; else the way goes on, and turns
// round at the ends. -1: nobody can tell. Who leaves the way for where it began, behind an
// evaluation say, begins the step anew.
int WeightUnits::wanted_after(int unit) {
  const bool goes_on = position_ < before_.size() && before_[position_] == unit;
  if (follows_ && !goes_on && !before_.empty() && before_[0] == unit) {
    now_.clear();
    position_ = 0;
  } else {
    follows_ = follows_ && goes_on;
  }
  const std::size_t at = position_++;
  if (now_.size() == at && at < now_.capacity()) now_.push_back(unit);
  const int last = std::exchange(last_, unit);
  if (last >= 0 && (unit == last + 1 || unit == last - 1)) direction_ = unit - last;
  if (at < before_.size() && before_[at] == unit) {
    for (std::size_t next = at + 1; next < before_.size(); ++next) {
      if (before_[next] != unit) return before_[next];
    }
    return -1;
  }
  if (last >= 0 && unit != last && unit != last + direction_) return -1;
  const int ahead = unit + direction_;
  if (ahead >= 0 && ahead < count()) return ahead;
  const int back = unit - direction_;
  return back >= 0 && back < count() ? back : -1;
}

void WeightUnits::fetch_ahead() {
  if (was_captured_ && capture_ == 0) return;  // it would not be counted on
  if (ahead_ < 0 || slot_of(ahead_) >= 0) return;
  const int s = free_slot();
  if (s < 0) return;
  fetch(ahead_, s);
  slots_[index(s)].used = ++clock_;
}

void* WeightUnits::in_slot(int param, std::size_t offset) const {
  const int s = slot_of(places_[index(param)].unit);
  return slots_[index(s)].memory.as<std::byte>() + offset;
}

TensorView WeightUnits::weight(int param) const {
  const Weight& w = weights_[index(param)];
  return {in_slot(param, places_[index(param)].codes), dtype_of(w.format), w.shape, ctx_.device()};
}

TensorView WeightUnits::transposed(int param) const {
  const Shape& shape = weights_[index(param)].shape;
  return {in_slot(param, places_[index(param)].transposed),
          DType::e4m3,
          {shape[1], shape[0]},
          ctx_.device()};
}

void* WeightUnits::weight_scales(int param) const {
  return in_slot(param, places_[index(param)].scales);
}

void* WeightUnits::transposed_scales(int param) const {
  return in_slot(param, places_[index(param)].transposed_scales);
}

std::uint64_t WeightUnits::payload_bytes(int unit) const {
  return units_[index(unit)].gather->payload_bytes();
}

std::int64_t WeightUnits::gathers(int unit) const {
  check_unit(unit, "unit_gathers");
  return units_[index(unit)].gathers;
}

}  // namespace octet
