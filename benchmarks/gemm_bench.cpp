// SPDX-License-Identifier: Apache-2.0
// FP8 products of a Linear's three passes on CUDA device 0: the library's, timed in turn with bare
// cuBLASLt after an exhaustive search, and beside torch._scaled_mm where its times are given.
#include <CLI/CLI.hpp>
#include <chrono>
#include <cmath>
#include <iostream>
#include <map>
#include <random>

#include "bare_cublaslt.hpp"
#include "cuda_report.hpp"
#include "octet/gemm/gemm.hpp"
#include "octet/ops/quantize.hpp"

namespace bench {
namespace {

using octet::DType;

constexpr double kTarget = 0.97;
constexpr double kHostTarget = 5.0;
constexpr double kBatchMs = 8.0;

struct Case {
  std::string name;
  octet::GemmProblem problem;
};

/// Forward, input and weight gradient of [T, N, K], with both kinds of accumulation; the weight
/// gradient also added to FP32.
std::vector<Case> all_cases() {
  const std::int64_t shapes[][3] = {{4096, 4096, 4096},
                                    {8192, 8192, 8192},
                                    {8192, 6144, 2048},
                                    {8192, 2048, 8192},
                                    {16384, 12288, 4096}};
  std::vector<Case> cases;
  for (const auto& [t, n, k] : shapes) {
    const std::string shape =
        std::to_string(t) + "x" + std::to_string(n) + "x" + std::to_string(k) + " ";
    const Case passes[] = {
        {"forward", {.m = t, .n = n, .k = k, .d = DType::bf16}},
        {"input gradient", {.m = t, .n = k, .k = n, .a = DType::e5m2, .d = DType::bf16}},
        {"weight gradient", {.m = n, .n = k, .k = t, .a = DType::e5m2, .d = DType::bf16}}};
    for (const Case& pass : passes) {
      for (bool fast : {false, true}) {
        Case c{shape + pass.name + (fast ? ", fast" : ", promoted"), pass.problem};
        if (fast) c.problem.accumulation = octet::Accumulation::fast;
        cases.push_back(c);
      }
    }
    Case added{shape + "weight gradient added to f32, promoted", passes[2].problem};
    added.problem.d = DType::f32;
    added.problem.accumulate = true;
    cases.push_back(added);
  }
  return cases;
}

/// Operands with normally distributed values, cast with current scaling.
class Operands {
 public:
  Operands(const octet::Context& ctx, const octet::GemmProblem& p)
      : a_(ctx, p.a, {p.m, p.k}), b_(ctx, p.b, {p.n, p.k}), d_(ctx, p.d, {p.m, p.n}) {
    fill(ctx, a_, 1);
    fill(ctx, b_, 2);
    octet::zero_bytes(ctx, d_.view().data, d_.bytes());
  }
  octet::GemmArgs args() const {
    return {a_.view().data.data, &a_.view().scale->scale_inv, b_.view().data.data,
            &b_.view().scale->scale_inv, d_.view().data};
  }
  BarePointers pointers() const {
    const octet::GemmArgs x = args();
    return {x.a, x.b, &a_.view().scale->scale_inv, &b_.view().scale->scale_inv, x.d};
  }

 private:
  static void fill(const octet::Context& ctx, const octet::ScaledTensor& out, unsigned seed) {
    const octet::Tensor wide(ctx, DType::bf16, out.view().data.shape);
    std::vector<std::uint16_t> block(1 << 18);
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    for (std::uint16_t& x : block) {
      const float value = normal(random);
      std::uint32_t bits = 0;
      std::memcpy(&bits, &value, sizeof bits);
      x = static_cast<std::uint16_t>(bits >> 16);
    }
    const std::size_t count = wide.bytes() / 2;
    for (std::size_t at = 0; at < count; at += block.size()) {
      octet::copy_bytes(ctx, wide.as<std::uint16_t>() + at, block.data(),
                        2 * std::min(block.size(), count - at));
    }
    octet::quantize(ctx, {.in = wide, .out = out});
    ctx.synchronize();
  }

