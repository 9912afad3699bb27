// SPDX-License-Identifier: Apache-2.0
#include "octet/ops/reduce_mean.hpp"

#include "backend.hpp"

namespace octet {
namespace {

void check_common(const MeanArgs& args, const char* op) {
  require(args.ranks >= 1, op, ": ranks is ", args.ranks, "; it must be at least 1");
  require(args.dtype == DType::e4m3 || args.dtype == DType::bf16 || args.dtype == DType::f32, op,
          ": the contributions are ", name_of(args.dtype), "; allowed are e4m3, bf16, f32");
  require(args.out_dtype == DType::f32 || args.out_dtype == args.dtype, op, ": the output is ",
          name_of(args.out_dtype), "; allowed are f32 and the contributions' ",
          name_of(args.dtype));
  require(args.tensor_count >= 0, op, ": tensor_count is ", args.tensor_count,
          "; it must not be negative");
  require(args.tensor_count == 0 || (args.scales != nullptr && args.mean_scales != nullptr), op,
          ": scales or mean_scales is null for ", args.tensor_count, " tensors");
}

}  // namespace

void mean_scales(const Context& ctx, const MeanArgs& args) {
  check_common(args, "mean_scales");
  require(args.nonfinite != nullptr, "mean_scales: nonfinite is null; it must be a device word");
  if (args.tensor_count != 0) detail::backend_of(ctx).mean_scales(ctx, args);
}

void reduce_mean(const Context& ctx, const MeanArgs& args) {
  check_common(args, "reduce_mean");
  require(args.rank >= 0 && args.rank < args.ranks, "reduce_mean: rank is ", args.rank,
          "; it must be within [0, ", args.ranks, ")");
  require(args.piece_count >= 0, "reduce_mean: piece_count is ", args.piece_count,
          "; it must not be negative");
  if (args.piece_count == 0) return;
  require(args.pieces != nullptr, "reduce_mean: pieces is null for ", args.piece_count, " pieces");
  require(args.tensor_count > 0, "reduce_mean: there are ", args.piece_count,
          " pieces but no tensor");
  require(args.ranks == 1 || args.staging != nullptr, "reduce_mean: staging is null for ",
          args.ranks, " ranks");
  require(args.stride >= 0 && args.stride % static_cast<std::int64_t>(size_of(args.dtype)) == 0,
          "reduce_mean: stride is ", args.stride, " bytes; it must be a multiple of the ",
          size_of(args.dtype), " bytes of an element");
  detail::backend_of(ctx).reduce_mean(ctx, args);
}

void max_amax(const Context& ctx, const TensorScale* gathered, int ranks, std::int64_t count,
              TensorScale* out) {
  require(ranks >= 1, "max_amax: ranks is ", ranks, "; it must be at least 1");
  require(count >= 0, "max_amax: count is ", count, "; it must not be negative");
  if (count == 0) return;
  require(gathered != nullptr && out != nullptr, "max_amax: gathered or out is null for ", count,
          " scales");
  detail::backend_of(ctx).max_amax(ctx, gathered, ranks, count, out);
}

}  // namespace octet
