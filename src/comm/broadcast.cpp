// SPDX-License-Identifier: Apache-2.0
#include "octet/comm/collectives.hpp"

namespace octet {
namespace {

struct Bytes {
  void* data;
  std::size_t count;
};

void send_from(Communicator& comm, int root, const std::vector<Bytes>& list, Traffic traffic) {
  std::vector<SendPart> sends;
  std::vector<RecvPart> recvs;
  for (const Bytes& bytes : list) {
    if (comm.rank() != root) {
      recvs.push_back({bytes.data, bytes.count, root});
      continue;
    }
    for (int peer = 0; peer < comm.size(); ++peer) {
      if (peer != root) sends.push_back({bytes.data, bytes.count, peer});
    }
  }
  comm.exchange(sends, recvs, traffic);
}

}  // namespace

void broadcast(Communicator& comm, std::span<const ScaledView> tensors, int root) {
  require(root >= 0 && root < comm.size(), "broadcast: root is ", root, "; ranks are 0 to ",
          comm.size() - 1);
  std::vector<Bytes> contents, scales;
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const ScaledView& tensor = tensors[i];
    require(tensor.data.device == comm.context().device(), "broadcast: tensor ", i, " is on ",
            tensor.data.device, ", the communicator on ", comm.context().device());
    require(tensor.data.data != nullptr || tensor.data.numel() == 0, "broadcast: tensor ", i,
            " of shape ", tensor.data.shape, " has a null pointer");
    if (tensor.data.bytes() > 0) contents.push_back({tensor.data.data, tensor.data.bytes()});
    if (tensor.scale != nullptr) scales.push_back({tensor.scale, sizeof(TensorScale)});
  }
  if (comm.size() == 1) return;
  const CollectiveScope scope(comm, {"broadcast"});
  send_from(comm, root, contents, Traffic::payload);
  send_from(comm, root, scales, Traffic::metadata);
}

}  // namespace octet
