// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <array>

#include "octet/ops/detail/adamw_math.hpp"
#include "ops/cpu_ops.hpp"

namespace octet::detail::cpu {
namespace {

constexpr int kLanes = 256;

float segment_sum(const AdamwTensor& tensor, const Segment& segment) {
  std::array<float, kLanes> lanes{};
  const float inv = tensor.gradient_scale->scale_inv;
  for (std::int64_t i = 0; i < segment.count; ++i) {
    const float g = gradient_at(tensor, inv, segment, i);
    float& lane = lanes[static_cast<std::size_t>(i % kLanes)];
    lane = fma_of(g, g, lane);
  }
  for (std::size_t width = kLanes / 2; width > 0; width /= 2) {
    for (std::size_t i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

void raise_amax(TensorScale& scale, std::uint32_t bits) {
  scale.amax = bits_float(larger(float_bits(scale.amax), bits));
}

void update_segment(const AdamwArgs& args, const Segment& segment) {
  const AdamwScalars& s = *args.scalars;
  const AdamwTensor& tensor = args.tensors[segment.tensor];
  const AdamwScales& scales = args.scales[segment.tensor];
  const float factor = weight_factor(s, tensor.weight_decay);
  const std::uint64_t first = tensor.random_base + static_cast<std::uint64_t>(segment.begin);
  const AdamwOffsets at = offsets_of(tensor, segment);
  AdamwAmax codes;
  for (std::int64_t group = 0; group < segment.count; group += 4) {
    const RandomWords words = philox(args.config.seed, static_cast<std::uint64_t>(s.step),
                                     (first + static_cast<std::uint64_t>(group)) >> 2);
    const std::int64_t end = std::min<std::int64_t>(group + 4, segment.count);
    for (std::int64_t i = group; i < end; ++i) {
      update_element(s, tensor, scales, at, i, factor, words.word[i - group], codes);
    }
  }
  const AdamwAmax amax = decoded_amax(formats_of(tensor), scales, codes);
#pragma omp critical(octet_adamw_amax)
  {
    raise_amax(*tensor.m_scale, amax.m);
    raise_amax(*tensor.v_scale, amax.v);
    raise_amax(*tensor.master_scale, amax.master);
    raise_amax(*tensor.weight_scale, amax.weight);
  }
}

}  // namespace

void adamw_initialise(const Context& ctx, const AdamwInit& init) {
  const AdamwTensor& tensor = init.tensor;
  cpu::measure_amax(ctx, init.values, tensor.master_scale);
  initialise_scales(tensor, tensor.master_scale->amax);
  const std::int64_t count = init.values.numel();
  for (std::int64_t i = 0; i < count; ++i) initialise_weight(tensor, init.values, i);
  std::int64_t local = 0;
  for (std::int64_t p = 0; p < init.piece_count; ++p) {
    const Piece& piece = init.pieces[p];
    for (std::int64_t i = 0; i < piece.count; ++i) {
      initialise_state(tensor, init.values, piece.begin + i, local + i);
    }
    local += piece.count;
  }
}

void adamw_sum_squares(const Context&, const AdamwArgs& args, float* sums) {
#pragma omp parallel for schedule(dynamic) if (args.segment_count > 1)
  for (std::int64_t i = 0; i < args.segment_count; ++i) {
    const Segment& segment = args.segments[i];
    sums[segment.index] = segment_sum(args.tensors[segment.tensor], segment);
  }
}

void adamw_prepare(const Context&, const AdamwArgs& args) {
  AdamwScalars& s = *args.scalars;
  begin_step(s, args.config, args.lr_device != nullptr ? *args.lr_device : args.lr);
  measure_clip(s, args.max_norm, args.config.maximize, [&] {
    return pairwise_sum(args.total_segments,
                        [&](std::int64_t i) { return static_cast<double>(args.segment_sums[i]); });
  });
  bool skip = must_skip(s, args.nonfinite);
  for (std::int64_t t = 0; t < args.tensor_count; ++t) {
    skip = skip || !bounds_are_finite(bounds_of(s, args.tensors[t]), args.tensors[t]);
  }
  end_decision(s, skip, args.nonfinite);
  if (skip) return;
  for (std::int64_t t = 0; t < args.tensor_count; ++t) {
    renew_scales(args.tensors[t], bounds_of(s, args.tensors[t]), args.scales[t]);
  }
}

void adamw_update(const Context&, const AdamwArgs& args) {
  if (args.scalars->skip != 0) return;
#pragma omp parallel for schedule(dynamic) if (args.segment_count > 1)
  for (std::int64_t i = 0; i < args.segment_count; ++i) update_segment(args, args.segments[i]);
}

}  // namespace octet::detail::cpu
