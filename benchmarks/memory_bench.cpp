// SPDX-License-Identifier: Apache-2.0
// Bytes of model state, memory and traffic for several GPT sizes, levels and rank counts: an engine
// with random weights does one step with random gradients. The bytes are those that the allocator
// gave out and the communicator sent; beside them stands what the plan said. Ranks are threads and
// share the GPUs where there are fewer.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <fstream>
#include <memory>
#include <mutex>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "build_info.hpp"
#include "command_line.hpp"
#include "octet/octet.hpp"

namespace {

using octet::DeviceType;
using octet::Level;

/// A GPT with tied head: embeddings, and per block two norms and the matrices of attention and MLP.
struct GptSize {
  std::int64_t layers, width, context, vocabulary;
};

struct Parameter {
  std::string name;
  octet::Shape shape;
};

std::vector<Parameter> parameters_of(const GptSize& size) {
  const std::int64_t w = size.width;
  std::vector<Parameter> list{{"token_embedding", {size.vocabulary, w}},
                              {"position_embedding", {size.context, w}}};
  const auto add_norm = [&](const std::string& name) {
    list.push_back({name + ".gain", {w}});
    list.push_back({name + ".bias", {w}});
  };
  for (std::int64_t layer = 0; layer < size.layers; ++layer) {
    const std::string block = "block." + std::to_string(layer);
    add_norm(block + ".attention_norm");
    list.push_back({block + ".qkv", {3 * w, w}});
    list.push_back({block + ".out", {w, w}});
    add_norm(block + ".mlp_norm");
    list.push_back({block + ".up", {4 * w, w}});
    list.push_back({block + ".down", {w, 4 * w}});
  }
  add_norm("final_norm");
  return list;
}

struct Case {
  GptSize size;
  Level level;
  int ranks;
};

/// What one rank measured and what its plan said.
struct RankBytes {
  octet::Plan plan;
  std::uint64_t wire = 0;
  std::uint64_t peak = 0;
  bool stepped = false;
};

/// Values of about the size of weights and of gradients; only their number matters here.
std::vector<float> random_values(std::int64_t count) {
  std::vector<float> values(static_cast<std::size_t>(count));
  std::uint32_t state = 1;
  for (float& value : values) {
    state = state * 1664525u + 1013904223u;
    value = (static_cast<float>(state >> 8) * 0x1p-24f - 0.5f) * 0.08f;
  }
  return values;
}

octet::Context make_context(DeviceType device, int rank) {
  if (device == DeviceType::cpu) return octet::Context::cpu();
  return octet::Context::cuda(rank % octet::cuda_device_count(), nullptr);
}

RankBytes measure_rank(const Case& c, const octet::Context& ctx, octet::Communicator& comm,
                       const octet::Context& trainer) {
  const std::vector<Parameter> parameters = parameters_of(c.size);
  std::int64_t largest = 0;
  for (const Parameter& p : parameters) largest = std::max(largest, p.shape.numel());
  // The trainer's own memory is in a context of its own, so that it is not counted. One buffer is
  // every parameter's initial value and gradient.
  const octet::Buffer values = octet::upload_sync<float>(trainer, random_values(largest));
  const auto view = [&](const octet::Shape& shape) {
    return octet::TensorView{values.data(), octet::DType::f32, shape, trainer.device()};
  };

  octet::Engine engine(ctx, comm, {.level = c.level});
  std::vector<octet::ParamId> ids;
  for (const Parameter& p : parameters) {
    ids.push_back(engine.add({.name = p.name, .shape = p.shape, .init = view(p.shape)}));
  }
  engine.freeze();
  const std::uint64_t sent_before = comm.wire_bytes().payload;
  for (std::size_t i = 0; i < ids.size(); ++i) {
    engine.add_gradient(ids[i], view(parameters[i].shape));
  }
  const octet::StepResult result = engine.step({.lr = 1e-4f, .max_norm = 1.0f});
  return {.plan = engine.plan(),
          .wire = comm.wire_bytes().payload - sent_before,
          .peak = ctx.memory_use().peak,
          .stepped = result.step.read_sync() == 1};
}

std::vector<RankBytes> measure(const Case& c, DeviceType device) {
  std::vector<RankBytes> results(static_cast<std::size_t>(c.ranks));
  octet::ThreadGroup group(c.ranks);
  std::mutex mutex;
  std::exception_ptr failure;
  const auto run_rank = [&](int rank) {
    // Outside the try block: the others must not see this rank leave before they know why.
    std::unique_ptr<octet::Communicator> comm;
    try {
      const octet::Context ctx = make_context(device, rank);
      comm = group.join(rank, ctx);
      results[static_cast<std::size_t>(rank)] =
          measure_rank(c, ctx, *comm, make_context(device, rank));
    } catch (const std::exception&) {
      const std::lock_guard lock(mutex);
      if (!failure) failure = std::current_exception();
      group.abort("rank " + std::to_string(rank) + " has failed");
    }
  };
  {
    std::vector<std::jthread> threads;
    for (int rank = 0; rank < c.ranks; ++rank) threads.emplace_back(run_rank, rank);
  }
  if (failure) std::rethrow_exception(failure);
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
  Figure managed, all, wire;
  std::uint64_t peak = 0;
  /// Sum over ranks and kinds of memory of |measured - planned|.
  std::uint64_t off_plan = 0;
};

Result summarise(const Case& c, const std::vector<RankBytes>& ranks) {
  const octet::Plan& plan = ranks.front().plan;
  Result result{.c = c, .parameters = plan.parameters, .managed = {}, .all = {}, .wire = {}};
  const auto distance = [](std::uint64_t a, std::uint64_t b) { return a > b ? a - b : b - a; };
  const double managed = static_cast<double>(plan.fp8_parameters) * c.ranks;
  const double all = static_cast<double>(plan.parameters) * c.ranks;
  for (const RankBytes& rank : ranks) {
    octet::require(rank.stepped, "the step of a rank was skipped");
    result.managed.add(rank.plan.state_bytes(true, true), rank.plan.state_bytes(true, false),
                       managed);
    result.all.add(rank.plan.state_bytes(false, true), rank.plan.state_bytes(false, false), all);
    result.wire.add(rank.wire, rank.plan.wire_bytes_per_step, all);
    result.peak = std::max(result.peak, rank.peak);
    for (const octet::MemoryRow& row : rank.plan.memory) {
      result.off_plan += distance(row.measured, row.predicted);
    }
    result.off_plan += distance(rank.wire, rank.plan.wire_bytes_per_step);
  }
  return result;
}

/// The most that the model state of an FP8-managed parameter may take in the mean over the ranks:
/// the bytes of the formats, and a tenth of a byte for scales.
double state_target(const Case& c) {
  constexpr double kScales = 0.1;
  switch (c.level) {
    case Level::O0: return 16.0 + kScales;
    case Level::O1: return 12.0 + kScales;
    case Level::O2: return 7.0 + kScales;
    case Level::O3: break;
  }
  return 2.0 + 5.0 / c.ranks + kScales;
}

bool met(const Result& r) { return r.managed.measured <= state_target(r.c) && r.off_plan == 0; }

std::string millions(std::int64_t count) {
  char text[32];
  std::snprintf(text, sizeof text, "%.1f M", static_cast<double>(count) / 1e6);
  return text;
}

void print_header() {
  std::puts(
      "Bytes: measured / planned, in the mean over the ranks.\n\n"
      "| parameters | level | ranks | state bytes per FP8-managed parameter "
      "| state bytes per parameter | wire bytes per parameter and step | peak MB per rank "
      "| as planned |\n|---|---|---|---|---|---|---|---|");
}

void print_row(const Result& r) {
  const std::string level(octet::name_of(r.c.level));
  std::printf("| %s | %s | %d | %.3f / %.3f | %.3f / %.3f | %.3f / %.3f | %.2f | %s |\n",
              millions(r.parameters).c_str(), level.c_str(), r.c.ranks, r.managed.measured,
              r.managed.planned, r.all.measured, r.all.planned, r.wire.measured, r.wire.planned,
              static_cast<double>(r.peak) / 1e6, r.off_plan == 0 ? "yes" : "NO");
  std::fflush(stdout);
}

nlohmann::ordered_json row_of(const Result& r, const char* metric, double value, const char* unit,
                              std::optional<double> target) {
  using Json = nlohmann::ordered_json;
  const std::string name = "gpt " + millions(r.parameters) + ", " +
                           std::string(octet::name_of(r.c.level)) + ", " +
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
        row_of(r, "state per FP8-managed parameter", r.managed.measured, each, state_target(r.c)));
    rows.push_back(row_of(r, "state per parameter", r.all.measured, each, {}));
    rows.push_back(row_of(r, "wire per parameter and step", r.wire.measured, each, {}));
    rows.push_back(row_of(r, "peak per rank", static_cast<double>(r.peak), "B", {}));
    rows.push_back(row_of(r, "off the plan", static_cast<double>(r.off_plan), "B", 0.0));
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
};

