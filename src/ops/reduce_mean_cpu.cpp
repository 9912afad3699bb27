// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <array>

#include "octet/ops/detail/mean_math.hpp"
#include "ops/cpu_ops.hpp"

namespace octet::detail::cpu {
namespace {

// Sums of one chunk stay in the first-level cache while the ranks are added one after the other.
constexpr std::int64_t kChunk = 2048;

template <class In, class Out>
void reduce_chunk(const MeanArgs& args, const MeanPiece& piece, std::int64_t begin,
                  std::int64_t count) {
  using Storage = typename In::Storage;
  std::array<MeanSum<In::kDType>, static_cast<std::size_t>(kChunk)> buffer;
  auto* sums = buffer.data();
  const Storage* codes = contribution_of<Storage>(args, piece, 0) + begin;
  float inv = scale_inv_of(args, piece, 0);
  for (std::int64_t i = 0; i < count; ++i) sums[i] = mean_term<In::kDType>(codes[i], inv);
  for (int r = 1; r < args.ranks; ++r) {
    codes = contribution_of<Storage>(args, piece, r) + begin;
    inv = scale_inv_of(args, piece, r);
    for (std::int64_t i = 0; i < count; ++i) sums[i] += mean_term<In::kDType>(codes[i], inv);
  }
  auto* out = static_cast<typename Out::Storage*>(piece.out) + begin;
  const float scale = args.mean_scales[piece.tensor].scale;
  for (std::int64_t i = 0; i < count; ++i) {
    out[i] = mean_code<Out::kDType>(mean_of(sums[i], args.ranks), scale);
  }
}

template <class In, class Out>
void reduce_piece(const MeanArgs& args, const MeanPiece& piece) {
#pragma omp parallel for if (piece.count > 8 * kChunk)
  for (std::int64_t begin = 0; begin < piece.count; begin += kChunk) {
    reduce_chunk<In, Out>(args, piece, begin, std::min(kChunk, piece.count - begin));
  }
}

}  // namespace

void mean_scales(const Context&, const MeanArgs& args) {
  for (std::int64_t t = 0; t < args.tensor_count; ++t) {
    const float bound = mean_bound(args, t);
    if (!is_finite_bits(magnitude_bits(bound))) *args.nonfinite = 1;
    args.mean_scales[t] = mean_scale(args.out_dtype, bound);
  }
}

void reduce_mean(const Context&, const MeanArgs& args) {
  for_mean_dtypes(args.dtype, args.out_dtype, [&]<class In, class Out>(In, Out) {
    for (std::int64_t p = 0; p < args.piece_count; ++p) {
      reduce_piece<In, Out>(args, args.pieces[p]);
    }
  });
}

void max_amax(const Context&, const TensorScale* gathered, int ranks, std::int64_t count,
              TensorScale* out) {
  for (std::int64_t i = 0; i < count; ++i) out[i].amax = largest_amax(gathered, ranks, count, i);
}

}  // namespace octet::detail::cpu
