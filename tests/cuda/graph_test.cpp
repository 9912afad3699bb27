// SPDX-License-Identifier: Apache-2.0
// A whole step, gradients and Linear included, captured once and replayed: the bits of the eager
// run, with a learning rate that changes between replays.
#include <cuda_runtime_api.h>

#include <array>
#include <vector>

#include "octet/octet.hpp"
#include "support/adamw_stored.hpp"
#include "support/catch.hpp"
#include "support/compare.hpp"
#include "support/devices.hpp"
#include "support/random.hpp"

namespace octet::test {
namespace {

constexpr std::int64_t kTokens = 48;
constexpr std::int64_t kIn = 96;
constexpr std::int64_t kOut = 64;
constexpr std::array<float, 6> kRates = {1e-3f, 2e-3f, 5e-4f, 4e-3f, 1e-3f, 3e-3f};

class Stream {
 public:
  Stream() { REQUIRE(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking) == cudaSuccess); }
  ~Stream() { cudaStreamDestroy(stream_); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  cudaStream_t get() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
};

/// One linear layer and a vector, trained on a fixed batch.
class Trainer {
 public:
  Trainer(const Context& ctx, Level level)
      : ctx_(ctx),
        comm_(make_single(ctx)),
        gemms_(ctx),
        engine_(ctx, *comm_, {.level = level}),
        x_(upload(ctx, normal_values(kTokens * kIn, 1))),
        dy_(upload(ctx, normal_values(kTokens * kOut, 2))),
        init_(upload(ctx, normal_values(kIn * kOut, 3, 0.02f))),
        y_(ctx, DType::f32, {kTokens, kOut}),
        dw_(ctx, DType::f32, {kOut, kIn}),
        lr_(ctx, sizeof(float)) {
    weight_ = engine_.add({.name = "w",
                           .shape = {kOut, kIn},
                           .init = view_of(ctx, init_, DType::f32, {kOut, kIn}),
                           .group = AdamWGroup{.weight_decay = 0.1f}});
    bias_ = engine_.add(
        {.name = "b", .shape = {kOut}, .init = view_of(ctx, init_, DType::f32, {kOut})});
    engine_.freeze();
    linear_ = std::make_unique<Linear>(
        gemms_, LinearConfig{.in_features = kIn,
                             .out_features = kOut,
                             .max_tokens = kTokens,
                             .weight_dtype = engine_.weight(weight_).data.dtype,
                             .nonfinite = engine_.nonfinite_flag()});
  }

  void set_rate(float rate) { write_one(ctx_, lr_.data(), rate); }

  void enqueue_step() {
    const ScaledView w = engine_.weight(weight_);
    linear_->forward(view_of(ctx_, x_, DType::f32, {kTokens, kIn}), w, y_);
    linear_->backward(view_of(ctx_, dy_, DType::f32, {kTokens, kOut}), w, {}, dw_);
    engine_.add_gradient(weight_, dw_);
    engine_.add_gradient(bias_, view_of(ctx_, dy_, DType::f32, {kOut}));
    engine_.step({.lr = 0.0f, .lr_device = lr_.as<const float>(), .max_norm = 1.0f});
  }

  std::vector<std::uint8_t> state() const {
    std::vector<std::uint8_t> bytes;
    for (int i : {weight_.index, bias_.index}) {
      const AdamW& adamw = engine_.optimizer();
      const auto append = [&bytes](const std::vector<std::uint8_t>& part) {
        bytes.insert(bytes.end(), part.begin(), part.end());
      };
      append(download_bytes(ctx_, engine_.weight({i}).data));
      for (const StateView& view : {adamw.master(i), adamw.m(i), adamw.v(i)}) {
        append(download_state(ctx_, view));
      }
    }
    return bytes;
  }

 private:
  Context ctx_;
  std::unique_ptr<Communicator> comm_;
  GemmRegistry gemms_;
  Engine engine_;
  Buffer x_, dy_, init_;
  Tensor y_, dw_;
  Buffer lr_;
  ParamId weight_, bias_;
  std::unique_ptr<Linear> linear_;
};

void check_replay(Level level) {
  const Stream stream;
  const Context ctx = Context::cuda(0, stream.get());
  Trainer eager(ctx, level);
  for (float rate : kRates) {
    eager.set_rate(rate);
    eager.enqueue_step();
  }

  Trainer captured(ctx, level);
  captured.set_rate(kRates[0]);
  captured.enqueue_step();  // plans of GEMMs are made at their first call
  ctx.synchronize();
  REQUIRE(cudaStreamBeginCapture(stream.get(), cudaStreamCaptureModeThreadLocal) == cudaSuccess);
  captured.enqueue_step();
  cudaGraph_t graph = nullptr;
  REQUIRE(cudaStreamEndCapture(stream.get(), &graph) == cudaSuccess);
  cudaGraphExec_t executable = nullptr;
  REQUIRE(cudaGraphInstantiate(&executable, graph, 0) == cudaSuccess);
  for (std::size_t i = 1; i < kRates.size(); ++i) {
    captured.set_rate(kRates[i]);
    REQUIRE(cudaGraphLaunch(executable, stream.get()) == cudaSuccess);
  }
  ctx.synchronize();
  REQUIRE(first_difference(captured.state(), eager.state()) == "");
  cudaGraphExecDestroy(executable);
  cudaGraphDestroy(graph);
}

}  // namespace

TEST_CASE("a captured step replays with the bits of the eager one") {
  if (cuda_device_count() == 0) {
    WARN("no CUDA device: nothing to capture");
    return;
  }
  for (Level level : {Level::O0, Level::O1, Level::O2}) {
    CAPTURE(name_of(level));
    check_replay(level);
  }
}

}  // namespace octet::test
