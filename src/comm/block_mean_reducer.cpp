// SPDX-License-Identifier: Apache-2.0
#include "octet/comm/block_mean_reducer.hpp"

#include "comm/owners.hpp"
#include "octet/core/detail/block_scaling.hpp"

namespace octet {
namespace {

using Path = MeanReducer::Path;
using detail::ScaleLayout;

std::size_t at(std::int64_t i) { return static_cast<std::size_t>(i); }

std::int64_t columns_of(const BlockReduceTensor& tensor) { return tensor.gradient.data.shape[1]; }
std::int64_t blocks_across(const BlockReduceTensor& tensor) {
  return (columns_of(tensor) + 127) / 128;
}
std::int64_t rows_of(const Piece& piece, const BlockReduceTensor& tensor) {
  return piece.count / columns_of(tensor);
}
std::uint8_t* codes_of(const BlockReduceTensor& tensor, const Piece& piece) {
  return tensor.gradient.data.as<std::uint8_t>() + piece.begin;
}

void check_gradients(const std::vector<BlockReduceTensor>& tensors, Device device) {
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const BlockScaledView& gradient = tensors[i].gradient;
    require(gradient.data.dtype == DType::e4m3, "BlockMeanReducer: gradient ", i, " is ",
            name_of(gradient.data.dtype), "; it must be e4m3");
    require(gradient.data.shape.rank() == 2, "BlockMeanReducer: gradient ", i, " has shape ",
            gradient.data.shape, "; blocks need a matrix");
    require(gradient.granularity == Granularity::row_block, "BlockMeanReducer: gradient ", i,
            " has scales per ", name_of(gradient.granularity), "; it must be row_block");
    require(gradient.data.device == device, "BlockMeanReducer: gradient ", i, " is on ",
            gradient.data.device, " but the communicator is on ", device);
    require(gradient.data.numel() == 0 || (!gradient.data.empty() && gradient.scales != nullptr),
            "BlockMeanReducer: gradient ", i, " of shape ", gradient.data.shape,
            " has a null pointer for its codes or its scales");
  }
}

std::vector<TensorView> codes_of(const std::vector<BlockReduceTensor>& tensors, Device device) {
  check_gradients(tensors, device);
  std::vector<TensorView> codes;
  for (const BlockReduceTensor& tensor : tensors) codes.push_back(tensor.gradient.data);
  return codes;
}

void check_rows(const std::vector<BlockReduceTensor>& tensors, const Owners& owners) {
  for (std::size_t r = 0; r < owners.size(); ++r) {
    for (const Piece& piece : owners[r]) {
      if (piece.count == 0) continue;
      const std::int64_t columns = columns_of(tensors[at(piece.tensor)]);
      require(piece.begin % columns == 0 && piece.count % columns == 0,
              "BlockMeanReducer: a piece of rank ", r, " begins at element ", piece.begin,
              " of tensor ", piece.tensor, " and has ", piece.count, "; rows have ", columns,
              " and pieces are whole rows, so that a block of 128 has one owner");
    }
  }
}

void check_shards(const std::vector<BlockReduceTensor>& tensors, Path path,
                  const std::vector<Piece>& own, Device device) {
  const std::vector<std::int64_t> owned = numels_by_tensor(own, tensors.size());
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const TensorView& shard = tensors[i].shard;
    if (path == Path::two_shot) {
      require(shard.empty(), "BlockMeanReducer: tensor ", i,
              " has a shard; two_shot puts the mean where the gradient was");
      continue;
    }
    if (shard.empty() && owned[i] == 0) continue;
    require(!shard.empty() && shard.dtype == DType::f32 && shard.numel() == owned[i] &&
                shard.device == device,
            "BlockMeanReducer: the shard of tensor ", i, " is ", name_of(shard.dtype), " ",
            shard.shape, " on ", shard.device, " at ", shard.data, "; it must be f32 with the ",
            owned[i], " elements that this rank owns, on ", device);
  }
}

}  // namespace

