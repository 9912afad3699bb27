// SPDX-License-Identifier: Apache-2.0
#include "octet/comm/collectives.hpp"

#include <algorithm>

#include "comm/join_parts.hpp"
#include "comm/owners.hpp"

namespace octet {
namespace {

// Every piece in a staging block starts where 16-byte loads can.
constexpr std::size_t kStagingAlignment = 16;

// A block of a kernel over windows gets at least so many packs of 16 bytes, where there are any.
constexpr std::int64_t kPacksForBlock = 512;

std::size_t aligned(std::size_t bytes) {
  return (bytes + kStagingAlignment - 1) / kStagingAlignment * kStagingAlignment;
}

std::size_t index(std::int32_t i) { return static_cast<std::size_t>(i); }

void* address_of(const TensorView& tensor, std::int64_t element) {
  return tensor.as<char>() + static_cast<std::size_t>(element) * size_of(tensor.dtype);
}

std::size_t bytes_of(const Piece& piece, DType dtype) {
  return static_cast<std::size_t>(piece.count) * size_of(dtype);
}

// Every peer gets all pieces that this rank owns and gives all that it owns itself.
void plan_gather(const std::vector<TensorView>& tensors, const Owners& owners, int rank,
                 std::vector<SendPart>& sends, std::vector<RecvPart>& recvs) {
  for (int peer = 0; peer < static_cast<int>(owners.size()); ++peer) {
    if (peer == rank) continue;
    for (const Piece& piece : owners[static_cast<std::size_t>(rank)]) {
      const TensorView& tensor = tensors[index(piece.tensor)];
      sends.push_back({address_of(tensor, piece.begin), bytes_of(piece, tensor.dtype), peer});
    }
    for (const Piece& piece : owners[static_cast<std::size_t>(peer)]) {
      const TensorView& tensor = tensors[index(piece.tensor)];
      recvs.push_back({address_of(tensor, piece.begin), bytes_of(piece, tensor.dtype), peer});
    }
  }
}

std::uint64_t total_bytes(const std::vector<SendPart>& sends) {
  std::uint64_t total = 0;
  for (const SendPart& part : sends) total += part.bytes;
  return total;
}

void check_tensor(const char* what, std::size_t i, const TensorView& tensor, Device device) {
  require(tensor.device == device, what, ": tensor ", i, " is on ", to_string(tensor.device),
          " but the communicator is on ", to_string(device));
  require(!tensor.empty() || tensor.numel() == 0, what, ": tensor ", i, " of shape ",
          to_string(tensor.shape), " has a null pointer");
}

std::vector<std::int64_t> numels_of(const std::vector<TensorView>& tensors) {
  std::vector<std::int64_t> numels;
  for (const TensorView& tensor : tensors) numels.push_back(tensor.numel());
  return numels;
}

std::vector<TensorView> gradients_of(const std::vector<ReduceTensor>& tensors) {
  std::vector<TensorView> gradients;
  for (const ReduceTensor& tensor : tensors) gradients.push_back(tensor.gradient);
  return gradients;
}

void check_gradients(const std::vector<ReduceTensor>& tensors, Device device) {
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const TensorView& gradient = tensors[i].gradient;
    check_tensor("MeanReducer", i, gradient, device);
    require(gradient.dtype == DType::e4m3 || gradient.dtype == DType::bf16 ||
                gradient.dtype == DType::f32,
            "MeanReducer: gradient ", i, " is ", name_of(gradient.dtype),
            "; allowed are e4m3, bf16, f32");
    require(gradient.dtype == tensors[0].gradient.dtype, "MeanReducer: gradient ", i, " is ",
            name_of(gradient.dtype), " but gradient 0 is ", name_of(tensors[0].gradient.dtype),
            "; all gradients of a reducer have the same dtype");
  }
}

const char* name_of(MeanReducer::Path path) {
  return path == MeanReducer::Path::sharded    ? "sharded"
         : path == MeanReducer::Path::two_shot ? "two_shot"
                                               : "contributions";
}

bool is_in_place(const ReduceTensor& tensor) {
  return !tensor.shard.empty() && tensor.shard.data == tensor.gradient.data;
}

// What belongs to `shard` depends on the path.
void check_shards(const std::vector<ReduceTensor>& tensors, MeanReducer::Path path,
                  const std::vector<Piece>& own, Device device) {
  const std::vector<std::int64_t> owned = numels_by_tensor(own, tensors.size());
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const TensorView& shard = tensors[i].shard;
    if (path != MeanReducer::Path::sharded) {
      require(shard.empty(), "MeanReducer: tensor ", i, " has a shard; ",
              path == MeanReducer::Path::two_shot ? "two_shot puts the mean where the gradient was"
                                                  : "contributions makes no mean");
      continue;
    }
    const DType dtype = tensors[i].gradient.dtype;
    require(shard.dtype == DType::f32 || shard.dtype == dtype, "MeanReducer: the shard of tensor ",
            i, " is ", name_of(shard.dtype), "; it must be f32 or, as the gradient, ",
            name_of(dtype));
    require(shard.dtype == tensors[0].shard.dtype, "MeanReducer: the shard of tensor ", i, " is ",
            name_of(shard.dtype), " but that of tensor 0 is ", name_of(tensors[0].shard.dtype),
            "; all shards of a reducer have the same dtype");
    if (shard.empty() && owned[i] == 0) continue;
    check_tensor("MeanReducer (shard)", i, shard, device);
    if (is_in_place(tensors[i])) {
      require(shard.dtype == dtype && shard.numel() == tensors[i].gradient.numel(),
              "MeanReducer: the shard of tensor ", i, " is ", name_of(shard.dtype), " ",
              shard.shape, " where the gradient is; then it must be that, ", name_of(dtype), " ",
              tensors[i].gradient.shape);
      continue;
    }
    require(shard.numel() == owned[i], "MeanReducer: the shard of tensor ", i, " has ",
            shard.numel(), " elements but this rank owns ", owned[i]);
  }
}

