// SPDX-License-Identifier: Apache-2.0
// Forward and backward of octet::Linear on CUDA device 0, casts included, against the same three
// products in BF16 by bare cuBLASLt, and against the ceiling that follows from what its parts take.
#include <cmath>
#include <functional>

#include "command_line.hpp"
#include "cuda_report.hpp"
#include "linear_model.hpp"

namespace bench {
namespace {

using octet::Fp8Recipe;

constexpr double kBatchMs = 8.0;
constexpr int kHostRuns = 20;
/// What products are assumed to sustain of the peak, 70 % of 1,979 and 80 % of 989 TFLOP/s: FP8
/// ones that take more of the time of BF16 than this leave something to be gained.
constexpr double kFp8Share = (0.8 * 989.0) / (0.7 * 1979.0);
/// Elements in BF16 that current scaling keeps on an H100: it reads them once, and of up to twice
/// as many only the rest a second time, see quantize().
constexpr std::int64_t kKept = 17'300'000;

struct Target {
  LinearShape shape;
  Fp8Recipe recipe;
  double speed_up;
};

/// Below 1500 the next size that FP8 units take without a conversion; 1500 itself stands beside it.
constexpr LinearShape kMiddle{1488, 1488, 1488}, kWide{8192, 4096, 14336},
    kLarge{16384, 8192, 8192};

std::vector<LinearShape> all_shapes() {
  LinearShape added = kWide;
  added.main_grad = true;
  return {{1024, 1024, 1024},
          {1408, 1408, 1408},
          kMiddle,
          {1500, 1500, 1500},
          {2048, 2048, 2048},
          {2560, 2560, 2560},
          {4096, 4096, 4096},
          {8192, 4096, 4096},
          kWide,
          added,
          kLarge};
}

/// Held with all three tensors cast in the step.
std::optional<double> target_of(const LinearShape& shape, Fp8Recipe recipe, WeightForm form) {
  const Target targets[] = {{kMiddle, Fp8Recipe::delayed, 1.0},
                            {kWide, Fp8Recipe::delayed, 1.45},
                            {kLarge, Fp8Recipe::delayed, 1.55},
                            {kWide, Fp8Recipe::tensorwise, 1.4},
                            {kLarge, Fp8Recipe::tensorwise, 1.5}};
  if (form != WeightForm::bf16) return {};
  for (const Target& t : targets) {
    if (t.shape.name() == shape.name() && t.recipe == recipe) return t.speed_up;
  }
  return {};
}

/// Bytes that the casts of a step have to move: each input read once, twice where it has to be
/// measured first and does not fit on the chip, and both copies written.
std::size_t cast_bytes(const LinearShape& s, Fp8Recipe recipe, WeightForm form) {
  const auto bytes = [&](std::int64_t elements) {
    std::int64_t again = 0;
    if (recipe == Fp8Recipe::tensorwise && elements > kKept) {
      again = elements > 2 * kKept ? elements : elements - kKept;
    }
    return static_cast<std::size_t>(4 * elements + 2 * again);
  };
  return bytes(s.t * s.k) + bytes(s.t * s.n) + (form == WeightForm::bf16 ? bytes(s.n * s.k) : 0);
}

/// Something that is timed in turn with the others.
struct Contender {
  std::string name;
  std::function<void()> run;
  int runs = 1;  ///< in a batch
  std::vector<double> ms = {};

  Timing timing() const { return timing_of(ms); }
};

/// Batches of all in turn, so that a clock that changes meets every one.
void race(const octet::Context& ctx, std::vector<Contender>& contenders, int rounds) {
  for (Contender& c : contenders) {
    c.runs = std::max(1, static_cast<int>(std::lround(kBatchMs / batch_ms(ctx, 3, c.run))));
    batch_ms(ctx, c.runs, c.run);
  }
  for (int round = 0; round < rounds; ++round) {
    for (Contender& c : contenders) c.ms.push_back(batch_ms(ctx, c.runs, c.run));
  }
}

/// What was measured for a recipe and a form of the weight, microseconds.
struct Row {
  std::string name;
  Timing plain, graph;
  double bf16_us = 0.0, bf16_graph_us = 0.0;
  double fp8_us = 0.0;          ///< the three products alone
  double ideal_casts_us = 0.0;  ///< their bytes at the rate of the copy
  double host_us = 0.0;
  std::size_t bytes = 0;
  double flops = 0.0;
  std::optional<double> target;

  double octet_us() const { return 1e3 * plain.median_ms; }
  double graph_us() const { return 1e3 * graph.median_ms; }
  double casts_us() const { return graph_us() - fp8_us; }
  double speed_up() const { return bf16_us / octet_us(); }
  double ceiling() const { return bf16_us / (fp8_us + ideal_casts_us); }

