// SPDX-License-Identifier: Apache-2.0
#include "octet/ops/adamw.hpp"

#include <sstream>

#include "octet/ops/adamw_rows.hpp"

#include "backend.hpp"

namespace octet {
namespace {

// The update's kernel has 64 threads a block, which load both a word each.
static_assert(sizeof(AdamwTensor) + sizeof(AdamwTensorStep) <= 64 * 4);

void check(const AdamwArgs& args, const char* op) {
  require(args.tensor_count >= 0 && args.segment_count >= 0, op, ": ", args.tensor_count,
          " tensors and ", args.segment_count, " segments; counts must not be negative");
  require(args.tensor_count == 0 ||
              (args.tensors != nullptr && args.scalars != nullptr && args.steps != nullptr),
          op, ": tensors, scalars and steps must all be given");
  require(args.tensor_count == 0 ||
              (args.groups != nullptr && args.group_scalars != nullptr && args.group_count > 0),
          op, ": groups and group_scalars must both be given");
  require(args.segment_count == 0 || args.segments != nullptr, op,
          ": the segment table is missing");
  require(!args.sums_contributions || args.tensor_count == 0 || args.exchanges != nullptr, op,
          ": sums_contributions is true but exchanges is missing");
  require(!args.config.amsgrad, op, ": amsgrad is true; it must be false");
}

}  // namespace

std::string reason_for_general_code(const AdamwTensor& tensor, const AdamWConfig& config,
                                    const AdamwHyper& hyper, const AdamwExchange* exchange) {
  const StateFormats& f = tensor.formats;
  const bool sums = exchange != nullptr && exchange->ranks > 0;
  const DType gradient = sums ? exchange->dtype : tensor.gradient_dtype;
  if (adamw_row_of(gradient, f) == 0 || (exchange != nullptr && !is_exchanged(f))) {
    std::ostringstream text;
    text << "kAdamwRows has no row of weight " << name_of(f.weight) << ", master "
         << name_of(f.master) << ", m " << name_of(f.m) << ", v " << name_of(f.v) << ", gradient "
         << name_of(gradient);
    if (exchange != nullptr) text << " that exchanges with other ranks";
    return text.str();
  }
  if (exchange != nullptr && !is_fit_for_row(*exchange)) {
    std::ostringstream text;
    if (!exchange->is_aligned) return "a contribution or a copy is not aligned to 16 bytes";
    text << exchange->ranks << " ranks contribute and the weight has " << exchange->copy_count
         << " copies; fast are up to " << kMaxRowRanks << " of each";
    return text.str();
  }
  if (!config.stochastic_rounding) return "stochastic_rounding is false";
  if (!config.decoupled_weight_decay && hyper.weight_decay != 0.0f) {
    return "decoupled_weight_decay is false";
  }
  if (hyper.eps < kSmallestEpsForRow) return "eps is below 2^-44";
  if (!is_aligned_for_row(tensor)) return "a buffer is not aligned to 16 bytes";
  if (!is_shaped_for_row(tensor)) {
    std::ostringstream text;
    text << "the weight has " << tensor.rows << " rows and " << tensor.columns
         << " columns; fast are 128 rows or more"
         << (is_transposed(f.weight) ? ", a multiple of 8," : "")
         << " and a multiple of 128 columns up to 2^23";
    return text.str();
  }
  return {};
}

void adamw_initialise(const Context& ctx, const AdamwInit& init) {
  const TensorView& values = init.values;
  require(!is_fp8(values.dtype), "adamw_initialise: the values are ", name_of(values.dtype),
          "; allowed are f32, bf16, f16");
  require(values.numel() == 0 || values.data != nullptr,
          "adamw_initialise: the values have a null pointer");
  require(values.device == ctx.device(), "adamw_initialise: the values are on ", values.device,
          " but the context is on ", ctx.device());
  for (std::int64_t p = 0; p < init.piece_count; ++p) {
    const Piece& piece = init.pieces[p];
    require(piece.begin >= 0 && piece.count >= 0 && piece.begin + piece.count <= values.numel(),
            "adamw_initialise: a piece covers elements ", piece.begin, " to ",
            piece.begin + piece.count, " of ", values.numel());
  }
  detail::backend_of(ctx).adamw_initialise(ctx, init);
}

void adamw_measure(const Context& ctx, const AdamwArgs& args, float* sums) {
  check(args, "adamw_measure");
  require(args.segment_count == 0 || sums != nullptr, "adamw_measure: no place for the sums");
  require(!args.sums_contributions,
          "adamw_measure: sums_contributions is true; the norm needs the means in a buffer");
  if (args.segment_count != 0) detail::backend_of(ctx).adamw_measure(ctx, args, sums);
}

void adamw_prepare(const Context& ctx, const AdamwArgs& args) {
  check(args, "adamw_prepare");
  require(args.scalars != nullptr, "adamw_prepare: the scalars are missing");
  require(args.scratch != nullptr, "adamw_prepare: the scratch is missing");
  require(args.max_norm >= 0.0f, "adamw_prepare: max_norm is ", args.max_norm,
          "; it must be positive, or 0 for no clipping");
  require(args.max_norm == 0.0f || args.total_segments == 0 || args.segment_sums != nullptr,
          "adamw_prepare: max_norm is ", args.max_norm, " but segment_sums is missing");
  require(args.max_norm == 0.0f || !args.sums_contributions, "adamw_prepare: max_norm is ",
          args.max_norm, " and sums_contributions is true; the norm needs the means in a buffer");
  require(args.lr_device != nullptr || args.lr >= 0.0f, "adamw_prepare: lr is ", args.lr,
          "; it must be 0 or more");
  detail::backend_of(ctx).adamw_prepare(ctx, args);
}

void adamw_update(const Context& ctx, const AdamwArgs& args) {
  check(args, "adamw_update");
  if (args.segment_count != 0) detail::backend_of(ctx).adamw_update(ctx, args);
}

}  // namespace octet
