// SPDX-License-Identifier: Apache-2.0
// Ranks that are threads read one another's memory. The same meetings as the kernel's, of one
// block.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <thread>

#include "octet/ops/detail/mean_math.hpp"
#include "ops/cpu_ops.hpp"

namespace octet::detail::cpu {
namespace {

using Word = std::atomic_ref<std::uint32_t>;

Word flag_of(const PeerMemory& peers, int at, int from) {
  return Word(reinterpret_cast<std::uint32_t*>(peers.windows[at])[from]);
}

bool wait_for(const PeerMemory& peers, int rank, std::uint32_t epoch) {
  const auto begin = std::chrono::steady_clock::now();
  const auto patience = std::chrono::nanoseconds(peers.deadline_ns);
  const Word flag = flag_of(peers, peers.rank, rank);
  while (static_cast<std::int32_t>(flag.load(std::memory_order_acquire) - epoch) < 0) {
    if (Word(peers.status->abort).load() != 0 ||
        std::chrono::steady_clock::now() - begin > patience) {
      peers.status->missing = static_cast<std::uint32_t>(rank);
      peers.status->tag = peers.tag;
      Word(peers.status->abort).store(1);
      Word(peers.status->failed).store(1);
      return false;
    }
    std::this_thread::yield();
  }
  return true;
}

bool meet_peers(const PeerMemory& peers) {
  const std::uint32_t epoch = ++peers.epochs[0];
  for (int r = 0; r < peers.ranks; ++r) {
    if (r != peers.rank) flag_of(peers, r, peers.rank).store(epoch, std::memory_order_release);
  }
  for (int r = 0; r < peers.ranks; ++r) {
    if (r != peers.rank && !wait_for(peers, r, epoch)) return false;
  }
  return true;
}

TensorScale scale_on(const WindowMeanArgs& args, int r, std::int64_t tensor) {
  return reinterpret_cast<const TensorScale*>(args.peers.windows[r] + args.scales_offset)[tensor];
}

template <class In, class Out>
void reduce_piece(const WindowMeanArgs& args, const WindowPiece& piece) {
  const PeerMemory& peers = args.peers;
  const float scale = args.mean_scales[piece.tensor].scale;
  const auto codes_of = [&](int r) {
    return reinterpret_cast<const typename In::Storage*>(peers.windows[r] + piece.offset);
  };
  for (std::int64_t i = 0; i < piece.count; ++i) {
    auto sum = mean_term<In::kDType>(codes_of(0)[i], scale_on(args, 0, piece.tensor).scale_inv);
    for (int r = 1; r < peers.ranks; ++r) {
      sum += mean_term<In::kDType>(codes_of(r)[i], scale_on(args, r, piece.tensor).scale_inv);
    }
    const auto code = mean_code<Out::kDType>(mean_of(sum, peers.ranks), scale);
    using Storage = typename Out::Storage;
    if (piece.out != nullptr) {
      static_cast<Storage*>(piece.out)[i] = code;
      continue;
    }
    for (int r = 0; r < peers.ranks; ++r) {
      reinterpret_cast<Storage*>(peers.windows[r] + piece.offset)[i] = code;
    }
  }
}

}  // namespace

void window_mean(const Context&, const WindowMeanArgs& args) {
  if (!meet_peers(args.peers)) {
    *args.nonfinite = 1;  // the step that follows is skipped
    return;
  }
  for (std::int64_t t = 0; t < args.tensor_count; ++t) {
    const float bound =
        mean_bound(args.dtype, args.peers.ranks, [&](int r) { return scale_on(args, r, t); });
    if (!is_finite_bits(magnitude_bits(bound))) *args.nonfinite = 1;
    args.mean_scales[t] = mean_scale(args.out_dtype, bound);
  }
  for_mean_dtypes(args.dtype, args.out_dtype, [&]<class In, class Out>(In, Out) {
    for (std::int64_t p = 0; p < args.piece_count; ++p) {
      reduce_piece<In, Out>(args, args.pieces[p]);
    }
  });
  if (!meet_peers(args.peers)) {
    *args.nonfinite = 1;  // the step that follows is skipped
    return;
  }
  auto* scales =
      reinterpret_cast<TensorScale*>(args.peers.windows[args.peers.rank] + args.scales_offset);
  std::copy_n(args.mean_scales, args.tensor_count, scales);
}

}  // namespace octet::detail::cpu
