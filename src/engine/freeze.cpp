// SPDX-License-Identifier: Apache-2.0
// Engine::freeze(), step by step: agree, cut, allocate, fill, describe.
#include <algorithm>
#include <cmath>
#include <sstream>

#include "engine/engine_impl.hpp"
#include "engine/tiles.hpp"
#include "octet/ops/quantize.hpp"

namespace octet {
// A rank that cannot go on must not leave the others waiting, here or in their first step.
void Engine::Impl::build() try {
  set_up_together_sync(comm, [this] {
    make_buckets();
    make_window();
    allocate_parameters();
    make_units();
    allocate_reducer();
    allocate_optimizer();
    allocate_communication();
    initialise();
    // Or the casts of a backward pass would wait for the reductions that run beside it, which may
    // be waiting for this rank.
    if (shares_device()) ctx.set_shares_device(true);
    describe();
  });
} catch (const SetUpError& error) {
  fail("Engine::freeze: ", error.what());
}

void Engine::Impl::allocate_parameters() {
  const std::size_t in_use = memory_in_use();
  flag = upload_sync<TensorScale>(ctx, std::vector<TensorScale>(1));
  gathered_flags =
      Buffer(comm.context(), static_cast<std::size_t>(comm.size()) * sizeof(TensorScale));
  plan.count("communication", true, false, flag.bytes() + gathered_flags.bytes(),
             memory_in_use() - in_use);
  const std::vector<TensorScale> ones(params.size());
  auto* scales = static_cast<TensorScale*>(
      window != nullptr ? take_from_window(ones.size() * sizeof(TensorScale)) : nullptr);
  if (scales == nullptr) {
    gradient_scales = Buffer(ctx, ones.size() * sizeof(TensorScale));
    scales = gradient_scales.as<TensorScale>();
  }
  copy_bytes(ctx, scales, ones.data(), ones.size() * sizeof(TensorScale));
  ctx.synchronize();
  for (const Bucket& bucket : buckets) {
    for (int i : bucket.params) params[static_cast<std::size_t>(i)].gradient_scale = scales++;
  }
  if (shards_gradients()) allocate_slots();
  for (Param& p : params) {
    if (!shards_weights()) allocate_weight(p);
    if (!shards_gradients()) {
      allocate_tensor("gradient", p, p.gradient, p.formats.gradient, p.spec.shape,
                      window != nullptr);
    }
  }
  if (config.micro_batches > 1) allocate_accumulators();
}

// What peers write lies in the window; transposed copies are every rank's own.
void Engine::Impl::allocate_weight(Param& p) {
  const WeightFormat format = p.formats.state.weight;
  const Shape& shape = p.spec.shape;
  const bool for_peers = window != nullptr && sharded();
  allocate_tensor("weight", p, p.weight, dtype_of(format), shape, for_peers);
  if (for_peers && has_block_scales(format)) {
    p.weight_blocks =
        static_cast<float*>(take_from_window(weight_scale_bytes(without_transpose(format), shape)));
  }
  if (!is_transposed(format)) return;
  allocate_tensor("transposed weight", p, p.weight_transposed, DType::e4m3, {shape[1], shape[0]},
                  false);
  if (!transposes_weights() || !has_block_scales(format)) return;
  const auto bytes =
      static_cast<std::size_t>(scale_bytes(granularity_of(format), shape[1], shape[0]));
  const std::size_t before = ctx.memory_use().current;
  p.transposed_blocks = Buffer(ctx, bytes);
  plan.count("weight scales", p.managed, true, bytes, ctx.memory_use().current - before);
}

void Engine::Impl::allocate_tensor(const char* what, const Param& p, Tensor& tensor, DType dtype,
                                   const Shape& shape, bool for_peers) {
  const std::size_t before = ctx.memory_use().current, taken = window_taken;
  const std::size_t bytes = static_cast<std::size_t>(shape.numel()) * size_of(dtype);
  tensor = for_peers ? Tensor::over({take_from_window(bytes), dtype, shape, ctx.device()})
                     : Tensor(ctx, dtype, shape);
  plan.count(what, p.managed, true, bytes,
             ctx.memory_use().current - before + window_taken - taken);
}

void Engine::Impl::allocate_accumulators() {
  for (Param& p : params) {
    const DType dtype = accumulator_of(p.formats.gradient);
    if (dtype == p.formats.gradient && !shards_gradients()) continue;  // summed where it is
    const std::size_t before = ctx.memory_use().current;
    p.accumulator = Tensor(ctx, dtype, p.spec.shape);
    plan.count("gradient accumulator", p.managed, false, p.accumulator.view().bytes(),
               ctx.memory_use().current - before);
  }
}

void Engine::Impl::allocate_reducer() {
  for (Param& p : params) {
    if (!keeps_shards() || reduces_in_place(p)) continue;
    const std::size_t before = ctx.memory_use().current;
    p.shard = Tensor(ctx, reduced(p.formats.gradient), Shape{p.owned()});
    // The gradient that there is, or beside one that there is anyway.
    plan.count("reduced gradient shard", p.managed, shards_gradients(), p.shard.view().bytes(),
               ctx.memory_use().current - before);
  }
  std::vector<GradientBucket> list;
  std::vector<std::int32_t> position_of(params.size());
  for (const Bucket& bucket : buckets) {
    GradientBucket b;
    b.params = bucket.params;
    for (int i : bucket.params) {
      const Param& p = params[static_cast<std::size_t>(i)];
      position_of[static_cast<std::size_t>(i)] = static_cast<std::int32_t>(b.tensors.size());
      b.tensors.push_back(
          {p.gradient.view(), reduces_in_place(p) ? p.gradient.view() : p.shard.view()});
    }
    b.owners = bucket.owners;
    b.after = bucket.after;
    for (std::vector<Piece>& pieces : b.owners) {
      for (Piece& piece : pieces)
        piece.tensor = position_of[static_cast<std::size_t>(piece.tensor)];
    }
    b.scales = params[static_cast<std::size_t>(bucket.params[0])].gradient_scale;
    list.push_back(std::move(b));
  }
  const MeanReducer::Path path = keeps_shards() ? MeanReducer::Path::sharded
                                 : sharded()    ? MeanReducer::Path::contributions
                                                : MeanReducer::Path::two_shot;
  const std::size_t before = memory_in_use();
  // Of units release() says when.
  const Schedule when = shards_weights() ? Schedule::after_backward : schedule();
  reducer =
      std::make_unique<GradientReducer>(ctx, comm, path, list, nonfinite(), when, window.get());
  plan.wire_bytes_per_step += reducer->payload_bytes();
  plan.count("communication", true, false, reducer->buffer_bytes(), memory_in_use() - before);
}

void Engine::Impl::allocate_optimizer() {
  std::vector<AdamWParam> list;
  for (Param& p : params) {
    AdamWParam a;
    a.name = p.spec.name;
    a.shape = p.spec.shape;
    a.formats = p.formats.state;
    a.gradient = p.gradient.view();
    a.gradient_scale = p.gradient_scale;
    a.weight = p.weight.view();
    a.group = p.spec.group;
    if (!sharded()) a.weight_transposed = p.weight_transposed.view();
    if (sharded()) {
      a.formats.weight = without_transpose(a.formats.weight);
      a.gradient_is_shard = !reduces_in_place(p);
      if (a.gradient_is_shard) a.gradient = p.shard.view();
      a.pieces = p.pieces;
      a.weight_blocks = p.weight_blocks;
      a.weight_copies = weight_copies(p);
    }
    if (shards_weights()) {
      const int i = static_cast<int>(list.size());
      a.weight = units->shard(i);
      a.weight_is_shard = true;
      a.weight_blocks = units->blocks(i);
    }
    list.push_back(std::move(a));
  }
  if (fused()) {
    std::vector<RankGradients> contributions = reducer->contributions();
    for (std::size_t i = 0; i < list.size(); ++i) {
      list[i].contributions = std::move(contributions[i]);
    }
  }
  const bool far = config.offload_states;
  std::optional<Context> states;
  if (far) states = ctx.with_allocator(pinned_host_allocator(ctx.device()));
  const std::size_t before = ctx.memory_use().current;
  adamw = std::make_unique<AdamW>(ctx, config.adamw, std::move(list), states);
  std::size_t tables = ctx.memory_use().current - before;
  const auto count_state = [&](const std::string& what, const Param& p, std::uint64_t predicted,
                               std::size_t measured) {
    plan.count(far ? what + " (host)" : what, p.managed, true, predicted, measured, far);
    if (!far) tables -= measured;
  };
  for (std::size_t i = 0; i < params.size(); ++i) {
    const Param& p = params[i];
    const std::int64_t owned = sharded() ? p.owned() : p.spec.shape.numel();
    if (p.managed) plan.owned_fp8_parameters += owned;
    const StateFormats& f = p.formats.state;
    const AdamW::StateBytes bytes = adamw->state_bytes(static_cast<int>(i));
    const bool own_master = f.weight != WeightFormat::f32;
    count_state("master", p, own_master ? state_bytes(f.master, owned) : 0, bytes.master);
    count_state("m", p, state_bytes(f.m, owned), bytes.m);
    count_state("v", p, state_bytes(f.v, owned), bytes.v);
    if (has_block_scales(f.weight) && !shards_weights()) {
      const std::uint64_t scales = weight_scale_bytes(
          transposes_weights() ? without_transpose(f.weight) : f.weight, p.spec.shape);
      plan.count("weight scales", p.managed, true, scales,
                 p.weight_blocks != nullptr ? scales : bytes.weight_blocks);
    }
    tables -= bytes.weight_blocks;
  }
  // Five scales per parameter are model state; the rest is what the kernels need to find it.
  const std::size_t own_scales =
      static_cast<std::size_t>(adamw->scale_count()) * sizeof(TensorScale);
  for (const Param& p : params) {
    plan.count("scales", p.managed, true, 5 * sizeof(TensorScale),
               (params.size() * sizeof(TensorScale) + own_scales) / params.size());
  }
  plan.count("tables", true, false, adamw->table_bytes(), tables - own_scales);
}

void Engine::Impl::allocate_communication() {
  const std::size_t before = memory_in_use();
  std::uint64_t predicted = 0;
  if (sharded()) {
    make_gathers();
    gathered_scales =
        Buffer(comm.context(),
               static_cast<std::size_t>(comm.size() * adamw->scale_count()) * sizeof(TensorScale));
    predicted += gathered_scales.bytes();
    if (weight_gather != nullptr) plan.wire_bytes_per_step += weight_gather->payload_bytes();
  }
  plan.count("communication", true, false, predicted, memory_in_use() - before);
}

std::size_t Engine::Impl::memory_in_use() const {
  const Context& other = comm.context();
  const bool is_one = other.state() == ctx.state();
  return ctx.memory_use().current + (is_one ? 0 : other.memory_use().current);
}

// The sharded step gives every rank the new weights, and the sums of squares of all segments.
void Engine::Impl::make_gathers() {
  std::vector<Shape> shapes;
  for (const Param& p : params) shapes.push_back(p.spec.shape);
  Owners weight_owners(static_cast<std::size_t>(comm.size()));
  Owners sum_owners(static_cast<std::size_t>(comm.size()));
  for (std::size_t r = 0; r < weight_owners.size(); ++r) {
    for (const Bucket& bucket : buckets) {
      weight_owners[r].insert(weight_owners[r].end(), bucket.owners[r].begin(),
                              bucket.owners[r].end());
    }
    for (const Segment& segment : segments_of(shapes, weight_owners[r])) {
      std::vector<Piece>& runs = sum_owners[r];
      if (!runs.empty() && runs.back().begin + runs.back().count == segment.index) {
        ++runs.back().count;
      } else {
        runs.push_back({0, segment.index, 1});
      }
    }
  }
  if (!shards_weights()) {
    std::vector<TensorView> weights;
    for (const Param& p : params) weights.push_back(p.weight.view());
    add_weight_scales(weights, weight_owners);
    weight_gather = std::make_unique<PieceGather>(comm, weights, weight_owners);
  }
  const TensorView sums{adamw->segment_sums(), DType::f32, Shape{adamw->total_segments()},
                        ctx.device()};
  sum_gather = std::make_unique<PieceGather>(comm, std::vector<TensorView>{sums}, sum_owners,
                                             Traffic::metadata);
}

void Engine::Impl::add_weight_scales(std::vector<TensorView>& tensors, Owners& owners) const {
  std::vector<std::int32_t> tensor_of(params.size(), -1);
  for (std::size_t i = 0; i < params.size(); ++i) {
    const Shape& shape = params[i].spec.shape;
    if (!has_block_scales(params[i].formats.state.weight)) continue;
    tensor_of[i] = static_cast<std::int32_t>(tensors.size());
    tensors.push_back({adamw->block_weight(static_cast<int>(i)).scales, DType::f32,
                       Shape{tile_count(shape[0], shape[1])}, ctx.device()});
  }
  const auto columns_of = [this](std::int32_t i) {
    return params[static_cast<std::size_t>(i)].spec.shape[1];
  };
  for (std::vector<Piece>& pieces : owners) {
    const std::vector<Piece> codes = pieces;
    append_tiles(pieces, codes, tensor_of, columns_of);
  }
}

void Engine::Impl::initialise() {
  const std::vector<float> amax =
      visit_initial_values_sync([this](std::size_t i, const TensorView& values) {
        adamw->initialise(static_cast<int>(i), values);
        if (transposes_weights()) transpose_weight(static_cast<int>(i));
      });
  for (std::size_t i = 0; i < params.size(); ++i) {
    Param& p = params[i];
    require(amax[i] == p.initial_amax, "parameter \"", p.spec.name,
            "\": its initial values have changed between the comparison of the ranks, with the "
            "largest ",
            p.initial_amax, ", and the initialisation, with ", amax[i],
            "; fill must make the same values both times");
    p.spec.init = {};
    p.spec.fill = {};
  }
}

// On CUDA some formats are much slower than others.
std::string Engine::Impl::describe_optimizer() const {
  if (ctx.device().type == DeviceType::cpu) return "one loop for all formats";
  std::int64_t general = 0, all = 0;
  std::string first;
  for (std::size_t i = 0; i < params.size(); ++i) {
    const Param& p = params[i];
    const std::int64_t owned = sharded() ? p.owned() : p.spec.shape.numel();
    all += owned;
    const std::string reason = adamw->general_code_reason(static_cast<int>(i));
    if (reason.empty() || owned == 0) continue;
    if (general == 0) first = "\"" + p.spec.name + "\": " + reason;
    general += owned;
  }
  if (general == 0) return "fast code for all formats";
  std::ostringstream out;
  out << "general code, several times slower, for " << general << " of " << all
      << " elements, first for " << first;
  return out.str();
}

// Whether AdamW on CUDA reads masters back that it has just written.
bool Engine::Impl::casts_from_masters(int i) const {
  const WeightFormat format = params[static_cast<std::size_t>(i)].formats.state.weight;
  return needs_matrix(sharded() ? without_transpose(format) : format) &&
         !adamw->general_code_reason(i).empty();
}

std::string Engine::Impl::describe_schedule() const {
  if (comm.size() == 1) return "one rank: nothing to overlap";
  if (fused()) {
    return std::string("fused: after backward, summed inside AdamW's pass; ") +
           (config.clipping ? "steps that clip make FP32 means in memory first (clipping is true)"
                            : "no FP32 shard buffer (clipping is false)");
  }
  if (shards_weights()) {
    return std::string("a unit's gradients are reduced when it is released, the rest in step(), ") +
           (streams.is_apart() ? "on the communicator's own stream"
                               : "one stream, because the communicator shares the engine's stream");
  }
  if (schedule() == Schedule::overlap) {
    return ctx.device().type == DeviceType::cpu
               ? "overlap: each bucket is reduced during backward, in the calling thread, because "
                 "a CPU has no second stream"
               : "overlap: reduced during backward on the communicator's own stream";
  }
  if (shards_gradients()) {
    return std::string(
               "during backward when a gradient slot is wanted again, the rest after it, ") +
           (streams.is_apart() ? "as configured"
                               : "one stream, because the communicator shares the engine's stream");
  }
  return streams.is_apart()
             ? "after backward, as configured"
             : "after backward, one stream, because the communicator shares the engine's stream";
}

std::string Engine::Impl::describe_means() const {
  const DType gradient = plan.formats.gradient, dtype = reduced(gradient);
  if (dtype != gradient) return "FP32 means straight into the owner's AdamW";
  return std::string(name_of(dtype)) + " means, " +
         (dtype == DType::f32 ? "" : "rounded once with a common scale, ") +
         (shards_gradients() ? "into the owner's shard" : "where the owner's gradient was");
}

std::string Engine::Impl::describe_reduction() const {
  if (comm.size() == 1) return "none (one rank)";
  const std::string by = window != nullptr ? "one kernel over memory windows" : "send/receive";
  if (!sharded()) return "two_shot (" + by + ", means rounded once and gathered)";
  const std::string sums =
      window != nullptr ? "read from the ranks' memory and summed" : "send/receive, summed";
  if (!keeps_shards()) return "contributions (" + sums + " by the owner's AdamW)";
  if (!fused()) return "sharded (" + by + ", " + describe_means() + ")";
  return "sharded (" + sums + " by the owner's AdamW, or " + by +
         " for the FP32 means where a step clips)";
}

void Engine::Impl::describe_gradients() {
  const bool is_cpu = ctx.device().type == DeviceType::cpu;
  if (ctx.shares_device() && !is_cpu) {
    plan.notes.push_back(
        "casts with current scaling read their input twice, because a cooperative launch would "
        "wait for the collectives beside it");
  }
  if (config.micro_batches == 1) {
    plan.accumulation = "1, nothing to sum";
    return;
  }
  const DType gradient = plan.formats.gradient, sum = accumulator_of(gradient);
  const std::string where = shards_gradients() ? " accumulators" : " where they are";
  std::ostringstream text;
  text << config.micro_batches << ", FP8-managed gradients summed in " << name_of(sum)
       << (sum != gradient      ? " accumulators and cast once"
           : sum == DType::e4m3 ? where + ", cast anew with every sum"
                                : where)
       << ", others in f32" << where;
  if (shards_gradients()) text << "; accumulators are whole on every rank";
  plan.accumulation = text.str();
}

void Engine::Impl::describe() {
  describe_gradients();
  plan.reduction = describe_reduction();
  plan.schedule = describe_schedule();
  plan.ranks = comm.size();
  plan.transport = comm.name();
  if (comm.size() > 1) plan.notes.push_back(describe_memory());
  if (shards_gradients()) plan.notes.push_back(describe_slots());
  plan.buckets = static_cast<int>(buckets.size());
  for (const Param& p : params) {
    plan.parameters += p.spec.shape.numel();
    if (p.managed) plan.fp8_parameters += p.spec.shape.numel();
  }
  if (comm.size() == 1) {
    plan.weight_gather = "written by the update";
    if (config.windows.value_or(false)) {
      plan.notes.push_back(
          "no window, though EngineConfig::windows is true: one rank has no peers");
    }
    if (plan.sharding != Sharding::none) {
      plan.notes.push_back(
          "one rank holds the whole optimizer: sharding has nothing to cut, and AdamW reads its "
          "gradient as stored, which is its mean in either format");
    }
  } else if (shards_weights()) {
    plan.weight_gather = describe_weights();
  } else if (sharded()) {
    plan.weight_gather = window != nullptr
                             ? "written by the owner's update to every rank's memory, as stored"
                             : "written by the owner's update, gathered as stored";
    const WeightFormat format = plan.formats.state.weight;
    if (has_block_scales(format)) plan.weight_gather += ", scales included";
    if (is_transposed(format)) plan.weight_gather += ", transposed copies made by every rank";
  } else {
    plan.weight_gather = "written by every rank's own update";
  }
  plan.optimizer = describe_optimizer();
  if (config.offload_states) {
    plan.optimizer += "; m, v and master in pinned host memory, read and written by the update";
    const bool is_cuda = ctx.device().type == DeviceType::cuda;
    for (std::size_t i = 0; is_cuda && i < params.size(); ++i) {
      if (!casts_from_masters(static_cast<int>(i))) continue;
      plan.optimizer +=
          ", masters once more for weights in tiles, which its general code casts then";
      break;
    }
  }
  if (plan.level == Level::O2 && plan.sharding == Sharding::optimizer) {
    plan.notes.push_back("O2 with a sharded optimizer is what O3 presets");
  }
  if (plan.formats != formats_of(plan.level)) {
    plan.notes.push_back("formats set by hand, not the level's");
  }
}

}  // namespace octet
