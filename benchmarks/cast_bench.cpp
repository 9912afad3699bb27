// SPDX-License-Identifier: Apache-2.0
// Times of the casts to FP8 on CUDA device 0 against the rate of a copy: row-major, transposed and
// both, with a scale that is given, with current scaling and with scales of blocks, from memory and
// from the cache.
#include <cstdio>
#include <memory>

#include "command_line.hpp"
#include "cuda_report.hpp"
#include "octet/ops/block_quantize.hpp"
#include "octet/runtime/tensor.hpp"

namespace bench {
namespace {

using octet::DType;
using octet::Granularity;
using octet::Scaling;
using octet::Shape;
using octet::TensorView;

enum class Copies : std::uint8_t { row, transposed, both };

const char* name_of(Copies copies) {
  constexpr const char* kNames[] = {"row", "transposed", "both"};
  return kNames[static_cast<int>(copies)];
}

/// Between two events, so that what they and the first launch cost does not count.
constexpr double kBatchMs = 1.0;
/// What the tensors of a case take together at least: several times what a cache holds.
constexpr std::size_t kFootprint = std::size_t{1} << 28;

constexpr const char *kOverCopy = "rate over that of a copy",
                     *kOverSmallCopy = "rate over that of a copy of 32 MiB";

struct Case {
  Shape shape;
  DType in = DType::bf16;
  Copies copies = Copies::both;
  Scaling scaling = Scaling::given;
  /// tensor, or that of a block cast, whose scaling is always current.
  Granularity granularity = Granularity::tensor;
  bool sums = false, counts = false;
  /// Casts in a captured graph; 0: enqueued one by one.
  int captured = 0;
  /// Of captured casts: the input stays in the cache. Else inputs take turns, so that none is there
  /// when it is read.
  bool warm = false;
  /// Fraction of the copy's rate; of captured ones microseconds.
  std::optional<double> target = {};

  std::string name() const {
    std::string text = std::string(octet::name_of(in)) + " " + to_string(shape) + " " +
                       name_of(copies) + (scaling == Scaling::given ? "" : ", current");
    if (is_blocks()) text += std::string(", ") + std::string(octet::name_of(granularity));
    if (sums) text += ", column sums";
    if (counts) text += ", counters";
    if (captured != 0) text += warm ? ", graph, warm" : ", graph, cold";
    return text;
  }
  /// Of a tensor that is read in some 10 us, what starting and ending costs is set against a copy
  /// that has it too.
  const char* metric() const {
    if (captured != 0) return "a cast of a graph";
    return shape.numel() < (1 << 25) ? kOverSmallCopy : kOverCopy;
  }
  std::size_t inputs() const { return warm ? 1 : (kFootprint + bytes() - 1) / bytes(); }
  bool is_blocks() const { return granularity != Granularity::tensor; }
  Shape turned() const { return {shape[1], octet::padded_rows(shape[0])}; }
  /// Each once: current scaling too wants its input read once.
  std::size_t bytes() const {
    const auto scales = [this](const Shape& s) {
      return is_blocks() ? octet::scale_bytes(granularity, s[0], s[1]) : 0;
    };
    std::int64_t bytes = shape.numel() * static_cast<std::int64_t>(size_of(in));
    if (copies != Copies::transposed) bytes += shape.numel() + scales(shape);
    if (copies != Copies::row) bytes += turned().numel() + scales(turned());
    return static_cast<std::size_t>(bytes);
  }
};

std::vector<Case> all_cases() {
  const Shape large{8192, 8192}, middle{8192, 4096}, least{4096, 4096}, small{2048, 2048};
  std::vector<Case> cases;
  for (DType in : {DType::bf16, DType::f32}) {
    for (const Shape& shape : {large, middle, least}) {
      for (Copies copies : {Copies::row, Copies::transposed, Copies::both}) {
        cases.push_back({.shape = shape, .in = in, .copies = copies, .target = 0.85});
      }
    }
  }
  cases.push_back({.shape = large, .sums = true});
  cases.push_back({.shape = large, .counts = true});
  for (const Shape& shape : {large, middle, least, Shape{2048, 3072}}) {
    cases.push_back({.shape = shape, .scaling = Scaling::current});
  }
  for (Granularity granularity : {Granularity::row_block, Granularity::tile, Granularity::mx}) {
    for (const Shape& shape : {large, least}) {
      for (Copies copies : {Copies::row, Copies::transposed, Copies::both}) {
        cases.push_back(
            {.shape = shape, .copies = copies, .granularity = granularity, .target = 0.85});
      }
    }
  }
  cases.push_back({.shape = large, .granularity = Granularity::row_block, .sums = true});
  cases.push_back({.shape = small, .captured = 20, .warm = true, .target = 5.0});
  cases.push_back({.shape = small, .captured = 40, .target = 8.0});
  cases.push_back({.shape = small, .scaling = Scaling::current, .captured = 20, .warm = true});
  return cases;
}

/// Buffers of a case with random inputs.
class Model {
 public:
  Model(const octet::Context& ctx, const Case& c) : ctx_(ctx), case_(c) {
    const octet::Tensor wide(ctx, DType::f32, c.shape);
    for (std::size_t i = 0; i < c.inputs(); ++i) {
      fill_random(wide, static_cast<std::uint32_t>(i));
      inputs_.emplace_back(ctx, c.in, c.shape);
      octet::convert(ctx, {wide, nullptr}, inputs_.back());
      outputs_.emplace_back(ctx, DType::e4m3, c.shape);
      transposed_.push_back(c.copies == Copies::row ? octet::Tensor()
                                                    : octet::Tensor(ctx, DType::e4m3, c.turned()));
    }
    if (c.is_blocks()) {
      scales_ = scale_buffer(c.shape);
      turned_scales_ = scale_buffer(c.turned());
    }
    if (c.sums) {
      sums_ = octet::Tensor(ctx, DType::f32, {octet::column_sum_rows(c.shape[0]), c.shape[1]});
    }
    counters_ = octet::Buffer(ctx, sizeof(octet::CastCounters));
    check(cudaMemsetAsync(counters_.data(), 0, counters_.bytes(), ctx.stream()), "cudaMemset");
  }

