// SPDX-License-Identifier: Apache-2.0
// Checkpoints against what the disk and the device give: save_checkpoint() beside plain write(2)
// and fsync of the same bytes in as many files, in turn and on the same disk; how long
// CheckpointWriter::start() keeps the stream beside the bare copy of the same memory to pinned host
// memory, and when it returns; loading. The states are those of a GPT after steps with random
// gradients. Ranks are threads and share the GPUs where there are fewer.
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
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
using Clock = std::chrono::steady_clock;
namespace fs = std::filesystem;

constexpr double kSaveTarget = 0.80;   ///< rate of a save over that of plain writes
constexpr double kBytesTarget = 0.01;  ///< bytes written beyond the states
constexpr double kStallTarget = 1.10;  ///< how long start() keeps the stream, over the copy alone
constexpr int kSteps = 2;
constexpr std::size_t kPlainWrite = std::size_t{1} << 20;  ///< bytes a call

/// A folder that goes when this does, whatever throws.
struct Removed {
  std::string folder;
  ~Removed() {
    std::error_code ignored;
    fs::remove_all(folder, ignored);
  }
};

struct Options {
  std::string device = "auto", directory, json;
  std::vector<int> ranks{1, 2};
  std::vector<std::string> formats{"O3", "small"};
  std::int64_t layers = 12, width = 1024;
  int repeats = 6;
  bool quick = false;
};

struct Case {
  std::string formats;
  int ranks = 1;
};

/// Medians over the repeats, in seconds; bytes of all ranks, the index among them.
struct Result {
  Case c;
  std::int64_t parameters = 0;
  std::uint64_t state_bytes = 0, file_bytes = 0;
  double plain = 0, save = 0, copy = 0, call = 0, stall = 0, beside = 0, load = 0;
};

std::vector<std::pair<std::string, octet::Shape>> parameters_of(const Options& options) {
  const std::int64_t w = options.width;
  std::vector<std::pair<std::string, octet::Shape>> list{
      {"embedding", {options.quick ? 512 : 50304, w}}};
  for (std::int64_t layer = 0; layer < options.layers; ++layer) {
    const std::string block = "block." + std::to_string(layer);
    list.push_back({block + ".norm", {w}});
    list.push_back({block + ".qkv", {3 * w, w}});
    list.push_back({block + ".out", {w, w}});
    list.push_back({block + ".up", {4 * w, w}});
    list.push_back({block + ".down", {w, 4 * w}});
  }
  return list;
}

