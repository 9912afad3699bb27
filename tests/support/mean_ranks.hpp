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

/// What a sharded reduction leaves where.
enum class Shard { wide, rounded, in_place };
inline constexpr Shard kShards[] = {Shard::wide, Shard::rounded, Shard::in_place};

/// One bucket: gradients[rank][tensor], all of one dtype, and who owns what.
struct MeanCase {
  DType dtype = DType::e4m3;
  Shard shard = Shard::wide;  ///< with the path sharded
  std::vector<std::vector<Contribution>> gradients;
  Owners owners;

  int ranks() const { return static_cast<int>(gradients.size()); }
  std::size_t tensors() const { return gradients[0].size(); }
  std::int64_t numel(std::size_t tensor) const {
    return static_cast<std::int64_t>(gradients[0][tensor].bytes.size() / size_of(dtype));
  }
  /// Of the means.
  DType out_dtype(MeanReducer::Path path) const {
    return path == MeanReducer::Path::sharded && shard == Shard::wide ? DType::f32 : dtype;
  }
  /// All ranks' contributions to one tensor.
  std::vector<Contribution> of_tensor(std::size_t tensor) const {
    std::vector<Contribution> all;
    for (const auto& rank : gradients) all.push_back(rank[tensor]);
    return all;
  }
};

struct MeanResult {
  std::vector<std::vector<float>> shards;            ///< [tensor], sharded and wide only
  std::vector<std::vector<std::uint8_t>> rounded;    ///< [tensor], sharded and rounded only
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

/// The same for elements of `width` bytes.
inline std::vector<std::uint8_t> bytes_of_pieces(const std::vector<Piece>& pieces,
                                                 std::size_t tensor, std::size_t width,
                                                 const std::vector<std::uint8_t>& whole) {
  std::vector<Piece> of_bytes;
  for (const Piece& piece : pieces) {
    const auto bytes = static_cast<std::int64_t>(width);
    of_bytes.push_back({piece.tensor, bytes * piece.begin, bytes * piece.count});
  }
  return pieces_of(of_bytes, tensor, whole);
}

/// `base` with these pieces taken from `other`.
inline std::vector<std::uint8_t> with_pieces(const std::vector<Piece>& pieces, std::size_t tensor,
                                             std::size_t width, std::vector<std::uint8_t> base,
                                             const std::vector<std::uint8_t>& other) {
  const auto bytes = static_cast<std::int64_t>(width);
  for (const Piece& piece : pieces) {
    if (piece.tensor != static_cast<std::int32_t>(tensor)) continue;
    std::copy_n(other.begin() + bytes * piece.begin, bytes * piece.count,
                base.begin() + bytes * piece.begin);
  }
  return base;
}

/// A window with room for a bucket's gradients, guarded, and its scales. Every gradient begins
/// `shift` bytes behind a multiple of 256. Throws where the ranks can have none.
class BucketWindow {
 public:
  BucketWindow(Communicator& comm, const MeanCase& bucket, std::size_t shift)
      : shift_(shift),
        here_(comm.context(), 4),
        all_here_(comm.context(), 4 * static_cast<std::size_t>(comm.size())) {
    std::size_t bytes = padded(bucket.tensors() * sizeof(TensorScale));
    for (const Contribution& c : bucket.gradients[0]) bytes += room_for(c.bytes.size());
    WindowOffer offer = comm.make_window(bytes);
    require(offer.window != nullptr, "no window: ", offer.refusal);
    window_ = std::move(offer.window);
    next_ =
        static_cast<std::byte*>(window_->data()) + padded(bucket.tensors() * sizeof(TensorScale));
  }
  const Window* get() const { return window_.get(); }
  /// Waits until every rank is here. Kernels of a rank that shares this one's GPU may wait for this
  /// rank's, while freeing memory and copying much wait for all kernels of the GPU: so there is
  /// none of that between this and them.
  void meet(Communicator& comm) const {
    comm.all_gather(here_.data(), all_here_.data(), 4);
    comm.synchronize();
  }
  TensorScale* scales() const { return static_cast<TensorScale*>(window_->data()); }
  void* take(std::size_t bytes) {
    void* at = next_ + shift_;
    next_ += room_for(bytes);
    return at;
  }

