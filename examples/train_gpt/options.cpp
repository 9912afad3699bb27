// SPDX-License-Identifier: Apache-2.0
#include "options.hpp"

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <filesystem>
#include <iostream>

#include "kernels.hpp"
#include "octet/comm/nccl.hpp"
#include "octet/core/error.hpp"
#include "octet/engine/engine.hpp"
#include "octet/runtime/context.hpp"

namespace train_gpt {
namespace {

using octet::DeviceType;
using octet::require;

/// The command line as text and numbers; what was not given has the device's default later.
struct Arguments {
  std::string data, json, load, save, device = "auto", fp8_recipe = "tensorwise";
  std::vector<std::string> levels{"O0", "O1", "O2", "O3"};
  std::optional<int> ranks, layers, width, heads, context, batch;
  std::optional<float> lr;
  float clip_grad = 1.0f;
  int steps = 300, log_every = 20, micro_batches = 1;
  std::string schedule = "auto", windows = "auto";
  std::optional<std::string> sharding, reduced_gradient;
  bool offload_states = false;
  int save_interval = 0, exit_interval = 0;
  std::optional<std::int64_t> bucket_elements;
  std::optional<std::string> fp8_format, amax_compute_algo;
  std::optional<int> amax_history_len, margin;
  std::int64_t seed = 1;
};

/// Model and batch where the command line is silent: what trains in a few minutes on two cores, and
/// 25 million parameters on a GPU.
struct Defaults {
  GptConfig model;
  int batch;
  float lr;
};
constexpr Defaults kCpuDefaults{
    .model = {.layers = 2, .width = 128, .heads = 4, .context = 64}, .batch = 16, .lr = 2e-3f};
constexpr Defaults kCudaDefaults{
    .model = {.layers = 8, .width = 512, .heads = 8, .context = 256}, .batch = 32, .lr = 1e-3f};

/// False when --help was printed.
bool read_command_line(int argc, char** argv, Arguments& a) {
  CLI::App app(
      "Trains one byte-level GPT per level from the same weights on the same batches and "
      "compares loss, memory, traffic and time.");
  app.add_option("--data", a.data, "Text to train on (default: this repository's own text)");
  app.add_option(
         "--levels", a.levels,
         "Levels, separated by commas (default: O0,O1,O2,O3); \"small\" is O2 with 5 bytes of "
         "state per parameter")
      ->delimiter(',');
  app.add_option(
      "--ranks", a.ranks,
      "Data-parallel ranks as threads (default: 2; on CUDA at most the GPUs); under mpirun, "
      "torchrun or srun every process is a rank");
  app.add_option("--steps", a.steps, "Training steps (default: 300)");
  app.add_option("--device", a.device, "auto, cpu or cuda (default: auto)");
  app.add_option("--layers", a.layers, "Transformer blocks (default: 2; on CUDA 8)");
  app.add_option("--width", a.width, "Width of the model (default: 128; on CUDA 512)");
  app.add_option("--heads", a.heads, "Attention heads (default: 4; on CUDA 8)");
  app.add_option("--context", a.context, "Bytes of context (default: 64; on CUDA 256)");
  app.add_option("--batch", a.batch, "Rows of the global batch (default: 16; on CUDA 32)");
  app.add_option("--micro-batches", a.micro_batches,
                 "Parts of a rank's rows that go through the model one after the other; their "
                 "gradients are summed and reduced once (default: 1)");
  app.add_option("--schedule", a.schedule,
                 "overlap (gradients are reduced during backward, on a stream of their own), "
                 "after_backward, fused (inside the update of an optimizer that is cut over ranks: "
                 "O3, with --clip-grad 0) or auto (overlap on CUDA with several ranks, else "
                 "after_backward; default: auto)");
  app.add_option("--bucket-elements", a.bucket_elements,
                 "Gradients are reduced in buckets of at least so many elements (default: 4194304 "
                 "with overlap, of which only the last bucket is waited for, else 33554432)");
  app.add_option("--windows", a.windows,
                 "on (ranks read gradients in one another's memory), off (they send them) or auto "
                 "(on with NCCL where the GPUs can; default: auto)");
  app.add_option("--sharding", a.sharding,
                 "What is cut over the ranks: none, optimizer, gradients or parameters (ZeRO 0 to "
                 "3; default: optimizer at O3, else none)");
  app.add_option("--reduced-gradient", a.reduced_gradient,
                 "Format of the mean gradient that a cut optimizer reads: f32, or that of the "
                 "gradients themselves, bf16 or e4m3, which is what --sharding none has (default: "
                 "f32); --load wants the one that was saved");
  app.add_flag("--offload-states", a.offload_states,
               "Moments and master weights live in pinned host memory");
  app.add_option("--load", a.load,
                 "Go on from the newest checkpoint in this folder, whatever number of ranks and "
                 "sharding saved it");
  app.add_option("--save", a.save, "Leave a checkpoint in this folder at the end");
  app.add_option("--save-interval", a.save_interval,
                 "... and every so many steps, while training goes on");
  app.add_option("--exit-interval", a.exit_interval,
                 "End after so many steps, though --steps plans more");
  app.add_option("--lr", a.lr, "Peak learning rate (default: 2e-3; on CUDA 1e-3)");
  app.add_option("--clip-grad", a.clip_grad,
                 "Norm that gradients are clipped to; 0 for no clipping (default: 1)");
  app.add_option("--seed", a.seed, "Seed of weights, batches and rounding (default: 1)");
  app.add_option("--log-every", a.log_every,
                 "Steps between progress lines in a file (default: 20)");
  app.add_option("--fp8-recipe", a.fp8_recipe,
                 "Scales of activations and their gradients in FP8 matrix products: tensorwise "
                 "(one each, by its own amax), delayed (one each, by amaxes of the steps before), "
                 "blockwise (one per 128 values) or mxfp8 (one per 32 values; default: "
                 "tensorwise); weights come from the optimizer with one scale each");
  app.add_option("--fp8-format", a.fp8_format,
                 "hybrid (gradients of activations in E5M2) or e4m3 (default: e4m3 for blockwise "
                 "and mxfp8, else hybrid)");
  app.add_option("--fp8-amax-history-len", a.amax_history_len,
                 "Steps that delayed scaling looks back (default: 1024)");
  app.add_option("--fp8-amax-compute-algo", a.amax_compute_algo,
                 "max or most_recent: the amax of these steps that makes the scale (default: max)");
  app.add_option("--fp8-margin", a.margin,
                 "Delayed scaling divides its scales by 2 to this power (default: 0)");
  app.add_option("--json", a.json, "Write the results to this file");
  try {
    app.parse(argc, argv);
  } catch (const CLI::CallForHelp&) {
    std::cout << app.help();
    return false;
  } catch (const CLI::ParseError& error) {
    octet::fail(error.what());
  }
  return true;
}

Setup setup_of(const std::string& name) {
  if (name == "small") return {name, octet::Level::O2, octet::small_formats()};
  for (octet::Level level :
       {octet::Level::O0, octet::Level::O1, octet::Level::O2, octet::Level::O3}) {
    if (name == octet::name_of(level)) return {name, level};
  }
  octet::fail("--levels ", name, ": must be O0, O1, O2, O3 or small");
}

octet::DelayedScalingConfig delayed_scaling_of(const Arguments& a, octet::Fp8Recipe recipe) {
  const auto check_recipe = [&](const char* option, const auto& value) {
    if (recipe == octet::Fp8Recipe::delayed || !value) return;
    octet::fail(option, " ", *value, ": is for --fp8-recipe delayed");
  };
  check_recipe("--fp8-amax-history-len", a.amax_history_len);
  check_recipe("--fp8-amax-compute-algo", a.amax_compute_algo);
  check_recipe("--fp8-margin", a.margin);
  octet::DelayedScalingConfig config;
  config.amax_history_len = a.amax_history_len.value_or(config.amax_history_len);
  config.margin = a.margin.value_or(config.margin);
  require(config.amax_history_len >= 1, "--fp8-amax-history-len ", config.amax_history_len,
          ": must be at least 1");
  require(config.margin >= -64 && config.margin <= 64, "--fp8-margin ", config.margin,
          ": must be from -64 to 64");
  const std::string algo = a.amax_compute_algo.value_or("max");
  require(algo == "max" || algo == "most_recent", "--fp8-amax-compute-algo ", algo,
          ": must be max or most_recent");
  if (algo == "most_recent") config.amax_compute_algo = octet::AmaxComputeAlgo::most_recent;
  return config;
}

Fp8Settings fp8_settings_of(const Arguments& a) {
  const auto recipe = octet::parse_fp8_recipe(a.fp8_recipe);
  require(recipe.has_value(), "--fp8-recipe ", a.fp8_recipe,
          ": must be tensorwise, delayed, blockwise or mxfp8");
  octet::Fp8Format format = octet::default_format(*recipe);
  if (a.fp8_format) {
    const auto asked = octet::parse_fp8_format(*a.fp8_format);
    require(asked.has_value(), "--fp8-format ", *a.fp8_format, ": must be hybrid or e4m3");
    format = *asked;
  }
  return {.recipe = *recipe, .format = format, .delayed = delayed_scaling_of(a, *recipe)};
}

DeviceType choose_device(const std::string& text) {
  require(text == "auto" || text == "cpu" || text == "cuda", "--device ", text,
          ": must be auto, cpu or cuda");
  const bool available = octet::cuda_device_count() > 0;
  require(text != "cuda" || available,
          "--device cuda: there is no CUDA device that this build can use");
  return text != "cpu" && available ? DeviceType::cuda : DeviceType::cpu;
}

/// A process that a launcher has started is one rank of as many as the launcher says.
int launched_ranks(std::optional<int> asked, DeviceType device, const octet::Launch& launch) {
  require(!asked || *asked == launch.size, "--ranks ", asked.value_or(0), ": ", launch.launcher,
          " has started ", launch.size, " processes, each of which is a rank");
  if (device == DeviceType::cuda) {
    const int gpus = octet::cuda_device_count();
    require(launch.local_rank < gpus, "rank ", launch.rank, " is process ", launch.local_rank,
            " of its host and needs a GPU of its own, but there ", gpus == 1 ? "is" : "are",
            " only ", gpus);
  }
  return launch.size;
}

int choose_ranks(std::optional<int> asked, DeviceType device, const octet::Launch& launch) {
  if (launch.size > 1) return launched_ranks(asked, device, launch);
  require(!asked || *asked >= 1, "--ranks ", asked.value_or(0), ": must be at least 1");
  if (device == DeviceType::cpu) return asked.value_or(2);
  const int gpus = octet::cuda_device_count();
  const int ranks = asked.value_or(octet::has_nccl() ? std::min(2, gpus) : 1);
  require(ranks <= gpus, "--ranks ", ranks, ": each rank needs a GPU of its own, but there ",
          gpus == 1 ? "is" : "are", " only ", gpus);
  require(ranks == 1 || octet::has_nccl(), "--ranks ", ranks,
          ": this build has no NCCL, so on CUDA only 1 rank is possible");
  return ranks;
}

octet::Schedule choose_schedule(const std::string& text, DeviceType device, int ranks) {
  require(text == "auto" || text == "overlap" || text == "after_backward" || text == "fused",
          "--schedule ", text, ": must be auto, overlap, after_backward or fused");
  if (text == "fused") return octet::Schedule::fused;
  const bool overlaps =
      text == "overlap" || (text == "auto" && device == DeviceType::cuda && ranks > 1);
  return overlaps ? octet::Schedule::overlap : octet::Schedule::after_backward;
}

std::optional<bool> choose_windows(const std::string& text) {
  require(text == "auto" || text == "on" || text == "off", "--windows ", text,
          ": must be auto, on or off");
  if (text == "auto") return std::nullopt;
  return text == "on";
}

std::optional<octet::DType> choose_reduced_gradient(const std::optional<std::string>& text) {
  if (!text) return std::nullopt;
  for (octet::DType dtype : octet::kGradientFormats) {
    if (*text == octet::name_of(dtype)) return dtype;
  }
  octet::fail("--reduced-gradient ", *text, ": must be f32, bf16 or e4m3");
}

octet::Sharding sharding_of(const Options& options, const Setup& setup) {
  return options.sharding.value_or(octet::sharding_of(setup.level));
}

/// With overlap what the last bucket takes is not hidden: it must be a small part of the model.
std::int64_t choose_bucket_elements(std::optional<std::int64_t> asked, octet::Schedule schedule) {
  constexpr std::int64_t kOverlap = std::int64_t{4} << 20;
  require(!asked || *asked >= 1, "--bucket-elements ", asked.value_or(0), ": must be at least 1");
  return asked.value_or(
      schedule == octet::Schedule::overlap ? kOverlap : octet::EngineConfig{}.bucket_elements);
}

void check_model(const GptConfig& model) {
  const auto at_least = [](const char* name, int value, int least) {
    require(value >= least, "--", name, " ", value, ": must be at least ", least);
  };
  at_least("layers", model.layers, 1);
  at_least("heads", model.heads, 1);
  at_least("context", model.context, 1);
  // From 64 on the smallest weight matrix, width x width, is managed in FP8.
  at_least("width", model.width, 64);
  require(model.width % 16 == 0, "--width ", model.width,
          ": must be a multiple of 16, which FP8 matrix products need");
  require(model.width % model.heads == 0, "--width ", model.width,
          ": must be a multiple of the number of heads, --heads ", model.heads);
  require(model.width / model.heads <= kMaxHeadWidth, "--width ", model.width, " with --heads ",
          model.heads, ": a head may be at most ", kMaxHeadWidth, " wide");
}

/// The sum inside the update leaves no means, whose norm clipping needs.
void check_fused(const Options& options) {
  if (options.schedule != octet::Schedule::fused) return;
  require(options.ranks > 1, "--schedule fused: is for several ranks, but --ranks is ",
          options.ranks);
  for (const Setup& setup : options.setups) {
    require(
        sharding_of(options, setup) == octet::Sharding::optimizer,
        "--schedule fused: is for --levels O3, whose optimizer is cut over ranks, or --sharding "
        "optimizer, not ",
        setup.name);
  }
  require(options.clip_grad == 0.0f, "--schedule fused: needs --clip-grad 0, but it is ",
          options.clip_grad);
}

void check_training(const Options& options) {
  require(options.steps >= 1, "--steps ", options.steps, ": must be at least 1");
  require(options.log_every >= 1, "--log-every ", options.log_every, ": must be at least 1");
  require(options.batch >= 1, "--batch ", options.batch, ": must be at least 1");
  require(options.batch % options.ranks == 0, "--batch ", options.batch,
          ": must be a multiple of the number of ranks, --ranks ", options.ranks);
  const int micro_batches = options.model.micro_batches;
  require(micro_batches >= 1, "--micro-batches ", micro_batches, ": must be at least 1");
  require(options.batch / options.ranks % micro_batches == 0, "--micro-batches ", micro_batches,
          ": must divide the ", options.batch / options.ranks, " rows of a rank, --batch ",
          options.batch, " over --ranks ", options.ranks);
  require(std::isfinite(options.lr) && options.lr > 0.0f, "--lr ", options.lr,
          ": must be a positive number");
  require(std::isfinite(options.clip_grad) && options.clip_grad >= 0.0f, "--clip-grad ",
          options.clip_grad, ": must be a positive number, or 0 for no clipping");
  if (!options.json.empty()) {
    const auto folder = std::filesystem::absolute(options.json).parent_path();
    require(std::filesystem::is_directory(folder), "--json ", options.json, ": there is no folder ",
            folder.string());
    require(!std::filesystem::is_directory(options.json), "--json ", options.json,
            ": is a folder; it must be a file");
  }
}

void check_checkpoints(const Options& options) {
  require(options.save_interval >= 0, "--save-interval ", options.save_interval,
          ": must not be negative");
  require(options.exit_interval >= 0, "--exit-interval ", options.exit_interval,
          ": must not be negative");
  require(options.save_interval == 0 || !options.save.empty(), "--save-interval ",
          options.save_interval, ": --save names no folder");
  for (const auto& [name, folder] :
       {std::pair{"--load ", options.load}, {"--save ", options.save}}) {
    require(folder.empty() || options.setups.size() == 1, name, folder,
            ": is for one level at a time; --levels names ", options.setups.size());
  }
  require(options.load.empty() || std::filesystem::is_directory(options.load), "--load ",
          options.load, ": there is no such folder");
}

}  // namespace

std::optional<Options> parse_options(int argc, char** argv) {
  Arguments arguments;
  if (!read_command_line(argc, argv, arguments)) return std::nullopt;
  Options options;
  options.device = choose_device(arguments.device);
  const Defaults& defaults = options.device == DeviceType::cpu ? kCpuDefaults : kCudaDefaults;
  options.launch = octet::launch_from_environment();
  options.ranks = choose_ranks(arguments.ranks, options.device, options.launch);
  options.schedule = choose_schedule(arguments.schedule, options.device, options.ranks);
  options.bucket_elements = choose_bucket_elements(arguments.bucket_elements, options.schedule);
  options.windows = choose_windows(arguments.windows);
  if (arguments.sharding) options.sharding = octet::parse_sharding(*arguments.sharding);
  options.reduced_gradient = choose_reduced_gradient(arguments.reduced_gradient);
  options.offload_states = arguments.offload_states;
  options.load = arguments.load;
  options.save = arguments.save;
  options.save_interval = arguments.save_interval;
  options.exit_interval = arguments.exit_interval;
  options.data = arguments.data;
  for (const std::string& name : arguments.levels) options.setups.push_back(setup_of(name));
  require(!options.setups.empty(), "--levels: at least one level is needed");
  options.model = {.layers = arguments.layers.value_or(defaults.model.layers),
                   .width = arguments.width.value_or(defaults.model.width),
                   .heads = arguments.heads.value_or(defaults.model.heads),
                   .context = arguments.context.value_or(defaults.model.context),
                   .micro_batches = arguments.micro_batches,
                   .fp8 = fp8_settings_of(arguments)};
  options.batch = arguments.batch.value_or(defaults.batch);
  options.steps = arguments.steps;
  options.lr = arguments.lr.value_or(defaults.lr);
  require(arguments.seed >= 0, "--seed ", arguments.seed, ": must not be negative");
  options.seed = static_cast<std::uint64_t>(arguments.seed);
  options.clip_grad = arguments.clip_grad;
  options.log_every = arguments.log_every;
  options.json = arguments.json;
  check_model(options.model);
  check_training(options);
  check_fused(options);
  check_checkpoints(options);
  return options;
}

}  // namespace train_gpt
