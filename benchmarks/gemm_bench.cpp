// SPDX-License-Identifier: Apache-2.0
// FP8 products of a Linear's three passes on CUDA device 0: the library's, timed in turn with bare
// cuBLASLt after an exhaustive search and with torch._scaled_mm, which a child process runs.
#include <cmath>
#include <memory>

#include "bare_cublaslt.hpp"
#include "command_line.hpp"
#include "cuda_report.hpp"
#include "octet/gemm/gemm.hpp"
#include "octet/ops/quantize.hpp"
#include "random_operands.hpp"
#include "torch_child.hpp"

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
    fill_normal(ctx, wide, seed);
    octet::quantize(ctx, {.in = wide, .out = out});
    ctx.synchronize();
  }

  octet::ScaledTensor a_, b_;
  octet::Tensor d_;
};

cudaDataType_t cuda_type(DType dtype) {
  switch (dtype) {
    case DType::e4m3: return CUDA_R_8F_E4M3;
    case DType::e5m2: return CUDA_R_8F_E5M2;
    case DType::f32: return CUDA_R_32F;
    default: return CUDA_R_16BF;
  }
}

BareProblem bare_problem(const octet::GemmProblem& p) {
  return {.m = p.m,
          .n = p.n,
          .k = p.k,
          .a = cuda_type(p.a),
          .b = cuda_type(p.b),
          .d = cuda_type(p.d),
          .fast = p.accumulation == octet::Accumulation::fast,
          .accumulate = p.accumulate};
}

struct Times {
  Timing octet, bare;
  std::optional<Timing> torch;
  int algorithms = 0;  ///< that the bare rival tried
  double prepare_s = 0.0;
};

/// Batches of all in turn, so that a clock that changes meets every one. `torch` may be null.
Times measure(octet::GemmRegistry& gemms, const octet::GemmProblem& p, TorchChild* torch,
              int rounds) {
  const octet::Context& ctx = gemms.context();
  const Operands operands(ctx, p);
  BareGemm bare(ctx, bare_problem(p), operands.pointers());
  Times times;
  times.algorithms = bare.search();
  const auto start = std::chrono::steady_clock::now();
  gemms.prepare(p);
  times.prepare_s = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  // torch._scaled_mm overwrites a result in BF16 alone.
  const bool has_torch = torch != nullptr && !p.accumulate && torch->prepare(p);
  const octet::GemmArgs args = operands.args();
  const auto run_octet = [&] { gemms.run(p, args); };
  const auto run_bare = [&] { bare.run(); };
  const int runs =
      std::max(1, static_cast<int>(std::lround(kBatchMs / batch_ms(ctx, 3, run_bare))));
  std::vector<double> octet_ms, bare_ms, torch_ms;
  batch_ms(ctx, runs, run_octet);
  if (has_torch) torch->batch_ms(runs);
  for (int round = 0; round < rounds; ++round) {
    octet_ms.push_back(batch_ms(ctx, runs, run_octet));
    bare_ms.push_back(batch_ms(ctx, runs, run_bare));
    if (has_torch) torch_ms.push_back(torch->batch_ms(runs));
  }
  times.octet = timing_of(octet_ms);
  times.bare = timing_of(bare_ms);
  if (has_torch) times.torch = timing_of(torch_ms);
  return times;
}

constexpr const char* kHostCase = "host time of a call, 256x256x256";

/// Host microseconds of a call, the library's and of bare cuBLASLt with the pointers set anew, with
/// the device kept so busy that the host never waits for it.
void add_host_rows(octet::GemmRegistry& gemms, std::vector<Result>& results) {
  const octet::GemmProblem p{.m = 256, .n = 256, .k = 256, .d = DType::bf16};
  const octet::Context& ctx = gemms.context();
  const Operands operands(ctx, p);
  BareGemm bare(ctx, bare_problem(p), operands.pointers());
  bare.search();
  gemms.prepare(p);
  const octet::GemmArgs args = operands.args();
  constexpr int kCalls = 200;  // fewer than the queue of a stream takes
  std::vector<double> octet_us, bare_us;
  for (int round = 0; round < 11; ++round) {
    octet_us.push_back(host_us(ctx, kCalls, [&] { gemms.run(p, args); }));
    bare_us.push_back(host_us(ctx, kCalls, [&] { bare.run_anew(); }));
  }
  const auto add = [&](const char* metric, const Timing& timing) -> Result& {
    results.push_back({.name = kHostCase,
                       .metric = metric,
                       .unit = "us",
                       .value = timing.median_ms,
                       .target = {},
                       .bound = Bound::below,
                       .median_ms = timing.median_ms / 1e3,
                       .spread = timing.spread});
    return results.back();
  };
  Result& host = add("host time", timing_of(octet_us));
  host.target = kHostTarget;
  const bool met = host.met();
  const double own = host.value;
  const double rival = add("host time, bare cuBLASLt", timing_of(bare_us)).value;
  std::printf("\nhost time of a call: octet %.2f us (below %.0f: %s), bare cuBLASLt %.2f us\n", own,
              kHostTarget, met ? "yes" : "NO", rival);
}

