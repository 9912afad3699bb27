// SPDX-License-Identifier: Apache-2.0
// Bytes of model state, memory and traffic for several GPT sizes, levels and rank counts: an engine
// with random weights does steps with random gradients. The bytes are those that the allocator gave
// out and the communicator sent; beside them stands what the plan said. Ranks are threads and share
// the GPUs where there are fewer. A single size may be as large as the device's memory: initial
// values are made one parameter after the other, and all gradients are one buffer.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "build_info.hpp"
#include "command_line.hpp"
#include "octet/octet.hpp"
#include "thread_ranks.hpp"

namespace {

using octet::DeviceType;
using octet::DType;

/// A GPT with tied head: embeddings, and per block two norms and the matrices of attention and MLP.
struct GptSize {
  std::int64_t layers, width, context, vocabulary;
};

struct Parameter {
  std::string name;
  octet::Shape shape;
  int unit = 0;
};

std::vector<Parameter> parameters_of(const GptSize& size) {
  const std::int64_t w = size.width;
  std::vector<Parameter> list{{"token_embedding", {size.vocabulary, w}},
                              {"position_embedding", {size.context, w}}};
  int unit = 0;  // the embeddings; every block is one, the last with the norm behind it
  const auto add = [&](const std::string& name, const octet::Shape& shape) {
    list.push_back({name, shape, unit});
  };
  const auto add_norm = [&](const std::string& name) {
    add(name + ".gain", {w});
    add(name + ".bias", {w});
  };
  for (std::int64_t layer = 0; layer < size.layers; ++layer) {
    ++unit;
    const std::string block = "block." + std::to_string(layer);
    add_norm(block + ".attention_norm");
    add(block + ".qkv", {3 * w, w});
    add(block + ".out", {w, w});
    add_norm(block + ".mlp_norm");
    add(block + ".up", {4 * w, w});
    add(block + ".down", {w, 4 * w});
  }
  add_norm("final_norm");
  return list;
}

struct Case {
  GptSize size;
  octet::EngineConfig config;
  int ranks;
  int steps;
};

/// What one rank measured and what its plan said.
struct RankBytes {
  octet::Plan plan;
  std::uint64_t wire = 0;
  std::uint64_t peak = 0;  ///< in steps
  bool stepped = false;
  std::vector<double> ms = {};  ///< of every step
};

/// Random values that are made on the host; tensors hold copies of them, from starts of their own.
constexpr std::int64_t kBlock = std::int64_t{1} << 20;

/// Values of about the size of weights and of gradients.
std::vector<float> random_block() {
  std::vector<float> values(static_cast<std::size_t>(kBlock));
  std::uint32_t state = 1;
  for (float& value : values) {
    state = state * 1664525u + 1013904223u;
    value = (static_cast<float>(state >> 8) * 0x1p-24f - 0.5f) * 0.08f;
  }
  return values;
}

/// `values`, of the block's dtype, become the block over and over from its element `start` on.
void repeat_block(const octet::Context& ctx, const octet::TensorView& block, std::int64_t start,
                  const octet::TensorView& values) {
  const auto bytes_of = [&](std::int64_t count) {
    return static_cast<std::size_t>(count) * octet::size_of(block.dtype);
  };
  start %= kBlock;
  for (std::int64_t done = 0; done < values.numel();) {
    const std::int64_t count = std::min(kBlock - start, values.numel() - done);
    octet::copy_bytes(ctx, values.as<char>() + bytes_of(done), block.as<char>() + bytes_of(start),
                      bytes_of(count));
    done += count;
    start = 0;
  }
}

/// A forward and a backward pass as far as weights and gradients go.
void pass_through(octet::Engine& engine, const std::vector<Parameter>& parameters,
                  const std::vector<octet::ParamId>& ids, const octet::TensorView& gradient) {
  const int last = parameters.back().unit;
  for (int unit = 0; unit <= last; ++unit) {
    engine.gather(unit);
    engine.release(unit);
  }
  std::size_t i = ids.size();
  for (int unit = last; unit >= 0; --unit) {
    engine.gather(unit);
    for (; i > 0 && parameters[i - 1].unit == unit; --i) {
      octet::TensorView view = gradient;
      view.shape = parameters[i - 1].shape;
      engine.add_gradient(ids[i - 1], view);
    }
    engine.release(unit);
  }
}

/// What that makes a rank send: units are gathered twice but for the last two, which the backward
/// pass finds where the forward pass had them.
std::uint64_t planned_wire(const octet::Plan& plan) {
  const std::vector<std::uint64_t>& units = plan.unit_gather_bytes;
  std::uint64_t bytes = plan.wire_bytes_per_step;
  for (std::size_t u = 0; u < units.size(); ++u) bytes += (u + 2 < units.size() ? 2 : 1) * units[u];
  return bytes;
}

RankBytes measure_rank(const Case& c, octet::Communicator& comm) {
  const octet::Context ctx = comm.context();
  // The trainer's own memory is in a context of its own, so that it is not counted.
  const octet::Context trainer = bench::rank_context(ctx.device().type, comm.rank());
  const std::vector<Parameter> parameters = parameters_of(c.size);
  std::int64_t largest = 0;
  for (const Parameter& p : parameters) largest = std::max(largest, p.shape.numel());
  const octet::Buffer values = octet::upload_sync<float>(trainer, random_block());
  const octet::TensorView block{values.data(), DType::f32, {kBlock}, trainer.device()};
  const octet::Tensor narrow(trainer, DType::bf16, {kBlock});
  octet::convert(trainer, {block, nullptr}, narrow);
  const octet::Tensor gradient(trainer, DType::bf16, {largest});
  repeat_block(trainer, narrow, 0, gradient);
  trainer.synchronize();

  octet::Engine engine(ctx, comm, c.config);
  std::vector<octet::ParamId> ids;
  for (const Parameter& p : parameters) {
    const auto start = static_cast<std::int64_t>(ids.size()) * 64 * 10007;
    ids.push_back(
        engine.add({.name = p.name,
                    .shape = p.shape,
                    .fill =
                        [block, start](const octet::Context& at, const octet::TensorView& to) {
                          repeat_block(at, block, start, to);
                        },
                    .unit = p.unit}));
  }
  engine.freeze();
  octet::Context counted = ctx;
  counted.reset_peak();
  RankBytes result{.plan = engine.plan()};
  for (int step = 1; step <= c.steps; ++step) {
    const auto begin = std::chrono::steady_clock::now();
    const std::uint64_t sent_before = comm.wire_bytes().payload;
    pass_through(engine, parameters, ids, gradient);
    const octet::StepResult done = engine.step({.lr = 1e-4f, .max_norm = 1.0f});
    ctx.synchronize();
    const std::chrono::duration<double, std::milli> passed =
        std::chrono::steady_clock::now() - begin;
    result.ms.push_back(passed.count());
    result.wire = comm.wire_bytes().payload - sent_before;
    result.stepped = done.step.read_sync() == step;
  }
  result.peak = ctx.memory_use().peak;
  return result;
}

std::vector<RankBytes> measure(const Case& c, DeviceType device) {
  std::vector<RankBytes> results(static_cast<std::size_t>(c.ranks));
  bench::run_ranks(c.ranks, device, [&](octet::Communicator& comm) {
    results[static_cast<std::size_t>(comm.rank())] = measure_rank(c, comm);
  });
  return results;
}

/// Bytes per parameter, measured and planned, in the mean over the ranks.
struct Figure {
  double measured = 0.0;
  double planned = 0.0;
  void add(std::uint64_t measured_bytes, std::uint64_t planned_bytes, double per) {
    measured += static_cast<double>(measured_bytes) / per;
    planned += static_cast<double>(planned_bytes) / per;
  }
};

struct Result {
  Case c;
  std::int64_t parameters = 0;
  double target = 0.0;  ///< of the state bytes of an FP8-managed parameter
  Figure managed, all, wire;
  std::uint64_t peak = 0;
  std::optional<double> ms = {};  ///< of a step, median of all but the first of the slowest rank
  /// Sum over ranks and kinds of memory of |measured - planned|.
  std::uint64_t off_plan = 0;
};

/// The most that the model state of an FP8-managed parameter may take on the device in the mean
/// over the ranks: the bytes of the formats, and a tenth of a byte for scales.
double state_target(const octet::Plan& plan, bool offloads_states) {
  constexpr double kScales = 0.1;
  const octet::StateFormats& f = plan.formats.state;
  const auto bytes = [](auto format) { return static_cast<double>(octet::size_of(format)); };
  const double optimizer = offloads_states ? 0.0 : bytes(f.master) + bytes(f.m) + bytes(f.v);
  const auto share_of = [&](octet::Sharding cut) {
    return plan.sharding >= cut ? 1.0 / plan.ranks : 1.0;
  };
  const bool cuts_gradients = plan.sharding >= octet::Sharding::gradients && plan.ranks > 1;
  const double gradient = bytes(cuts_gradients ? plan.reduced_gradient : plan.formats.gradient);
  return share_of(octet::Sharding::parameters) * bytes(octet::dtype_of(f.weight)) +
         share_of(octet::Sharding::gradients) * gradient +
         share_of(octet::Sharding::optimizer) * optimizer + kScales;
}

std::optional<double> step_ms(std::vector<double> ms) {
  if (ms.size() < 2) return std::nullopt;  // the first one loads kernels
  std::sort(ms.begin() + 1, ms.end());
  const std::size_t count = ms.size() - 1;
  return (ms[1 + (count - 1) / 2] + ms[1 + count / 2]) / 2.0;
}

Result summarise(const Case& c, const std::vector<RankBytes>& ranks) {
  const octet::Plan& plan = ranks.front().plan;
  Result result{.c = c,
                .parameters = plan.parameters,
                .target = state_target(plan, c.config.offload_states),
                .managed = {},
                .all = {},
                .wire = {}};
  const auto distance = [](std::uint64_t a, std::uint64_t b) { return a > b ? a - b : b - a; };
  const double managed = static_cast<double>(plan.fp8_parameters) * c.ranks;
  const double all = static_cast<double>(plan.parameters) * c.ranks;
  for (const RankBytes& rank : ranks) {
    octet::require(rank.stepped, "the step of a rank was skipped");
    result.managed.add(rank.plan.state_bytes(true, true), rank.plan.state_bytes(true, false),
                       managed);
    result.all.add(rank.plan.state_bytes(false, true), rank.plan.state_bytes(false, false), all);
    result.wire.add(rank.wire, planned_wire(rank.plan), all);
    result.peak = std::max(result.peak, rank.peak);
    const std::optional<double> ms = step_ms(rank.ms);
    if (ms) result.ms = std::max(result.ms.value_or(0.0), *ms);
    for (const octet::MemoryRow& row : rank.plan.memory) {
      result.off_plan += distance(row.measured, row.predicted);
    }
    result.off_plan += distance(rank.wire, planned_wire(rank.plan));
  }
  return result;
}

bool met(const Result& r) { return r.managed.measured <= r.target && r.off_plan == 0; }

std::string millions(std::int64_t count) {
  char text[32];
  std::snprintf(text, sizeof text, "%.1f M", static_cast<double>(count) / 1e6);
  return text;
}

/// The level and what was set apart from it.
std::string name_of(const octet::EngineConfig& config) {
  std::string name(octet::name_of(config.level));
  if (config.formats) name += " with small formats";
  if (config.sharding) name += ", sharding " + std::string(octet::name_of(*config.sharding));
  if (config.reduced_gradient) {
    name += ", means in " + std::string(octet::name_of(*config.reduced_gradient));
  }
  if (config.offload_states) name += ", states in host memory";
  return name;
}

void print_header() {
  std::puts(
      "Bytes: measured / planned, in the mean over the ranks.\n\n"
      "| parameters | level | ranks | state bytes per FP8-managed parameter "
      "| state bytes per parameter | wire bytes per parameter and step | peak MB per rank "
      "| ms per step | as planned |\n|---|---|---|---|---|---|---|---|---|");
}

void print_row(const Result& r) {
  char ms[32] = "";
  if (r.ms) std::snprintf(ms, sizeof ms, "%.2f", *r.ms);
  std::printf("| %s | %s | %d | %.3f / %.3f | %.3f / %.3f | %.3f / %.3f | %.2f | %s | %s |\n",
              millions(r.parameters).c_str(), name_of(r.c.config).c_str(), r.c.ranks,
              r.managed.measured, r.managed.planned, r.all.measured, r.all.planned, r.wire.measured,
              r.wire.planned, static_cast<double>(r.peak) / 1e6, ms,
              r.off_plan == 0 ? "yes" : "NO");
  std::fflush(stdout);
}

nlohmann::ordered_json row_of(const Result& r, const char* metric, double value, const char* unit,
                              std::optional<double> target) {
  using Json = nlohmann::ordered_json;
  const std::string name = "gpt " + millions(r.parameters) + ", " + name_of(r.c.config) + ", " +
                           std::to_string(r.c.ranks) + " ranks";
  return {{"case", name},
          {"metric", metric},
          {"value", value},
          {"unit", unit},
          {"target", target ? Json(*target) : Json()},
          {"met", target ? Json(value <= *target) : Json()},
          {"median_ms", nullptr},
          {"spread", nullptr},
          {"bytes", nullptr},
          {"flops", nullptr}};
}

void write_json(const std::string& path, DeviceType device, const std::vector<Result>& results) {
  nlohmann::ordered_json rows = nlohmann::ordered_json::array();
  for (const Result& r : results) {
    const char* each = "B/parameter";
    rows.push_back(
        row_of(r, "state per FP8-managed parameter", r.managed.measured, each, r.target));
    rows.push_back(row_of(r, "state per parameter", r.all.measured, each, {}));
    rows.push_back(row_of(r, "wire per parameter and step", r.wire.measured, each, {}));
    rows.push_back(row_of(r, "peak per rank", static_cast<double>(r.peak), "B", {}));
    rows.push_back(row_of(r, "off the plan", static_cast<double>(r.off_plan), "B", 0.0));
    if (r.ms) rows.push_back(row_of(r, "step", *r.ms, "ms", {}));
  }
  const nlohmann::ordered_json document{
      {"benchmark", "memory_bench"},
      {"device", device == DeviceType::cuda ? "cuda" : "cpu"},
      {"gpus", device == DeviceType::cuda ? octet::cuda_device_count() : 0},
      {"commit", octet::build_info::kCommit},
      {"cuda", octet::build_info::kCuda},
      {"nccl", "not used"},
      {"rows", rows}};
  std::ofstream file(path);
  file << document.dump(2) << '\n';
  file.close();
  octet::require(file.good(), "results cannot be written to ", path);
}

struct Options {
  std::string device = "auto", json;
  std::vector<int> ranks{1, 2, 4};
  bool quick = false;
  GptSize size{0, 0, 1024, 50304};  ///< a single one where layers and width are given
  std::vector<std::string> levels{"O0", "O1", "O2", "O3"};
  std::string formats = "level", reduced_gradient;
  std::vector<std::string> shardings;
  bool offload = false;
  int steps = 1;
};

DeviceType choose_device(const std::string& text) {
  octet::require(text == "auto" || text == "cpu" || text == "cuda", "--device ", text,
                 ": must be auto, cpu or cuda");
  const bool available = octet::cuda_device_count() > 0;
  octet::require(text != "cuda" || available,
                 "--device cuda: there is no CUDA device that this build can use");
  return text != "cpu" && available ? DeviceType::cuda : DeviceType::cpu;
}

std::vector<GptSize> sizes_for(DeviceType device, const Options& options) {
  const GptSize& one = options.size;
  if (one.layers != 0 || one.width != 0) {
    octet::require(one.layers > 0 && one.width > 0 && one.context > 0 && one.vocabulary > 0,
                   "--layers ", one.layers, " --width ", one.width, " --context ", one.context,
                   " --vocabulary ", one.vocabulary, ": all must be positive");
    return {one};
  }
  if (options.quick) return {{2, 128, 64, 256}, {4, 256, 128, 256}};
  if (device == DeviceType::cpu) {
    return {{2, 128, 64, 256}, {4, 256, 128, 256}, {8, 512, 256, 256}, {6, 512, 512, 50304}};
  }
  return {{8, 512, 256, 256}, {12, 768, 1024, 50304}, {24, 1024, 1024, 50304}};
}

octet::EngineConfig config_of(const Options& options, const std::string& level,
                              const std::optional<std::string>& sharding) {
  octet::EngineConfig config{.level = octet::parse_level(level)};
  octet::require(options.formats == "level" || options.formats == "small", "--formats ",
                 options.formats, ": must be level or small");
  if (options.formats == "small") config.formats = octet::small_formats();
  if (sharding) config.sharding = octet::parse_sharding(*sharding);
  const std::string& mean = options.reduced_gradient;
  octet::require(mean.empty() || mean == "f32" || mean == "e4m3", "--reduced-gradient ", mean,
                 ": must be f32 or e4m3");
  if (!mean.empty()) config.reduced_gradient = mean == "f32" ? DType::f32 : DType::e4m3;
  config.offload_states = options.offload;
  return config;
}

int run(const Options& options) {
  const DeviceType device = choose_device(options.device);
  for (int ranks : options.ranks) {
    octet::require(ranks >= 1, "--ranks ", ranks, ": must be at least 1");
  }
  octet::require(options.steps >= 1, "--steps ", options.steps, ": must be at least 1");
  std::vector<octet::EngineConfig> configs;
  for (const std::string& level : options.levels) {
    for (const std::string& sharding : options.shardings) {
      configs.push_back(config_of(options, level, sharding));
    }
    if (options.shardings.empty()) configs.push_back(config_of(options, level, {}));
  }
  const std::vector<GptSize> sizes = sizes_for(device, options);
  std::vector<Result> results;
  print_header();
  for (const GptSize& size : sizes) {
    for (const octet::EngineConfig& config : configs) {
      for (int ranks : options.ranks) {
        const Case c{size, config, ranks, options.steps};
        results.push_back(summarise(c, measure(c, device)));
        print_row(results.back());
      }
    }
  }
  if (!options.json.empty()) write_json(options.json, device, results);
  const auto missed =
      std::count_if(results.begin(), results.end(), [](const Result& r) { return !met(r); });
  if (missed > 0) {
    std::fprintf(stderr, "memory_bench: %d of %d cases are off the plan or above their target\n",
                 static_cast<int>(missed), static_cast<int>(results.size()));
  }
  return missed > 0 ? 1 : 0;
}

}  // namespace

