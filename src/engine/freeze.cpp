// SPDX-License-Identifier: Apache-2.0
// Engine::freeze(), step by step: agree, cut, allocate, fill, describe.
#include <algorithm>
#include <cmath>
#include <sstream>

#include "engine/engine_impl.hpp"
#include "octet/ops/quantize.hpp"

namespace octet {
namespace {

// What every rank must have registered alike, a line each.
std::vector<std::string> lines_of(const std::string& text) {
  std::vector<std::string> lines;
  std::istringstream in(text);
  for (std::string line; std::getline(in, line);) lines.push_back(line);
  return lines;
}

std::string describe_formats(const Formats& f) {
  std::ostringstream out;
  out << "weight " << name_of(f.state.weight) << ", gradient " << name_of(f.gradient) << ", master "
      << name_of(f.state.master) << ", m " << name_of(f.state.m) << ", v " << name_of(f.state.v);
  return out.str();
}

std::string describe_hyper(const AdamwHyper& g) {
  std::ostringstream out;
  out.precision(9);  // every float apart from every other
  out << "lr_factor " << g.lr_factor << ", beta1 " << g.beta1 << ", beta2 " << g.beta2 << ", eps "
      << g.eps << ", weight_decay " << g.weight_decay;
  return out.str();
}

std::vector<float> read_amax_sync(const Context& ctx, const TensorScale* scales,
                                  std::size_t count) {
  std::vector<float> values;
  for (const TensorScale& s : read_sync<TensorScale>(ctx, scales, count)) values.push_back(s.amax);
  return values;
}

// Of the blocks of a matrix, and of those of its transposed copy.
std::uint64_t weight_scale_bytes(WeightFormat format, const Shape& shape) {
  const Granularity granularity = granularity_of(format);
  std::int64_t bytes = scale_bytes(granularity, shape[0], shape[1]);
  if (is_transposed(format)) bytes += scale_bytes(granularity, shape[1], shape[0]);
  return static_cast<std::uint64_t>(bytes);
}

}  // namespace

// A rank that cannot go on must not leave the others waiting for it in their first step.
void Engine::Impl::build() {
  std::string problem;
  try {
    make_buckets();
    allocate_parameters();
    allocate_optimizer();
    allocate_communication();
    initialise();
    describe();
  } catch (const std::exception& error) {
    problem = error.what();
  }
  const std::vector<std::string> problems = all_gather_text_sync(comm, problem);
  for (std::size_t r = 0; r < problems.size(); ++r) {
    require(problems[r].empty(), "Engine::freeze: rank ", r, ": ", problems[r]);
  }
}

void Engine::Impl::check_lists_agree() {
  Buffer scales(ctx, params.size() * sizeof(TensorScale));
  for (std::size_t i = 0; i < params.size(); ++i) {
    measure_amax(ctx, params[i].spec.init, scales.as<TensorScale>() + i);
  }
  const std::vector<float> amax =
      read_amax_sync(ctx, scales.as<const TensorScale>(), params.size());
  std::ostringstream list;
  list.precision(9);  // every float apart from every other
  list << "configuration: level " << name_of(plan.level) << ", sharding " << name_of(plan.sharding)
       << ", " << describe_formats(plan.formats) << ", bucket_elements " << config.bucket_elements
       << ", seed " << config.adamw.seed << ", decoupled_weight_decay "
       << config.adamw.decoupled_weight_decay << ", maximize " << config.adamw.maximize
       << ", stochastic_rounding " << config.adamw.stochastic_rounding << "\n";
  for (std::size_t i = 0; i < params.size(); ++i) {
    const ParamSpec& spec = params[i].spec;
    list << "parameter " << i << ": \"" << spec.name << "\" " << to_string(spec.shape) << ", "
         << (params[i].managed ? "FP8-managed" : "f32") << ", "
         << describe_hyper(config.adamw.of(spec.group)) << ", largest initial value " << amax[i]
         << "\n";
  }
  const std::vector<std::string> texts = all_gather_text_sync(comm, list.str());
  const std::vector<std::string> first = lines_of(texts[0]);
  for (std::size_t r = 1; r < texts.size(); ++r) {
    const std::vector<std::string> other = lines_of(texts[r]);
    for (std::size_t i = 0; i < std::max(first.size(), other.size()); ++i) {
      const std::string mine =
          i < first.size() ? first[i] : "no parameter " + std::to_string(i - 1);
      const std::string theirs =
          i < other.size() ? other[i] : "no parameter " + std::to_string(i - 1);
      require(mine == theirs, "Engine::freeze: the ranks differ: rank 0 has ", mine, "; rank ", r,
              " has ", theirs);
    }
  }
  for (std::size_t i = 0; i < params.size(); ++i) {
    require(std::isfinite(amax[i]), "parameter \"", params[i].spec.name,
            "\": its initial values hold a NaN or an infinity");
  }
}

// One dtype per bucket, in reverse order of registration, which is about the order in which a
// backward pass produces the gradients.
void Engine::Impl::make_buckets() {
  std::vector<Shape> shapes;
  for (const Param& p : params) shapes.push_back(p.spec.shape);
  ShardPlan shards(comm.size());
  for (const bool managed : {true, false}) {
    std::int64_t elements = config.bucket_elements;  // full: the first parameter opens a bucket
    for (int i = static_cast<int>(params.size()) - 1; i >= 0; --i) {
      const Param& p = params[static_cast<std::size_t>(i)];
      if (p.managed != managed) continue;
      if (elements >= config.bucket_elements) {
        buckets.emplace_back();
        elements = 0;
      }
      buckets.back().params.push_back(i);
      elements += p.spec.shape.numel();
    }
  }
  for (Bucket& bucket : buckets) {
    bucket.owners = shards.cut(shapes, bucket.params);
    for (const Piece& piece : bucket.owners[static_cast<std::size_t>(comm.rank())]) {
      params[static_cast<std::size_t>(piece.tensor)].pieces.push_back(piece);
    }
  }
}

void Engine::Impl::allocate_parameters() {
  flag = upload_sync<TensorScale>(ctx, std::vector<TensorScale>(1));
  zero_scale = upload_sync<TensorScale>(ctx, std::vector<TensorScale>(1));
  gathered_flags = Buffer(ctx, static_cast<std::size_t>(comm.size()) * sizeof(TensorScale));
  gradient_scales = upload_sync<TensorScale>(ctx, std::vector<TensorScale>(params.size()));
  std::size_t slot = 0;
  for (const Bucket& bucket : buckets) {
    for (int i : bucket.params) {
      params[static_cast<std::size_t>(i)].gradient_scale =
          gradient_scales.as<TensorScale>() + slot++;
    }
  }
  for (Param& p : params) {
    const Shape& shape = p.spec.shape;
    const std::uint64_t numel = static_cast<std::uint64_t>(shape.numel());
    auto allocate = [&](const char* what, Tensor& tensor, DType dtype, const Shape& as) {
      const std::size_t before = ctx.memory_use().current;
      tensor = Tensor(ctx, dtype, as);
      plan.count(what, p.managed, true, numel * size_of(dtype), ctx.memory_use().current - before);
    };
    allocate("weight", p.weight, dtype_of(p.formats.state.weight), shape);
    if (is_transposed(p.formats.state.weight)) {
      allocate("transposed weight", p.weight_transposed, DType::e4m3, {shape[1], shape[0]});
    }
    allocate("gradient", p.gradient, p.formats.gradient, shape);
  }
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
    a.weight_transposed = p.weight_transposed.view();
    a.group = p.spec.group;
    if (sharded()) {
      std::int64_t owned = 0;
      for (const Piece& piece : p.pieces) owned += piece.count;
      const std::size_t before = ctx.memory_use().current;
      p.shard = Tensor(ctx, DType::f32, Shape{owned});
      plan.count("reduced gradient shard", p.managed, false,
                 static_cast<std::uint64_t>(owned) * sizeof(float),
                 ctx.memory_use().current - before);
      a.gradient = p.shard.view();
      a.gradient_is_shard = true;
      a.pieces = p.pieces;
    }
    list.push_back(std::move(a));
  }
  const std::size_t before = ctx.memory_use().current;
  adamw = std::make_unique<AdamW>(ctx, config.adamw, std::move(list));
  std::size_t tables = ctx.memory_use().current - before;
  for (std::size_t i = 0; i < params.size(); ++i) {
    const Param& p = params[i];
    const std::int64_t owned = sharded() ? p.shard.view().numel() : p.spec.shape.numel();
    if (p.managed) plan.owned_fp8_parameters += owned;
    const StateFormats& f = p.formats.state;
    const AdamW::StateBytes bytes = adamw->state_bytes(static_cast<int>(i));
    const bool own_master = f.weight != WeightFormat::f32;
    plan.count("master", p.managed, true, own_master ? state_bytes(f.master, owned) : 0,
               bytes.master);
    plan.count("m", p.managed, true, state_bytes(f.m, owned), bytes.m);
    plan.count("v", p.managed, true, state_bytes(f.v, owned), bytes.v);
    if (has_block_scales(f.weight)) {
      plan.count("weight scales", p.managed, true, weight_scale_bytes(f.weight, p.spec.shape),
                 bytes.weight_blocks);
    }
    tables -= bytes.master + bytes.m + bytes.v + bytes.weight_blocks;
  }
  // Five scales per parameter are model state; the rest is what the kernels need to find it.
  const std::size_t own_scales =
      static_cast<std::size_t>(adamw->scale_count()) * sizeof(TensorScale);
  for (const Param& p : params) {
    plan.count("scales", p.managed, true, 5 * sizeof(TensorScale),
               (gradient_scales.bytes() + own_scales) / params.size());
  }
  plan.count("tables", true, false, adamw->table_bytes(), tables - own_scales);
}

