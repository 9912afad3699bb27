// SPDX-License-Identifier: Apache-2.0
// Entries of the CUDA table of backend.hpp.
#pragma once

#include "backend.hpp"

namespace octet::detail::cuda {

void quantize(const Context& ctx, const QuantizeArgs& args);
void convert(const Context& ctx, const ScaledView& in, const TensorView& out);
void transpose(const Context& ctx, const TensorView& in, const TensorView& out);
void sum_columns(const Context& ctx, const TensorView& sums, const TensorView& out);
void block_quantize(const Context& ctx, const BlockQuantizeArgs& args);
void block_dequantize(const Context& ctx, const BlockScaledView& in, const TensorView& out);
void broadcast_scale(const Context& ctx, const TensorScale* scale, const BlockScaledView& out);
void transpose_tile_scales(const Context& ctx, const float* scales, std::int64_t rows,
                           std::int64_t columns, float* out);
void make_gemm_ready(const Context& ctx, const void* compact, std::int64_t rows,
                     std::int64_t columns, void* gemm_ready);
void delayed_update(const Context& ctx, const DelayedArgs& args);
void measure_amax(const Context& ctx, const TensorView& in, TensorScale* scale);
void accumulate(const Context& ctx, const AccumulateArgs& args);
void adamw_initialise(const Context& ctx, const AdamwInit& init);
void adamw_measure(const Context& ctx, const AdamwArgs& args, float* sums);
void adamw_prepare(const Context& ctx, const AdamwArgs& args);
void adamw_update(const Context& ctx, const AdamwArgs& args);
void mean_scales(const Context& ctx, const MeanArgs& args);
void reduce_mean(const Context& ctx, const MeanArgs& args);
void max_amax(const Context& ctx, const TensorScale* gathered, int ranks, std::int64_t count,
              TensorScale* out);
void pack_block_scales(const Context& ctx, const BlockScalePiece* pieces, std::int64_t count,
                       float* packed);
void unpack_block_scales(const Context& ctx, const BlockScalePiece* pieces, std::int64_t count,
                         const float* packed);
void block_mean(const Context& ctx, const BlockMeanArgs& args);
void merge_amaxes(const Context& ctx, const std::uint32_t* gathered, int ranks, std::int64_t count,
                  TensorScale* scales, std::uint32_t* nonfinite);
void sum_scales(const Context& ctx, const SumArgs& args);
void requantise_codes(const Context& ctx, const SumArgs& args);
void add_codes(const Context& ctx, std::uint8_t* own, std::int64_t count,
               const std::uint8_t* staging, std::int64_t stride, int ranks, int rank);
void take_sums(const Context& ctx, const SumArgs& args);
void update_auto_scale(const Context& ctx, AutoScaleState* state, int ranks);
void window_mean(const Context& ctx, const WindowMeanArgs& args);

}  // namespace octet::detail::cuda
