// SPDX-License-Identifier: Apache-2.0
#include "octet/comm/collectives.hpp"

#include <algorithm>

namespace octet {
namespace {

// Every piece in a staging block starts where 16-byte loads can.
constexpr std::size_t kStagingAlignment = 16;

std::size_t aligned(std::size_t bytes) {
  return (bytes + kStagingAlignment - 1) / kStagingAlignment * kStagingAlignment;
}

std::size_t index(std::int32_t i) { return static_cast<std::size_t>(i); }

struct OwnedPiece {
  Piece piece;
  int rank = 0;
};

// The pieces of one tensor, sorted by their begin, must follow one another without gap or overlap.
void check_cover(const char* what, std::size_t tensor, std::int64_t numel,
                 std::vector<OwnedPiece>& pieces) {
  std::sort(pieces.begin(), pieces.end(),
            [](const OwnedPiece& a, const OwnedPiece& b) { return a.piece.begin < b.piece.begin; });
  std::int64_t covered = 0;
  for (const OwnedPiece& owned : pieces) {
    require(owned.piece.begin >= covered, what, ": element ", owned.piece.begin, " of tensor ",
            tensor, " belongs to a piece of rank ", owned.rank,
            " and to another one; every element belongs to exactly one piece");
    require(owned.piece.begin == covered, what, ": element ", covered, " of tensor ", tensor,
            " belongs to no piece; every element belongs to exactly one piece");
    covered += owned.piece.count;
  }
  require(covered == numel, what, ": element ", covered, " of tensor ", tensor,
          " belongs to no piece; every element belongs to exactly one piece");
}

void check_owners(const char* what, const Owners& owners, int ranks,
                  const std::vector<std::int64_t>& numels) {
  require(owners.size() == static_cast<std::size_t>(ranks), what, ": owners has ", owners.size(),
          " lists of pieces for ", ranks, " ranks");
  std::vector<std::vector<OwnedPiece>> by_tensor(numels.size());
  for (std::size_t r = 0; r < owners.size(); ++r) {
    for (const Piece& piece : owners[r]) {
      require(piece.tensor >= 0 && index(piece.tensor) < numels.size(), what, ": a piece of rank ",
              r, " names tensor ", piece.tensor, " of ", numels.size());
      const std::int64_t numel = numels[index(piece.tensor)];
      require(piece.begin >= 0 && piece.count >= 0 && piece.begin <= numel &&
                  piece.count <= numel - piece.begin,
              what, ": a piece of rank ", r, " begins at ", piece.begin, " and has ", piece.count,
              " elements; tensor ", piece.tensor, " has ", numel);
      if (piece.count == 0) continue;
      by_tensor[index(piece.tensor)].push_back({piece, static_cast<int>(r)});
    }
  }
  for (std::size_t t = 0; t < numels.size(); ++t) check_cover(what, t, numels[t], by_tensor[t]);
}

// Neighbouring pieces of one owner travel as one: a transport pays for every part.
std::vector<Piece> merged(const std::vector<Piece>& pieces) {
  std::vector<Piece> runs;
  for (const Piece& piece : pieces) {
    if (piece.count == 0) continue;
    if (!runs.empty() && runs.back().tensor == piece.tensor &&
        runs.back().begin + runs.back().count == piece.begin) {
      runs.back().count += piece.count;
    } else {
      runs.push_back(piece);
    }
  }
  return runs;
}

Owners merged(const Owners& owners) {
  Owners runs;
  for (const std::vector<Piece>& pieces : owners) runs.push_back(merged(pieces));
  return runs;
}

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

// What belongs to `shard` depends on the path.
void check_shards(const std::vector<ReduceTensor>& tensors, MeanReducer::Path path,
                  const std::vector<Piece>& own, Device device) {
  std::vector<std::int64_t> owned(tensors.size(), 0);
  for (const Piece& piece : own) owned[index(piece.tensor)] += piece.count;
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const TensorView& shard = tensors[i].shard;
    if (path == MeanReducer::Path::two_shot) {
      require(shard.empty(), "MeanReducer: tensor ", i,
              " has a shard; two_shot puts the mean where the gradient was");
      continue;
    }
    if (shard.empty() && owned[i] == 0) continue;
    check_tensor("MeanReducer (shard)", i, shard, device);
    require(shard.dtype == DType::f32, "MeanReducer: the shard of tensor ", i, " is ",
            name_of(shard.dtype), "; it must be f32");
    require(shard.numel() == owned[i], "MeanReducer: the shard of tensor ", i, " has ",
            shard.numel(), " elements but this rank owns ", owned[i]);
  }
}

}  // namespace

