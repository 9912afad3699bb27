// SPDX-License-Identifier: Apache-2.0
// Times of FP8 collectives over several GPUs of one host against NCCL's BF16 all-reduce of as many
// elements, and of a whole sharded step against one in BF16 and FP32, in turn within every round. A
// thread per GPU.
#include <barrier>
#include <exception>
#include <mutex>
#include <thread>

#include "comm_model.hpp"
#include "comm_step.hpp"
#include "command_line.hpp"
#include "cuda_report.hpp"
#include "octet/comm/nccl.hpp"

namespace bench {
namespace {

constexpr std::int64_t kMi = 1 << 20;

struct Options {
  int ranks = 0;
  std::vector<std::int64_t> elements = {256 * kMi, 16 * kMi, kMi};
  int repeats = 15;
  int layers = 24;
  std::string json;
};

/// How many times as fast as the rival a case is to be at a size; 0: any.
struct Target {
  const char* name;
  std::int64_t elements;
  double speedup;
};
constexpr Target kTargets[] = {
    {"two_shot in one kernel", 256 * kMi, 2.3},
    {"two_shot in one kernel", 16 * kMi, 2.5},
    {"two_shot in one kernel", kMi, 2.4},
    {"cast with current scaling, then two_shot in one kernel", 256 * kMi, 1.35},
    {"cast with a given scale, then two_shot in one kernel", 256 * kMi, 1.55},
    {"two_shot over send/receive", 256 * kMi, 1.4},
    {"octet O3 over windows, fused", 0, 3.0},
};

/// Times of one size: [case][round], milliseconds of the slowest rank. The first case is the rival.
struct SizeTimes {
  std::int64_t elements = 0;
  std::string rival = "NCCL's BF16 all-reduce";
  std::vector<std::string> names;
  std::vector<std::uint64_t> payload;
  std::vector<std::vector<double>> ms;
  std::string no_windows;
};

/// Threads that are the ranks, and what they bring together.
class Bench {
 public:
  Bench(const Options& options, int ranks)
      : options_(options),
        ranks_(ranks),
        together_(ranks),
        times_(options.elements.size() + (options.layers > 0 ? 1 : 0)) {
    std::vector<int> devices(static_cast<std::size_t>(ranks));
    for (int r = 0; r < ranks; ++r) devices[static_cast<std::size_t>(r)] = r;
    comms_.resize(devices.size());
    const ncclResult_t status = ncclCommInitAll(comms_.data(), ranks, devices.data());
    octet::require(status == ncclSuccess, "ncclCommInitAll: ", ncclGetErrorString(status));
  }

  std::vector<SizeTimes> run() {
    std::vector<std::thread> threads;
    for (int r = 0; r < ranks_; ++r) threads.emplace_back([this, r] { run_rank(r); });
    for (std::thread& thread : threads) thread.join();
    return times_;
  }

 private:
  // A rank that fails leaves the others waiting in NCCL: the program ends.
  void run_rank(int rank) {
    try {
      measure(rank);
    } catch (const std::exception& error) {
      std::fprintf(stderr, "comm_bench: rank %d: %s\n", rank, error.what());
      std::_Exit(1);
    }
  }

  void measure(int rank) {
    check(cudaSetDevice(rank), "cudaSetDevice");
    cudaStream_t stream = nullptr;
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
    const octet::Context ctx = octet::Context::cuda(rank, stream);
    const ncclComm_t nccl = comms_[static_cast<std::size_t>(rank)];
    const auto comm = octet::adopt_nccl(nccl, ctx);
    const CommRank self{ctx, nccl, *comm};
    for (std::size_t i = 0; i < options_.elements.size(); ++i) {
      const CommModel model(self, options_.elements[i]);
      measure_size(rank, ctx, model, times_[i], options_.elements[i]);
      model.verify();
    }
    if (options_.layers == 0) return;
    const StepModel model(self, options_.layers);
    measure_size(rank, ctx, model, times_.back(), model.parameters());
    if (rank == 0) times_.back().rival = "BF16 with FP32 AdamW";
    model.verify();
  }