  /// The part that takes most beyond its share: products beyond that of FP8's rate, casts beyond
  /// the copy's, calls beyond the graph.
  std::string limit() const {
    const std::pair<double, const char*> parts[] = {{fp8_us - kFp8Share * bf16_us, "GEMM"},
                                                    {casts_us() - ideal_casts_us, "casts"},
                                                    {octet_us() - graph_us(), "host"}};
    const auto& most = *std::max_element(std::begin(parts), std::end(parts));
    return most.first > 0.02 * octet_us() ? most.second : "none";
  }
};

void print_header(double tb_per_s) {
  std::printf(
      "copy: %.3f TB/s; times in us, graph: the step replayed, casts: graph less GEMMs\n\n"
      "| T x K x N, recipe, weight | BF16 | octet | speed-up | ceiling | target | met | FP8 GEMMs "
      "| casts | ideal casts | graph | BF16 graph | speed-up, graph | host | limited by |\n"
      "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|\n",
      tb_per_s);
}

void add_rows(const Row& r, std::vector<Result>& results) {
  const auto add = [&](const char* metric, const char* unit, double value, double us) -> Result& {
    results.push_back({.name = r.name,
                       .metric = metric,
                       .unit = unit,
                       .value = value,
                       .target = {},
                       .median_ms = us / 1e3,
                       .spread = {}});
    return results.back();
  };
  Result& total = add("speed-up", "1", r.speed_up(), r.octet_us());
  total.target = r.target;
  total.spread = r.plain.spread;
  total.flops = r.flops;
  total.note = "limited by " + r.limit();
  const bool met = total.met();
  add("speed-up of the graph", "1", r.bf16_graph_us / r.graph_us(), r.graph_us()).spread =
      r.graph.spread;
  add("ceiling", "1", r.ceiling(), r.fp8_us + r.ideal_casts_us);
  add("BF16", "us", r.bf16_us, r.bf16_us).flops = r.flops;
  add("BF16 graph", "us", r.bf16_graph_us, r.bf16_graph_us).flops = r.flops;
  add("FP8 GEMMs", "us", r.fp8_us, r.fp8_us).flops = r.flops;
  add("casts", "us", r.casts_us(), r.casts_us());
  add("ideal casts", "us", r.ideal_casts_us, r.ideal_casts_us).bytes = r.bytes;
  add("host time", "us", r.host_us, r.host_us);
  std::printf(
      "| %s | %.1f | %.1f | %.3f | %.3f | %s | %s | %.1f | %.1f | %.1f | %.1f | %.1f | %.3f | %.1f "
      "| %s |\n",
      r.name.c_str(), r.bf16_us, r.octet_us(), r.speed_up(), r.ceiling(),
      r.target ? text_of("%g", *r.target).c_str() : "",
      !r.target ? ""
      : met     ? "yes"
                : "NO",
      r.fp8_us, r.casts_us(), r.ideal_casts_us, r.graph_us(), r.bf16_graph_us,
      r.bf16_graph_us / r.graph_us(), r.host_us, r.limit().c_str());
  std::fflush(stdout);
}

struct Variant {
  Fp8Recipe recipe;
  WeightForm form;
  std::string name;
};

std::vector<Variant> variants_of(const LinearShape& shape, const std::string& wanted) {
  std::vector<Variant> list;
  for (Fp8Recipe recipe : {Fp8Recipe::delayed, Fp8Recipe::tensorwise, Fp8Recipe::blockwise}) {
    for (WeightForm form : {WeightForm::bf16, WeightForm::e4m3}) {
      Variant v{recipe, form, shape.name() + ", " + std::string(octet::name_of(recipe))};
      v.name += form == WeightForm::bf16 ? ", weight bf16" : ", weight e4m3";
      if (v.name.find(wanted) != std::string::npos) list.push_back(v);
    }
  }
  return list;
}

/// A step with everything that is timed of it.
struct Runner {
  Runner(octet::GemmRegistry& gemms, const LinearShape& shape, const LinearTensors& tensors,
         const Variant& v, const Cuts& by_tensor)
      : step(gemms, shape, tensors, v.recipe, v.form, by_tensor.w) {}
  /// Once all steps are there: the workspace may grow with each, and must not move after a capture.
  void capture(const octet::Context& ctx, const LinearTensors& tensors, const Bf16Products& rival) {
    // Also the ordinary step that has to come before a capture.
    require_agreement(ctx, tensors, step, rival);
    graph.emplace(ctx.stream(), [&] { step.run(); });
  }
  LinearStep step;
  std::optional<Graph> graph;
};

struct Options {
  std::string json, wanted;
  int rounds = 7;
};

std::vector<Row> measure(octet::GemmRegistry& gemms, const LinearShape& shape,
                         const std::vector<Variant>& variants, int rounds) {
  const octet::Context& ctx = gemms.context();
  const LinearTensors tensors(ctx, shape);
  const Cuts by_tensor(ctx, tensors, Fp8Recipe::tensorwise);
  const Cuts by_block(ctx, tensors, Fp8Recipe::blockwise);
  const Fp8Products tensor_products(gemms, shape, tensors, by_tensor);
  const Fp8Products block_products(gemms, shape, tensors, by_block);
  Bf16Products rival(ctx, shape, tensors);
  const int tried = rival.search();
  std::fprintf(stderr, "%s: BF16 the fastest of %d algorithms\n", shape.name().c_str(), tried);
  rival.run();
  const Graph rival_graph(ctx.stream(), [&] { rival.run(); });
  std::vector<std::unique_ptr<Runner>> runners;
  for (const Variant& v : variants) {
    runners.push_back(std::make_unique<Runner>(gemms, shape, tensors, v, by_tensor));
  }
  for (const auto& runner : runners) runner->capture(ctx, tensors, rival);
  tensor_products.run();
  block_products.run();
  const Graph tensor_graph(ctx.stream(), [&] { tensor_products.run(); });
  const Graph block_graph(ctx.stream(), [&] { block_products.run(); });

  std::vector<Contender> contenders = {{"BF16", [&] { rival.run(); }},
                                       {"BF16 graph", [&] { rival_graph.replay(); }},
                                       {"FP8 by tensor", [&] { tensor_graph.replay(); }},
                                       {"FP8 by block", [&] { block_graph.replay(); }}};
  const std::size_t first = contenders.size();
  for (const auto& runner : runners) {
    contenders.push_back({"step", [&r = *runner] { r.step.run(); }});
    contenders.push_back({"graph", [&r = *runner] { r.graph->replay(); }});
  }
  race(ctx, contenders, rounds);

  const auto us = [&](std::size_t i) { return 1e3 * contenders[i].timing().median_ms; };
  std::vector<Row> rows;
  for (std::size_t i = 0; i < variants.size(); ++i) {
    const Variant& v = variants[i];
    Row row{.name = v.name,
            .plain = contenders[first + 2 * i].timing(),
            .graph = contenders[first + 2 * i + 1].timing(),
            .bf16_us = us(0),
            .bf16_graph_us = us(1),
            .fp8_us = us(octet::is_per_tensor(v.recipe) ? 2 : 3),
            .bytes = cast_bytes(shape, v.recipe, v.form),
            .flops = shape.flops(),
            .target = target_of(shape, v.recipe, v.form)};
    std::vector<double> host;
    for (int round = 0; round < rounds; ++round) {
      host.push_back(host_us(ctx, kHostRuns, [&] { runners[i]->step.run(); }));
    }
    row.host_us = timing_of(host).median_ms;
    rows.push_back(row);
  }
  return rows;
}

int run(const Options& options) {
  octet::require(options.rounds >= 1, "--rounds ", options.rounds, ": must be at least 1");
  const Gpu gpu;
  const Result copy = copy_result(measure_copy(gpu.context, 3 * options.rounds));
  octet::GemmRegistry gemms(gpu.context);
  std::printf("%s\n", gpu.properties.name);
  print_header(copy.value);
  std::vector<Result> results;
  for (const LinearShape& shape : all_shapes()) {
    const std::vector<Variant> variants = variants_of(shape, options.wanted);
    if (variants.empty()) continue;
    for (Row& row : measure(gemms, shape, variants, options.rounds)) {
      row.ideal_casts_us = static_cast<double>(row.bytes) / copy.value * 1e-6;
      add_rows(row, results);
    }
  }
  octet::require(!results.empty(), "--case ", options.wanted, ": no case has this in its name");
  results.push_back(copy);
  if (!options.json.empty()) {
    write_json(options.json,
               {{"benchmark", "linear_bench"},
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
  CLI::App app("Forward and backward of Linear on CUDA device 0 against BF16 by bare cuBLASLt.",
               "linear_bench");
  app.add_option("--rounds", options.rounds, "Timed batches of each contender (default: 7)");
  app.add_option("--case", options.wanted, "Only cases with this in their name");
  app.add_option("--json", options.json, "Write the results to this file");
  return bench::parse_and_run(app, argc, argv, [&] { return bench::run(options); });
}
