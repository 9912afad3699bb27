// SPDX-License-Identifier: Apache-2.0
#include "octet/comm/sum_reducer.hpp"

#include <algorithm>

namespace octet {
namespace {

std::size_t at(std::int64_t i) { return static_cast<std::size_t>(i); }

// Tensors, and the runs that ranks add up, begin where wide loads can.
std::int64_t aligned(std::int64_t count) { return (count + 15) / 16 * 16; }

void check_gradients(const std::vector<TensorView>& gradients, const TensorScale* scales,
                     Device device) {
  for (std::size_t i = 0; i < gradients.size(); ++i) {
    const TensorView& gradient = gradients[i];
    require(gradient.dtype == DType::e4m3, "SumReducer: gradient ", i, " is ",
            name_of(gradient.dtype), "; it must be e4m3");
    require(gradient.device == device, "SumReducer: gradient ", i, " is on ", gradient.device,
            " but the communicator is on ", device);
    require(!gradient.empty() || gradient.numel() == 0, "SumReducer: gradient ", i, " of shape ",
            gradient.shape, " has a null pointer");
  }
  require(scales != nullptr || gradients.empty(), "SumReducer: scales is null for ",
          gradients.size(), " tensors");
}

// The same answer on all ranks, although only some may be unable.
void check_transport(Communicator& comm) {
  if (!comm.has_sum_e4m3()) return;
  const auto refusals = all_gather_text_sync(comm, comm.sum_e4m3_refusal());
  for (std::size_t r = 0; r < refusals.size(); ++r) {
    require(refusals[r].empty(), "SumReducer: rank ", r, " cannot add FP8: ", refusals[r],
            "; MeanReducer (two_shot, sharded) works there");
  }
}

}  // namespace

AutoScale::AutoScale(const Context& ctx, int ranks) : ctx_(ctx), ranks_(ranks) {
  require(ranks >= 1, "AutoScale: ranks is ", ranks, "; it must be at least 1");
  const AutoScaleState initial;
  state_ = upload_sync<AutoScaleState>(ctx, std::span(&initial, 1));
}

void AutoScale::update() { update_auto_scale(ctx_, state(), ranks_); }

std::int32_t AutoScale::exponent_sync() const {
  return read_sync<AutoScaleState>(ctx_, state(), 1).front().mu_exponent;
}

void AutoScale::set_exponent_sync(std::int32_t exponent) {
  require(exponent >= -kMuExponentLimit && exponent <= kMuExponentLimit,
          "AutoScale: the exponent of mu is ", exponent, " thousandths; allowed are ",
          -kMuExponentLimit, " to ", kMuExponentLimit);
  copy_bytes(ctx_, &state()->mu_exponent, &exponent, sizeof(exponent));
  ctx_.synchronize();
}

SumReducer::SumReducer(Communicator& comm, const std::vector<TensorView>& gradients,
                       TensorScale* scales, AutoScale* auto_scale, int bucket)
    : comm_(comm), name_{"nccl_sum", bucket} {
  const Context& ctx = comm.context();
  check_gradients(gradients, scales, ctx.device());
  check_transport(comm);
  if (gradients.empty()) return;

  std::vector<SumTensor> tensors;
  for (const TensorView& gradient : gradients) {
    tensors.push_back({gradient.data, gradient.numel(), packed_count_});
    packed_count_ += aligned(gradient.numel());
  }
  tensors_ = upload_sync<SumTensor>(ctx, std::span<const SumTensor>(tensors));
  saturated_ = upload_sync<std::uint64_t>(ctx, std::vector<std::uint64_t>(tensors.size()));
  gathered_ = Buffer(ctx, at(comm.size()) * tensors.size() * sizeof(TensorScale));
  packed_ = Buffer(ctx, at(packed_count_));
  zero_bytes(ctx, packed_.data(), packed_.bytes());  // padding is summed too
  args_.tensors = tensors_.as<SumTensor>();
  args_.tensor_count = static_cast<std::int64_t>(tensors.size());
  args_.ranks = comm.size();
  args_.rank = comm.rank();
  args_.gathered = gathered_.as<TensorScale>();
  args_.scales = scales;
  args_.packed = packed_.as<std::uint8_t>();
  args_.saturated = saturated_.as<std::uint64_t>();
  args_.auto_scale = auto_scale != nullptr ? auto_scale->state() : nullptr;
  if (comm.has_sum_e4m3()) {
    payload_ = sum_e4m3_bytes(packed_count_, comm.size());
  } else {
    plan_parts();
  }
}

// Where the transport cannot add, each rank adds up one run of codes, which all then get.
void SumReducer::plan_parts() {
  stride_ = aligned((packed_count_ + args_.ranks - 1) / args_.ranks);
  const auto begin_of = [&](int r) { return std::min(r * stride_, packed_count_); };
  const auto bytes_of = [&](int r) { return at(begin_of(r + 1) - begin_of(r)); };
  const int rank = args_.rank;
  own_ = args_.packed + begin_of(rank);
  own_count_ = begin_of(rank + 1) - begin_of(rank);
  if (args_.ranks > 1) staging_ = Buffer(comm_.context(), at(stride_) * at(args_.ranks));
  for (int peer = 0; peer < args_.ranks; ++peer) {
    if (peer == rank) continue;
    std::uint8_t* theirs = args_.packed + begin_of(peer);
    sends_.push_back({theirs, bytes_of(peer), peer});
    recvs_.push_back({staging_.as<std::uint8_t>() + peer * stride_, bytes_of(rank), peer});
    gather_sends_.push_back({own_, bytes_of(rank), peer});
    gather_recvs_.push_back({theirs, bytes_of(peer), peer});
    payload_ += bytes_of(peer) + bytes_of(rank);
  }
}

void SumReducer::add_up() {
  if (args_.ranks == 1) return;
  if (comm_.has_sum_e4m3()) return comm_.sum_e4m3(args_.packed, packed_count_);
  comm_.exchange(sends_, recvs_);
  add_codes(comm_.context(), own_, own_count_, staging_.as<std::uint8_t>(), stride_, args_.ranks,
            args_.rank);
  comm_.exchange(gather_sends_, gather_recvs_);
}

void SumReducer::run(std::uint32_t* nonfinite) {
  require(nonfinite != nullptr, "SumReducer::run: nonfinite is null; it must be a device word");
  comm_.check();
  if (args_.tensor_count == 0) return;
  const CollectiveScope scope(comm_, name_);
  const Context& ctx = comm_.context();
  SumArgs args = args_;
  args.nonfinite = nonfinite;
  comm_.all_gather(args.scales, gathered_.data(), at(args.tensor_count) * sizeof(TensorScale));
  sum_scales(ctx, args);
  requantise_codes(ctx, args);
  add_up();
  take_sums(ctx, args);
}

std::size_t SumReducer::buffer_bytes() const {
  return tensors_.bytes() + gathered_.bytes() + packed_.bytes() + saturated_.bytes() +
         staging_.bytes();
}

}  // namespace octet