// Of every tensor what a peer's part of this rank's pieces takes in a block of staging.
std::vector<std::size_t> staged_bytes(const std::vector<ReduceTensor>& tensors,
                                      const std::vector<Piece>& own) {
  std::vector<std::size_t> bytes(tensors.size(), 0);
  for (const Piece& piece : own) {
    bytes[index(piece.tensor)] += bytes_of(piece, tensors[index(piece.tensor)].gradient.dtype);
  }
  for (std::size_t& each : bytes) each = aligned(each);
  return bytes;
}

std::int64_t packs_of(const Piece& piece, DType dtype) {
  return static_cast<std::int64_t>(aligned(bytes_of(piece, dtype)) / kStagingAlignment);
}

// In packs. The ranks' kernels have as many blocks as the longest shard asks for.
std::int64_t longest_shard(const Owners& owners, DType dtype) {
  std::int64_t longest = 0;
  for (const std::vector<Piece>& pieces : owners) {
    std::int64_t packs = 0;
    for (const Piece& piece : pieces) packs += packs_of(piece, dtype);
    longest = std::max(longest, packs);
  }
  return longest;
}

void check_in_window(const Window& window, const std::vector<ReduceTensor>& tensors,
                     const TensorScale* scales) {
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const TensorView& gradient = tensors[i].gradient;
    const std::size_t bytes = static_cast<std::size_t>(gradient.numel()) * size_of(gradient.dtype);
    require(bytes == 0 || window.contains(gradient.data, bytes), "MeanReducer: gradient ", i,
            " does not lie in the window");
  }
  require(window.contains(scales, tensors.size() * sizeof(TensorScale)),
          "MeanReducer: the scales do not lie in the window");
}

}  // namespace