BlockMeanReducer::BlockMeanReducer(Communicator& comm, Path path,
                                   const std::vector<BlockReduceTensor>& tensors,
                                   TensorScale* scales, const Owners& owners, int bucket)
    : comm_(comm),
      path_(path),
      name_{path == Path::sharded ? "sharded" : "two_shot", bucket},
      scales_(scales),
      tensor_count_(static_cast<std::int64_t>(tensors.size())),
      gather_(comm, codes_of(tensors, comm.context().device()), owners) {
  const Context& ctx = comm.context();
  const auto rank = at(comm.rank());
  require(path != Path::contributions,
          "BlockMeanReducer: the path is contributions; it must be two_shot or sharded");
  check_rows(tensors, owners);
  check_shards(tensors, path, owners[rank], ctx.device());
  require(scales != nullptr || tensors.empty(), "BlockMeanReducer: scales is null for ",
          tensors.size(), " tensors");
  if (tensors.empty()) return;

  args_.ranks = comm.size();
  args_.rank = comm.rank();
  args_.out_dtype = path == Path::sharded ? DType::f32 : DType::e4m3;
  words_ = Buffer(ctx, (tensors.size() + 1) * sizeof(std::uint32_t));
  gathered_ = Buffer(ctx, words_.bytes() * at(comm.size()));
  args_.amaxes = words_.as<std::uint32_t>();
  const Owners runs = merged(owners);
  plan_scales(tensors, runs);
  plan_pieces(tensors, runs[rank]);
  plan_parts(tensors, runs);
}

// All scales in the order of the owners: what a rank has for another, or gives to all, is one run.
void BlockMeanReducer::plan_scales(const std::vector<BlockReduceTensor>& tensors,
                                   const Owners& runs) {
  std::vector<BlockScalePiece> table;
  std::int64_t packed = 0;
  for (const std::vector<Piece>& pieces : runs) {
    sections_.push_back(packed);
    for (const Piece& piece : pieces) {
      const BlockReduceTensor& tensor = tensors[at(piece.tensor)];
      const Shape& shape = tensor.gradient.data.shape;
      const ScaleLayout layout =
          detail::scale_layout(Granularity::row_block, MxLayout::compact, shape[0], shape[1]);
      auto* first = static_cast<float*>(tensor.gradient.scales) +
                    layout.at(piece.begin / columns_of(tensor), 0);
      const std::int64_t rows = rows_of(piece, tensor);
      table.push_back({first, layout.pitch, rows, blocks_across(tensor), packed});
      packed += rows * blocks_across(tensor);
    }
  }
  sections_.push_back(packed);
  require(packed < std::int64_t{1} << 31, "BlockMeanReducer: the tensors have ", packed,
          " blocks; fewer than 2^31 are allowed");
  const Context& ctx = comm_.context();
  scale_table_ = upload_sync<BlockScalePiece>(ctx, std::span<const BlockScalePiece>(table));
  scale_pieces_ = static_cast<std::int64_t>(table.size());
  packed_ = Buffer(ctx, at(packed) * sizeof(float));
  args_.own_scales = packed_.as<float>() + sections_[at(args_.rank)];
}

// Where this rank's pieces lie: its own codes, the peers' in staging, and the mean.
void BlockMeanReducer::plan_pieces(const std::vector<BlockReduceTensor>& tensors,
                                   const std::vector<Piece>& own) {
  std::vector<BlockMeanPiece> pieces;
  std::vector<std::int64_t> local(tensors.size(), 0);
  std::int64_t staged = 0, packed = 0;
  for (const Piece& piece : own) {
    const BlockReduceTensor& tensor = tensors[at(piece.tensor)];
    std::int64_t& shard_begin = local[at(piece.tensor)];
    BlockMeanPiece entry;
    entry.tensor = piece.tensor;
    entry.rows = rows_of(piece, tensor);
    entry.columns = columns_of(tensor);
    entry.own = codes_of(tensor, piece);
    entry.staged = staged;
    entry.packed = packed;
    entry.out = codes_of(tensor, piece);
    if (path_ == Path::sharded) entry.out = tensor.shard.as<float>() + shard_begin;
    pieces.push_back(entry);
    shard_begin += piece.count;
    staged += (piece.count + 15) / 16 * 16;  // every piece starts where wide loads can
    packed += entry.rows * blocks_across(tensor);
  }
  const Context& ctx = comm_.context();
  pieces_ = upload_sync<BlockMeanPiece>(ctx, std::span<const BlockMeanPiece>(pieces));
  if (args_.ranks > 1) {
    staging_ = Buffer(ctx, at(staged) * at(args_.ranks));
    staged_scales_ = Buffer(ctx, at(packed) * sizeof(float) * at(args_.ranks));
  }
  args_.pieces = pieces_.as<BlockMeanPiece>();
  args_.piece_count = static_cast<std::int64_t>(pieces.size());
  args_.staging = staging_.data();
  args_.stride = staged;
  args_.staged_scales = staged_scales_.as<float>();
  args_.scale_stride = packed;
}