 private:
  static std::size_t padded(std::size_t bytes) { return (bytes + 255) / 256 * 256; }
  std::size_t room_for(std::size_t bytes) const {
    return padded(bytes + 2 * Guarded::kGuard + shift_);
  }
  std::unique_ptr<Window> window_;
  std::size_t shift_;
  Buffer here_, all_here_;
  std::byte* next_ = nullptr;
};

/// Runs the reduction of a bucket on this rank, `runs` times from the same input; in a window where
/// one is given.
inline MeanResult reduce_on_rank(Communicator& comm, const MeanCase& bucket, MeanReducer::Path path,
                                 int runs = 1, BucketWindow* window = nullptr) {
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
    const std::size_t bytes = own[t].bytes.size();
    if (window != nullptr) {
      gradients.emplace_back(ctx, bytes, window->take(bytes));
    } else {
      gradients.emplace_back(ctx, bytes);
    }
    const DType shard_dtype = bucket.out_dtype(MeanReducer::Path::sharded);
    shards.emplace_back(ctx, static_cast<std::size_t>(owned) * size_of(shard_dtype));
    ReduceTensor tensor;
    tensor.gradient = gradients[t].view(bucket.dtype, {bucket.numel(t)});
    if (path == MeanReducer::Path::sharded) {
      const bool in_place = bucket.shard == Shard::in_place;
      tensor.shard = in_place ? tensor.gradient : shards[t].view(shard_dtype, {owned});
    }
    tensors.push_back(tensor);
    own_scales.push_back(own[t].scale);
  }
  const Buffer own_memory = upload(ctx, own_scales);
  TensorScale* scales = window != nullptr ? window->scales() : own_memory.as<TensorScale>();
  const Buffer flag = upload(ctx, std::vector<std::uint32_t>{0});
  MeanReducer reducer(comm, path, tensors, scales, bucket.owners, -1,
                      window != nullptr ? window->get() : nullptr);
  const WireBytes before = comm.wire_bytes();
  for (int i = 0; i < runs; ++i) {
    for (std::size_t t = 0; t < own.size(); ++t) write(ctx, gradients[t].data(), own[t].bytes);
    write(ctx, scales, own_scales);
    if (window != nullptr) window->meet(comm);
    reducer.run(flag.as<std::uint32_t>());
  }

  MeanResult result;
  result.planned = reducer.payload_bytes();
  result.wire = {comm.wire_bytes().payload - before.payload,
                 comm.wire_bytes().metadata - before.metadata};
  result.scales = download<TensorScale>(ctx, scales, own.size());
  result.nonfinite = download_one<std::uint32_t>(ctx, flag.data());
  for (std::size_t t = 0; t < own.size(); ++t) {
    result.gradients.push_back(gradients[t].values<std::uint8_t>());
    if (bucket.shard == Shard::wide) {
      result.shards.push_back(shards[t].values<float>());
    } else {
      result.rounded.push_back(shards[t].values<std::uint8_t>());
    }
    result.intact = result.intact && gradients[t].intact() && shards[t].intact();
  }
  return result;
}

/// Empty, or what is wrong with a rank's result of a finite bucket of at least two ranks.
inline std::string wrong_in(const MeanCase& bucket, MeanReducer::Path path, int rank,
                            const MeanResult& result) {
  if (!result.intact) return "bytes outside the outputs were written";
  if (result.nonfinite != 0) return "the flag is raised";
  const DType out = bucket.out_dtype(path);
  for (std::size_t t = 0; t < bucket.tensors(); ++t) {
    const auto ranks = bucket.of_tensor(t);
    const auto means = reference_means(bucket.dtype, ranks);
    const TensorScale scale = reference_mean_scale(out, reference_bound(bucket.dtype, ranks));
    const std::string where = "tensor " + std::to_string(t) + ": ";
    if (std::memcmp(&scale, &result.scales[t], sizeof(scale)) != 0) return where + "its scale";
    std::string difference;
    const auto& pieces = bucket.owners[static_cast<std::size_t>(rank)];
    const auto& own = bucket.gradients[static_cast<std::size_t>(rank)][t].bytes;
    const auto rounded = reference_rounded(bucket.dtype, means, scale.scale);
    if (path == MeanReducer::Path::two_shot) {
      difference = first_difference(result.gradients[t], rounded);
    } else if (bucket.shard == Shard::in_place) {
      // The rest is this rank's own contribution still.
      difference = first_difference(result.gradients[t],
                                    with_pieces(pieces, t, size_of(bucket.dtype), own, rounded));
    } else if (bucket.shard == Shard::rounded) {
      difference = first_difference(result.rounded[t],
                                    bytes_of_pieces(pieces, t, size_of(bucket.dtype), rounded));
    } else {
      difference = first_difference(result.shards[t], pieces_of(pieces, t, means));
    }
    if (!difference.empty()) return where + difference;
  }
  return {};
}

/// Odd sizes, an empty tensor.
inline const std::vector<std::size_t> kOddSizes = {1, 2, 3, 0, 127, 129, 16384 + 1};

/// Gradients of these sizes; the ranks' magnitudes differ.
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

}  // namespace octet::test