void Engine::Impl::allocate_communication() {
  const MeanReducer::Path path =
      sharded() ? MeanReducer::Path::sharded : MeanReducer::Path::two_shot;
  const std::size_t before = ctx.memory_use().current;
  std::uint64_t predicted = 0;
  std::vector<std::int32_t> slot_of(params.size());
  for (Bucket& bucket : buckets) {
    std::vector<ReduceTensor> tensors;
    for (int i : bucket.params) {
      const Param& p = params[static_cast<std::size_t>(i)];
      slot_of[static_cast<std::size_t>(i)] = static_cast<std::int32_t>(tensors.size());
      tensors.push_back({p.gradient.view(), sharded() ? p.shard.view() : TensorView{}});
    }
    Owners owners = bucket.owners;  // a reducer counts its tensors from 0
    for (std::vector<Piece>& pieces : owners) {
      for (Piece& piece : pieces) piece.tensor = slot_of[static_cast<std::size_t>(piece.tensor)];
    }
    TensorScale* scales = params[static_cast<std::size_t>(bucket.params[0])].gradient_scale;
    const int number = static_cast<int>(&bucket - buckets.data());
    bucket.reducer = std::make_unique<MeanReducer>(comm, path, tensors, scales, owners, number);
    predicted += bucket.reducer->buffer_bytes();
    plan.wire_bytes_per_step += bucket.reducer->payload_bytes();
  }
  if (sharded()) {
    make_gathers();
    gathered_scales = Buffer(
        ctx, static_cast<std::size_t>(comm.size() * adamw->scale_count()) * sizeof(TensorScale));
    predicted += gathered_scales.bytes();
    plan.wire_bytes_per_step += weight_gather->payload_bytes();
  }
  plan.count("communication", true, false, predicted, ctx.memory_use().current - before);
}

