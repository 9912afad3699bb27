// SPDX-License-Identifier: Apache-2.0
#include "octet/ops/sum_codes.hpp"

#include "backend.hpp"

namespace octet {
namespace {

void check_ranks(const char* op, int ranks, int rank) {
  require(ranks >= 1, op, ": ranks is ", ranks, "; it must be at least 1");
  require(rank >= 0 && rank < ranks, op, ": rank is ", rank, "; it must be within [0, ", ranks,
          ")");
}

void check_sum(const char* op, const SumArgs& args) {
  check_ranks(op, args.ranks, args.rank);
  require(args.tensor_count >= 0, op, ": tensor_count is ", args.tensor_count,
          "; it must not be negative");
  require(args.tensor_count == 0 ||
              (args.tensors != nullptr && args.gathered != nullptr && args.scales != nullptr &&
               args.packed != nullptr && args.saturated != nullptr && args.nonfinite != nullptr),
          op, ": tensors, gathered, scales, packed, saturated or nonfinite is null for ",
          args.tensor_count, " tensors");
}

}  // namespace

void sum_scales(const Context& ctx, const SumArgs& args) {
  check_sum("sum_scales", args);
  if (args.tensor_count != 0) detail::backend_of(ctx).sum_scales(ctx, args);
}

void requantise_codes(const Context& ctx, const SumArgs& args) {
  check_sum("requantise_codes", args);
  if (args.tensor_count != 0) detail::backend_of(ctx).requantise_codes(ctx, args);
}

void take_sums(const Context& ctx, const SumArgs& args) {
  check_sum("take_sums", args);
  if (args.tensor_count != 0) detail::backend_of(ctx).take_sums(ctx, args);
}

void add_codes(const Context& ctx, std::uint8_t* own, std::int64_t count,
               const std::uint8_t* staging, std::int64_t stride, int ranks, int rank) {
  check_ranks("add_codes", ranks, rank);
  require(count >= 0, "add_codes: count is ", count, "; it must not be negative");
  require(stride >= count, "add_codes: stride is ", stride, " for ", count, " codes");
  if (count == 0 || ranks == 1) return;
  require(own != nullptr && staging != nullptr, "add_codes: own or staging is null for ", count,
          " codes");
  detail::backend_of(ctx).add_codes(ctx, own, count, staging, stride, ranks, rank);
}

void update_auto_scale(const Context& ctx, AutoScaleState* state, int ranks) {
  check_ranks("update_auto_scale", ranks, 0);
  require(state != nullptr, "update_auto_scale: state is null");
  detail::backend_of(ctx).update_auto_scale(ctx, state, ranks);
}

}  // namespace octet
