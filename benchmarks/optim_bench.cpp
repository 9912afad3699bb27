// SPDX-License-Identifier: Apache-2.0
// Time of an AdamW step on CUDA device 0 against the rate of a copy on the same device. The
// parameters are those of a GPT of 1.3 B (97 tensors, random values and gradients); beside them
// 4,000 tensors of 1,000 elements in a CUDA graph. Repetitions are enqueued one after the other
// with an event between each two, so the host's latency is not in the times.
#include <cuda_runtime.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <fstream>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "build_info.hpp"
#include "octet/octet.hpp"

namespace {

using octet::DType;
using octet::Shape;
using octet::StateFormats;

constexpr int kWarmup = 3;
constexpr float kLearningRate = 1e-4f;
constexpr std::size_t kCopyBytes = std::size_t{2} << 30;
/// Random values that are made on the host; a tensor holds copies of them, from its own start.
constexpr std::int64_t kBlock = std::int64_t{1} << 22;

void check(cudaError_t status, const char* what) {
  octet::require(status == cudaSuccess, what, ": ", cudaGetErrorString(status));
}

class Stream {
 public:
  Stream() {
    check(cudaSetDevice(0), "cudaSetDevice");
    check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
  }
  ~Stream() { cudaStreamDestroy(stream_); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  cudaStream_t get() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
};

class TimingEvent {
 public:
  TimingEvent() { check(cudaEventCreate(&event_), "cudaEventCreate"); }
  ~TimingEvent() { cudaEventDestroy(event_); }
  TimingEvent(const TimingEvent&) = delete;
  TimingEvent& operator=(const TimingEvent&) = delete;
  void record(cudaStream_t stream) { check(cudaEventRecord(event_, stream), "cudaEventRecord"); }
  double ms_since(const TimingEvent& start) const {
    float ms = 0.0f;
    check(cudaEventElapsedTime(&ms, start.event_, event_), "cudaEventElapsedTime");
    return static_cast<double>(ms);
  }

 private:
  cudaEvent_t event_ = nullptr;
};

/// What was captured between the constructor and finish(), to be replayed.
class Graph {
 public:
  template <class Work>
  Graph(cudaStream_t stream, const Work& work) : stream_(stream) {
    check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal),
          "cudaStreamBeginCapture");
    work();
    check(cudaStreamEndCapture(stream, &graph_), "cudaStreamEndCapture");
    check(cudaGraphInstantiate(&executable_, graph_, 0), "cudaGraphInstantiate");
  }
  ~Graph() {
    cudaGraphExecDestroy(executable_);
    cudaGraphDestroy(graph_);
  }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;
  void replay() const { check(cudaGraphLaunch(executable_, stream_), "cudaGraphLaunch"); }

 private:
  cudaStream_t stream_;
  cudaGraph_t graph_ = nullptr;
  cudaGraphExec_t executable_ = nullptr;
};

/// Milliseconds of each of `repeats` runs after kWarmup more.
template <class Work>
std::vector<double> time_each(const octet::Context& ctx, int repeats, const Work& work) {
  std::vector<TimingEvent> events(static_cast<std::size_t>(repeats) + 1);
  for (int i = 0; i < kWarmup; ++i) work();
  events.front().record(ctx.stream());
  for (std::size_t i = 1; i < events.size(); ++i) {
    work();
    events[i].record(ctx.stream());
  }
  ctx.synchronize();
  std::vector<double> times;
  for (std::size_t i = 1; i < events.size(); ++i) {
    times.push_back(events[i].ms_since(events[i - 1]));
  }
  return times;
}

struct Timing {
  double median_ms = 0.0;
  double spread = 0.0;  ///< (largest - smallest) / median
};

Timing timing_of(std::vector<double> times) {
  std::sort(times.begin(), times.end());
  const std::size_t n = times.size();
  const double median = (times[(n - 1) / 2] + times[n / 2]) / 2.0;
  return {median, (times.back() - times.front()) / median};
}

/// Embedding, and per layer qkv, out, up and down.
std::vector<Shape> gpt_shapes(int layers) {
  constexpr std::int64_t kWidth = 2048, kVocabulary = 50304;
  std::vector<Shape> shapes{{kVocabulary, kWidth}};
  for (int layer = 0; layer < layers; ++layer) {
    shapes.insert(
        shapes.end(),
        {{3 * kWidth, kWidth}, {kWidth, kWidth}, {4 * kWidth, kWidth}, {kWidth, 4 * kWidth}});
  }
  return shapes;
}