// The sharded step gives every rank the new weights, and the sums of squares of all segments.
void Engine::Impl::make_gathers() {
  std::vector<TensorView> weights;
  std::vector<Shape> shapes;
  for (const Param& p : params) {
    weights.push_back(p.weight.view());
    shapes.push_back(p.spec.shape);
  }
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
  add_weight_scales(weights, weight_owners);
  weight_gather = std::make_unique<PieceGather>(comm, weights, weight_owners);
  const TensorView sums{adamw->segment_sums(), DType::f32, Shape{adamw->total_segments()},
                        ctx.device()};
  sum_gather = std::make_unique<PieceGather>(comm, std::vector<TensorView>{sums}, sum_owners,
                                             Traffic::metadata);
}

// Scales of tiles travel beside the codes: a panel is a row of tiles, so those of a piece lie
// together.
void Engine::Impl::add_weight_scales(std::vector<TensorView>& tensors, Owners& owners) const {
  const auto scales_in = [](std::int64_t rows, std::int64_t columns) {
    return scale_bytes(Granularity::tile, rows, columns) / std::int64_t{sizeof(float)};
  };
  std::vector<std::int32_t> tensor_of(params.size(), -1);
  for (std::size_t i = 0; i < params.size(); ++i) {
    const Shape& shape = params[i].spec.shape;
    if (!has_block_scales(params[i].formats.state.weight)) continue;
    tensor_of[i] = static_cast<std::int32_t>(tensors.size());
    tensors.push_back({adamw->block_weight(static_cast<int>(i)).scales, DType::f32,
                       Shape{scales_in(shape[0], shape[1])}, ctx.device()});
  }
  for (std::vector<Piece>& pieces : owners) {
    std::vector<Piece> scales;
    for (const Piece& piece : pieces) {
      const auto i = static_cast<std::size_t>(piece.tensor);
      if (tensor_of[i] < 0 || piece.count == 0) continue;
      const std::int64_t columns = params[i].spec.shape[1];
      scales.push_back({tensor_of[i], scales_in(piece.begin / columns, columns),
                        scales_in(piece.count / columns, columns)});
    }
    pieces.insert(pieces.end(), scales.begin(), scales.end());
  }
}

