// SPDX-License-Identifier: Apache-2.0
// The state of a tensor before the first step; the CPU loop and the CUDA kernels call these.
#pragma once

#include "octet/ops/detail/adamw_tiles.hpp"

namespace octet::detail {

/// Scale that holds values up to amax, with the amax of what will be stored; `maximum` 0 is a
/// format without a scale.
OCTET_HD inline TensorScale initial_scale(float maximum, float amax) {
  TensorScale scale;
  if (maximum != 0.0f && is_finite_bits(magnitude_bits(amax))) {
    scale.scale = power_of_two_scale(amax, maximum);
    scale.scale_inv = inverse_of_power_of_two(scale.scale);
  }
  scale.amax = amax;
  return scale;
}

/// How the initial state of a tensor is encoded, from its scales.
OCTET_HD inline AdamwTensorStep initial_step(const AdamwTensor& tensor) {
  AdamwTensorStep s;
  s.master_scale = tensor.master_scale->scale;
  s.master_scale_inv = tensor.master_scale->scale_inv;
  s.weight_scale = tensor.weight_scale->scale;
  s.weight_scale_inv = tensor.weight_scale->scale_inv;
  return s;
}

/// Writes the scales of a tensor whose initial values have this amax.
OCTET_HD inline void initialise_scales(const AdamwTensor& tensor, float amax) {
  const StateFormats& f = tensor.formats;
  *tensor.master_scale = initial_scale(scaled_max(f.master), amax);
  const std::uint32_t largest = nearest_code(f.master, amax * tensor.master_scale->scale);
  const float stored = decode_state(f.master, largest) * tensor.master_scale->scale_inv;
  // A NaN or an infinity stays visible; a format with a scale could not show it.
  const bool finite = is_finite_bits(magnitude_bits(amax));
  tensor.master_scale->amax = finite ? stored : amax;
  // The weight's scale follows from the rounded master; the halves of a split master share one.
  *tensor.weight_scale = f.master == StateFormat::split
                             ? *tensor.master_scale
                             : initial_scale(scaled_max(f.weight), tensor.master_scale->amax);
  if (finite) {
    const AdamwAmax amaxes{.master = largest};
    tensor.weight_scale->amax = bits_float(amax_of_weight(f, initial_step(tensor), amaxes));
  }
  *tensor.m_scale = TensorScale{};
  *tensor.v_scale = TensorScale{};
}

/// Code of element i of the initial master, rounded to nearest.
OCTET_HD inline std::uint32_t initial_master(const AdamwTensor& tensor, const TensorView& values,
                                             std::int64_t i) {
  return nearest_code(tensor.formats.master,
                      load_element(values.data, values.dtype, i) * tensor.master_scale->scale);
}

/// Element `whole` of the values as element `stored` of the initial compute weight; not of one
/// whose blocks have scales, which is cast like that of a step.
OCTET_HD inline void initialise_weight(const AdamwTensor& tensor, const TensorView& values,
                                       std::int64_t whole, std::int64_t stored) {
  const StateFormats& f = tensor.formats;
  if (f.weight == WeightFormat::none) return;
  const std::uint32_t master = initial_master(tensor, values, whole);
  if (f.weight == WeightFormat::f32) {
    static_cast<float*>(tensor.master)[stored] = bits_float(master);
  } else {
    store_weight(tensor, stored,
                 weight_code(f, initial_step(tensor), master, tensor.weight_scale->scale));
  }
}

/// Element `whole` of the values as element `shard` of this rank's states.
OCTET_HD inline void initialise_state(const AdamwTensor& tensor, const TensorView& values,
                                      std::int64_t whole, std::int64_t shard) {
  const StateFormats& f = tensor.formats;
  store_code(tensor.master, size_of(f.master), tensor.master_is_shard ? shard : whole,
             initial_master(tensor, values, whole));
  store_code(tensor.m, size_of(f.m), shard, 0);
  store_code(tensor.v, size_of(f.v), shard, 0);
  if (shard % kStateBlock != 0) return;
  if (is_block(f.m)) tensor.m_blocks[shard / kStateBlock] = block_scale(0.0f).inv;
  if (is_block(f.v)) tensor.v_blocks[shard / kStateBlock] = block_scale(0.0f).inv;
}

}  // namespace octet::detail
