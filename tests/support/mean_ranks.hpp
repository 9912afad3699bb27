// SPDX-License-Identifier: Apache-2.0
// One rank's part in a test of MeanReducer and PieceGather: the same whatever carries the bytes.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "octet/comm/collectives.hpp"
#include "support/compare.hpp"
#include "support/guarded.hpp"
#include "support/mean_reference.hpp"
#include "support/random.hpp"

namespace octet::test {

/// One bucket: gradients[rank][tensor], all of one dtype, and who owns what.
struct MeanCase {
  DType dtype = DType::e4m3;
  std::vector<std::vector<Contribution>> gradients;
  Owners owners;

  int ranks() const { return static_cast<int>(gradients.size()); }
  std::size_t tensors() const { return gradients[0].size(); }
  std::int64_t numel(std::size_t tensor) const {
    return static_cast<std::int64_t>(gradients[0][tensor].bytes.size() / size_of(dtype));
  }
  /// All ranks' contributions to one tensor.
  std::vector<Contribution> of_tensor(std::size_t tensor) const {
    std::vector<Contribution> all;
    for (const auto& rank : gradients) all.push_back(rank[tensor]);
    return all;
  }
};

struct MeanResult {
  std::vector<std::vector<float>> shards;            ///< [tensor], sharded only
  std::vector<std::vector<std::uint8_t>> gradients;  ///< [tensor], afterwards
  std::vector<TensorScale> scales;
  std::uint32_t nonfinite = 0;
  bool intact = true;
  std::uint64_t planned = 0;
  WireBytes wire;
};

/// Elements of a tensor that a rank owns.
inline std::int64_t owned_by(const std::vector<Piece>& pieces, std::size_t tensor) {
  std::int64_t count = 0;
  for (const Piece& piece : pieces) {
    if (piece.tensor == static_cast<std::int32_t>(tensor)) count += piece.count;
  }
  return count;
}

/// The elements of a rank's pieces one after the other: what its shard should hold.
template <class T>
std::vector<T> pieces_of(const std::vector<Piece>& pieces, std::size_t tensor,
                         const std::vector<T>& whole) {
  std::vector<T> part;
  for (const Piece& piece : pieces) {
    if (piece.tensor != static_cast<std::int32_t>(tensor)) continue;
    part.insert(part.end(), whole.begin() + piece.begin, whole.begin() + piece.begin + piece.count);
  }
  return part;
}

/// Runs the reduction of a bucket on this rank, `runs` times from the same input.
inline MeanResult reduce_on_rank(Communicator& comm, const MeanCase& bucket, MeanReducer::Path path,
                                 int runs = 1) {
  const Context& ctx = comm.context();
  const auto rank = static_cast<std::size_t>(comm.rank());
  const auto& own = bucket.gradients[rank];
  std::vector<Guarded> gradients, shards;
  std::vector<ReduceTensor> tensors;
  std::vector<TensorScale> own_scales;
  gradients.reserve(own.size());
  shards.reserve(own.size());
  for (std::size_t t = 0; t < own.size(); ++t) {
    const std::int64_t owned = owned_by(bucket.owners[rank], t);
    gradients.emplace_back(ctx, own[t].bytes.size());
    shards.emplace_back(ctx, static_cast<std::size_t>(owned) * sizeof(float));
    ReduceTensor tensor;
    tensor.gradient = gradients[t].view(bucket.dtype, {bucket.numel(t)});
    if (path == MeanReducer::Path::sharded) tensor.shard = shards[t].view(DType::f32, {owned});
    tensors.push_back(tensor);
    own_scales.push_back(own[t].scale);
  }
  const Buffer scales = upload(ctx, own_scales);
  const Buffer flag = upload(ctx, std::vector<std::uint32_t>{0});
  MeanReducer reducer(comm, path, tensors, scales.as<TensorScale>(), bucket.owners);
  const WireBytes before = comm.wire_bytes();
  for (int i = 0; i < runs; ++i) {
    for (std::size_t t = 0; t < own.size(); ++t) write(ctx, gradients[t].data(), own[t].bytes);
    write(ctx, scales.data(), own_scales);
    reducer.run(flag.as<std::uint32_t>());
  }

  MeanResult result;
  result.planned = reducer.payload_bytes();
  result.wire = {comm.wire_bytes().payload - before.payload,
                 comm.wire_bytes().metadata - before.metadata};
  result.scales = download<TensorScale>(ctx, scales.data(), own.size());
  result.nonfinite = download_one<std::uint32_t>(ctx, flag.data());
  for (std::size_t t = 0; t < own.size(); ++t) {
    result.gradients.push_back(gradients[t].values<std::uint8_t>());
    result.shards.push_back(shards[t].values<float>());
    result.intact = result.intact && gradients[t].intact() && shards[t].intact();
  }
  return result;
}

/// Empty, or what is wrong with a rank's result of a finite bucket of at least two ranks.
inline std::string wrong_in(const MeanCase& bucket, MeanReducer::Path path, int rank,
                            const MeanResult& result) {
  if (!result.intact) return "bytes outside the outputs were written";
  if (result.nonfinite != 0) return "the flag is raised";
  const bool sharded = path == MeanReducer::Path::sharded;
  for (std::size_t t = 0; t < bucket.tensors(); ++t) {
    const auto ranks = bucket.of_tensor(t);
    const auto means = reference_means(bucket.dtype, ranks);
    const TensorScale scale = reference_mean_scale(sharded ? DType::f32 : bucket.dtype,
                                                   reference_bound(bucket.dtype, ranks));
    const std::string where = "tensor " + std::to_string(t) + ": ";
    if (std::memcmp(&scale, &result.scales[t], sizeof(scale)) != 0) return where + "its scale";
    std::string difference;
    if (sharded) {
      const auto& pieces = bucket.owners[static_cast<std::size_t>(rank)];
      difference = first_difference(result.shards[t], pieces_of(pieces, t, means));
    } else {
      difference = first_difference(result.gradients[t],
                                    reference_rounded(bucket.dtype, means, scale.scale));
    }
    if (!difference.empty()) return where + difference;
  }
  return {};
}

/// Deals all elements out in chunks; chunk k goes to the rank that `owner` names for it.
template <class OwnerOf>
Owners deal(const MeanCase& bucket, std::int64_t chunk, const OwnerOf& owner) {
  Owners owners(bucket.gradients.size());
  int k = 0;
  for (std::size_t t = 0; t < bucket.tensors(); ++t) {
    for (std::int64_t begin = 0; begin < bucket.numel(t); begin += chunk) {
      const std::int64_t count = std::min(chunk, bucket.numel(t) - begin);
      owners[static_cast<std::size_t>(owner(k++))].push_back(
          {static_cast<std::int32_t>(t), begin, count});
    }
  }
  return owners;
}

/// Bytes of the pieces of one rank.
inline std::uint64_t owned_bytes(const MeanCase& bucket, int rank) {
  std::uint64_t bytes = 0;
  for (const Piece& piece : bucket.owners[static_cast<std::size_t>(rank)]) {
    bytes += static_cast<std::uint64_t>(piece.count) * size_of(bucket.dtype);
  }
  return bytes;
}

/// Values of wide range; the ranks' magnitudes differ.
inline MeanCase random_case(DType dtype, int ranks, const std::vector<std::size_t>& counts) {
  MeanCase bucket;
  bucket.dtype = dtype;
  for (int r = 0; r < ranks; ++r) {
    std::vector<Contribution> own;
    for (std::size_t t = 0; t < counts.size(); ++t) {
      const auto seed = static_cast<std::uint32_t>(100 * r + static_cast<int>(t));
      own.push_back(contribute(dtype, wide_values(counts[t], seed, -12 - r, 2 * r)));
    }
    bucket.gradients.push_back(own);
  }
  return bucket;
}

/// Four ways to cut: fine and unaligned, coarse, in runs, and everything on one rank.
inline std::vector<Owners> cuts_of(const MeanCase& bucket) {
  const int n = bucket.ranks();
  int chunks = 0;
  deal(bucket, 2000, [&](int) { return ++chunks, 0; });
  return {deal(bucket, 37, [n](int k) { return (k * 7 + 1) % n; }),
          deal(bucket, 5000, [n](int k) { return k % n; }),
          deal(bucket, 2000, [&](int k) { return k * n / chunks; }),
          deal(bucket, 128, [n](int) { return n - 1; })};
}

/// Odd sizes, an empty tensor.
inline const std::vector<std::size_t> kOddSizes = {1, 2, 3, 0, 127, 129, 16384 + 1};

}  // namespace octet::test