void Engine::Impl::initialise() {
  for (std::size_t i = 0; i < params.size(); ++i) {
    adamw->initialise(static_cast<int>(i), params[i].spec.init);
    params[i].spec.init = {};
  }
  ctx.synchronize();
}

// On CUDA some formats are much slower than others.
std::string Engine::Impl::describe_optimizer() const {
  if (ctx.device().type == DeviceType::cpu) return "one loop for all formats";
  std::int64_t general = 0, all = 0;
  std::string first;
  for (std::size_t i = 0; i < params.size(); ++i) {
    const Param& p = params[i];
    const std::int64_t owned = sharded() ? p.shard.view().numel() : p.spec.shape.numel();
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

void Engine::Impl::describe() {
  plan.ranks = comm.size();
  plan.transport = comm.name();
  plan.buckets = static_cast<int>(buckets.size());
  for (const Param& p : params) {
    plan.parameters += p.spec.shape.numel();
    if (p.managed) plan.fp8_parameters += p.spec.shape.numel();
  }
  if (comm.size() == 1) {
    plan.reduction = "none (one rank)";
    plan.weight_gather = "written by the update";
    if (plan.sharding == Sharding::optimizer) {
      plan.notes.push_back("one rank holds the whole optimizer: sharding has nothing to cut");
    }
  } else if (sharded()) {
    plan.reduction = "sharded (send/receive, FP32 means straight into the owner's AdamW)";
    plan.weight_gather = "written by the owner's update, gathered as stored";
    if (has_block_scales(plan.formats.state.weight)) plan.weight_gather += ", scales included";
  } else {
    plan.reduction = "two_shot (send/receive, means rounded once and gathered)";
    plan.weight_gather = "written by every rank's own update";
  }
  plan.optimizer = describe_optimizer();
  if (plan.level == Level::O2 && plan.sharding == Sharding::optimizer) {
    plan.notes.push_back("O2 with a sharded optimizer is what O3 presets");
  }
  if (plan.formats != formats_of(plan.level)) {
    plan.notes.push_back("formats set by hand, not the level's");
  }
}

}  // namespace octet