std::int64_t numel_of(const std::vector<Shape>& shapes) {
  std::int64_t count = 0;
  for (const Shape& shape : shapes) count += shape.numel();
  return count;
}

struct Case {
  std::string name;
  DType gradient;
  StateFormats formats;
  double target;  ///< fraction of the copy's rate, or microseconds for `small`

  /// Every byte once: gradient read, states read and written, weight written.
  std::size_t bytes_per_parameter() const {
    using octet::size_of;
    return size_of(gradient) + size_of(formats.weight) +
           2 * (size_of(formats.master) + size_of(formats.m) + size_of(formats.v));
  }
};

/// Random f32 values on the device, enough for the largest tensor from any start in the block.
class RandomValues {
 public:
  RandomValues(const octet::Context& ctx, std::int64_t largest)
      : ctx_(ctx), buffer_(ctx, static_cast<std::size_t>(largest + kBlock) * sizeof(float)) {
    std::mt19937 generator(1);
    std::normal_distribution<float> normal(0.0f, 0.02f);
    std::vector<float> block(static_cast<std::size_t>(kBlock));
    for (float& value : block) value = normal(generator);
    const octet::Buffer source = octet::upload_sync<float>(ctx, block);
    for (std::size_t done = 0; done < buffer_.bytes(); done += source.bytes()) {
      check(cudaMemcpyAsync(buffer_.as<char>() + done, source.data(),
                            std::min(source.bytes(), buffer_.bytes() - done),
                            cudaMemcpyDeviceToDevice, ctx.stream()),
            "cudaMemcpyAsync");
    }
    ctx.synchronize();
  }

  /// Another start, aligned to 256 bytes, in every call.
  octet::TensorView next(const Shape& shape) {
    start_ = (start_ + 64 * 10007) % kBlock;
    return {buffer_.as<float>() + start_, DType::f32, shape, ctx_.device()};
  }

 private:
  octet::Context ctx_;
  octet::Buffer buffer_;
  std::int64_t start_ = 0;
};

/// An optimizer with weights and gradients, ready to step.
class Model {
 public:
  Model(const octet::Context& ctx, const Case& c, const std::vector<Shape>& shapes)
      : ctx_(ctx),
        flag_(octet::upload_sync<std::uint32_t>(ctx, std::vector<std::uint32_t>{0})),
        lr_(octet::upload_sync<float>(ctx, std::vector<float>{kLearningRate})) {
    std::int64_t largest = 0;
    for (const Shape& shape : shapes) largest = std::max(largest, shape.numel());
    RandomValues random(ctx, largest);
    std::vector<octet::AdamWParam> params;
    for (const Shape& shape : shapes) {
      weights_.emplace_back(ctx, c.formats.weight, shape);
      gradients_.emplace_back(ctx, c.gradient, shape);
      const octet::ScaledView gradient = gradients_.back().view();
      const octet::TensorView values = random.next(shape);
      if (octet::is_fp8(c.gradient)) {
        octet::quantize(ctx, {.in = values, .out = gradient});
      } else {
        octet::convert(ctx, {values, nullptr}, gradient.data);
        octet::measure_amax(ctx, gradient.data, gradient.scale);
      }
      params.push_back({.name = "p" + std::to_string(params.size()),
                        .shape = shape,
                        .formats = c.formats,
                        .gradient = gradient.data,
                        .gradient_scale = gradient.scale,
                        .weight = weights_.back().view(),
                        .weight_decay = 0.1f});
    }
    optimizer_ = std::make_unique<octet::AdamW>(ctx, octet::AdamWConfig{}, std::move(params));
    for (std::size_t i = 0; i < shapes.size(); ++i) {
      optimizer_->initialise(static_cast<int>(i), random.next(shapes[i]));
    }
    ctx.synchronize();
  }

  void step() {
    optimizer_->step({.lr_device = lr_.as<float>(), .nonfinite = flag_.as<std::uint32_t>()});
  }

  void require_steps(const std::string& name, std::int64_t expected) const {
    const auto scalars = octet::read_sync<octet::AdamwScalars>(ctx_, optimizer_->scalars(), 1)[0];
    octet::require(scalars.step == expected && scalars.skipped == 0, name, ": ", scalars.step,
                   " steps were applied and ", scalars.skipped, " skipped; expected are ", expected,
                   " and 0");
  }

 private:
  octet::Context ctx_;
  octet::Buffer flag_, lr_;
  std::vector<octet::Tensor> weights_;
  std::vector<octet::ScaledTensor> gradients_;
  std::unique_ptr<octet::AdamW> optimizer_;
};

