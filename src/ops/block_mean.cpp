// SPDX-License-Identifier: Apache-2.0
#include "octet/ops/block_mean.hpp"

#include "backend.hpp"

namespace octet {
namespace {

void check_table(const char* op, std::int64_t count, const void* pieces, const void* scales) {
  require(count >= 0, op, ": there are ", count, " pieces; the count must not be negative");
  require(count == 0 || pieces != nullptr, op, ": the table of ", count, " pieces is null");
  require(count == 0 || scales != nullptr, op, ": the packed scales of ", count,
          " pieces are null");
}

}  // namespace

void pack_block_scales(const Context& ctx, const BlockScalePiece* pieces, std::int64_t count,
                       float* packed) {
  check_table("pack_block_scales", count, pieces, packed);
  if (count != 0) detail::backend_of(ctx).pack_block_scales(ctx, pieces, count, packed);
}

void unpack_block_scales(const Context& ctx, const BlockScalePiece* pieces, std::int64_t count,
                         const float* packed) {
  check_table("unpack_block_scales", count, pieces, packed);
  if (count != 0) detail::backend_of(ctx).unpack_block_scales(ctx, pieces, count, packed);
}

void block_mean(const Context& ctx, const BlockMeanArgs& args) {
  check_table("block_mean", args.piece_count, args.pieces, args.own_scales);
  require(args.ranks >= 1, "block_mean: ranks is ", args.ranks, "; it must be at least 1");
  require(args.rank >= 0 && args.rank < args.ranks, "block_mean: rank is ", args.rank,
          "; it must be within [0, ", args.ranks, ")");
  require(args.out_dtype == DType::f32 || args.out_dtype == DType::e4m3,
          "block_mean: the output is ", name_of(args.out_dtype), "; allowed are f32, e4m3");
  if (args.piece_count == 0) return;
  require(args.ranks == 1 || (args.staging != nullptr && args.staged_scales != nullptr),
          "block_mean: staging or staged_scales is null for ", args.ranks, " ranks");
  require(args.amaxes != nullptr, "block_mean: amaxes is null for ", args.piece_count, " pieces");
  detail::backend_of(ctx).block_mean(ctx, args);
}

void merge_amaxes(const Context& ctx, const std::uint32_t* gathered, int ranks, std::int64_t count,
                  TensorScale* scales, std::uint32_t* nonfinite) {
  require(ranks >= 1, "merge_amaxes: ranks is ", ranks, "; it must be at least 1");
  require(count >= 0, "merge_amaxes: count is ", count, "; it must not be negative");
  require(gathered != nullptr && nonfinite != nullptr && (count == 0 || scales != nullptr),
          "merge_amaxes: gathered, scales or nonfinite is null for ", count, " tensors");
  detail::backend_of(ctx).merge_amaxes(ctx, gathered, ranks, count, scales, nonfinite);
}

}  // namespace octet
