// SPDX-License-Identifier: Apache-2.0
// Time of an AdamW step on CUDA device 0 against the rate of a copy on the same device. The
// parameters are those of a GPT of 1.3 B (97 tensors, random values and gradients); beside them
// 4,000 tensors of 1,000 elements in a CUDA graph. Repetitions are enqueued one after the other
// with an event between each two, so the host's latency is not in the times. Steps with states in
// host memory are beside pinned copies in both directions at once.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <fstream>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "command_line.hpp"
#include "cuda_report.hpp"
#include "octet/octet.hpp"
#include "optim_model.hpp"

namespace bench {
namespace {

using octet::DType;
using octet::Shape;

constexpr double kTorchTarget = 2.4;  ///< its time over that of O2
constexpr std::size_t kLinkBytes = std::size_t{1} << 30;
const char* const kLinkMetric = "rate over that of pinned copies both ways";
const char* const kReference = "O2";
const char* const kFasterThanReference = "blocks and split";

std::vector<Case> all_cases() {
  const octet::Formats o2 = octet::formats_of(octet::Level::O2);
  const auto o2_with = [&o2](octet::WeightFormat weight) {
    octet::Formats formats = o2;
    formats.state.weight = weight;
    return formats;
  };
  const auto shard = [](octet::Formats formats) {
    formats.gradient = DType::f32;
    return formats;
  };
  return {{.name = kReference, .formats = o2, .target = 0.90},
          {.name = "O2 with transpose",
           .formats = o2_with(octet::WeightFormat::e4m3_and_transpose),
           .target = 0.85},
          {.name = "O2 with tiles", .formats = o2_with(octet::WeightFormat::e4m3_tile)},
          {.name = "O2 with tiles and transpose",
           .formats = o2_with(octet::WeightFormat::e4m3_tile_and_transpose)},
          {.name = kFasterThanReference, .formats = octet::small_formats(), .target = 0.75},
          {.name = "O1", .formats = octet::formats_of(octet::Level::O1), .target = 0.90},
          {.name = "O0", .formats = octet::formats_of(octet::Level::O0), .target = 0.92},
          {.name = "all FP32", .formats = {}},
          {.name = "O3 shard", .formats = shard(o2), .gradient_is_shard = true},
          {.name = "blocks and split shard",
           .formats = shard(octet::small_formats()),
           .gradient_is_shard = true},
          {.name = "O1 shard",
           .formats = shard(octet::formats_of(octet::Level::O1)),
           .gradient_is_shard = true},
          {.name = "O0 shard",
           .formats = shard(octet::formats_of(octet::Level::O0)),
           .gradient_is_shard = true},
          {.name = "O3 shard, 1 copy",
           .formats = shard(o2),
           .gradient_is_shard = true,
           .weight_copies = 1},
          {.name = "O3 contributions of 2", .formats = o2, .contributions = 2},
          {.name = "O3 contributions of 2, 1 copy",
           .formats = o2,
           .contributions = 2,
           .weight_copies = 1},
          {.name = "O3 contributions of 3", .formats = o2, .contributions = 3},
          {.name = "O3 contributions of 8", .formats = o2, .contributions = 8},
          {.name = "blocks and split contributions of 2",
           .formats = octet::small_formats(),
           .contributions = 2},
          {.name = "O1 contributions of 2",
           .formats = octet::formats_of(octet::Level::O1),
           .contributions = 2},
          {.name = "O0 contributions of 2",
           .formats = octet::formats_of(octet::Level::O0),
           .contributions = 2},
          {.name = "O2, states in host memory", .formats = o2, .target = 0.90, .host_states = true},
          {.name = "blocks and split, states in host memory",
           .formats = octet::small_formats(),
           .target = 0.90,
           .host_states = true},
          // The general code.
          {.name = "O2 to nearest", .formats = o2, .config = {.stochastic_rounding = false}},
          {.name = "norm", .formats = o2, .work = Work::norm},
          {.name = "small", .formats = o2, .work = Work::replay, .target = 25.0},
          {.name = "small with clipping", .formats = o2, .work = Work::clipped_replay}};
}

/// The cases of these names in the order of the list; all where there are no names.
std::vector<Case> select_cases(const std::vector<std::string>& names) {
  std::vector<Case> cases = all_cases();
  std::string allowed;
  for (const Case& c : cases) allowed += (allowed.empty() ? "" : ", ") + c.name;
  for (const std::string& name : names) {
    octet::require(
        std::any_of(cases.begin(), cases.end(), [&](const Case& c) { return c.name == name; }),
        "--case ", name, ": there is no such case; allowed are ", allowed);
  }
  if (names.empty()) return cases;
  std::erase_if(cases, [&](const Case& c) {
    return std::find(names.begin(), names.end(), c.name) == names.end();
  });
  return cases;
}

/// Times of pinned copies of kLinkBytes to the device and of as many from it, at once.
std::vector<double> measure_link(const octet::Context& ctx, int repeats) {
  const octet::Context host = ctx.with_allocator(octet::pinned_host_allocator(ctx.device()));
  const octet::Buffer from(host, kLinkBytes), back(host, kLinkBytes);
  const octet::Buffer to(ctx, kLinkBytes), out(ctx, kLinkBytes);
  octet::zero_bytes(ctx, out.data(), kLinkBytes);
  const Stream second;
  octet::SideStream streams(ctx, octet::Context::cuda(0, second.get()));
  return time_each(ctx, repeats, [&] {
    streams.fork();
    check(cudaMemcpyAsync(to.data(), from.data(), kLinkBytes, cudaMemcpyHostToDevice, ctx.stream()),
          "cudaMemcpyAsync");
    check(
        cudaMemcpyAsync(back.data(), out.data(), kLinkBytes, cudaMemcpyDeviceToHost, second.get()),
        "cudaMemcpyAsync");
    streams.join();
  });
}

Result link_result(const std::vector<double>& times) {
  const Timing timing = timing_of(times);
  return {.name = "pinned copies both ways",
          .metric = "rate each way",
          .unit = "GB/s",
          .value = static_cast<double>(kLinkBytes) / (timing.median_ms * 1e6),
          .target = {},
          .median_ms = timing.median_ms,
          .spread = timing.spread,
          .bytes = 2 * kLinkBytes};
}

Timing measure_case(const octet::Context& ctx, const Case& c, const std::vector<Shape>& shapes,
                    int repeats) {
  Model model(ctx, c, shapes);
  if (!is_replay(c.work)) {
    const Timing timing = timing_of(time_each(ctx, repeats, [&] { model.run(); }));
    model.require_runs(kWarmup + repeats);
    return timing;
  }
  model.run();
  ctx.synchronize();
  const Graph graph(ctx.stream(), [&] { model.run(); });
  const Timing timing = timing_of(time_each(ctx, repeats, [&] { graph.replay(); }));
  model.require_runs(1 + kWarmup + repeats);
  return timing;
}

Result result_of(const Case& c, const Timing& timing, const std::vector<Shape>& shapes) {
  const std::size_t bytes = c.host_states ? link_bytes(c, shapes) : bytes_moved(c, shapes);
  const bool replay = is_replay(c.work);
  return {.name = c.name,
          .metric = replay          ? "graph replay"
                    : c.host_states ? kLinkMetric
                                    : "rate over that of a copy",
          .unit = replay ? "us" : "1",
          .target = c.target,
          .bound = replay ? Bound::at_most : Bound::at_least,
          .median_ms = timing.median_ms,
          .spread = timing.spread,
          .bytes = bytes,
          .bytes_per_element = static_cast<double>(bytes) / static_cast<double>(numel_of(shapes))};
}

struct Options {
  std::string scale = "full", json;
  std::vector<std::string> cases;
  int repeats = 15;
  std::string torch;
};

/// What torch_adamw.py printed.
struct TorchResult {
  double ms = 0.0;
  std::string version;
  std::int64_t parameters = 0;
};

std::optional<TorchResult> read_torch(const std::string& path) {
  if (path.empty()) return std::nullopt;
  std::ifstream file(path);
  const auto json = nlohmann::json::parse(file, nullptr, false);
  octet::require(json.is_object() && json.contains("ms") && json.contains("torch") &&
                     json.contains("parameters"),
                 "--torch ", path, ": must be what torch_adamw.py printed");
  return TorchResult{json["ms"], json["torch"], json["parameters"]};
}

/// The rows of the cases and of the copy, and those that compare two times.
std::vector<Result> measure(const octet::Context& ctx, const Options& options,
                            const std::optional<TorchResult>& torch, const std::vector<Case>& cases,
                            const std::vector<Shape>& shapes,
                            const std::vector<Shape>& small_shapes) {
  std::vector<double> copies = measure_copy(ctx, options.repeats), link;
  const bool has_link =
      std::any_of(cases.begin(), cases.end(), [](const Case& c) { return c.host_states; });
  const auto add_link = [&] {
    if (!has_link) return;
    for (double ms : measure_link(ctx, options.repeats)) link.push_back(ms);
  };
  add_link();
  std::vector<Result> results;
  std::optional<double> reference_ms;
  for (const Case& c : cases) {
    const std::vector<Shape>& of = is_replay(c.work) ? small_shapes : shapes;
    results.push_back(result_of(c, measure_case(ctx, c, of, options.repeats), of));
    Result ratio = results.back();
    if (c.name == kReference) reference_ms = ratio.median_ms;
    if (c.name != kFasterThanReference || !reference_ms) continue;
    ratio.metric = "time over that of O2";
    ratio.value = ratio.median_ms / *reference_ms;
    ratio.target = 1.0;
    ratio.bound = Bound::below;
    results.push_back(ratio);
  }
  for (double ms : measure_copy(ctx, options.repeats)) copies.push_back(ms);
  add_link();
  const Result copy = copy_result(copies);
  for (Result& r : results) {
    if (r.unit == "us") r.value = r.median_ms * 1e3;
    if (r.metric == "rate over that of a copy") r.value = r.rate() / copy.rate();
  }
  results.push_back(copy);
  if (has_link) {
    const Result both_ways = link_result(link);
    std::vector<Result> each_way;
    for (Result& r : results) {
      if (r.metric != kLinkMetric) continue;
      r.value = r.rate() / both_ways.rate();
      each_way.push_back(r);
      each_way.back().metric = "rate of the link each way";
      each_way.back().unit = "GB/s";
      each_way.back().value = r.rate() * 1e3 / 2.0;
      each_way.back().target.reset();
    }
    results.insert(results.end(), each_way.begin(), each_way.end());
    results.push_back(both_ways);
  }
  if (torch && reference_ms) {
    results.push_back({.name = "torch fused AdamW FP32",
                       .metric = "time over that of octet O2",
                       .unit = "1",
                       .value = torch->ms / *reference_ms,
                       .target = kTorchTarget,
                       .median_ms = torch->ms,
                       .spread = {},
                       .bytes = {}});
  }
  return results;
}

int run(const Options& options) {
  octet::require(options.scale == "full" || options.scale == "small", "--scale ", options.scale,
                 ": must be full or small");
  octet::require(options.repeats >= 1, "--repeats ", options.repeats, ": must be at least 1");
  const std::vector<Case> cases = select_cases(options.cases);
  const std::vector<Shape> shapes = gpt_shapes(options.scale == "full" ? 24 : 3);
  const std::optional<TorchResult> torch = read_torch(options.torch);
  octet::require(!torch || cases.front().name == kReference, "--torch ", options.torch,
                 ": the ratio wants the case ", kReference, " too");
  octet::require(!torch || torch->parameters == numel_of(shapes), "--torch ", options.torch, ": ",
                 torch ? torch->parameters : 0, " parameters; must be ", numel_of(shapes));
  const Gpu gpu;
  const octet::Context& ctx = gpu.context;

  const std::vector<Shape> small_shapes(4000, Shape{1000});
  const std::vector<Result> results = measure(ctx, options, torch, cases, shapes, small_shapes);
  std::printf("%s, %zu tensors of %lld parameters in total; small: %zu of %lld.\n\n",
              gpu.properties.name, shapes.size(), static_cast<long long>(numel_of(shapes)),
              small_shapes.size(), static_cast<long long>(numel_of(small_shapes)));
  print_table("parameter", results);
  if (!options.json.empty()) {
    using Json = nlohmann::ordered_json;
    write_json(options.json,
               {{"benchmark", "optim_bench"},
                {"device", gpu.properties.name},
                {"parameters", numel_of(shapes)},
                {"scale", options.scale},
                {"repeats", options.repeats},
                {"torch", torch ? Json(torch->version) : Json()}},
               results);
  }
  return 0;
}

}  // namespace
}  // namespace bench

int main(int argc, char** argv) {
  bench::Options options;
  CLI::App app("Time of an AdamW step on CUDA device 0 against the rate of a copy.", "optim_bench");
  app.add_option("--scale", options.scale, "full or small (3 layers instead of 24; default: full)");
  app.add_option("--case", options.cases, "Only the case of this name; repeatable (default: all)")
      ->allow_extra_args(false);
  app.add_option("--repeats", options.repeats, "Timed runs of each case (default: 15)");
  app.add_option("--json", options.json, "Write the results to this file");
  app.add_option("--torch", options.torch,
                 "File with what torch_adamw.py printed, for the ratio of the times");
  return bench::parse_and_run(app, argc, argv, [&] { return bench::run(options); });
}