int main(int argc, char** argv) {
  Options options;
  CLI::App app("Bytes of model state, memory and traffic for several GPT sizes, levels and ranks.",
               "memory_bench");
  app.add_option("--device", options.device, "auto, cpu or cuda (default: auto)");
  app.add_option("--ranks", options.ranks, "Rank counts, separated by commas (default: 1,2,4)")
      ->delimiter(',');
  app.add_flag("--quick", options.quick, "Small sizes only: seconds");
  app.add_option("--layers", options.size.layers, "With --width: one size instead of several");
  app.add_option("--width", options.size.width, "Width of the model of --layers");
  app.add_option("--context", options.size.context, "Positions of that model (default: 1024)");
  app.add_option("--vocabulary", options.size.vocabulary, "Tokens of that model (default: 50304)");
  app.add_option("--levels", options.levels, "Separated by commas (default: O0,O1,O2,O3)")
      ->delimiter(',');
  app.add_option("--formats", options.formats,
                 "level, or small: block states and split master (default: level)");
  app.add_option("--sharding", options.shardings,
                 "none, optimizer, gradients, parameters, or several, separated by commas "
                 "(default: the level's)")
      ->delimiter(',');
  app.add_option("--reduced-gradient", options.reduced_gradient,
                 "Format of the means that the optimizer reads: f32 or e4m3");
  app.add_flag("--offload", options.offload, "Keep m, v and master in host memory");
  app.add_option("--steps", options.steps, "Of each case; with more than 1 they are timed");
  app.add_option("--json", options.json, "Write the results to this file");
  return bench::parse_and_run(app, argc, argv, [&] { return run(options); });
}