Timing measure_steps(const octet::Context& ctx, const Case& c, const std::vector<Shape>& shapes,
                     int repeats) {
  Model model(ctx, c, shapes);
  const Timing timing = timing_of(time_each(ctx, repeats, [&] { model.step(); }));
  model.require_steps(c.name, kWarmup + repeats);
  return timing;
}

Timing measure_replays(const octet::Context& ctx, const Case& c, const std::vector<Shape>& shapes,
                       int repeats) {
  Model model(ctx, c, shapes);
  model.step();
  ctx.synchronize();
  const Graph graph(ctx.stream(), [&] { model.step(); });
  const Timing timing = timing_of(time_each(ctx, repeats, [&] { graph.replay(); }));
  model.require_steps(c.name, 1 + kWarmup + repeats);
  return timing;
}

std::vector<double> measure_copy(const octet::Context& ctx, int repeats) {
  const octet::Buffer from(ctx, kCopyBytes), to(ctx, kCopyBytes);
  check(cudaMemsetAsync(from.data(), 0x5a, kCopyBytes, ctx.stream()), "cudaMemsetAsync");
  return time_each(ctx, repeats, [&] {
    check(
        cudaMemcpyAsync(to.data(), from.data(), kCopyBytes, cudaMemcpyDeviceToDevice, ctx.stream()),
        "cudaMemcpyAsync");
  });
}

struct Result {
  std::string name;
  std::string metric, unit;
  double value = 0.0;
  std::optional<double> target;
  bool at_least = true;  ///< the target is a lower bound
  Timing timing;
  std::size_t bytes = 0;
  std::size_t bytes_per_parameter = 0;
  double fraction = 0.0;  ///< of the copy's rate

  double rate() const { return static_cast<double>(bytes) / (timing.median_ms * 1e9); }
  bool met() const { return !target || (at_least ? value >= *target : value <= *target); }
};

std::string table_row(const Result& r) {
  char text[256];
  std::string per = r.bytes_per_parameter > 0 ? std::to_string(r.bytes_per_parameter) : "";
  std::string target, met;
  if (r.target) {
    char number[32];
    std::snprintf(number, sizeof number, r.at_least ? ">= %.2f" : "<= %.0f us", *r.target);
    target = number;
    met = r.met() ? "yes" : "NO";
  }
  std::snprintf(text, sizeof text, "| %s | %s | %.4f | %.1f %% | %.3f | %.3f | %s | %s |",
                r.name.c_str(), per.c_str(), r.timing.median_ms, 100.0 * r.timing.spread, r.rate(),
                r.fraction, target.c_str(), met.c_str());
  return text;
}

nlohmann::ordered_json json_row(const Result& r) {
  using Json = nlohmann::ordered_json;
  return {{"case", r.name},
          {"metric", r.metric},
          {"value", r.value},
          {"unit", r.unit},
          {"target", r.target ? Json(*r.target) : Json()},
          {"met", r.target ? Json(r.met()) : Json()},
          {"median_ms", r.timing.median_ms},
          {"spread", r.timing.spread},
          {"bytes", r.bytes},
          {"flops", nullptr}};
}

struct Options {
  std::string scale = "full", json;
  int repeats = 15;
  double torch_ms = 0.0;
};

void write_json(const Options& options, const std::string& device, std::int64_t parameters,
                const std::vector<Result>& results, std::optional<double> torch_ratio) {
  nlohmann::ordered_json rows = nlohmann::ordered_json::array();
  for (const Result& r : results) rows.push_back(json_row(r));
  if (torch_ratio) {
    rows.push_back({{"case", "torch fused AdamW FP32"},
                    {"metric", "time over that of octet O2"},
                    {"value", *torch_ratio},
                    {"unit", "1"},
                    {"target", nullptr},
                    {"met", nullptr},
                    {"median_ms", options.torch_ms},
                    {"spread", nullptr},
                    {"bytes", nullptr},
                    {"flops", nullptr}});
  }
  const nlohmann::ordered_json document{
      {"benchmark", "optim_bench"},       {"device", device},
      {"parameters", parameters},         {"scale", options.scale},
      {"repeats", options.repeats},       {"commit", octet::build_info::kCommit},
      {"cuda", octet::build_info::kCuda}, {"rows", rows}};
  std::ofstream file(options.json);
  file << document.dump(2) << '\n';
  file.close();
  octet::require(file.good(), "results cannot be written to ", options.json);
}