MeanReducer::MeanReducer(Communicator& comm, Path path, const std::vector<ReduceTensor>& tensors,
                         TensorScale* scales, const Owners& owners, int bucket)
    : comm_(comm),
      path_(path),
      name_{path == Path::sharded ? "sharded" : "two_shot", bucket},
      scales_(scales) {
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
  args_.out_dtype = path == Path::sharded ? DType::f32 : args_.dtype;
  args_.tensor_count = static_cast<std::int64_t>(tensors.size());
  // All ranks' scales, then, for two_shot on one rank, those of the means, which it does not adopt.
  const bool keeps_scales = comm.size() == 1 && path == Path::two_shot;
  const std::size_t blocks = static_cast<std::size_t>(comm.size()) + (keeps_scales ? 1 : 0);
  gathered_ = Buffer(ctx, blocks * tensors.size() * sizeof(TensorScale));
  args_.scales = gathered_.as<TensorScale>();
  args_.mean_scales = keeps_scales ? gathered_.as<TensorScale>() + tensors.size() : scales;
  if (keeps_scales) return;

  const Owners runs = merged(owners);
  plan_pieces(tensors, runs[rank]);
  plan_parts(tensors, runs);
}

// Where this rank's pieces lie: its own contribution, the peers' in staging, and the mean.
void MeanReducer::plan_pieces(const std::vector<ReduceTensor>& tensors,
                              const std::vector<Piece>& own) {
  std::vector<MeanPiece> pieces;
  std::vector<std::int64_t> local(tensors.size(), 0);
  std::size_t staged = 0;
  for (const Piece& piece : own) {
    const ReduceTensor& tensor = tensors[index(piece.tensor)];
    MeanPiece entry;
    entry.tensor = piece.tensor;
    entry.count = piece.count;
    entry.own = address_of(tensor.gradient, piece.begin);
    entry.staged = static_cast<std::int64_t>(staged);
    entry.out = path_ == Path::sharded ? address_of(tensor.shard, local[index(piece.tensor)])
                                       : address_of(tensor.gradient, piece.begin);
    local[index(piece.tensor)] += piece.count;
    staged += aligned(bytes_of(piece, args_.dtype));
    pieces.push_back(entry);
  }
  const Context& ctx = comm_.context();
  pieces_ = upload_sync<MeanPiece>(ctx, std::span<const MeanPiece>(pieces));
  if (args_.ranks > 1) staging_ = Buffer(ctx, staged * static_cast<std::size_t>(args_.ranks));
  args_.pieces = pieces_.as<MeanPiece>();
  args_.piece_count = static_cast<std::int64_t>(pieces.size());
  args_.staging = staging_.data();
  args_.stride = static_cast<std::int64_t>(staged);
}

void MeanReducer::plan_parts(const std::vector<ReduceTensor>& tensors, const Owners& owners) {
  for (int peer = 0; peer < args_.ranks; ++peer) {
    if (peer == args_.rank) continue;
    for (const Piece& piece : owners[static_cast<std::size_t>(peer)]) {
      const TensorView& gradient = tensors[index(piece.tensor)].gradient;
      sends_.push_back({address_of(gradient, piece.begin), bytes_of(piece, gradient.dtype), peer});
    }
    auto* block = staging_.as<char>() + peer * args_.stride;
    for (const Piece& piece : owners[static_cast<std::size_t>(args_.rank)]) {
      const std::size_t bytes = bytes_of(piece, args_.dtype);
      recvs_.push_back({block, bytes, peer});
      block += aligned(bytes);
    }
  }
  if (path_ == Path::two_shot) {
    plan_gather(gradients_of(tensors), owners, args_.rank, gather_sends_, gather_recvs_);
  }
  payload_ = total_bytes(sends_) + total_bytes(gather_sends_);
}

void MeanReducer::run(std::uint32_t* nonfinite) {
  require(nonfinite != nullptr, "MeanReducer::run: nonfinite is null; it must be a device word");
  comm_.check();
  if (args_.tensor_count == 0) return;
  const CollectiveScope scope(comm_, name_);
  const Context& ctx = comm_.context();
  MeanArgs args = args_;
  args.nonfinite = nonfinite;
  comm_.all_gather(scales_, gathered_.data(),
                   static_cast<std::size_t>(args.tensor_count) * sizeof(TensorScale));
  mean_scales(ctx, args);
  if (args.mean_scales != scales_) {
    max_amax(ctx, args.mean_scales, 1, args.tensor_count, scales_);
    return;
  }
  if (args.ranks > 1) comm_.exchange(sends_, recvs_);
  reduce_mean(ctx, args);
  if (path_ == Path::two_shot) comm_.exchange(gather_sends_, gather_recvs_);
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
  if (traffic_ == Traffic::payload) payload_ = total_bytes(sends_);
}

void PieceGather::run() {
  comm_.check();
  if (comm_.size() == 1) return;
  const CollectiveScope scope(comm_, {"all_gather"});
  comm_.exchange(sends_, recvs_, traffic_);
}

}  // namespace octet
