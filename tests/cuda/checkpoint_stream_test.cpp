// SPDX-License-Identifier: Apache-2.0
// Saving beside training on a CUDA stream: nothing waits for the copy but the thread that writes.
#include <atomic>
#include <chrono>
#include <thread>

#include "octet/checkpoint/checkpoint.hpp"
#include "support/catch.hpp"
#include "support/checkpoint_run.hpp"
#include "support/cuda_stream.hpp"
#include "support/errors.hpp"
#include "support/folder.hpp"

namespace octet::test {
namespace {

/// Holds a stream up until it is opened, or for 20 s. Outlives the stream.
struct Gate {
  std::atomic<bool> is_open{false}, gave_up{false};

  void close(cudaStream_t stream) {
    const auto wait = [](void* data) {
      auto& gate = *static_cast<Gate*>(data);
      const auto until = std::chrono::steady_clock::now() + std::chrono::seconds(20);
      while (!gate.is_open && !gate.gave_up) {
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
        gate.gave_up = std::chrono::steady_clock::now() > until;
      }
    };
    is_open = false;
    REQUIRE(cudaLaunchHostFunc(stream, wait, this) == cudaSuccess);
  }
};

/// With the gradients of a step in device memory, so that a step needs no wait.
struct Ready : Trained {
  explicit Ready(cudaStream_t stream) : Trained(2, Context::cuda(0, stream)) {
    for (std::size_t p = 0; p < params.size(); ++p) {
      gradients.push_back(upload(ctx, leg_gradient(p, params[p].shape, 3, 0, true)));
    }
    ctx.synchronize();
  }
  void enqueue_step() {
    for (std::size_t p = params.size(); p-- > 0;) {
      engine.add_gradient({static_cast<int>(p)},
                          view_of(ctx, gradients[p], DType::f32, params[p].shape));
    }
    engine.step({.lr = 1e-3f});
  }

  const std::vector<SavedParam> params = saved_params();
  std::vector<Buffer> gradients;
};

}  // namespace

TEST_CASE("a save begins and steps follow while the stream is far behind") {
  if (cuda_device_count() == 0) {
    WARN("no CUDA device: no stream to be behind");
    return;
  }
  const Folder folder;
  const std::string directory = folder.file("run");
  Gate gate;
  const Stream stream;
  Ready run(stream.get());
  CheckpointWriter writer(run.engine, *run.comm, directory);
  writer.start();  // makes the directory and takes memory
  writer.finish();
  const Bytes before = run.held();
  run.enqueue_step();  // what it needs is loaded, and the state is another one
  const Bytes saved = run.held();
  REQUIRE(saved != before);

  gate.close(stream.get());
  writer.start();
  run.enqueue_step();
  CHECK(writer.is_writing());
  CHECK(cudaStreamQuery(stream.get()) == cudaErrorNotReady);
  CHECK(!gate.gave_up);  // which it has where anything above waits for the stream
  gate.is_open = true;
  const auto info = writer.finish();
  REQUIRE(info.has_value());
  CHECK(info->step == 3);
  CHECK(run.held() != saved);
  load_checkpoint(run.engine, *run.comm, directory);
  CHECK(run.held() == saved);
}

TEST_CASE("a graph is captured, in the strictest mode, while a save waits for its copy") {
  if (cuda_device_count() == 0) {
    WARN("no CUDA device: nothing to capture");
    return;
  }
  const Folder folder;
  const std::string directory = folder.file("run");
  Gate gate;
  const Stream stream, captured;
  Ready run(stream.get());
  CheckpointWriter writer(run.engine, *run.comm, directory);
  writer.start();
  writer.finish();

  gate.close(stream.get());
  writer.start();
  REQUIRE(cudaStreamBeginCapture(captured.get(), cudaStreamCaptureModeGlobal) == cudaSuccess);
  std::this_thread::sleep_for(std::chrono::milliseconds(50));  // of questions by the other thread
  cudaGraph_t graph = nullptr;
  REQUIRE(cudaStreamEndCapture(captured.get(), &graph) == cudaSuccess);
  cudaGraphDestroy(graph);
  CHECK(writer.is_writing());
  CHECK(!gate.gave_up);
  gate.is_open = true;
  CHECK(writer.finish().has_value());
}

TEST_CASE("a save is no part of a graph") {
  if (cuda_device_count() == 0) {
    WARN("no CUDA device: nothing to capture");
    return;
  }
  const Folder folder;
  const Stream stream;
  Ready run(stream.get());
  CheckpointWriter writer(run.engine, *run.comm, folder.file("run"));
  writer.start();
  writer.finish();
  Graph graph(stream.get(), [&] { writer.start(); });
  CHECK(missing(error_of([&] { writer.finish(); }), {"CheckpointWriter::start", "captured"}) == "");
  writer.start();
  CHECK(writer.finish().has_value());
}

}  // namespace octet::test
