// SPDX-License-Identifier: Apache-2.0
// Casts to FP8 with scales of blocks. The input is read once, a tile of 128 rows and 128 columns at
// a time, which stays in registers until the amaxes of its blocks are known.
#include "cuda/device/dependent.cuh"
#include "cuda/ops/block_tile.cuh"
#include "cuda/ops/cast_launch.cuh"
#include "cuda/ops/cuda_ops.hpp"

namespace octet::detail::cuda {
namespace {

using namespace casts;

/// 64 registers for a thread: room for its vectors, and enough threads to keep loads in flight
/// while another block is at work.
constexpr int kTileBlocksPerSm = 2;

template <Granularity G, class In, class Out>
__global__ void __launch_bounds__(kTileThreads, kTileBlocksPerSm)
    block_cast_kernel(const __grid_constant__ BlockCast cast) {
  __shared__ union {
    ByteTile<kTileGroups> tile;
    float lanes[kLanes][kTileColumns];
  } shared;
  allow_next_kernel();
  if (blockIdx.x < cast.ahead) prefetch_tile<In>(cast, blockIdx.x);
  wait_for_previous_kernel();
  const TileSpot spot(cast);
  Counts counts;
  std::uint32_t largest = 0;
  Vector8<In> vectors[kVectors];
  load_tile<In>(cast, spot, vectors);
  prefetch_tile<In>(cast, blockIdx.x + cast.ahead);
  // Barriers of what follows keep these sums from the tile that comes in their place.
  if (cast.column_sums != nullptr) sum_tile_columns<In>(cast, spot, vectors, shared.lanes);
  if constexpr (G == Granularity::tile) {
    largest = cast_one_tile<In, Out>(cast, spot, vectors, shared.tile, counts);
    if (cast.transposed.data != nullptr) store_turned(cast, spot, shared.tile);
  } else {
    __shared__ ColumnBlocks<G, In, Out> columns;
    if (cast.transposed.data != nullptr) {
      columns.clear();
      __syncthreads();
      columns.raise(spot, vectors);
    }
    if (cast.out.data != nullptr) {
      largest = RowBlocks<G, In, Out>::cast(cast, spot, vectors, counts);
    } else if (cast.nonfinite != nullptr || cast.amax != nullptr) {
      largest = largest_of<In>(vectors);
    }
    if (cast.transposed.data != nullptr) {
      __syncthreads();
      columns.finish(cast, spot);
      __syncthreads();
      columns.cast(cast, spot, vectors, shared.tile, counts);
      store_turned(cast, spot, shared.tile);
    }
  }
  if (!is_finite_bits(largest) && cast.nonfinite != nullptr) *cast.nonfinite = 1;
  if (cast.amax != nullptr) raise_amax<G>(cast, largest);
  if (cast.counters != nullptr) counts.publish(cast.counters);
}

std::int64_t tiles_of(std::int64_t count) { return (count + 127) / 128; }

BlockSide side_of(const BlockScaledView& view) {
  if (view.data.empty()) return {};
  const Shape& shape = view.data.shape;
  return {view.data.as<std::uint8_t>(), view.scales,
          scale_layout(view.granularity, view.mx_layout, shape[0], shape[1]),
          shape[1] % 8 == 0 && is_aligned_to_vectors(view.data.data, 1)};
}

BlockCast cast_of(const BlockQuantizeArgs& args) {
  BlockCast cast{};
  cast.in = args.in.data;
  cast.rows = args.in.shape[0];
  cast.columns = args.in.shape[1];
  cast.tiles_across = static_cast<unsigned>(tiles_of(cast.columns));
  cast.out = side_of(args.out);
  cast.transposed = side_of(args.transposed);
  cast.nonfinite = args.nonfinite;
  cast.amax = reinterpret_cast<std::uint32_t*>(args.amax);
  cast.counters = args.counters;
  if (!args.column_sums.empty()) cast.column_sums = args.column_sums.as<float>();
  cast.in_aligned =
      cast.columns % 8 == 0 && is_aligned_to_vectors(args.in.data, size_of(args.in.dtype));
  return cast;
}

/// Half as many as run at once (measured: with all of them, what is prefetched too early costs more
/// than it gains).
unsigned tiles_ahead(const Context& ctx) {
  int multiprocessors = 0;
  OCTET_CUDA_CHECK(
      cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, ctx.device().index));
  return static_cast<unsigned>(multiprocessors) * kTileBlocksPerSm / 2;
}

template <class In, class Out>
void launch_block_cast(const Context& ctx, const BlockQuantizeArgs& args, Granularity granularity) {
  BlockCast cast = cast_of(args);
  cast.ahead = tiles_ahead(ctx);
  const auto kernel =
      granularity == Granularity::row_block ? block_cast_kernel<Granularity::row_block, In, Out>
      : granularity == Granularity::tile    ? block_cast_kernel<Granularity::tile, In, Out>
                                            : block_cast_kernel<Granularity::mx, In, Out>;
  launch_dependent(ctx, kernel, tiles_of(cast.rows) * cast.tiles_across, kTileThreads, cast);
}

}  // namespace

void block_quantize(const Context& ctx, const BlockQuantizeArgs& args) {
  set_device(ctx);
  const BlockScaledView& to = args.out.data.empty() ? args.transposed : args.out;
  for_wide_dtype(args.in.dtype, [&]<class In>(In) {
    if (to.data.dtype == DType::e4m3) {
      launch_block_cast<In, Element<DType::e4m3>>(ctx, args, to.granularity);
    } else {
      launch_block_cast<In, Element<DType::e5m2>>(ctx, args, to.granularity);
    }
  });
}

}  // namespace octet::detail::cuda