int run(const Options& options) {
  octet::require(options.scale == "full" || options.scale == "small", "--scale ", options.scale,
                 ": must be full or small");
  octet::require(options.repeats >= 1, "--repeats ", options.repeats, ": must be at least 1");
  octet::require(options.torch_ms >= 0.0, "--torch-ms ", options.torch_ms, ": must be positive");
  octet::require(octet::cuda_device_count() > 0, "there is no CUDA device that this build can use");
  const Stream stream;
  const octet::Context ctx = octet::Context::cuda(0, stream.get());
  cudaDeviceProp properties{};
  check(cudaGetDeviceProperties(&properties, 0), "cudaGetDeviceProperties");

  const std::vector<Shape> shapes = gpt_shapes(options.scale == "full" ? 24 : 3);
  const std::vector<Shape> small_shapes(4000, Shape{1000});
  const StateFormats o2{DType::e4m3, DType::f16, DType::e4m3, DType::f16};
  const Case cases[] = {
      {"O2", DType::e4m3, o2, 0.90},
      {"O1", DType::e4m3, {DType::e4m3, DType::f16, DType::f32, DType::f32}, 0.90},
      {"O0", DType::bf16, {DType::bf16, DType::f32, DType::f32, DType::f32}, 0.92}};
  const Case small{"small", DType::e4m3, o2, 25.0};
  const auto traffic = [](const Case& c, const std::vector<Shape>& of) {
    return static_cast<std::size_t>(numel_of(of)) * c.bytes_per_parameter();
  };

  std::vector<double> copies = measure_copy(ctx, options.repeats);
  std::vector<Result> results;
  for (const Case& c : cases) {
    results.push_back({.name = c.name,
                       .metric = "rate over that of a copy",
                       .unit = "1",
                       .target = c.target,
                       .timing = measure_steps(ctx, c, shapes, options.repeats),
                       .bytes = traffic(c, shapes),
                       .bytes_per_parameter = c.bytes_per_parameter()});
  }
  results.push_back({.name = small.name,
                     .metric = "graph replay",
                     .unit = "us",
                     .target = small.target,
                     .at_least = false,
                     .timing = measure_replays(ctx, small, small_shapes, options.repeats),
                     .bytes = traffic(small, small_shapes),
                     .bytes_per_parameter = small.bytes_per_parameter()});
  for (double ms : measure_copy(ctx, options.repeats)) copies.push_back(ms);
  results.push_back({.name = "copy",
                     .metric = "rate",
                     .unit = "TB/s",
                     .target = {},
                     .timing = timing_of(copies),
                     .bytes = 2 * kCopyBytes});

  const double copy_rate = results.back().rate();
  for (Result& r : results) {
    r.fraction = r.rate() / copy_rate;
    r.value = r.unit == "us" ? r.timing.median_ms * 1e3 : r.unit == "1" ? r.fraction : r.rate();
  }
  std::printf("%s, %zu tensors of %lld parameters in total; small: %zu of %lld.\n\n",
              properties.name, shapes.size(), static_cast<long long>(numel_of(shapes)),
              small_shapes.size(), static_cast<long long>(numel_of(small_shapes)));
  std::puts(
      "| case | bytes/parameter | ms | spread | TB/s | fraction of copy | target | met |\n"
      "|---|---|---|---|---|---|---|---|");
  for (const Result& r : results) std::puts(table_row(r).c_str());
  std::optional<double> torch_ratio;
  if (options.torch_ms > 0.0) {
    torch_ratio = options.torch_ms / results.front().timing.median_ms;
    std::printf("\ntorch fused AdamW FP32: %.4f ms, %.2f times that of octet O2\n",
                options.torch_ms, *torch_ratio);
  }
  if (!options.json.empty()) {
    write_json(options, properties.name, numel_of(shapes), results, torch_ratio);
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  Options options;
  CLI::App app("Time of an AdamW step on CUDA device 0 against the rate of a copy.");
  app.add_option("--scale", options.scale, "full or small (3 layers instead of 24; default: full)");
  app.add_option("--repeats", options.repeats, "Timed runs of each case (default: 15)");
  app.add_option("--json", options.json, "Write the results to this file");
  app.add_option("--torch-ms", options.torch_ms, "What torch_adamw.py measured, for the ratio");
  try {
    app.parse(argc, argv);
    return run(options);
  } catch (const CLI::CallForHelp&) {
    std::cout << app.help();
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "optim_bench: %s\n", error.what());
    return 1;
  }
}
