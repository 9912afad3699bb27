// SPDX-License-Identifier: Apache-2.0
// Entries of the CPU table of backend.hpp.
#pragma once

#include "backend.hpp"

namespace octet::detail::cpu {

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
void adamw_initialise(const Context& ctx, const AdamwInit& init);
void adamw_measure(const Context& ctx, const AdamwArgs& args, float* sums);
void adamw_prepare(const Context& ctx, const AdamwArgs& args);
void adamw_update(const Context& ctx, const AdamwArgs& args);
void mean_scales(const Context& ctx, const MeanArgs& args);
void reduce_mean(const Context& ctx, const MeanArgs& args);
void max_amax(const Context& ctx, const TensorScale* gathered, int ranks, std::int64_t count,
              TensorScale* out);

// What casts share.

/// Largest magnitude; NaN before infinity before all else.
float amax_of(const TensorView& in);
/// Raises what casts before have recorded, as an unsigned-integer maximum over bits.
void raise_amax(float& recorded, float amax);
/// What QuantizeArgs::column_sums defines.
void sum_tiles(const TensorView& in, const TensorView& sums);

}  // namespace octet::detail::cpu