  void run() {
    const auto i = next_++ % inputs_.size();
    if (case_.is_blocks()) return run_blocks(i);
    octet::QuantizeArgs args{.in = inputs_[i], .out = outputs_[i].view()};
    if (case_.copies == Copies::transposed) args.out.data.data = nullptr;
    args.transposed = transposed_[i].view();
    args.scaling = case_.scaling;
    args.column_sums = sums_.view();
    if (case_.counts) args.counters = counters_.as<octet::CastCounters>();
    octet::quantize(ctx_, args);
  }

 private:
  octet::Buffer scale_buffer(const Shape& shape) const {
    return {ctx_,
            static_cast<std::size_t>(octet::scale_bytes(case_.granularity, shape[0], shape[1]))};
  }

  void run_blocks(std::size_t i) const {
    octet::BlockQuantizeArgs args{.in = inputs_[i]};
    if (case_.copies != Copies::transposed) {
      args.out = {.data = outputs_[i].view().data,
                  .granularity = case_.granularity,
                  .scales = scales_.data()};
    }
    if (case_.copies != Copies::row) {
      args.transposed = {.data = transposed_[i].view(),
                         .granularity = case_.granularity,
                         .scales = turned_scales_.data()};
    }
    args.column_sums = sums_.view();
    octet::block_quantize(ctx_, args);
  }

  /// Of one magnitude, so that a scale of 1 is a good one.
  void fill_random(const TensorView& out, std::uint32_t seed) const {
    std::vector<float> block(1 << 16);
    std::uint32_t state = 2654435761u * (seed + 1);
    for (float& x : block) {
      state = state * 1664525u + 1013904223u;
      x = static_cast<float>(static_cast<std::int32_t>(state)) * 0x1p-24f;
    }
    const auto count = static_cast<std::size_t>(out.numel());
    for (std::size_t at = 0; at < count; at += block.size()) {
      check(cudaMemcpyAsync(out.as<float>() + at, block.data(),
                            std::min(block.size(), count - at) * sizeof(float),
                            cudaMemcpyHostToDevice, ctx_.stream()),
            "cudaMemcpyAsync");
    }
    ctx_.synchronize();
  }