DeviceType choose_device(const std::string& text) {
  octet::require(text == "auto" || text == "cpu" || text == "cuda", "--device ", text,
                 ": must be auto, cpu or cuda");
  const bool available = octet::cuda_device_count() > 0;
  octet::require(text != "cuda" || available,
                 "--device cuda: there is no CUDA device that this build can use");
  return text != "cpu" && available ? DeviceType::cuda : DeviceType::cpu;
}

std::vector<GptSize> sizes_for(DeviceType device, bool quick) {
  if (quick) return {{2, 128, 64, 256}, {4, 256, 128, 256}};
  if (device == DeviceType::cpu) {
    return {{2, 128, 64, 256}, {4, 256, 128, 256}, {8, 512, 256, 256}, {6, 512, 512, 50304}};
  }
  return {{8, 512, 256, 256}, {12, 768, 1024, 50304}, {24, 1024, 1024, 50304}};
}

int run(const Options& options) {
  const DeviceType device = choose_device(options.device);
  for (int ranks : options.ranks) {
    octet::require(ranks >= 1, "--ranks ", ranks, ": must be at least 1");
  }
  std::vector<Result> results;
  print_header();
  for (const GptSize& size : sizes_for(device, options.quick)) {
    for (Level level : {Level::O0, Level::O1, Level::O2, Level::O3}) {
      for (int ranks : options.ranks) {
        const Case c{size, level, ranks};
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
  app.add_option("--json", options.json, "Write the results to this file");
  return bench::parse_and_run(app, argc, argv, [&] { return run(options); });
}
