// SPDX-License-Identifier: Apache-2.0
#include "octet/ops/accumulate.hpp"

#include "backend.hpp"
#include "ops/cast_checks.hpp"

namespace octet {

using namespace detail;

void accumulate(const Context& ctx, const AccumulateArgs& args) {
  const TensorView& sum = args.sum.data;
  check_device(ctx, args.in, "accumulate", "the input");
  check_wide(args.in.dtype, "accumulate", "the input");
  check_device(ctx, sum, "accumulate", "the sum");
  require(sum.dtype == DType::f32 || sum.dtype == DType::bf16 || sum.dtype == DType::e4m3,
          "accumulate: the sum is ", name_of(sum.dtype), "; allowed are f32, bf16, e4m3");
  require((sum.dtype == DType::e4m3) == (args.sum.scale != nullptr), "accumulate: the sum is ",
          name_of(sum.dtype), args.sum.scale != nullptr ? " and has a scale" : " without a scale",
          "; e4m3 has one, f32 and bf16 have none");
  require(sum.shape == args.in.shape, "accumulate: the sum has shape ", sum.shape, ", the input ",
          args.in.shape);
  check_apart("accumulate", {named("the input", args.in),
                             named("the sum", sum),
                             {"the scale", args.sum.scale, sizeof(TensorScale)}});
  if (sum.numel() != 0) backend_of(ctx).accumulate(ctx, args);
}

}  // namespace octet