  octet::Context ctx_;
  Case case_;
  std::vector<octet::Tensor> inputs_, transposed_;
  std::vector<octet::ScaledTensor> outputs_;
  octet::Tensor sums_;
  octet::Buffer counters_, scales_, turned_scales_;
  std::size_t next_ = 0;
};

Result measure_case(const octet::Context& ctx, const Case& c, int repeats) {
  Model model(ctx, c);
  Result result{.name = c.name(),
                .metric = c.metric(),
                .unit = c.captured != 0 ? "us" : "1",
                .target = c.target,
                .bound = c.captured != 0 ? Bound::at_most : Bound::at_least,
                .spread = {},
                .bytes = c.bytes()};
  result.bytes_per_element = static_cast<double>(c.bytes()) / static_cast<double>(c.shape.numel());
  Timing timing;
  if (c.captured == 0) {
    const auto run = [&] { model.run(); };
    const double once = timing_of(time_each(ctx, 5, run)).median_ms;
    const int runs = std::max(1, static_cast<int>(kBatchMs / once));
    timing = timing_of(time_each(ctx, repeats, [&] {
      for (int i = 0; i < runs; ++i) run();
    }));
    timing.median_ms /= runs;
  } else {
    const Graph graph(ctx.stream(), [&] {
      for (int i = 0; i < c.captured; ++i) model.run();
    });
    timing = timing_of(time_each(ctx, repeats, [&] { graph.replay(); }));
    timing.median_ms /= c.captured;
  }
  result.median_ms = timing.median_ms;
  result.spread = timing.spread;
  return result;
}

/// Moves as many bytes as a cast of [4096, 4096] from bf16 into both copies.
Result measure_small_copy(const octet::Context& ctx, int repeats) {
  constexpr std::size_t kBytes = std::size_t{32} << 20, kPairs = kFootprint / (2 * kBytes);
  const octet::Buffer from(ctx, kPairs * kBytes), to(ctx, kPairs * kBytes);
  check(cudaMemsetAsync(from.data(), 0x5a, from.bytes(), ctx.stream()), "cudaMemsetAsync");
  const Timing timing = timing_of(time_each(ctx, repeats, [&] {
    for (std::size_t at = 0; at < from.bytes(); at += kBytes) {
      check(cudaMemcpyAsync(to.as<char>() + at, from.as<const char>() + at, kBytes,
                            cudaMemcpyDeviceToDevice, ctx.stream()),
            "cudaMemcpyAsync");
    }
  }));
  return {.name = "copy of 32 MiB",
          .metric = kOverCopy,
          .unit = "1",
          .target = {},
          .median_ms = timing.median_ms / kPairs,
          .spread = timing.spread,
          .bytes = 2 * kBytes};
}

struct Options {
  std::string json;
  int repeats = 21;
};

int run(const Options& options) {
  octet::require(options.repeats >= 1, "--repeats ", options.repeats, ": must be at least 1");
  const Gpu gpu;
  const octet::Context& ctx = gpu.context;
  std::vector<double> copies = measure_copy(ctx, options.repeats);
  std::vector<Result> results;
  for (const Case& c : all_cases()) results.push_back(measure_case(ctx, c, options.repeats));
  const Result small_copy = measure_small_copy(ctx, options.repeats);
  results.push_back(small_copy);
  for (double ms : measure_copy(ctx, options.repeats)) copies.push_back(ms);
  const Result copy = copy_result(copies);
  for (Result& r : results) {
    const Result& yardstick = r.metric == kOverSmallCopy ? small_copy : copy;
    r.value = r.unit == "us" ? r.median_ms * 1e3 : r.rate() / yardstick.rate();
  }
  results.push_back(copy);
  std::printf("%s\n\n", gpu.properties.name);
  print_table("element", results);
  if (!options.json.empty()) {
    write_json(options.json,
               {{"benchmark", "cast_bench"},
                {"device", gpu.properties.name},
                {"repeats", options.repeats}},
               results);
  }
  return 0;
}

}  // namespace
}  // namespace bench

int main(int argc, char** argv) {
  bench::Options options;
  CLI::App app("Time of the casts to FP8 on CUDA device 0 against the rate of a copy.",
               "cast_bench");
  app.add_option("--repeats", options.repeats, "Timed runs of each case (default: 21)");
  app.add_option("--json", options.json, "Write the results to this file");
  return bench::parse_and_run(app, argc, argv, [&] { return bench::run(options); });
}
