// SPDX-License-Identifier: Apache-2.0
#include "comm_step.hpp"

#include <algorithm>

#include "octet/engine/shard_plan.hpp"
#include "optim_model.hpp"
#include "random_operands.hpp"

namespace bench {
namespace {

using octet::DType;
using octet::TensorScale;
using octet::TensorView;
using octet::upload_sync;

constexpr float kLearningRate = 1e-4f;

void check_nccl(ncclResult_t status, const char* what) {
  octet::require(status == ncclSuccess, what, ": ", ncclGetErrorString(status));
}

std::size_t padded(std::size_t bytes) { return octet::WorkspaceScope::padded(bytes); }

/// An AdamW with the learning rate and the flag that its steps read.
struct Optimizer {
  octet::Buffer flag, lr;
  std::unique_ptr<octet::AdamW> adamw;

  Optimizer(const octet::Context& ctx, std::vector<octet::AdamWParam> params)
      : flag(upload_sync<std::uint32_t>(ctx, std::vector<std::uint32_t>(1))),
        lr(upload_sync<float>(ctx, std::vector<float>{kLearningRate})),
        adamw(std::make_unique<octet::AdamW>(ctx, octet::AdamWConfig{}, std::move(params))) {}

  void step(bool from_contributions, float max_norm = 0.0f) {
    adamw->step({.lr_device = lr.as<float>(),
                 .max_norm = max_norm,
                 .nonfinite = flag.as<std::uint32_t>(),
                 .from_contributions = from_contributions});
  }
};

void require_applied(const octet::Context& ctx, const Optimizer& optimizer, const char* what) {
  const auto s = octet::read_sync<octet::AdamwScalars>(ctx, optimizer.adamw->scalars(), 1)[0];
  octet::require(s.step > 0 && s.skipped == 0, what, ": ", s.step, " steps were applied, ",
                 s.skipped, " skipped");
}

}  // namespace

/// One flat tensor; a rank updates its part of 1/N.
struct StepModel::Rival {
  std::int64_t part = 0;
  octet::Buffer gradients, mean, weights, scale;
  std::unique_ptr<Optimizer> optimizer;
};

/// The gradients and weights of all tensors lie in a window.
struct StepModel::Sharded {
  std::unique_ptr<octet::Window> window;
  octet::Tensor shard;
  octet::Buffer gathered_scales, gathered_flags;
  TensorScale* scales = nullptr;
  std::vector<TensorView> gradients, weights;
  std::unique_ptr<octet::MeanReducer> reducer;
  std::unique_ptr<Optimizer> optimizer;
  std::unique_ptr<octet::PieceGather> sums;
};

StepModel::StepModel(const CommRank& rank, int layers)
    : rank_(rank), shapes_(gpt_shapes(layers)), parameters_(numel_of(shapes_)) {
  add_rival();
  add_sharded();
  rank.ctx.synchronize();
}

StepModel::~StepModel() = default;

void StepModel::add_rival() {
  const octet::Context& ctx = rank_.ctx;
  const std::int64_t ranks = rank_.comm.size();
  rival_ = std::make_unique<Rival>();
  Rival& r = *rival_;
  r.part = parameters_ / ranks / 1024 * 1024;
  const auto bytes = static_cast<std::size_t>(r.part * ranks) * 2;
  r.gradients = octet::Buffer(ctx, bytes);
  r.weights = octet::Buffer(ctx, bytes);
  r.mean = octet::Buffer(ctx, static_cast<std::size_t>(r.part) * 2);
  const octet::Shape part{r.part / 1024, 1024};
  fill_normal(ctx, {r.gradients.data(), DType::bf16, {r.part * ranks}, ctx.device()}, 3);
  auto* own = r.weights.as<std::uint16_t>() + r.part * rank_.comm.rank();
  const octet::StateFormats fp32{.weight = octet::WeightFormat::bf16};
  octet::AdamWParam param{.name = "part", .shape = part, .formats = fp32};
  // States in FP32 need no bound of the gradient; this one spares the rival a pass that finds it.
  const TensorScale bound{.amax = 1e6f};
  r.scale = upload_sync<TensorScale>(ctx, std::span(&bound, 1));
  param.gradient = {r.mean.data(), DType::bf16, part, ctx.device()};
  param.gradient_scale = r.scale.as<TensorScale>();
  param.weight = {own, DType::bf16, part, ctx.device()};
  r.optimizer = std::make_unique<Optimizer>(ctx, std::vector<octet::AdamWParam>{param});
  r.optimizer->adamw->initialise(0, {r.gradients.data(), DType::bf16, part, ctx.device()});
  cases_.push_back(
      {"BF16 reduce-scatter, FP32 AdamW, BF16 all-gather", [this, &r, own] {
         const auto count = static_cast<std::size_t>(r.part);
         const cudaStream_t stream = rank_.ctx.stream();
         check_nccl(ncclReduceScatter(r.gradients.data(), r.mean.data(), count, ncclBfloat16,
                                      ncclAvg, rank_.nccl, stream),
                    "ncclReduceScatter");
         r.optimizer->step(false);
         check_nccl(ncclAllGather(own, r.weights.data(), count, ncclBfloat16, rank_.nccl, stream),
                    "ncclAllGather");
       }});
}

void StepModel::add_sharded() {
  const octet::Context& ctx = rank_.ctx;
  const int ranks = rank_.comm.size(), rank = rank_.comm.rank();
  const std::size_t scale_bytes = padded(shapes_.size() * sizeof(TensorScale));
  std::size_t bytes = scale_bytes;
  for (const octet::Shape& shape : shapes_) {
    bytes += 2 * padded(static_cast<std::size_t>(shape.numel()));
  }
  octet::WindowOffer offer = rank_.comm.make_window(bytes);
  no_windows_ = offer.refusal;
  if (offer.window == nullptr) return;
  sharded_ = std::make_unique<Sharded>();
  Sharded& s = *sharded_;
  s.window = std::move(offer.window);

  octet::ShardPlan plan(ranks);
  std::vector<int> all(shapes_.size());
  for (std::size_t i = 0; i < all.size(); ++i) all[i] = static_cast<int>(i);
  const octet::Owners owners = plan.cut(shapes_, all);
  std::vector<std::vector<octet::Piece>> own(shapes_.size());
  std::int64_t owned = 0;
  for (const octet::Piece& piece : owners[static_cast<std::size_t>(rank)]) {
    own[static_cast<std::size_t>(piece.tensor)].push_back(piece);
    owned += piece.count;
  }
  s.shard = octet::Tensor(ctx, DType::f32, {owned});

  auto* next = static_cast<std::byte*>(s.window->data());
  s.scales = reinterpret_cast<TensorScale*>(next);
  next += scale_bytes;
  const auto take = [&](const octet::Shape& shape) {
    const TensorView view{next, DType::e4m3, shape, ctx.device()};
    next += padded(static_cast<std::size_t>(shape.numel()));
    return view;
  };
  std::vector<octet::ReduceTensor> tensors;
  auto* shard = s.shard.as<float>();
  for (std::size_t i = 0; i < shapes_.size(); ++i) {
    s.gradients.push_back(take(shapes_[i]));
    s.weights.push_back(take(shapes_[i]));
    std::int64_t count = 0;
    for (const octet::Piece& piece : own[i]) count += piece.count;
    tensors.push_back({s.gradients[i], {shard, DType::f32, {count}, ctx.device()}});
    shard += count;
    octet::Tensor values(ctx, DType::bf16, shapes_[i]);
    fill_normal(ctx, values, static_cast<unsigned>(100 * i) + static_cast<unsigned>(rank));
    octet::quantize(ctx, {.in = values, .out = {s.gradients[i], s.scales + i}});
    ctx.synchronize();
  }
  s.reducer = std::make_unique<octet::MeanReducer>(rank_.comm, octet::MeanReducer::Path::sharded,
                                                   tensors, s.scales, owners, -1, s.window.get());

  std::vector<octet::RankGradients> contributions = s.reducer->contributions();
  std::vector<octet::AdamWParam> params;
  for (std::size_t i = 0; i < shapes_.size(); ++i) {
    octet::AdamWParam param{.name = "p" + std::to_string(i),
                            .shape = shapes_[i],
                            .formats = octet::formats_of(octet::Level::O3).state};
    param.gradient = tensors[i].shard;
    param.gradient_scale = s.scales + i;
    param.gradient_is_shard = true;
    param.contributions = contributions[i];
    param.weight = s.weights[i];
    for (int r = 0; r < ranks; ++r) {
      if (r == rank) continue;
      param.weight_copies.push_back({s.window->on_rank(r, s.weights[i].as<std::byte>()), nullptr});
    }
    param.pieces = own[i];
    params.push_back(std::move(param));
  }
  s.optimizer = std::make_unique<Optimizer>(ctx, std::move(params));
  for (std::size_t i = 0; i < shapes_.size(); ++i) {
    octet::Tensor values(ctx, DType::bf16, shapes_[i]);
    fill_normal(ctx, values, static_cast<unsigned>(i));
    s.optimizer->adamw->initialise(static_cast<int>(i), values);
    ctx.synchronize();
  }
  octet::AdamW& adamw = *s.optimizer->adamw;
  s.gathered_scales = octet::Buffer(
      ctx, static_cast<std::size_t>(ranks * adamw.scale_count()) * sizeof(TensorScale));
  s.gathered_flags = octet::Buffer(ctx, static_cast<std::size_t>(ranks) * sizeof(TensorScale));
  octet::Owners sum_owners(static_cast<std::size_t>(ranks));
  for (int r = 0; r < ranks; ++r) {
    for (const octet::Segment& segment :
         octet::segments_of(shapes_, owners[static_cast<std::size_t>(r)])) {
      sum_owners[static_cast<std::size_t>(r)].push_back({0, segment.index, 1});
    }
  }
  const TensorView sums{adamw.segment_sums(), DType::f32, {adamw.total_segments()}, ctx.device()};
  s.sums = std::make_unique<octet::PieceGather>(rank_.comm, std::vector<TensorView>{sums},
                                                sum_owners, octet::Traffic::metadata);

  // What Engine::step() enqueues between the gradients and the next forward pass.
  const auto begin = [this, &s] {
    rank_.comm.all_gather(s.scales, s.gathered_flags.data(), sizeof(TensorScale));
  };
  const auto end = [this, &s, &adamw] {
    rank_.comm.all_gather(adamw.scales(), s.gathered_scales.data(),
                          static_cast<std::size_t>(adamw.scale_count()) * sizeof(TensorScale));
    octet::max_amax(rank_.ctx, s.gathered_scales.as<const TensorScale>(), rank_.comm.size(),
                    adamw.scale_count(), adamw.scales());
  };
  const std::uint64_t payload =
      s.reducer->payload_bytes() + static_cast<std::uint64_t>(owned) * (ranks - 1);
  cases_.push_back({"octet O3 over windows, fused",
                    [=, &s] {
                      s.reducer->collect(s.optimizer->flag.as<std::uint32_t>());
                      begin();
                      s.optimizer->step(true);
                      end();
                    },
                    payload});
  cases_.push_back({"octet O3 over windows, with clipping",
                    [=, &s, &adamw] {
                      s.reducer->run(s.optimizer->flag.as<std::uint32_t>());
                      begin();
                      adamw.measure();
                      s.sums->run();
                      s.optimizer->step(false, 1.0f);
                      end();
                    },
                    payload});
}

void StepModel::verify() const {
  const octet::Context& ctx = rank_.ctx;
  require_applied(ctx, *rival_->optimizer, "the rival");
  if (sharded_ == nullptr) return;
  require_applied(ctx, *sharded_->optimizer, "octet O3");
  for (const TensorView& weight : {sharded_->weights.front(), sharded_->weights.back()}) {
    const std::size_t count = std::min<std::size_t>(1 << 16, weight.bytes());
    const auto codes =
        octet::read_sync<char>(ctx, weight.as<char>() + (weight.bytes() - count), count);
    const auto texts = octet::all_gather_text_sync(rank_.comm, std::string(codes.data(), count));
    for (const std::string& text : texts) {
      octet::require(text == texts[0], "comm_bench: the ranks' weights differ");
    }
  }
}

}  // namespace bench
