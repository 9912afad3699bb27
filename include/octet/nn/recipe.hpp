// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>

#include "octet/core/block_scales.hpp"
#include "octet/core/dtype.hpp"

namespace octet {

/// How the operands of FP8 GEMMs are scaled, by the names of Megatron-LM's --fp8-recipe. In
/// Transformer Engine they are the recipes DelayedScaling, Float8CurrentScaling,
/// Float8BlockScaling and MXFP8BlockScaling.
enum class Fp8Recipe : std::uint8_t {
  delayed,     ///< a scale per tensor, from the amaxes of the steps before
  tensorwise,  ///< a scale per tensor, from its own amax
  blockwise,   ///< 1x128 of activations and their gradients, 128x128 of weights
  mxfp8        ///< 1x32 of everything, E8M0
};

/// Formats of the operands, by Megatron-LM's --fp8-format.
enum class Fp8Format : std::uint8_t {
  hybrid,  ///< E4M3, but gradients of activations in E5M2
  e4m3     ///< E4M3 throughout
};

constexpr std::string_view name_of(Fp8Recipe recipe) {
  constexpr std::string_view kNames[] = {"delayed", "tensorwise", "blockwise", "mxfp8"};
  return kNames[static_cast<int>(recipe)];
}

constexpr std::string_view name_of(Fp8Format format) {
  return format == Fp8Format::hybrid ? "hybrid" : "e4m3";
}

/// Empty when there is none of this name.
constexpr std::optional<Fp8Recipe> parse_fp8_recipe(std::string_view name) {
  for (Fp8Recipe recipe :
       {Fp8Recipe::delayed, Fp8Recipe::tensorwise, Fp8Recipe::blockwise, Fp8Recipe::mxfp8}) {
    if (name == name_of(recipe)) return recipe;
  }
  return std::nullopt;
}

/// Empty when there is none of this name.
constexpr std::optional<Fp8Format> parse_fp8_format(std::string_view name) {
  for (Fp8Format format : {Fp8Format::hybrid, Fp8Format::e4m3}) {
    if (name == name_of(format)) return format;
  }
  return std::nullopt;
}

/// Whether the recipe has one scale for a whole tensor.
constexpr bool is_per_tensor(Fp8Recipe recipe) {
  return recipe == Fp8Recipe::delayed || recipe == Fp8Recipe::tensorwise;
}

/// What Transformer Engine's recipes take unless told otherwise: a gradient's range needs E5M2
/// where the whole tensor has one scale; blocks have range enough in E4M3.
constexpr Fp8Format default_format(Fp8Recipe recipe) {
  return is_per_tensor(recipe) ? Fp8Format::hybrid : Fp8Format::e4m3;
}

constexpr DType gradient_dtype(Fp8Format format) {
  return format == Fp8Format::hybrid ? DType::e5m2 : DType::e4m3;
}

/// Scales of activations and of their gradients.
constexpr Granularity activation_scales(Fp8Recipe recipe) {
  return is_per_tensor(recipe)            ? Granularity::tensor
         : recipe == Fp8Recipe::blockwise ? Granularity::row_block
                                          : Granularity::mx;
}

constexpr Granularity weight_scales(Fp8Recipe recipe) {
  return recipe == Fp8Recipe::blockwise ? Granularity::tile : activation_scales(recipe);
}

}  // namespace octet