struct Options {
  std::string json, torch, wanted;
  int rounds = 7;
};

void add_rows(const Case& c, const Times& times, std::vector<Result>& results) {
  const octet::GemmProblem& p = c.problem;
  const double flops =
      2.0 * static_cast<double>(p.m) * static_cast<double>(p.n) * static_cast<double>(p.k);
  double rival = times.bare.median_ms;
  const auto row = [&](const std::string& who, const Timing& timing) {
    Result r{.name = c.name,
             .metric = who,
             .unit = "TFLOP/s",
             .target = {},
             .median_ms = timing.median_ms,
             .spread = timing.spread};
    r.flops = flops;
    r.value = flops / timing.median_ms * 1e-9;
    return r;
  };
  results.push_back(row("octet", times.octet));
  results.push_back(row("bare cuBLASLt", times.bare));
  std::string line = "| " + c.name + " | " + text_of("%.0f", results.rbegin()[1].value) + " | " +
                     text_of("%.0f", results.back().value);
  if (times.torch) {
    rival = std::min(rival, times.torch->median_ms);
    results.push_back(row("torch", *times.torch));
    line += " | " + text_of("%.0f", results.back().value);
  } else {
    line += " | ";
  }
  Result ratio = row("over the best rival", times.octet);
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
  std::vector<Case> cases = all_cases();
  std::erase_if(cases,
                [&](const Case& c) { return c.name.find(options.wanted) == std::string::npos; });
  octet::require(!cases.empty(), "--case ", options.wanted, ": no case has this in its name");
  std::unique_ptr<TorchChild> torch;
  if (!options.torch.empty()) torch = std::make_unique<TorchChild>(options.torch);
  const std::string torch_version = torch ? torch->version() : "";
  if (torch_version.empty()) torch.reset();
  const Gpu gpu;
  octet::GemmRegistry gemms(gpu.context);
  std::printf("%s, torch: %s\n\n", gpu.properties.name,
              torch ? torch_version.c_str() : "none, so without its column");
  std::printf(
      "TFLOP/s\n\n| T x N x K, pass | octet | bare cuBLASLt | torch | over the best "
      "| >= %.2f | algorithms tried | prepare() s |\n|---|---|---|---|---|---|---|---|\n",
      kTarget);
  std::vector<Result> results;
  for (const Case& c : cases) {
    add_rows(c, measure(gemms, c.problem, torch.get(), options.rounds), results);
  }
  add_host_rows(gemms, results);
  if (!options.json.empty()) {
    write_json(options.json,
               {{"benchmark", "gemm_bench"},
                {"device", gpu.properties.name},
                {"gpus", 1},
                {"cublaslt", cublasLtGetVersion()},
                {"torch", torch ? nlohmann::ordered_json(torch_version) : nullptr},
                {"rounds", options.rounds}},
               results);
  }
  return 0;
}

}  // namespace
}  // namespace bench

int main(int argc, char** argv) {
  bench::Options options;
  CLI::App app("FP8 products on CUDA device 0 against bare cuBLASLt and torch._scaled_mm.",
               "gemm_bench");
  app.add_option("--rounds", options.rounds, "Timed batches of each case (default: 7)");
  app.add_option("--torch", options.torch, "torch_scaled_mm.py, for torch to take its turn");
  app.add_option("--case", options.wanted, "Only cases with this in their name");
  app.add_option("--json", options.json, "Write the results to this file");
  return bench::parse_and_run(app, argc, argv, [&] { return bench::run(options); });
}
