// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "linear_impl.hpp"
#include "ops/cast_checks.hpp"

namespace octet {
namespace {

using detail::named, detail::scales_of;
using DTypes = std::initializer_list<DType>;

constexpr DTypes kWide = {DType::f32, DType::bf16, DType::f16};
constexpr DTypes kStored = {DType::f32, DType::bf16};

/// What GEMMs ask of every pointer.
constexpr std::uintptr_t kAlignment = 16;

std::string names_of(DTypes dtypes) {
  std::string text;
  for (DType dtype : dtypes) text += (text.empty() ? "" : ", ") + std::string(name_of(dtype));
  return text;
}

bool contains(DTypes dtypes, DType dtype) {
  return std::find(dtypes.begin(), dtypes.end(), dtype) != dtypes.end();
}

}  // namespace

void check_linear_config(const LinearConfig& c) {
  const auto at_least_zero = [](const char* name, std::int64_t value) {
    require(value >= 0, "Linear: ", name, " is ", value, "; it must not be negative");
  };
  at_least_zero("in_features", c.in_features);
  at_least_zero("out_features", c.out_features);
  at_least_zero("max_tokens", c.max_tokens);
  require(c.recipe <= Fp8Recipe::mxfp8, "Linear: recipe is ", static_cast<int>(c.recipe),
          "; it must be delayed, tensorwise, blockwise or mxfp8");
  require(!c.format || *c.format <= Fp8Format::e4m3, "Linear: format is ",
          static_cast<int>(c.format.value_or(Fp8Format::e4m3)), "; it must be hybrid or e4m3");
  require(c.weight_dtype == DType::e4m3 || contains(kWide, c.weight_dtype),
          "Linear: weight_dtype is ", name_of(c.weight_dtype), "; e4m3, ", names_of(kWide),
          " are allowed");
  require(c.forward_accumulation <= Accumulation::fast, "Linear: forward_accumulation is ",
          static_cast<int>(c.forward_accumulation), "; it must be promoted or fast");
  const LinearConfig usual;
  require(
      c.fp8 || (c.recipe == usual.recipe && !c.format && c.counters == nullptr &&
                c.forward_accumulation == usual.forward_accumulation),
      "Linear: fp8 is false; recipe, format, forward_accumulation and counters are for FP8 GEMMs "
      "and must be left as they are");
}

void Linear::Impl::check(const char* what, const TensorView& view, Shape shape,
                         DTypes allowed) const {
  require(view.shape == shape, "Linear: ", what, " has shape ", view.shape, "; it must be ", shape);
  if (!contains(allowed, view.dtype)) {  // no text is made unless it is needed
    fail("Linear: ", what, " is ", name_of(view.dtype), "; ", names_of(allowed),
         allowed.size() == 1 ? " is" : " are", " allowed");
  }
  require(view.device == ctx.device(), "Linear: ", what, " is on ", view.device, "; it must be on ",
          ctx.device());
  require(!view.empty() || view.numel() == 0, "Linear: ", what, " of shape ", shape,
          " has no memory");
  require(reinterpret_cast<std::uintptr_t>(view.data) % kAlignment == 0, "Linear: ", what,
          " is at ", view.data, "; it must be aligned to ", kAlignment, " bytes");
}

void Linear::Impl::check_weight(const ScaledView& weight, const BlockScaledView& blocks) const {
  if (!blocks.data.empty()) {
    require(weight.data.empty(), "Linear: the weight and block_weight are both given");
    return check_block_weight("block_weight", blocks, {config.out_features, config.in_features});
  }
  check("the weight", weight.data, {config.out_features, config.in_features},
        {config.weight_dtype});
  require(config.weight_dtype != DType::e4m3 || weight.scale != nullptr,
          "Linear: the weight is e4m3 and has no scale");
}

void Linear::Impl::check_block_weight(const char* what, const BlockScaledView& view,
                                      Shape shape) const {
  require(config.fp8 && config.recipe == Fp8Recipe::blockwise && config.weight_dtype == DType::e4m3,
          "Linear: ", what, " is given; it is for the recipe blockwise with weight_dtype e4m3");
  check(what, view.data, shape, {DType::e4m3});
  require(view.granularity == w_granularity(), "Linear: ", what, " has scales per ",
          name_of(view.granularity), "; they must be per ", name_of(w_granularity()));
  require(view.scales != nullptr, "Linear: ", what, " has no scales");
  require(reinterpret_cast<std::uintptr_t>(view.scales) % kAlignment == 0, "Linear: the scales of ",
          what, " are at ", view.scales, "; they must be aligned to ", kAlignment, " bytes");
}

/// The caller's transposed copies of the weight.
void Linear::Impl::check_transposed(const LinearBackward& args) const {
  const std::int64_t k = config.in_features, n = config.out_features;
  const bool has_blocks = !args.block_weight.data.empty();
  const auto check_rows = [n](const char* what) {
    require(n % 16 == 0, "Linear: ", what, " is given, but out_features is ", n,
            "; it must be a multiple of 16");
  };
  if (!args.weight_transposed.empty()) {
    require(config.fp8 && config.weight_dtype == DType::e4m3 && !has_blocks,
            "Linear: weight_transposed is given; it is for e4m3 weights with one scale in FP8 "
            "GEMMs");
    check_rows("weight_transposed");
    check("weight_transposed", args.weight_transposed, {k, n}, {DType::e4m3});
  }
  if (!args.block_weight_transposed.data.empty()) {
    require(has_blocks, "Linear: block_weight_transposed is given, but no block_weight");
    check_rows("block_weight_transposed");
    check_block_weight("block_weight_transposed", args.block_weight_transposed, {k, n});
  }
}

void Linear::Impl::check(const LinearForward& args) const {
  const std::int64_t count = args.x.shape.rank() == 2 ? args.x.shape[0] : 0;
  check("x", args.x, {count, config.in_features}, kWide);
  require(count <= config.max_tokens, "Linear: x has ", count, " tokens; at most ",
          config.max_tokens, " (max_tokens) are allowed");
  check_weight(args.weight, args.block_weight);
  if (config.bias) {
    check("the bias", args.bias, {config.out_features}, kWide);
  } else {
    require(args.bias.empty(), "Linear: a bias is given, but the configuration has none");
  }
  check("y", args.y, {count, config.out_features}, kStored);
}

void Linear::Impl::check(const LinearBackward& args, std::int64_t count) const {
  const std::int64_t k = config.in_features, n = config.out_features;
  check("dy", args.dy, {count, n}, kWide);
  check_weight(args.weight, args.block_weight);
  check_transposed(args);
  require(config.gelu || !args.dy_of_pre_activation,
          "Linear: dy_of_pre_activation is for a configuration with gelu");
  if (!args.dx.empty()) check("dx", args.dx, {count, k}, kStored);
  if (!args.input_pre_activation.empty()) {
    require(!args.dx.empty(), "Linear: input_pre_activation is given, but no dx");
    check("input_pre_activation", args.input_pre_activation, {count, k}, {DType::bf16});
  }
  if (!args.dw.data.empty()) {
    check("dw", args.dw.data, {n, k}, {DType::f32, DType::bf16, DType::e4m3});
    const bool codes = args.dw.data.dtype == DType::e4m3;
    require(!codes || args.dw.scale != nullptr, "Linear: dw is e4m3 and has no scale");
    require(!codes || !args.accumulate,
            "Linear: dw is e4m3; accumulate needs f32 or bf16, because a sum of rounded sums has "
            "no scale that fits both");
  }
  if (!args.dbias.empty()) check("dbias", args.dbias, {n}, kStored);
}

void Linear::Impl::check_memory(const LinearForward& args) const {
  detail::check_apart(
      "Linear", {named("y", args.y)},
      {named("x", args.x), named("the weight", args.weight.data),
       named("block_weight", args.block_weight.data),
       scales_of("the scales of block_weight", args.block_weight), named("the bias", args.bias)});
}

void Linear::Impl::check_memory(const LinearBackward& args) const {
  detail::check_apart(
      "Linear", {named("dx", args.dx), named("dw", args.dw.data), named("dbias", args.dbias)},
      {named("dy", args.dy), named("the weight", args.weight.data),
       named("block_weight", args.block_weight.data),
       scales_of("the scales of block_weight", args.block_weight),
       named("weight_transposed", args.weight_transposed),
       named("block_weight_transposed", args.block_weight_transposed.data),
       scales_of("the scales of block_weight_transposed", args.block_weight_transposed),
       named("input_pre_activation", args.input_pre_activation)});
}

}  // namespace octet
