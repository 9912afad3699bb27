// SPDX-License-Identifier: Apache-2.0
#include "backend.hpp"
#include "cuda/gemm/cublaslt.hpp"
#include "cuda/gemm/cuda_gemm.hpp"
#include "cuda/ops/cuda_ops.hpp"
#include "cuda/runtime/runtime.hpp"
#include "octet/gemm/gemm.hpp"

namespace octet::detail {

const CudaPart& cuda_part() {
  static const Backend table = {
      .allocate = cuda::allocate,
      .deallocate = cuda::deallocate,
      .copy = cuda::copy,
      .zero = cuda::zero,
      .synchronize = cuda::synchronize,
      .event_create = cuda::event_create,
      .event_destroy = cuda::event_destroy,
      .event_record = cuda::event_record,
      .event_wait = cuda::event_wait,
      .event_synchronize = cuda::event_synchronize,
      .capture = cuda::capture,
      .allocate_pinned = cuda::allocate_pinned,
      .deallocate_pinned = cuda::deallocate_pinned,
      .allocate_mapped = cuda::allocate_mapped,
      .deallocate_mapped = cuda::deallocate_mapped,
      .is_one_allocation = cuda::is_one_allocation,
      .quantize = cuda::quantize,
      .convert = cuda::convert,
      .transpose = cuda::transpose,
      .sum_columns = cuda::sum_columns,
      .block_quantize = cuda::block_quantize,
      .block_dequantize = cuda::block_dequantize,
      .broadcast_scale = cuda::broadcast_scale,
      .transpose_tile_scales = cuda::transpose_tile_scales,
      .make_gemm_ready = cuda::make_gemm_ready,
      .delayed_update = cuda::delayed_update,
      .measure_amax = cuda::measure_amax,
      .accumulate = cuda::accumulate,
      .adamw_initialise = cuda::adamw_initialise,
      .adamw_measure = cuda::adamw_measure,
      .adamw_prepare = cuda::adamw_prepare,
      .adamw_update = cuda::adamw_update,
      .mean_scales = cuda::mean_scales,
      .reduce_mean = cuda::reduce_mean,
      .max_amax = cuda::max_amax,
      .pack_block_scales = cuda::pack_block_scales,
      .unpack_block_scales = cuda::unpack_block_scales,
      .block_mean = cuda::block_mean,
      .merge_amaxes = cuda::merge_amaxes,
      .sum_scales = cuda::sum_scales,
      .requantise_codes = cuda::requantise_codes,
      .add_codes = cuda::add_codes,
      .take_sums = cuda::take_sums,
      .update_auto_scale = cuda::update_auto_scale,
      .window_mean = cuda::window_mean,
      .epilogue = cuda::epilogue,
      .operand_to_bf16 = cuda::operand_to_bf16,
  };
  static const CudaPart part = {
      .backend = &table,
      .device_count = cuda::device_count,
      .check_device = cuda::check_device,
      .compute_capability = cuda::compute_capability,
      .device_name = cuda::device_name,
      .make_cublaslt = cuda::make_cublaslt_gemm,
  };
  return part;
}

}  // namespace octet::detail
