// SPDX-License-Identifier: Apache-2.0
#include "octet/ops/window_mean.hpp"

#include "backend.hpp"

namespace octet {

void window_mean(const Context& ctx, const WindowMeanArgs& args) {
  const PeerMemory& peers = args.peers;
  require(peers.ranks >= 1 && peers.ranks <= kMaxPeers, "window_mean: there are ", peers.ranks,
          " ranks; allowed are 1 to ", kMaxPeers);
  require(peers.rank >= 0 && peers.rank < peers.ranks, "window_mean: rank is ", peers.rank,
          "; it must be within [0, ", peers.ranks, ")");
  require(peers.blocks >= 1 && peers.blocks < kMaxPeerBlocks, "window_mean: blocks is ",
          peers.blocks, "; allowed are 1 to ", kMaxPeerBlocks - 1);
  require(peers.windows != nullptr && peers.epochs != nullptr && peers.status != nullptr,
          "window_mean: the peer memory has a null pointer; take it from Window::peers()");
  require(args.dtype == DType::e4m3 || args.dtype == DType::bf16 || args.dtype == DType::f32,
          "window_mean: the contributions are ", name_of(args.dtype),
          "; allowed are e4m3, bf16, f32");
  require(args.out_dtype == DType::f32 || args.out_dtype == args.dtype,
          "window_mean: the output is ", name_of(args.out_dtype),
          "; allowed are f32 and the contributions' ", name_of(args.dtype));
  require(args.piece_count >= 0 && args.tensor_count >= 0, "window_mean: there are ",
          args.piece_count, " pieces of ", args.tensor_count, " tensors; neither may be negative");
  require(args.pieces != nullptr || args.piece_count == 0, "window_mean: pieces is null for ",
          args.piece_count, " pieces");
  require(args.mean_scales != nullptr || args.tensor_count == 0,
          "window_mean: mean_scales is null for ", args.tensor_count, " tensors");
  require(args.nonfinite != nullptr, "window_mean: nonfinite is null; it must be a device word");
  // Without a piece, too: the others wait for this rank.
  detail::backend_of(ctx).window_mean(ctx, args);
}

}  // namespace octet