MeanReducer::MeanReducer(Communicator& comm, Path path, const std::vector<ReduceTensor>& tensors,
                         TensorScale* scales, const Owners& owners, int bucket,
                         const Window* window, void* staging)
    : comm_(comm), path_(path), name_{name_of(path), bucket}, window_(window), scales_(scales) {
  const Context& ctx = comm.context();
  const auto rank = static_cast<std::size_t>(comm.rank());
  check_gradients(tensors, ctx.device());
  check_owners("MeanReducer", owners, comm.size(), numels_of(gradients_of(tensors)));
  check_shards(tensors, path, owners[rank], ctx.device());
  require(scales != nullptr || tensors.empty(), "MeanReducer: scales is null for ", tensors.size(),
          " tensors");
  if (tensors.empty()) return;

  args_.ranks = comm.size();
  args_.rank = comm.rank();
  args_.dtype = tensors[0].gradient.dtype;
  args_.out_dtype = path == Path::two_shot  ? args_.dtype
                    : path == Path::sharded ? tensors[0].shard.dtype
                                            : DType::f32;
  args_.tensor_count = static_cast<std::int64_t>(tensors.size());
  // All ranks' scales, then, for two_shot on one rank, those of the means, which it does not adopt.
  const bool keeps_scales = comm.size() == 1 && path == Path::two_shot;
  if (comm.size() == 1) window_ = nullptr;
  const std::size_t blocks = static_cast<std::size_t>(comm.size()) + (keeps_scales ? 1 : 0);
  gathered_ = Buffer(ctx, blocks * tensors.size() * sizeof(TensorScale));
  args_.scales = gathered_.as<TensorScale>();
  args_.mean_scales = keeps_scales ? gathered_.as<TensorScale>() + tensors.size() : scales;
  if (keeps_scales) return;

  const Owners runs = merged(owners);
  for (const ReduceTensor& tensor : tensors) gradients_.push_back(tensor.gradient.data);
  payload_ = payload_of(runs);
  if (window_ != nullptr) {
    plan_window(tensors, runs);
    return;
  }
  plan_staging(tensors, runs[rank], staging);
  if (path != Path::contributions) plan_pieces(tensors, runs[rank]);
  plan_parts(tensors, runs);
}

// What the owners of the others' pieces get from this rank, and what all get back.
std::uint64_t MeanReducer::payload_of(const Owners& owners) const {
  std::uint64_t bytes = 0;
  for (int r = 0; r < args_.ranks; ++r) {
    const bool is_own = r == args_.rank;
    const int times = !is_own ? 1 : path_ == Path::two_shot ? args_.ranks - 1 : 0;
    for (const Piece& piece : owners[static_cast<std::size_t>(r)]) {
      bytes += static_cast<std::uint64_t>(times) * bytes_of(piece, args_.dtype);
    }
  }
  return bytes;
}

// Where this rank's pieces lie in every rank's window.
void MeanReducer::plan_window(const std::vector<ReduceTensor>& tensors, const Owners& owners) {
  check_in_window(*window_, tensors, scales_);
  std::vector<WindowPiece> pieces;
  std::vector<std::int64_t> local(tensors.size(), 0);
  std::int64_t packs = 0;
  for (const Piece& piece : owners[static_cast<std::size_t>(args_.rank)]) {
    const ReduceTensor& tensor = tensors[index(piece.tensor)];
    std::int64_t& at = local[index(piece.tensor)];
    WindowPiece entry;
    entry.tensor = piece.tensor;
    entry.count = piece.count;
    entry.offset = window_->offset_of(address_of(tensor.gradient, piece.begin));
    entry.begin = packs;
    if (path_ == Path::sharded) {
      entry.out = address_of(tensor.shard, is_in_place(tensor) ? piece.begin : at);
    }
    at += piece.count;
    packs += packs_of(piece, args_.dtype);
    pieces.push_back(entry);
  }
  pieces_ = upload_sync<WindowPiece>(comm_.context(), std::span<const WindowPiece>(pieces));
  WindowMeanArgs& w = window_args_;
  w.peers = window_->peers();
  w.peers.blocks = static_cast<int>(std::clamp<std::int64_t>(
      longest_shard(owners, args_.dtype) / kPacksForBlock, 1, window_->peers().blocks));
  w.pieces = pieces_.as<WindowPiece>();
  w.piece_count = static_cast<std::int64_t>(pieces.size());
  w.pack_count = packs;
  w.dtype = args_.dtype;
  w.out_dtype = args_.out_dtype;
  w.scales_offset = window_->offset_of(scales_);
  w.mean_scales = gathered_.as<TensorScale>();
  w.tensor_count = args_.tensor_count;
}