void BlockMeanReducer::plan_parts(const std::vector<BlockReduceTensor>& tensors,
                                  const Owners& runs) {
  const auto rank = at(args_.rank);
  const auto section = [&](int r) { return packed_.as<float>() + sections_[at(r)]; };
  const auto section_bytes = [&](int r) {
    return at(sections_[at(r) + 1] - sections_[at(r)]) * sizeof(float);
  };
  for (int peer = 0; peer < args_.ranks; ++peer) {
    if (peer == args_.rank) continue;
    for (const Piece& piece : runs[at(peer)]) {
      const std::uint8_t* codes = codes_of(tensors[at(piece.tensor)], piece);
      code_sends_.push_back({codes, at(piece.count), peer});
      payload_ += at(piece.count);
    }
    auto* block = staging_.as<std::uint8_t>() + peer * args_.stride;
    for (const Piece& piece : runs[rank]) {
      code_recvs_.push_back({block, at(piece.count), peer});
      block += (piece.count + 15) / 16 * 16;
    }
    auto* staged_scales = staged_scales_.as<float>() + peer * args_.scale_stride;
    scale_sends_.push_back({section(peer), section_bytes(peer), peer});
    scale_recvs_.push_back({staged_scales, section_bytes(args_.rank), peer});
    scale_gather_sends_.push_back({section(args_.rank), section_bytes(args_.rank), peer});
    scale_gather_recvs_.push_back({section(peer), section_bytes(peer), peer});
  }
  if (path_ == Path::two_shot) payload_ += gather_.payload_bytes();
}

void BlockMeanReducer::run(std::uint32_t* nonfinite) {
  require(nonfinite != nullptr,
          "BlockMeanReducer::run: nonfinite is null; it must be a device word");
  comm_.check();
  if (tensor_count_ == 0) return;
  const CollectiveScope scope(comm_, name_);
  const Context& ctx = comm_.context();
  const auto* table = scale_table_.as<BlockScalePiece>();
  pack_block_scales(ctx, table, scale_pieces_, packed_.as<float>());
  if (args_.ranks > 1) {
    comm_.exchange(code_sends_, code_recvs_);
    comm_.exchange(scale_sends_, scale_recvs_, Traffic::metadata);
  }

  zero_bytes(ctx, words_.data(), words_.bytes());
  block_mean(ctx, args_);
  copy_bytes(ctx, args_.amaxes + tensor_count_, nonfinite, sizeof(*nonfinite));
  comm_.all_gather(words_.data(), gathered_.data(), words_.bytes());
  merge_amaxes(ctx, gathered_.as<std::uint32_t>(), args_.ranks, tensor_count_, scales_, nonfinite);
  if (path_ == Path::sharded) return;

  if (args_.ranks > 1) {
    comm_.exchange(scale_gather_sends_, scale_gather_recvs_, Traffic::metadata);
    gather_.run();
  }
  unpack_block_scales(ctx, table, scale_pieces_, packed_.as<float>());
}

std::size_t BlockMeanReducer::buffer_bytes() const {
  return staging_.bytes() + staged_scales_.bytes() + packed_.bytes() + pieces_.bytes() +
         scale_table_.bytes() + words_.bytes() + gathered_.bytes();
}

}  // namespace octet