  template <class Model>
  void measure_size(int rank, const octet::Context& ctx, const Model& model, SizeTimes& times,
                    std::int64_t elements) {
    const auto& cases = model.cases();
    if (rank == 0) {
      times.elements = elements;
      times.no_windows = model.no_windows();
      for (const CommCase& c : cases) {
        times.names.push_back(c.name);
        times.payload.push_back(c.payload);
      }
      times.ms.assign(cases.size(), std::vector<double>());
    }
    // About ten milliseconds a batch.
    const int runs = static_cast<int>(std::clamp<std::int64_t>(4096 * kMi / elements, 5, 200));
    for (int round = -1; round < options_.repeats; ++round) {
      for (std::size_t c = 0; c < cases.size(); ++c) {
        together_.arrive_and_wait();
        const double ms = batch_ms(ctx, runs, cases[c].run);
        const std::lock_guard lock(mutex_);
        if (round < 0) continue;  // warms up
        auto& all = times.ms[c];
        all.resize(static_cast<std::size_t>(round) + 1);
        all.back() = std::max(all.back(), ms);
      }
    }
    together_.arrive_and_wait();
  }

  const Options& options_;
  int ranks_;
  std::barrier<> together_;
  std::mutex mutex_;
  std::vector<ncclComm_t> comms_;
  std::vector<SizeTimes> times_;
};

std::vector<Result> results_of(const std::vector<SizeTimes>& all) {
  std::vector<Result> results;
  for (const SizeTimes& size : all) {
    const double rival = timing_of(size.ms[0]).median_ms;
    for (std::size_t c = 0; c < size.names.size(); ++c) {
      const Timing timing = timing_of(size.ms[c]);
      const std::string count = size.elements % kMi == 0
                                    ? std::to_string(size.elements / kMi) + " Mi"
                                    : std::to_string(size.elements);
      Result r{.name = count + ", " + size.names[c],
               .metric = "times as fast as " + size.rival,
               .unit = "1",
               .value = rival / timing.median_ms,
               .target = {},
               .median_ms = timing.median_ms,
               .spread = timing.spread};
      if (size.payload[c] != 0) r.bytes = size.payload[c];
      for (const Target& target : kTargets) {
        const bool fits = target.elements == 0 || target.elements == size.elements;
        if (size.names[c] == target.name && fits) {
          r.target = target.speedup;
        }
      }
      results.push_back(r);
    }
  }
  return results;
}

int run(const Options& options) {
  octet::require(options.layers >= 0 && options.layers <= 24, "--layers ", options.layers,
                 ": must be from 0 to 24");
  octet::require(options.repeats >= 1, "--repeats ", options.repeats, ": must be at least 1");
  for (std::int64_t n : options.elements) {
    octet::require(n >= 1, "--elements ", n, ": must be at least 1");
  }
  const cudaDeviceProp properties = properties_of_device();
  const int devices = octet::cuda_device_count();
  const int ranks = options.ranks == 0 ? devices : options.ranks;
  octet::require(ranks >= 2 && ranks <= devices, "--ranks ", ranks, ": must be from 2 to the ",
                 devices, " GPUs here");
  const std::vector<SizeTimes> times = Bench(options, ranks).run();
  const std::vector<Result> results = results_of(times);
  int version = 0;
  ncclGetVersion(&version);
  std::printf("%d x %s, NCCL %d\n", ranks, properties.name, version);
  if (!times[0].no_windows.empty()) std::printf("no windows: %s\n", times[0].no_windows.c_str());
  std::puts("bytes: payload that a rank sends\n");
  print_table("element", results);
  if (!options.json.empty()) {
    write_json(options.json,
               {{"benchmark", "comm_bench"},
                {"device", properties.name},
                {"gpus", ranks},
                {"nccl", version},
                {"repeats", options.repeats}},
               results);
  }
  return 0;
}

}  // namespace
}  // namespace bench

int main(int argc, char** argv) {
  bench::Options options;
  CLI::App app("Times of FP8 collectives against NCCL's BF16 all-reduce, a thread per GPU.",
               "comm_bench");
  app.add_option("--ranks", options.ranks, "GPUs to use (default: all)");
  app.add_option("--elements", options.elements, "Gradient elements; repeatable")
      ->allow_extra_args(false);
  app.add_option("--layers", options.layers,
                 "Layers of the GPT whose whole step is timed (default: 24, 1.31 billion "
                 "parameters; 0: none)");
  app.add_option("--repeats", options.repeats, "Timed rounds (default: 15)");
  app.add_option("--json", options.json, "Write the results to this file");
  return bench::parse_and_run(app, argc, argv, [&] { return bench::run(options); });
}
