// SPDX-License-Identifier: Apache-2.0
#include "octet/comm/shard_gather.hpp"

#include <algorithm>

#include "comm/join_parts.hpp"
#include "comm/owners.hpp"
#include "octet/runtime/tensor.hpp"

namespace octet {
namespace {

std::size_t bytes_of(const ShardedTensor& tensor, std::int64_t elements) {
  return static_cast<std::size_t>(elements) * size_of(tensor.dtype);
}

const ShardedTensor& tensor_of(const std::vector<ShardedTensor>& tensors, const Piece& piece) {
  return tensors[static_cast<std::size_t>(piece.tensor)];
}

/// Where a piece lies in a destination.
std::size_t place_of(const std::vector<ShardedTensor>& tensors, const Piece& piece) {
  const ShardedTensor& tensor = tensor_of(tensors, piece);
  return tensor.offset + bytes_of(tensor, piece.begin);
}

/// Where this rank's pieces begin in its memory.
std::vector<const char*> sources_of(const std::vector<ShardedTensor>& tensors,
                                    const std::vector<Piece>& own) {
  std::vector<const char*> next, sources;
  for (const ShardedTensor& t : tensors) next.push_back(static_cast<const char*>(t.data));
  for (const Piece& piece : own) {
    const ShardedTensor& tensor = tensor_of(tensors, piece);
    const char*& at = next[static_cast<std::size_t>(piece.tensor)];
    require(at != nullptr, "ShardGather: tensor ", piece.tensor, " of shape ", tensor.shape,
            " has a null pointer and this rank owns pieces of it");
    if (tensor.is_shard) {
      sources.push_back(at);
      at += bytes_of(tensor, piece.count);
    } else {
      sources.push_back(at + bytes_of(tensor, piece.begin));
    }
  }
  return sources;
}

void check_layout(const std::vector<ShardedTensor>& tensors, std::size_t bytes) {
  struct Extent {
    std::size_t begin, end, tensor;
  };
  std::vector<Extent> extents;
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const ShardedTensor& t = tensors[i];
    const std::size_t size = bytes_of(t, t.shape.numel());
    require(t.offset <= bytes && size <= bytes - t.offset, "ShardGather: tensor ", i, " has ", size,
            " bytes from byte ", t.offset, " on; a destination has ", bytes);
    if (size > 0) extents.push_back({t.offset, t.offset + size, i});
  }
  std::sort(extents.begin(), extents.end(),
            [](const Extent& a, const Extent& b) { return a.begin < b.begin; });
  for (std::size_t i = 1; i < extents.size(); ++i) {
    require(extents[i].begin >= extents[i - 1].end, "ShardGather: tensor ", extents[i].tensor,
            " begins at byte ", extents[i].begin, " of a destination, where tensor ",
            extents[i - 1].tensor, " has not ended");
  }
}

}  // namespace

ShardGather::ShardGather(Communicator& comm, const std::vector<ShardedTensor>& tensors,
                         const Owners& owners, const std::vector<void*>& destinations,
                         std::size_t bytes)
    : comm_(comm), destinations_(destinations) {
  require(!destinations.empty(), "ShardGather: there is no destination");
  for (std::size_t d = 0; d < destinations.size(); ++d) {
    require(destinations[d] != nullptr || bytes == 0, "ShardGather: destination ", d,
            " has a null pointer");
  }
  check_layout(tensors, bytes);
  std::vector<std::int64_t> numels;
  for (const ShardedTensor& tensor : tensors) numels.push_back(tensor.shape.numel());
  check_owners("ShardGather", owners, comm.size(), numels);
  plan(tensors, merged(owners));
}

// A transport does not send to the rank itself, so its own pieces are copied.
void ShardGather::plan(const std::vector<ShardedTensor>& tensors, const Owners& owners) {
  const auto rank = static_cast<std::size_t>(comm_.rank());
  const std::vector<Piece>& own = owners[rank];
  const std::vector<const char*> sources = sources_of(tensors, own);
  auto* const first = static_cast<char*>(destinations_[0]);
  std::vector<RecvPart> recvs;
  for (std::size_t peer = 0; peer < owners.size(); ++peer) {
    for (std::size_t i = 0; i < own.size(); ++i) {
      const std::size_t bytes = bytes_of(tensor_of(tensors, own[i]), own[i].count);
      if (peer == rank) {
        add_copy({sources[i], place_of(tensors, own[i]), bytes});
      } else {
        sends_.push_back({sources[i], bytes, static_cast<int>(peer)});
        payload_ += bytes;
      }
    }
    if (peer == rank) continue;
    for (const Piece& piece : owners[peer]) {
      recvs.push_back({first + place_of(tensors, piece),
                       bytes_of(tensor_of(tensors, piece), piece.count), static_cast<int>(peer)});
    }
  }
  join_parts(comm_, sends_, recvs);
  for (void* destination : destinations_) {
    recvs_.push_back(recvs);
    for (RecvPart& part : recvs_.back()) {
      part.data = static_cast<char*>(destination) + (static_cast<char*>(part.data) - first);
    }
  }
}

// Joined to the copy before where it goes on in both memories.
void ShardGather::add_copy(const Copy& copy) {
  const bool goes_on =
      !copies_.empty() && copies_.back().to + copies_.back().bytes == copy.to &&
      follows(comm_.context(), copy.from, copies_.back().from, copies_.back().bytes);
  if (goes_on) {
    copies_.back().bytes += copy.bytes;
  } else {
    copies_.push_back(copy);
  }
}

void ShardGather::run(int destination) {
  require(destination >= 0 && static_cast<std::size_t>(destination) < destinations_.size(),
          "ShardGather::run: there is no destination ", destination, "; they are 0 to ",
          static_cast<std::int64_t>(destinations_.size()) - 1);
  comm_.check();
  const auto d = static_cast<std::size_t>(destination);
  for (const Copy& copy : copies_) {
    copy_bytes(comm_.context(), static_cast<char*>(destinations_[d]) + copy.to, copy.from,
               copy.bytes);
  }
  if (comm_.size() == 1) return;
  const CollectiveScope scope(comm_, {"shard_gather"});
  comm_.exchange(sends_, recvs_[d]);
}

}  // namespace octet
