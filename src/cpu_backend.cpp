// SPDX-License-Identifier: Apache-2.0
#include "backend.hpp"
#include "gemm/cpu_gemm.hpp"
#include "ops/cpu_ops.hpp"
#include "runtime/cpu.hpp"

namespace octet::detail {

const Backend& cpu_backend() {
  static const Backend table = {
      .allocate = cpu::allocate,
      .deallocate = cpu::deallocate,
      .copy = cpu::copy,
      .zero = cpu::zero,
      .synchronize = cpu::synchronize,
      .event_create = cpu::event_create,
      .event_destroy = cpu::event_destroy,
      .event_record = cpu::event_record,
      .event_wait = cpu::event_wait,
      .event_synchronize = cpu::event_synchronize,
      .capture = cpu::capture,
      .allocate_pinned = cpu::allocate,
      .deallocate_pinned = cpu::deallocate,
      .allocate_mapped = cpu::allocate_mapped,
      .deallocate_mapped = cpu::deallocate_mapped,
      .is_one_allocation = cpu::is_one_allocation,
      .quantize = cpu::quantize,
      .convert = cpu::convert,
      .transpose = cpu::transpose,
      .sum_columns = cpu::sum_columns,
      .block_quantize = cpu::block_quantize,
      .block_dequantize = cpu::block_dequantize,
      .broadcast_scale = cpu::broadcast_scale,
      .transpose_tile_scales = cpu::transpose_tile_scales,
      .make_gemm_ready = cpu::make_gemm_ready,
      .delayed_update = cpu::delayed_update,
      .measure_amax = cpu::measure_amax,
      .accumulate = cpu::accumulate,
      .adamw_initialise = cpu::adamw_initialise,
      .adamw_measure = cpu::adamw_measure,
      .adamw_prepare = cpu::adamw_prepare,
      .adamw_update = cpu::adamw_update,
      .mean_scales = cpu::mean_scales,
      .reduce_mean = cpu::reduce_mean,
      .max_amax = cpu::max_amax,
      .pack_block_scales = cpu::pack_block_scales,
      .unpack_block_scales = cpu::unpack_block_scales,
      .block_mean = cpu::block_mean,
      .merge_amaxes = cpu::merge_amaxes,
      .sum_scales = cpu::sum_scales,
      .requantise_codes = cpu::requantise_codes,
      .add_codes = cpu::add_codes,
      .take_sums = cpu::take_sums,
      .update_auto_scale = cpu::update_auto_scale,
      .window_mean = cpu::window_mean,
      .epilogue = cpu::epilogue,
      .operand_to_bf16 = cpu::operand_to_bf16,
  };
  return table;
}

}  // namespace octet::detail