std::vector<float> random_values(std::int64_t count) {
  std::vector<float> values(static_cast<std::size_t>(count));
  std::uint32_t state = 1;
  for (float& value : values) {
    state = state * 1664525u + 1013904223u;
    value = (static_cast<float>(state >> 8) * 0x1p-24f - 0.5f) * 0.08f;
  }
  return values;
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

/// The rival: what dd does with conv=fsync.
void write_plainly(const std::string& path, const std::byte* data, std::size_t bytes) {
  const int file = open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
  octet::require(file >= 0, path, " cannot be created");
  for (std::size_t at = 0; at < bytes;) {
    const ssize_t done = write(file, data + at, std::min(kPlainWrite, bytes - at));
    octet::require(done > 0, path, " cannot be written");
    at += static_cast<std::size_t>(done);
  }
  octet::require(fsync(file) == 0 && close(file) == 0, path, " cannot be flushed");
}

/// One rank of a case.
class Rank {
 public:
  Rank(const Options& options, const Case& c, octet::Communicator& comm)
      : options_(options), comm_(comm), ctx_(comm.context()), engine_(ctx_, comm, config_of(c)) {
    const auto parameters = parameters_of(options);
    std::int64_t largest = 0;
    for (const auto& [name, shape] : parameters) largest = std::max(largest, shape.numel());
    const octet::Buffer values = octet::upload_sync<float>(ctx_, random_values(largest));
    const auto view = [&](const octet::Shape& shape) {
      return octet::TensorView{values.data(), octet::DType::f32, shape, ctx_.device()};
    };
    for (const auto& [name, shape] : parameters) {
      engine_.add({.name = name, .shape = shape, .init = view(shape)});
    }
    engine_.freeze();
    for (int step = 0; step < kSteps; ++step) {
      for (std::size_t i = 0; i < parameters.size(); ++i) {
        engine_.add_gradient({static_cast<int>(i)}, view(parameters[i].second));
      }
      engine_.step({.lr = 1e-3f});
    }
    for (const octet::ParamState& param : engine_.state().params) {
      for (const octet::StateArray& array : param.arrays) {
        for (const octet::StateRange& range : array.owned) {
          owned_.push_back({range.data, array.bytes(range.count)});
          bytes_ += array.bytes(range.count);
        }
      }
    }
    host_ = octet::Buffer(ctx_.with_allocator(octet::pinned_host_allocator(ctx_.device())), bytes_);
  }

  /// All results are those of rank 0, from when all ranks begin until the last is done.
  Result measure(const std::string& directory) {
    Result r;
    r.parameters = engine_.plan().parameters;
    std::vector<double> plain, save, copy, call, stall, beside, load;
    const std::string saved = directory + "/saved";
    octet::CheckpointInfo info;
    octet::CheckpointWriter writer(engine_, comm_, directory + "/beside");
    writer.start();  // takes host memory once
    writer.finish();
    for (int i = 0; i < options_.repeats; ++i) {
      copy.push_back(time([&] { copy_out(); }));
      // In turn: who comes first may find the page cache in another condition.
      for (int turn = 0; turn < 2; ++turn) {
        if ((i + turn) % 2 == 0) {
          plain.push_back(time([&] { replace_plainly(directory, i); }));
        } else {
          save.push_back(time([&] { info = save_checkpoint(engine_, comm_, saved); }));
        }
      }
      stall.push_back(time([&] {
        const auto begin = Clock::now();
        writer.start();
        call.push_back(std::chrono::duration<double>(Clock::now() - begin).count());
        ctx_.synchronize();  // the next step's kernels would begin here
      }));
      beside.push_back(time([&] { writer.finish(); }));
      load.push_back(time([&] { load_checkpoint(engine_, comm_, saved); }));
    }
    r.file_bytes = info.bytes + fs::file_size(info.index);
    r.state_bytes = sum_over_ranks(bytes_) + scale_bytes();
    r.plain = median(plain), r.save = median(save), r.copy = median(copy);
    r.call = median(call), r.stall = median(stall), r.beside = median(beside),
    r.load = median(load);
    return r;
  }

 private:
  static octet::EngineConfig config_of(const Case& c) {
    octet::EngineConfig config{.level = octet::Level::O3};
    if (c.formats == "small") {
      config.formats = octet::small_formats();
    } else {
      config.level = octet::parse_level(c.formats);
    }
    return config;
  }

  void copy_out() {
    auto* to = host_.as<std::byte>();
    for (const auto& [data, bytes] : owned_) {
      octet::copy_bytes(ctx_, to, data, bytes);
      to += bytes;
    }
    ctx_.synchronize();
  }

  /// Beside the file before, which then goes, as a checkpoint does: an old file's pages are not
  /// there for the new one.
  void replace_plainly(const std::string& directory, int i) {
    const std::string path = directory + "/plain-" + std::to_string(comm_.rank()) + "-";
    write_plainly(path + std::to_string(i), host_.as<std::byte>(), bytes_);
    fs::remove(path + std::to_string(i - 1));
  }

  double time(const std::function<void()>& work) {
    octet::all_gather_text_sync(comm_, "ready");
    const auto begin = Clock::now();
    work();
    octet::all_gather_text_sync(comm_, "done");
    return std::chrono::duration<double>(Clock::now() - begin).count();
  }

  std::uint64_t sum_over_ranks(std::uint64_t value) {
    std::uint64_t sum = 0;
    for (const std::string& text : octet::all_gather_text_sync(comm_, std::to_string(value))) {
      sum += std::stoull(text);
    }
    return sum;
  }

  std::uint64_t scale_bytes() {
    return static_cast<std::uint64_t>(engine_.state().scale_count) * sizeof(octet::TensorScale);
  }

  const Options& options_;
  octet::Communicator& comm_;
  octet::Context ctx_;
  octet::Engine engine_;
  std::vector<std::pair<const void*, std::size_t>> owned_;
  std::size_t bytes_ = 0;
  octet::Buffer host_;
};

Result measure(const Options& options, const Case& c, DeviceType device,
               const std::string& directory) {
  Result result;
  bench::run_ranks(c.ranks, device, [&](octet::Communicator& comm) {
    const Result r = Rank(options, c, comm).measure(directory);
    if (comm.rank() == 0) result = r;
  });
  result.c = c;
  return result;
}

double rate(const Result& r, double seconds) {
  return static_cast<double>(r.file_bytes) / seconds / 1e9;
}
double excess(const Result& r) {
  return static_cast<double>(r.file_bytes) / static_cast<double>(r.state_bytes) - 1.0;
}

void print_row(const Result& r) {
  std::printf(
      "| %.1f M | %s | %d | %.1f | %.2f %% | %.3f | %.3f | %.2f | %.1f | %.1f | %.2f | %.2f |\n",
      static_cast<double>(r.parameters) / 1e6, r.c.formats.c_str(), r.c.ranks,
      static_cast<double>(r.file_bytes) / 1e6, 100.0 * excess(r), rate(r, r.plain), rate(r, r.save),
      r.plain / r.save, 1e3 * r.copy, 1e3 * r.stall, 1e3 * r.call, rate(r, r.load));
  std::fflush(stdout);
}

nlohmann::ordered_json row_of(const Result& r, const char* metric, double value, const char* unit,
                              std::optional<double> target = {}, bool at_most = true) {
  using Json = nlohmann::ordered_json;
  char name[100];
  std::snprintf(name, sizeof name, "gpt %.1f M, %s, %d ranks",
                static_cast<double>(r.parameters) / 1e6, r.c.formats.c_str(), r.c.ranks);
  return {{"case", name},
          {"metric", metric},
          {"value", value},
          {"unit", unit},
          {"target", target ? Json(*target) : Json()},
          {"met", target ? Json(at_most ? value <= *target : value >= *target) : Json()},
          {"median_ms", nullptr},
          {"spread", nullptr},
          {"bytes", r.file_bytes},
          {"flops", nullptr}};
}

void write_json(const std::string& path, DeviceType device, const std::vector<Result>& results) {
  nlohmann::ordered_json rows = nlohmann::ordered_json::array();
  for (const Result& r : results) {
    rows.push_back(row_of(r, "bytes beyond the states", excess(r), "1", kBytesTarget));
    rows.push_back(row_of(r, "write(2) and fsync", rate(r, r.plain), "GB/s"));
    rows.push_back(row_of(r, "save", rate(r, r.save), "GB/s"));
    rows.push_back(row_of(r, "save over write(2)", r.plain / r.save, "1", kSaveTarget, false));
    rows.push_back(row_of(r, "copy to the host", 1e3 * r.copy, "ms"));
    rows.push_back(row_of(r, "start() returns after", 1e3 * r.call, "ms"));
    rows.push_back(row_of(r, "stall", 1e3 * r.stall, "ms"));
    rows.push_back(row_of(r, "stall over copy", r.stall / r.copy, "1", kStallTarget));
    rows.push_back(row_of(r, "start to finish beside training", 1e3 * (r.stall + r.beside), "ms"));
    rows.push_back(row_of(r, "load", rate(r, r.load), "GB/s"));
  }
  const nlohmann::ordered_json document{
      {"benchmark", "checkpoint_bench"},
      {"device", device == DeviceType::cuda ? "cuda" : "cpu"},
      {"gpus", device == DeviceType::cuda ? octet::cuda_device_count() : 0},
      {"commit", octet::build_info::kCommit},
      {"compiler", octet::build_info::kCompiler},
      {"cuda", octet::build_info::kCuda},
      {"rows", rows}};
  std::ofstream file(path);
  file << document.dump(2) << '\n';
  file.close();
  octet::require(file.good(), "results cannot be written to ", path);
}

int run(Options options) {
  octet::require(options.device == "auto" || options.device == "cpu" || options.device == "cuda",
                 "--device ", options.device, ": must be auto, cpu or cuda");
  const bool is_cuda =
      options.device == "cuda" || (options.device == "auto" && octet::cuda_device_count() > 0);
  const DeviceType device = is_cuda ? DeviceType::cuda : DeviceType::cpu;
  octet::require(options.repeats >= 1, "--repeats ", options.repeats, ": must be at least 1");
  if (options.quick) options.layers = 2, options.width = 256, options.repeats = 1;
  std::string folder =
      options.directory.empty() ? fs::temp_directory_path() : fs::path(options.directory);
  folder += "/octet-checkpoint-bench-XXXXXX";
  octet::require(mkdtemp(folder.data()) != nullptr, folder, " cannot be created");
  const Removed removed{folder};
  std::printf(
      "| parameters | formats | ranks | MB | beyond states | write(2) GB/s | save GB/s | "
      "ratio | copy ms | stall ms | call ms | load GB/s |\n"
      "|---|---|---|---|---|---|---|---|---|---|---|---|\n");
  std::vector<Result> results;
  for (const std::string& formats : options.formats) {
    for (int ranks : options.ranks) {
      results.push_back(measure(options, {formats, ranks}, device, folder));
      print_row(results.back());
    }
  }
  if (!options.json.empty()) write_json(options.json, device, results);
  const auto too_large = std::count_if(results.begin(), results.end(), [](const Result& r) {
    return r.file_bytes < r.state_bytes || excess(r) > kBytesTarget;
  });
  if (too_large > 0)
    std::fprintf(stderr, "checkpoint_bench: %d cases write too much\n",
                 static_cast<int>(too_large));
  return too_large > 0 ? 1 : 0;
}

}  // namespace

int main(int argc, char** argv) {
  Options options;
  CLI::App app("Rate of saving and loading, against plain writes and copies of the same bytes.",
               "checkpoint_bench");
  app.add_option("--device", options.device, "auto, cpu or cuda (default: auto)");
  app.add_option("--directory", options.directory,
                 "On the disk to measure (default: the system's for temporary files)");
  app.add_option("--ranks", options.ranks, "Rank counts, separated by commas (default: 1,2)")
      ->delimiter(',');
  app.add_option("--formats", options.formats,
                 "O0 to O3, or small: O3 with small_formats() (default: O3,small)")
      ->delimiter(',');
  app.add_option("--layers", options.layers, "Of the GPT (default: 12)");
  app.add_option("--width", options.width, "Of the GPT (default: 1024)");
  app.add_option("--repeats", options.repeats, "Of each measurement; medians count (default: 6)");
  app.add_flag("--quick", options.quick, "A small model, once: only the bytes mean anything");
  app.add_option("--json", options.json, "Write the results to this file");
  return bench::parse_and_run(app, argc, argv, [&] { return run(options); });
}
