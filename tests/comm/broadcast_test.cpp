// SPDX-License-Identifier: Apache-2.0
#include "octet/comm/collectives.hpp"
#include "support/catch.hpp"
#include "support/devices.hpp"
#include "support/errors.hpp"
#include "support/ranks.hpp"

namespace octet::test {
namespace {

struct Model {
  std::vector<Tensor> tensors;
  Buffer scales;
  std::vector<ScaledView> views;
};

constexpr DType kDTypes[] = {DType::e4m3, DType::f32, DType::e4m3, DType::bf16};
constexpr std::int64_t kSizes[] = {127, 1, 0, 4099};

std::size_t at(std::int64_t i) { return static_cast<std::size_t>(i); }

std::uint8_t byte_of(int rank, std::size_t tensor, std::size_t i) {
  return static_cast<std::uint8_t>(31 * rank + 7 * static_cast<int>(tensor) + 3 * (i % 67) + 1);
}

/// Contents and scales of a rank, told apart from those of every other; bf16 has no scale.
Model model_of(const Context& ctx, int rank) {
  Model model;
  std::vector<TensorScale> scales;
  for (std::size_t t = 0; t < std::size(kSizes); ++t) {
    const Tensor& tensor = model.tensors.emplace_back(Tensor(ctx, kDTypes[t], Shape{kSizes[t]}));
    std::vector<std::uint8_t> bytes(tensor.view().bytes());
    for (std::size_t i = 0; i < bytes.size(); ++i) bytes[i] = byte_of(rank, t, i);
    write(ctx, tensor.view().data, bytes);
    const float scale = static_cast<float>(rank + 2 * static_cast<int>(t) + 1);
    scales.push_back({.scale_inv = 1.0f / scale, .scale = scale, .amax = 3.0f * scale});
  }
  model.scales = upload_sync<TensorScale>(ctx, scales);
  for (std::size_t t = 0; t < std::size(kSizes); ++t) {
    TensorScale* scale = model.scales.as<TensorScale>() + t;
    model.views.push_back({model.tensors[t].view(), kDTypes[t] == DType::bf16 ? nullptr : scale});
  }
  return model;
}

std::string wrong_in(const Context& ctx, const Model& model, int root, int rank) {
  const auto scales = download<TensorScale>(ctx, model.scales.data(), std::size(kSizes));
  for (std::size_t t = 0; t < std::size(kSizes); ++t) {
    const TensorView view = model.tensors[t].view();
    const auto bytes = download<std::uint8_t>(ctx, view.data, view.bytes());
    for (std::size_t i = 0; i < bytes.size(); ++i) {
      if (bytes[i] != byte_of(root, t, i)) return "byte " + std::to_string(i);
    }
    const int from = kDTypes[t] == DType::bf16 ? rank : root;
    const float scale = static_cast<float>(from + 2 * static_cast<int>(t) + 1);
    if (scales[t].scale != scale || scales[t].amax != 3.0f * scale ||
        scales[t].scale_inv != 1.0f / scale) {
      return "scale of tensor " + std::to_string(t);
    }
  }
  return "";
}

}  // namespace

TEST_CASE("broadcast gives every rank the root's tensors with their scales, and counts them") {
  for (DeviceType device : rank_devices()) {
    for (int n : {1, 2, 3, 5, 8}) {
      for (int root : {0, n - 1}) {
        std::vector<std::string> wrong(at(n));
        std::vector<WireBytes> wire(at(n));
        run_ranks(
            n,
            [&](Communicator& comm) {
              const Model model = model_of(comm.context(), comm.rank());
              broadcast(comm, model.views, root);
              wrong[at(comm.rank())] = wrong_in(comm.context(), model, root, comm.rank());
              wire[at(comm.rank())] = comm.wire_bytes();
            },
            device);
        for (int r = 0; r < n; ++r) {
          CAPTURE(n, root, r);
          CHECK(wrong[at(r)] == "");
          const auto others = static_cast<std::uint64_t>(r == root ? n - 1 : 0);
          CHECK(wire[at(r)].payload == others * (127 + 4 + 2 * 4099));
          CHECK(wire[at(r)].metadata == others * 3 * sizeof(TensorScale));
        }
      }
    }
  }
}

TEST_CASE("broadcast refuses a root that is no rank and tensors that it cannot send") {
  const Context ctx = Context::cpu();
  const auto comm = make_single(ctx);
  Model model = model_of(ctx, 0);
  CHECK(missing(error_of([&] { broadcast(*comm, model.views, 1); }), {"root is 1", "0 to 0"}) ==
        "");
  CHECK(missing(error_of([&] { broadcast(*comm, model.views, -1); }), {"root is -1"}) == "");
  model.views[1].data.data = nullptr;
  CHECK(missing(error_of([&] { broadcast(*comm, model.views, 0); }), {"tensor 1", "null"}) == "");
  model.views[1].data = {model.tensors[1].view().data, DType::f32, Shape{1},
                         Device{DeviceType::cuda, 0}};
  CHECK(missing(error_of([&] { broadcast(*comm, model.views, 0); }), {"tensor 1", "cuda"}) == "");
}

}  // namespace octet::test
