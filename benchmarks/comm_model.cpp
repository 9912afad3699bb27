// SPDX-License-Identifier: Apache-2.0
#include "comm_model.hpp"

#include <algorithm>

#include "octet/engine/shard_plan.hpp"
#include "random_operands.hpp"

namespace bench {
namespace {

using octet::DType;
using octet::Shape;
using octet::TensorScale;
using octet::TensorView;
using Path = octet::MeanReducer::Path;

void check_nccl(ncclResult_t status, const char* what) {
  octet::require(status == ncclSuccess, what, ": ", ncclGetErrorString(status));
}

/// Matrices of 4096 x 4096, the last one smaller.
std::vector<Shape> shapes_of(std::int64_t elements) {
  constexpr std::int64_t kColumns = 4096, kRows = 4096;
  std::vector<Shape> shapes;
  for (std::int64_t left = elements; left > 0; left -= shapes.back().numel()) {
    const std::int64_t columns = std::min(left, kColumns);
    shapes.push_back({std::min(left / columns, kRows), columns});
  }
  return shapes;
}

}  // namespace

/// FP8 gradients with their scales, and the reducer over them.
struct CommModel::Reduction {
  Path path = Path::two_shot;
  octet::Buffer memory;  ///< unless they lie in a window
  octet::Tensor shard;   ///< empty where this rank owns nothing
  TensorScale* scales = nullptr;
  std::vector<octet::ReduceTensor> tensors;
  std::unique_ptr<octet::MeanReducer> reducer;
};

CommModel::CommModel(const CommRank& rank, std::int64_t elements)
    : rank_(rank), elements_(elements), shapes_(shapes_of(elements)) {
  const octet::Context& ctx = rank.ctx;
  octet::ShardPlan plan(rank.comm.size());
  std::vector<int> all(shapes_.size());
  for (std::size_t i = 0; i < all.size(); ++i) all[i] = static_cast<int>(i);
  owners_ = plan.cut(shapes_, all);
  const auto count = static_cast<std::size_t>(elements);
  wide_ = octet::Buffer(ctx, count * 2);
  sums_ = octet::Buffer(ctx, count * 2);
  flag_ = octet::upload_sync<std::uint32_t>(ctx, std::vector<std::uint32_t>(1));
  fill_normal(ctx, {wide_.data(), DType::bf16, {elements}, ctx.device()},
              static_cast<unsigned>(rank.comm.rank() + 1));
  add_rivals();
  add_send_receive();
  add_window();
  ctx.synchronize();
}

CommModel::~CommModel() = default;

void CommModel::add_rivals() {
  const auto all_reduce = [this](ncclDataType_t type) {
    check_nccl(ncclAllReduce(wide_.data(), sums_.data(), static_cast<std::size_t>(elements_), type,
                             ncclSum, rank_.nccl, rank_.ctx.stream()),
               "ncclAllReduce");
  };
  cases_.push_back({"NCCL bf16 all-reduce", [=] { all_reduce(ncclBfloat16); }});
  cases_.push_back(
      {"NCCL e4m3 all-reduce, a rounding at every hop", [=] { all_reduce(ncclFloat8e4m3); }});
}

CommModel::Reduction& CommModel::add(Path path, const octet::Window* window) {
  const octet::Context& ctx = rank_.ctx;
  auto& made = reductions_.emplace_back(std::make_unique<Reduction>());
  Reduction& r = *made;
  r.path = path;
  const std::size_t scale_bytes = (shapes_.size() * sizeof(TensorScale) + 255) / 256 * 256;
  const std::size_t bytes = scale_bytes + static_cast<std::size_t>(elements_);
  if (window == nullptr) r.memory = octet::Buffer(ctx, bytes);
  auto* at = static_cast<std::byte*>(window != nullptr ? window->data() : r.memory.data());
  r.scales = reinterpret_cast<TensorScale*>(at);
  octet::copy_bytes(ctx, r.scales, std::vector<TensorScale>(shapes_.size()).data(),
                    shapes_.size() * sizeof(TensorScale));
  ctx.synchronize();
  at += scale_bytes;
  std::vector<std::int64_t> owned(shapes_.size());
  for (const octet::Piece& piece : owners_[static_cast<std::size_t>(rank_.comm.rank())]) {
    owned[static_cast<std::size_t>(piece.tensor)] += piece.count;
  }
  if (path == Path::sharded) {
    std::int64_t total = 0;
    for (std::int64_t n : owned) total += n;
    r.shard = octet::Tensor(ctx, DType::f32, {total});
  }
  auto* shard = r.shard.as<float>();
  for (std::size_t i = 0; i < shapes_.size(); ++i) {
    octet::ReduceTensor tensor{{at, DType::e4m3, shapes_[i], ctx.device()}, {}};
    if (path == Path::sharded) {
      tensor.shard = {shard, DType::f32, {owned[i]}, ctx.device()};
      shard += owned[i];
    }
    r.tensors.push_back(tensor);
    at += shapes_[i].numel();
  }
  r.reducer = std::make_unique<octet::MeanReducer>(rank_.comm, path, r.tensors, r.scales, owners_,
                                                   -1, window);
  return r;
}

void CommModel::cast(const Reduction& r, octet::Scaling scaling) const {
  auto* in = wide_.as<std::uint16_t>();
  for (std::size_t i = 0; i < r.tensors.size(); ++i) {
    octet::quantize(rank_.ctx, {.in = {in, DType::bf16, shapes_[i], rank_.ctx.device()},
                                .out = {r.tensors[i].gradient, r.scales + i},
                                .nonfinite = flag_.as<std::uint32_t>(),
                                .scaling = scaling});
    in += shapes_[i].numel();
  }
}

void CommModel::add_send_receive() {
  Reduction& r = add(Path::two_shot, nullptr);
  cast(r, octet::Scaling::current);
  auto* flag = flag_.as<std::uint32_t>();
  cases_.push_back({"two_shot over send/receive", [&r, flag] { r.reducer->run(flag); },
                    r.reducer->payload_bytes()});
}

void CommModel::add_window() {
  const std::size_t scale_bytes = (shapes_.size() * sizeof(TensorScale) + 255) / 256 * 256;
  octet::WindowOffer offer =
      rank_.comm.make_window(scale_bytes + 3 * static_cast<std::size_t>(elements_));
  no_windows_ = offer.refusal;
  if (offer.window == nullptr) return;
  window_ = std::move(offer.window);
  Reduction& r = add(Path::two_shot, window_.get());
  cast(r, octet::Scaling::current);
  auto* flag = flag_.as<std::uint32_t>();
  const auto reduce = [&r, flag] { r.reducer->run(flag); };
  const std::uint64_t payload = r.reducer->payload_bytes();
  cases_.push_back({"two_shot in one kernel", reduce, payload});
  cases_.push_back({"cast with current scaling, then two_shot in one kernel",
                    [=, this, &r] {
                      cast(r, octet::Scaling::current);
                      reduce();
                    },
                    payload});
  cases_.push_back({"cast with a given scale, then two_shot in one kernel",
                    [=, this, &r] {
                      cast(r, octet::Scaling::given);
                      reduce();
                    },
                    payload});
  add_copy(static_cast<std::byte*>(window_->data()) + scale_bytes + elements_, payload);
  Reduction& s = add(Path::sharded, window_.get());
  cases_.push_back({"sharded means in one kernel", [&s, flag] { s.reducer->run(flag); },
                    s.reducer->payload_bytes()});
}

/// What the link can do: the copy engines send as many bytes to the next rank as two_shot does.
void CommModel::add_copy(std::byte* spare, std::uint64_t payload) {
  std::byte* to = window_->on_rank((rank_.comm.rank() + 1) % rank_.comm.size(), spare);
  cases_.push_back({"copy engines, as many bytes as two_shot sends",
                    [=, this] { octet::copy_bytes(rank_.ctx, to, wide_.data(), payload); },
                    payload});
}

void CommModel::verify() const {
  const octet::Context& ctx = rank_.ctx;
  octet::require(octet::read_sync<std::uint32_t>(ctx, flag_.data(), 1).front() == 0,
                 "comm_bench: a gradient is not finite");
  for (const auto& r : reductions_) {
    if (r->path == Path::sharded) continue;
    const TensorView& last = r->tensors.back().gradient;
    const auto count = static_cast<std::size_t>(std::min<std::int64_t>(last.numel(), 1 << 16));
    const auto codes = octet::read_sync<char>(
        ctx, last.as<char>() + last.numel() - static_cast<std::int64_t>(count), count);
    const auto texts =
        octet::all_gather_text_sync(rank_.comm, std::string(codes.data(), codes.size()));
    std::size_t zeros = 0;
    for (char code : codes) zeros += (code & 0x7F) == 0 ? 1 : 0;
    octet::require(zeros < count / 2, "comm_bench: ", zeros, " of ", count, " means are zero");
    for (const std::string& text : texts) {
      octet::require(text == texts[0], "comm_bench: the ranks' reduced gradients differ");
    }
  }
}

}  // namespace bench
