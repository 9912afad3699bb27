// SPDX-License-Identifier: Apache-2.0
// One rank's part in a test of BlockMeanReducer, the same whatever carries the bytes, and what it
// should leave behind by plain loops on the independent format tables.
#pragma once

#include <string>
#include <vector>

#include "octet/comm/block_mean_reducer.hpp"
#include "support/block_cast_run.hpp"
#include "support/compare.hpp"
#include "support/guarded.hpp"
#include "support/random.hpp"

namespace octet::test::blocks {

inline constexpr BlockKind kRows = {Granularity::row_block};
inline std::size_t at(std::int64_t i) { return static_cast<std::size_t>(i); }

/// blocks[rank][tensor] of matrices of these shapes; owners by rows.
struct BlockBucket {
  std::vector<Shape> shapes;
  std::vector<std::vector<Blocks>> blocks;
  Owners owners;
  std::vector<std::uint32_t> flags;  // what every rank's casts have raised

  int ranks() const { return static_cast<int>(blocks.size()); }
};

inline Blocks stored(const std::vector<float>& values, const Shape& shape) {
  CastCounters counters;
  return reference_blocks(Doubles(values.begin(), values.end()), shape, shape, kRows, DType::e4m3,
                          counters);
}

inline BlockBucket random_bucket(int ranks, const std::vector<Shape>& shapes) {
  BlockBucket bucket;
  bucket.shapes = shapes;
  bucket.flags.assign(at(ranks), 0);
  for (int r = 0; r < ranks; ++r) {
    std::vector<Blocks> own;
    for (std::size_t t = 0; t < shapes.size(); ++t) {
      const auto seed = static_cast<std::uint32_t>(100 * r + static_cast<int>(t));
      own.push_back(stored(wide_values(at(shapes[t].numel()), seed, -12 - r, 2 * r), shapes[t]));
    }
    bucket.blocks.push_back(own);
  }
  return bucket;
}

/// Deals whole rows out, `chunk` at a time.
template <class OwnerOf>
Owners deal_rows(const BlockBucket& bucket, std::int64_t chunk, const OwnerOf& owner) {
  Owners owners(at(bucket.ranks()));
  int k = 0;
  for (std::size_t t = 0; t < bucket.shapes.size(); ++t) {
    const Shape& shape = bucket.shapes[t];
    for (std::int64_t row = 0; row < shape[0]; row += chunk) {
      const std::int64_t rows = std::min(chunk, shape[0] - row);
      owners[at(owner(k++))].push_back(
          {static_cast<std::int32_t>(t), row * shape[1], rows * shape[1]});
    }
  }
  return owners;
}

struct BlockOutcome {
  std::vector<Blocks> blocks;              ///< [tensor], afterwards
  std::vector<std::vector<float>> shards;  ///< [tensor]
  std::vector<TensorScale> scales;
  std::uint32_t nonfinite = 0;
  bool intact = true;
  std::uint64_t planned = 0;
  WireBytes wire;
};

inline std::int64_t owned_by(const std::vector<Piece>& pieces, std::size_t tensor) {
  std::int64_t count = 0;
  for (const Piece& p : pieces) count += at(p.tensor) == tensor ? p.count : 0;
  return count;
}

inline BlockOutcome reduce_on_rank(Communicator& comm, const BlockBucket& bucket,
                                   MeanReducer::Path path, int runs) {
  const Context& ctx = comm.context();
  const auto rank = at(comm.rank());
  const auto& own = bucket.blocks[rank];
  std::vector<Guarded> codes, scales, shards;
  std::vector<BlockReduceTensor> tensors;
  for (std::size_t t = 0; t < own.size(); ++t) {
    const std::int64_t owned = owned_by(bucket.owners[rank], t);
    codes.emplace_back(ctx, own[t].codes.size());
    scales.emplace_back(ctx, own[t].scales.size());
    shards.emplace_back(ctx, at(owned) * sizeof(float));
    BlockReduceTensor tensor;
    tensor.gradient = {codes[t].view(DType::e4m3, bucket.shapes[t]), Granularity::row_block,
                       MxLayout::gemm_ready, scales[t].data()};
    if (path == MeanReducer::Path::sharded) tensor.shard = shards[t].view(DType::f32, {owned});
    tensors.push_back(tensor);
  }
  const Buffer common = upload(ctx, std::vector<TensorScale>(own.size(), {2.0f, 0.5f, 77.0f}));
  const Buffer flag = upload(ctx, std::vector<std::uint32_t>{0});
  BlockMeanReducer reducer(comm, path, tensors, common.as<TensorScale>(), bucket.owners);
  const WireBytes before = comm.wire_bytes();
  for (int i = 0; i < runs; ++i) {
    for (std::size_t t = 0; t < own.size(); ++t) {
      write(ctx, codes[t].data(), own[t].codes);
      write(ctx, scales[t].data(), own[t].scales);
    }
    write_one(ctx, flag.data(), bucket.flags[rank]);
    reducer.run(flag.as<std::uint32_t>());
  }

  BlockOutcome outcome;
  outcome.planned = reducer.payload_bytes();
  outcome.wire = {comm.wire_bytes().payload - before.payload,
                  comm.wire_bytes().metadata - before.metadata};
  outcome.scales = download<TensorScale>(ctx, common.data(), own.size());
  outcome.nonfinite = download_one<std::uint32_t>(ctx, flag.data());
  for (std::size_t t = 0; t < own.size(); ++t) {
    outcome.blocks.push_back({codes[t].values<std::uint8_t>(), scales[t].values<std::uint8_t>()});
    outcome.shards.push_back(shards[t].values<float>());
    outcome.intact =
        outcome.intact && codes[t].intact() && scales[t].intact() && shards[t].intact();
  }
  return outcome;
}

/// code * scale_inv, in float.
inline std::vector<float> decoded(const Blocks& blocks, const Shape& shape) {
  const ScalePlaces places{kRows, shape[0], shape[1]};
  std::vector<float> values(at(shape.numel()));
  for (std::size_t i = 0; i < values.size(); ++i) {
    const auto row = static_cast<std::int64_t>(i) / shape[1];
    const auto column = static_cast<std::int64_t>(i) % shape[1];
    const double inv = scale_value(kRows, &blocks.scales[places.of(row, column)]);
    values[i] =
        static_cast<float>(table_of(DType::e4m3).decode(blocks.codes[i])) * static_cast<float>(inv);
  }
  return values;
}

/// The means of tensor t, summed in float in rank order.
inline std::vector<float> reference_means(const BlockBucket& bucket, std::size_t t) {
  std::vector<float> sums;
  for (const auto& rank : bucket.blocks) {
    const auto terms = decoded(rank[t], bucket.shapes[t]);
    if (sums.empty()) {
      sums = terms;
      continue;
    }
    for (std::size_t i = 0; i < sums.size(); ++i) sums[i] = sums[i] + terms[i];
  }
  for (float& sum : sums) sum = sum / static_cast<float>(bucket.ranks());
  return sums;
}

inline float largest_of(const std::vector<float>& values) {
  float largest = 0;
  for (float value : values) largest = std::max(largest, std::abs(value));
  return largest;
}

inline std::vector<float> pieces_of(const std::vector<Piece>& pieces, std::size_t tensor,
                                    const std::vector<float>& whole) {
  std::vector<float> part;
  for (const Piece& p : pieces) {
    if (at(p.tensor) != tensor) continue;
    part.insert(part.end(), whole.begin() + p.begin, whole.begin() + p.begin + p.count);
  }
  return part;
}

/// Empty, or what is wrong with a rank's outcome of a finite bucket.
inline std::string wrong_in(const BlockBucket& bucket, MeanReducer::Path path, int rank,
                            const BlockOutcome& outcome) {
  if (!outcome.intact) return "bytes outside the outputs were written";
  if (outcome.nonfinite != 0) return "the flag is raised";
  for (std::size_t t = 0; t < bucket.shapes.size(); ++t) {
    const auto means = reference_means(bucket, t);
    const std::string where = "tensor " + std::to_string(t) + ": ";
    std::string difference;
    float amax = largest_of(means);
    if (path == MeanReducer::Path::sharded) {
      difference =
          first_difference(outcome.shards[t], pieces_of(bucket.owners[at(rank)], t, means));
    } else {
      const Blocks expected = stored(means, bucket.shapes[t]);
      difference = first_difference(outcome.blocks[t].codes, expected.codes);
      if (difference.empty() && outcome.blocks[t].scales != expected.scales) {
        difference = "scales of blocks";
      }
      amax = largest_of(decoded(expected, bucket.shapes[t]));
    }
    if (!difference.empty()) return where + difference;
    const TensorScale common = {1.0f, 1.0f, amax};
    if (std::memcmp(&common, &outcome.scales[t], sizeof(common)) != 0) return where + "its amax";
  }
  return {};
}

}  // namespace octet::test::blocks