void MeanReducer::run_window(std::uint32_t* nonfinite) {
  WindowMeanArgs args = window_args_;
  args.nonfinite = nonfinite;
  args.peers.tag = comm_.tag();
  window_mean(comm_.context(), args);
  comm_.count_sent(Traffic::payload, payload_);
  comm_.count_sent(Traffic::metadata, static_cast<std::uint64_t>(args_.ranks - 1) *
                                          static_cast<std::uint64_t>(args_.tensor_count) *
                                          sizeof(TensorScale));
}

// A block of staging holds one peer's part of this rank's shards, one after the other.
void MeanReducer::plan_staging(const std::vector<ReduceTensor>& tensors,
                               const std::vector<Piece>& own, void* staging) {
  const std::vector<std::size_t> bytes = staged_bytes(tensors, own);
  std::size_t stride = 0;
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    staged_.push_back(static_cast<std::int64_t>(stride));
    stride += bytes[i];
  }
  if (args_.ranks > 1 && staging == nullptr) {
    staging_ = Buffer(comm_.context(), stride * static_cast<std::size_t>(args_.ranks));
  }
  args_.staging = staging != nullptr ? staging : staging_.data();
  args_.stride = static_cast<std::int64_t>(stride);
}

std::size_t MeanReducer::staging_bytes(const Communicator& comm,
                                       const std::vector<ReduceTensor>& tensors,
                                       const Owners& owners) {
  check_owners("MeanReducer", owners, comm.size(), numels_of(gradients_of(tensors)));
  if (comm.size() == 1) return 0;
  std::size_t stride = 0;
  for (std::size_t bytes : staged_bytes(tensors, owners[static_cast<std::size_t>(comm.rank())])) {
    stride += bytes;
  }
  return stride * static_cast<std::size_t>(comm.size());
}

// Where this rank's pieces lie: its own contribution, the peers' in staging, and the mean.
void MeanReducer::plan_pieces(const std::vector<ReduceTensor>& tensors,
                              const std::vector<Piece>& own) {
  std::vector<MeanPiece> pieces;
  std::vector<std::int64_t> local(tensors.size(), 0);
  for (const Piece& piece : own) {
    const std::size_t t = index(piece.tensor);
    const ReduceTensor& tensor = tensors[t];
    MeanPiece entry;
    entry.tensor = piece.tensor;
    entry.count = piece.count;
    entry.own = address_of(tensor.gradient, piece.begin);
    entry.staged = staged_[t] + local[t] * static_cast<std::int64_t>(size_of(args_.dtype));
    entry.out = path_ == Path::sharded && !is_in_place(tensor)
                    ? address_of(tensor.shard, local[t])
                    : address_of(tensor.gradient, piece.begin);
    local[t] += piece.count;
    pieces.push_back(entry);
  }
  pieces_ = upload_sync<MeanPiece>(comm_.context(), std::span<const MeanPiece>(pieces));
  args_.pieces = pieces_.as<MeanPiece>();
  args_.piece_count = static_cast<std::int64_t>(pieces.size());
}

void MeanReducer::plan_parts(const std::vector<ReduceTensor>& tensors, const Owners& owners) {
  for (int peer = 0; peer < args_.ranks; ++peer) {
    if (peer == args_.rank) continue;
    for (const Piece& piece : owners[static_cast<std::size_t>(peer)]) {
      const TensorView& gradient = tensors[index(piece.tensor)].gradient;
      sends_.push_back({address_of(gradient, piece.begin), bytes_of(piece, gradient.dtype), peer});
    }
    std::vector<std::int64_t> staged = staged_;
    for (const Piece& piece : owners[static_cast<std::size_t>(args_.rank)]) {
      const std::size_t bytes = bytes_of(piece, args_.dtype);
      std::int64_t& at = staged[index(piece.tensor)];
      recvs_.push_back({staged_of(peer) + at, bytes, peer});
      at += static_cast<std::int64_t>(bytes);
    }
  }
  if (path_ == Path::two_shot) {
    plan_gather(gradients_of(tensors), owners, args_.rank, gather_sends_, gather_recvs_);
  }
  join_parts(comm_, sends_, recvs_);
  join_parts(comm_, gather_sends_, gather_recvs_);
}