  octet::ScaledTensor a_, b_;
  octet::Tensor d_;
};

/// Milliseconds of a run in a batch.
template <class Work>
double batch_ms(const octet::Context& ctx, int runs, const Work& work) {
  TimingEvent start, end;
  start.record(ctx.stream());
  for (int i = 0; i < runs; ++i) work();
  end.record(ctx.stream());
  ctx.synchronize();
  return end.ms_since(start) / runs;
}

cudaDataType_t cuda_type(DType dtype) {
  switch (dtype) {
    case DType::e4m3: return CUDA_R_8F_E4M3;
    case DType::e5m2: return CUDA_R_8F_E5M2;
    case DType::f32: return CUDA_R_32F;
    default: return CUDA_R_16BF;
  }
}

BareProblem bare_problem(const octet::GemmProblem& p) {
  return {p.m,
          p.n,
          p.k,
          cuda_type(p.a),
          cuda_type(p.b),
          cuda_type(p.d),
          p.accumulation == octet::Accumulation::fast,
          p.accumulate};
}

struct Times {
  Timing octet, bare;
  int algorithms = 0;  ///< that the bare rival tried
  double prepare_s = 0.0;
};

/// Batches of both in turn, so that a clock that changes meets both.
Times measure(octet::GemmRegistry& gemms, const octet::GemmProblem& p, int rounds) {
  const octet::Context& ctx = gemms.context();
  const Operands operands(ctx, p);
  BareGemm bare(ctx, bare_problem(p), operands.pointers());
  Times times;
  times.algorithms = bare.search();
  const auto start = std::chrono::steady_clock::now();
  gemms.prepare(p);
  times.prepare_s = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  const octet::GemmArgs args = operands.args();
  const auto run_octet = [&] { gemms.run(p, args); };
  const auto run_bare = [&] { bare.run(); };
  const int runs =
      std::max(1, static_cast<int>(std::lround(kBatchMs / batch_ms(ctx, 3, run_bare))));
  std::vector<double> octet_ms, bare_ms;
  batch_ms(ctx, runs, run_octet);
  for (int round = 0; round < rounds; ++round) {
    bare_ms.push_back(batch_ms(ctx, runs, run_bare));
    octet_ms.push_back(batch_ms(ctx, runs, run_octet));
  }
  times.octet = timing_of(octet_ms);
  times.bare = timing_of(bare_ms);
  return times;
}

/// Host microseconds of a call, of the library and of cublasLtMatmul alone.
struct HostTimes {
  double octet = 0, bare = 0;
};

/// The device is kept so busy that the host never waits for it.
HostTimes host_us(octet::GemmRegistry& gemms) {
  const octet::GemmProblem p{.m = 256, .n = 256, .k = 256, .d = DType::bf16};
  const octet::Context& ctx = gemms.context();
  const Operands operands(ctx, p);
  BareGemm bare(ctx, bare_problem(p), operands.pointers());
  bare.search();
  gemms.prepare(p);
  const octet::GemmArgs args = operands.args();
  const auto call_us = [&](auto&& call) {
    constexpr int kCalls = 200;  // fewer than the queue of a stream takes
    ctx.synchronize();
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < kCalls; ++i) call();
    const std::chrono::duration<double, std::micro> passed =
        std::chrono::steady_clock::now() - start;
    return passed.count() / kCalls;
  };
  std::vector<double> octet_us, bare_us;
  for (int round = 0; round < 11; ++round) {
    octet_us.push_back(call_us([&] { gemms.run(p, args); }));
    bare_us.push_back(call_us([&] { bare.run(); }));
  }
  ctx.synchronize();
  return {timing_of(octet_us).median_ms, timing_of(bare_us).median_ms};
}

/// Milliseconds by case from torch_scaled_mm.py.
std::map<std::string, double> read_torch(const std::string& path) {
  if (path.empty()) return {};
  std::ifstream file(path);
  const nlohmann::json document = nlohmann::json::parse(file, nullptr, false);
  octet::require(document.is_object() && document.contains("ms") && document["ms"].is_object(),
                 "--torch ", path, ": must be what torch_scaled_mm.py printed");
  return document["ms"].get<std::map<std::string, double>>();
}

struct Options {
  std::string json, torch;
  int rounds = 7;
};

void add_rows(const Case& c, const Times& times, const std::map<std::string, double>& torch,
              std::vector<Result>& results) {
  const octet::GemmProblem& p = c.problem;
  const double flops =
      2.0 * static_cast<double>(p.m) * static_cast<double>(p.n) * static_cast<double>(p.k);
  double rival = times.bare.median_ms;
  const auto row = [&](const std::string& who, double ms, std::optional<double> spread) {
    Result r{.name = c.name,
             .metric = who,
             .unit = "TFLOP/s",
             .target = {},
             .median_ms = ms,
             .spread = spread};
    r.flops = flops;
    r.value = flops / ms * 1e-9;
    return r;
  };
  results.push_back(row("octet", times.octet.median_ms, times.octet.spread));
  results.push_back(row("bare cuBLASLt", times.bare.median_ms, times.bare.spread));
  std::string line = "| " + c.name + " | " + text_of("%.0f", results.rbegin()[1].value) + " | " +
                     text_of("%.0f", results.back().value);
  const auto other = torch.find(c.name);
  if (other != torch.end()) {
    rival = std::min(rival, other->second);
    results.push_back(row("torch", other->second, {}));
    line += " | " + text_of("%.0f", results.back().value);
  } else {
    line += " | ";
  }
  Result ratio = row("over the best rival", times.octet.median_ms, times.octet.spread);
  ratio.unit = "1";
  ratio.value = rival / times.octet.median_ms;
  ratio.target = kTarget;
  line += " | " + text_of("%.3f", ratio.value) + " | " + (ratio.met() ? "yes" : "NO") + " | " +
          std::to_string(times.algorithms) + " | " + text_of("%.1f", times.prepare_s) + " |";
  results.push_back(ratio);
  std::puts(line.c_str());
  std::fflush(stdout);
}

int run(const Options& options) {
  octet::require(options.rounds >= 1, "--rounds ", options.rounds, ": must be at least 1");
  const auto torch = read_torch(options.torch);
  const Gpu gpu;
  octet::GemmRegistry gemms(gpu.context);
  std::printf(
      "%s\n\nTFLOP/s\n\n| T x N x K, pass | octet | bare cuBLASLt | torch | over the best "
      "| >= %.2f | algorithms tried | prepare() s |\n|---|---|---|---|---|---|---|---|\n",
      gpu.properties.name, kTarget);
  std::vector<Result> results;
  for (const Case& c : all_cases()) {
    add_rows(c, measure(gemms, c.problem, options.rounds), torch, results);
  }
  Result host{.name = "host time of a call, 256x256x256",
              .metric = "host time",
              .unit = "us",
              .target = kHostTarget,
              .bound = Bound::below,
              .spread = {}};
  const HostTimes host_times = host_us(gemms);
  host.value = host_times.octet;
  host.median_ms = host.value / 1e3;
  results.push_back(host);
  std::printf("\nhost time of a call: %.2f us (below %.0f: %s), of cublasLtMatmul alone: %.2f us\n",
              host.value, kHostTarget, host.met() ? "yes" : "NO", host_times.bare);
  host.name += ", bare cuBLASLt";
  host.target.reset();
  host.value = host_times.bare;
  host.median_ms = host.value / 1e3;
  results.push_back(host);
  if (!options.json.empty()) {
    write_json(options.json,
               {{"benchmark", "gemm_bench"},
                {"device", gpu.properties.name},
                {"gpus", 1},
                {"cublaslt", cublasLtGetVersion()},
                {"rounds", options.rounds}},
               results);
  }
  return 0;
}

}  // namespace
}  // namespace bench

int main(int argc, char** argv) {
  bench::Options options;
  CLI::App app("FP8 products on CUDA device 0 against bare cuBLASLt and torch._scaled_mm.");
  app.add_option("--rounds", options.rounds, "Timed batches of each case (default: 7)");
  app.add_option("--torch", options.torch, "File with what torch_scaled_mm.py printed");
  app.add_option("--json", options.json, "Write the results to this file");
  try {
    app.parse(argc, argv);
    return bench::run(options);
  } catch (const CLI::CallForHelp&) {
    std::cout << app.help();
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "gemm_bench: %s\n", error.what());
    return 1;
  }
}