// The scales of the means, and whether those are what the tensors' scales become.
bool MeanReducer::share_scales(std::uint32_t* nonfinite) {
  const Context& ctx = comm_.context();
  MeanArgs args = args_;
  args.nonfinite = nonfinite;
  comm_.all_gather(scales_, gathered_.data(),
                   static_cast<std::size_t>(args.tensor_count) * sizeof(TensorScale));
  mean_scales(ctx, args);
  if (args.mean_scales == scales_) return true;
  max_amax(ctx, args.mean_scales, 1, args.tensor_count, scales_);
  return false;
}

void MeanReducer::collect(std::uint32_t* nonfinite) {
  require(nonfinite != nullptr,
          "MeanReducer::collect: nonfinite is null; it must be a device word");
  require(path_ != Path::two_shot,
          "MeanReducer::collect: the path is two_shot, which gathers means");
  comm_.check();
  if (args_.tensor_count == 0) return;
  const CollectiveScope scope(comm_, name_);
  share_scales(nonfinite);
  if (window_ != nullptr) return comm_.count_sent(Traffic::payload, payload_);
  if (args_.ranks > 1) comm_.exchange(sends_, recvs_);
}

void MeanReducer::run(std::uint32_t* nonfinite) {
  require(nonfinite != nullptr, "MeanReducer::run: nonfinite is null; it must be a device word");
  require(path_ != Path::contributions,
          "MeanReducer::run: the path is contributions, which makes no means; call collect()");
  comm_.check();
  if (args_.tensor_count == 0) return;
  const CollectiveScope scope(comm_, name_);
  if (window_ != nullptr) return run_window(nonfinite);
  if (!share_scales(nonfinite)) return;
  if (args_.ranks > 1) comm_.exchange(sends_, recvs_);
  reduce_mean(comm_.context(), args_);
  if (path_ == Path::two_shot) comm_.exchange(gather_sends_, gather_recvs_);
}

std::vector<RankGradients> MeanReducer::contributions() const {
  require(path_ != Path::two_shot,
          "MeanReducer::contributions: the path is two_shot, which gathers means");
  std::vector<RankGradients> result;
  for (std::size_t i = 0; i < gradients_.size(); ++i) {
    RankGradients from;
    from.dtype = args_.dtype;
    from.scales = args_.scales + i;
    from.scale_stride = args_.tensor_count;
    for (int r = 0; r < args_.ranks; ++r) {
      if (r == args_.rank) {
        from.ranks.push_back({gradients_[i], false});
      } else if (window_ != nullptr) {
        const auto* data = static_cast<const char*>(gradients_[i]);
        from.ranks.push_back({window_->on_rank(r, data), false, true});
      } else {
        from.ranks.push_back({staged_of(r) + staged_[i], true});
      }
    }
    result.push_back(std::move(from));
  }
  return result;
}

std::size_t MeanReducer::buffer_bytes() const {
  return staging_.bytes() + pieces_.bytes() + gathered_.bytes();
}

PieceGather::PieceGather(Communicator& comm, const std::vector<TensorView>& tensors,
                         const Owners& owners, Traffic traffic)
    : comm_(comm), traffic_(traffic) {
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    check_tensor("PieceGather", i, tensors[i], comm.context().device());
  }
  check_owners("PieceGather", owners, comm.size(), numels_of(tensors));
  plan_gather(tensors, merged(owners), comm.rank(), sends_, recvs_);
  join_parts(comm, sends_, recvs_);
  if (traffic_ == Traffic::payload) payload_ = total_bytes(sends_);
}

void PieceGather::run() {
  comm_.check();
  if (comm_.size() == 1) return;
  const CollectiveScope scope(comm_, {"all_gather"});
  comm_.exchange(sends_, recvs_, traffic_);
}

}  // namespace octet
