// SPDX-License-Identifier: Apache-2.0
// train_gpt as its user meets it: the table, the JSON, the progress lines, and bad input.
#include <algorithm>
#include <cmath>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

#include "examples/program.hpp"
#include "octet/runtime/context.hpp"
#include "support/catch.hpp"
#include "support/errors.hpp"

using namespace octet::test;
using nlohmann::json;

namespace {

const std::string kSmall = "--layers 1 --width 64 --heads 2 --context 16 --batch 4 ";

const char* const kRunKeys[] = {"level",
                                "sharding",
                                "ranks",
                                "schedule",
                                "clip_grad",
                                "micro_batches",
                                "device",
                                "parameters",
                                "fp8_recipe",
                                "fp8_format",
                                "amax_history_len",
                                "amax_compute_algo",
                                "margin",
                                "val_loss",
                                "losses",
                                "state_bytes_per_parameter",
                                "state_bytes_per_parameter_all",
                                "peak_bytes_per_rank",
                                "wire_bytes_per_parameter_per_step",
                                "fp8_gemms_per_step",
                                "converted_gemms_per_step",
                                "step_seconds",
                                "skipped_steps"};

/// Runs train_gpt and returns what --json wrote.
json train(const std::string& arguments, Outcome* outcome = nullptr) {
  const Folder folder;
  const std::string path = folder.file("out.json");
  const Outcome result = run_program(folder, arguments + " --json '" + path + "'");
  INFO(arguments << "\n" << result.err);
  REQUIRE(result.exit_code == 0);
  if (outcome != nullptr) *outcome = result;
  return json::parse(read_file(path));
}

std::size_t count_of(const std::string& text, const std::string& part) {
  std::size_t count = 0;
  for (auto at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) ++count;
  return count;
}

double mean_of(const std::vector<double>& values, std::size_t begin, std::size_t end) {
  double sum = 0.0;
  for (std::size_t i = begin; i < end; ++i) sum += values[i] / double(end - begin);
  return sum;
}

/// 200,000 bytes of words in a random order: always the same, unlike the repository's own text.
std::string words_text() {
  const char* const words[] = {"weight", "scale", "of",    "the",  "gradient", "is",   "stored",
                               "in",     "eight", "bits,", "and",  "a",        "rank", "sums.",
                               "moment", "with",  "every", "step", "block",    "has"};
  std::minstd_rand generator(1);
  std::string text;
  while (text.size() < 200000) {
    text += words[generator() % std::size(words)];
    text += generator() % 12 == 0 ? '\n' : ' ';
  }
  return text;
}

/// What must hold for every run of kSmall with 20 steps.
void check_run(const json& run, int ranks, const std::string& device) {
  const std::string level = run.at("level");
  INFO(level << ", " << ranks << " ranks, " << device);
  CHECK(run.size() == std::size(kRunKeys));
  for (const char* key : kRunKeys) CHECK(run.contains(key));
  CHECK(run.at("sharding") == (level == "O3" ? "optimizer" : "none"));
  CHECK(run.at("ranks") == ranks);
  CHECK(run.at("device") == device);
  // 256 and 16 rows of embeddings, one block, five LayerNorm vectors of gains and biases each.
  CHECK(run.at("parameters") == 256 * 64 + 16 * 64 + 12 * 64 * 64 + 3 * 2 * 64);
  CHECK(run.at("skipped_steps") == 0);
  CHECK(run.at("fp8_gemms_per_step") == (level == "O0" ? 0 : 15));  // 5 products, 3 GEMMs each
  if (device == "cpu") CHECK(run.at("converted_gemms_per_step") == 0);
  CHECK(run.at("step_seconds") > 0.0);
  CHECK(run.at("peak_bytes_per_rank") > run.at("parameters"));

  const double state = run.at("state_bytes_per_parameter");
  const double expected = level == "O0"      ? 16.0
                          : level == "O1"    ? 12.0
                          : level == "O2"    ? 7.0
                          : level == "small" ? 5.0625
                                             : 2.0 + 5.0 / ranks;
  CHECK(state >= expected);
  CHECK(state <= expected + 0.1);
  CHECK(run.at("state_bytes_per_parameter_all") > state);
  CHECK((run.at("wire_bytes_per_parameter_per_step") > 0.0) == (ranks > 1));

  const auto losses = run.at("losses").get<std::vector<double>>();
  REQUIRE(losses.size() == 20);
  // Logits of an untrained model scatter by 0.02 * sqrt(width) = 0.16, the same for all places of a
  // frequent byte.
  CHECK(std::abs(losses.front() - std::log(256.0)) < 0.3);
  CHECK(mean_of(losses, 15, 20) < losses.front() - 0.5);
  CHECK(std::abs(run.at("val_loss").get<double>() - mean_of(losses, 15, 20)) < 0.5);
}

}  // namespace

TEST_CASE("four levels and the smallest states learn", "[train_gpt]") {
  const Folder folder;
  std::ofstream(folder.file("words")) << words_text();
  Outcome outcome;
  const json document = train(kSmall +
                                  "--levels O0,O1,O2,O3,small --device cpu --ranks 2 "
                                  "--steps 20 --log-every 10 --lr 1e-2 --data '" +
                                  folder.file("words") + "'",
                              &outcome);
  for (const char* key : {"commit", "compiler", "cuda"}) CHECK(document.at(key).is_string());
  CHECK(document.size() == 4);
  const json& runs = document.at("runs");
  REQUIRE(runs.size() == 5);
  const std::string levels[] = {"O0", "O1", "O2", "O3", "small"};
  for (std::size_t i = 0; i < 5; ++i) {
    CHECK(runs[i].at("level") == levels[i]);
    check_run(runs[i], 2, "cpu");
    CHECK(count_of(outcome.out, "\n| " + levels[i] + " |") == 1);
    for (const char* line : {"  step 10/20  loss ", "  step 20/20  loss "}) {
      CHECK(count_of(outcome.err, levels[i] + line) == 1);
    }
  }
  CHECK(count_of(outcome.err, "step ") == 10);
  CHECK(outcome.err.find('\r') == std::string::npos);
  // FP8 is really computed, and formats really differ.
  CHECK(runs[0].at("losses") != runs[1].at("losses"));
  CHECK(runs[1].at("losses") != runs[2].at("losses"));
  CHECK(runs[1].at("losses")[0] == runs[2].at("losses")[0]);
  CHECK(runs[2].at("losses")[0] == runs[3].at("losses")[0]);
  CHECK(runs[2].at("losses") != runs[4].at("losses"));
}

TEST_CASE("every recipe learns and is a run of its own", "[train_gpt]") {
  const Folder folder;
  std::ofstream(folder.file("words")) << words_text();
  const std::string arguments = kSmall +
                                "--device cpu --levels O2 --ranks 2 --steps 20 --lr 1e-2 --data '" +
                                folder.file("words") + "' ";
  struct Recipe {
    std::string options;
    json recipe, format, length;
  };
  const Recipe recipes[] = {
      {"", "tensorwise", "hybrid", nullptr},
      {"--fp8-format e4m3", "tensorwise", "e4m3", nullptr},
      {"--fp8-recipe delayed", "delayed", "hybrid", 1024},
      // Scales that never followed a step would make these two one run.
      {"--fp8-recipe delayed --fp8-amax-history-len 1", "delayed", "hybrid", 1},
      // Less of a margin moves no code: all scales are powers of two.
      {"--fp8-recipe delayed --fp8-margin 8", "delayed", "hybrid", 1024},
      {"--fp8-recipe blockwise", "blockwise", "e4m3", nullptr},
      {"--fp8-recipe mxfp8", "mxfp8", "e4m3", nullptr}};
  std::vector<json> losses;
  for (const Recipe& recipe : recipes) {
    INFO(recipe.options);
    const json run = train(arguments + recipe.options).at("runs")[0];
    check_run(run, 2, "cpu");
    CHECK(run.at("fp8_recipe") == recipe.recipe);
    CHECK(run.at("fp8_format") == recipe.format);
    CHECK(run.at("amax_history_len") == recipe.length);
    CHECK(run.at("amax_compute_algo").is_null() == recipe.length.is_null());
    CHECK(run.at("margin").is_null() == recipe.length.is_null());
    for (const json& other : losses) {
      // Powers of two for scales: what is not small in its tensor has the same codes in every
      // recipe. The gradients of the first step differ.
      CHECK(std::abs(run.at("losses")[0].get<double>() - other[0].get<double>()) < 1e-3);
      CHECK(run.at("losses") != other);
    }
    losses.push_back(run.at("losses"));
    const auto early = [](const json& list) {
      return mean_of(list.get<std::vector<double>>(), 5, 15);
    };
    CHECK(std::abs(early(losses.back()) - early(losses.front())) < 0.05);
  }
  const json most_recent =
      train(arguments +
            "--fp8-recipe delayed --fp8-amax-history-len 2 --fp8-amax-compute-algo "
            "most_recent");
  CHECK(most_recent.at("runs")[0].at("losses") == losses[3]);  // as a history of one has it
  CHECK(most_recent.at("runs")[0].at("amax_compute_algo") == "most_recent");

  // What does not run in FP8 after all is told apart.
  REQUIRE(setenv("OCTET_GEMM", "dequant_bf16", 1) == 0);
  Outcome outcome;
  const json converted = train(arguments + "--fp8-recipe mxfp8", &outcome).at("runs")[0];
  REQUIRE(unsetenv("OCTET_GEMM") == 0);
  CHECK(converted.at("fp8_gemms_per_step") == 15);
  CHECK(converted.at("converted_gemms_per_step") == 15);
  CHECK(count_of(outcome.out, "| 15, 15 with conversion |") == 1);
  const json plain = train(kSmall + "--device cpu --levels O0 --ranks 1 --steps 1 --data '" +
                           folder.file("words") + "' --fp8-recipe delayed");
  CHECK(plain.at("runs")[0].at("fp8_recipe").is_null());
}

TEST_CASE("blockwise takes weights in tiles at every level", "[train_gpt]") {
  const Folder folder;
  std::ofstream(folder.file("words")) << words_text();
  const std::string arguments = kSmall +
                                "--device cpu --levels O1,O2,O3,small --ranks 2 --steps 20 "
                                "--lr 1e-2 --data '" +
                                folder.file("words") + "' --fp8-recipe ";
  const json tiles = train(arguments + "blockwise").at("runs");
  const json one_scale = train(arguments + "mxfp8").at("runs");
  for (std::size_t i = 0; i < 4; ++i) {
    check_run(tiles[i], 2, "cpu");
    // Lines of four scales: 2 each of the tables of tokens, qkv and up, 1 each of out and down. A
    // split master has a weight of one scale.
    const double more = tiles[i].at("state_bytes_per_parameter").get<double>() -
                        one_scale[i].at("state_bytes_per_parameter").get<double>();
    const double scales = i < 3 ? 16.0 * (2 + 2 + 2 + 1 + 1) / (256 * 64 + 12 * 64 * 64) : 0.0;
    CHECK(std::abs(more - scales) < 1e-9);
  }
  CHECK(tiles[1].at("losses")[0] == tiles[2].at("losses")[0]);
}

TEST_CASE("the same seed gives the same run, at any number of ranks the same batches",
          "[train_gpt]") {
  const std::string arguments = kSmall + "--device cpu --levels O0,O2 --steps 3 ";
  const json two = train(arguments + "--ranks 2"), again = train(arguments + "--ranks 2");
  const json one = train(arguments + "--ranks 1"), four = train(arguments + "--ranks 4");
  const json other = train(arguments + "--ranks 2 --seed 4");
  for (std::size_t i = 0; i < 2; ++i) {
    CHECK(two.at("runs")[i].at("losses") == again.at("runs")[i].at("losses"));
    CHECK(two.at("runs")[i].at("val_loss") == again.at("runs")[i].at("val_loss"));
    CHECK(two.at("runs")[i].at("losses") != other.at("runs")[i].at("losses"));
  }
  for (const json* result : {&one, &four}) {
    for (std::size_t step = 0; step < 3; ++step) {
      const double loss = result->at("runs")[0].at("losses")[step];
      CHECK(std::abs(loss - two.at("runs")[0].at("losses")[step].get<double>()) < 2e-3);
    }
  }
}

TEST_CASE("micro-batches train as the whole batch does and are reduced once", "[train_gpt]") {
  const std::string arguments = kSmall + "--device cpu --levels O0,O2 --steps 3 --ranks 2 ";
  const json whole = train(arguments).at("runs");
  Outcome outcome;
  const json halves = train(arguments + "--micro-batches 2", &outcome).at("runs");
  CHECK(count_of(outcome.out, "3 steps of 2 micro-batches. ") == 1);
  for (std::size_t i = 0; i < 2; ++i) {
    CHECK(halves[i].at("micro_batches") == 2);
    for (std::size_t step = 0; step < 3; ++step) {
      const double loss = halves[i].at("losses")[step];
      CHECK(std::abs(loss - whole[i].at("losses")[step].get<double>()) < 2e-3);
    }
    const double apart =
        halves[i].at("val_loss").get<double>() - whole[i].at("val_loss").get<double>();
    CHECK(std::abs(apart) < 2e-3);
    CHECK(halves[i].at("wire_bytes_per_parameter_per_step") ==
          whole[i].at("wire_bytes_per_parameter_per_step"));
    CHECK(halves[i].at("fp8_gemms_per_step") == 2 * whole[i].at("fp8_gemms_per_step").get<int>());
  }
}

TEST_CASE("overlap trains with the bits of a reduction after backward", "[train_gpt]") {
  const std::string arguments = kSmall + "--device cpu --steps 3 --ranks 2 --micro-batches 2 ";
  const json after = train(arguments).at("runs");
  const json overlap = train(arguments + "--schedule overlap --bucket-elements 5000").at("runs");
  for (std::size_t i = 0; i < 4; ++i) {
    CHECK(after[i].at("schedule") == "after_backward");
    CHECK(overlap[i].at("schedule") == "overlap");
    for (const char* key : {"losses", "val_loss", "wire_bytes_per_parameter_per_step"}) {
      CHECK(overlap[i].at(key) == after[i].at(key));
    }
  }
}

TEST_CASE("fused trains with the bits of a reduction after backward", "[train_gpt]") {
  const std::string arguments =
      kSmall + "--device cpu --steps 3 --ranks 2 --levels O3 --micro-batches 2 --clip-grad 0 ";
  const json after = train(arguments).at("runs")[0];
  const json fused = train(arguments + "--schedule fused").at("runs")[0];
  CHECK(after.at("schedule") == "after_backward");
  CHECK(fused.at("schedule") == "fused");
  CHECK(fused.at("clip_grad") == 0.0f);
  for (const char* key : {"losses", "val_loss", "wire_bytes_per_parameter_per_step"}) {
    CHECK(fused.at(key) == after.at(key));
  }
  CHECK(fused.at("peak_bytes_per_rank") < after.at("peak_bytes_per_rank"));
}

TEST_CASE("windows train with the bits of messages", "[train_gpt]") {
  const std::string arguments = kSmall + "--device cpu --steps 3 --ranks 2 --levels O2,O3 ";
  const json off = train(arguments + "--windows off").at("runs");
  const json on = train(arguments + "--windows on").at("runs");
  for (std::size_t i = 0; i < 2; ++i) {
    for (const char* key : {"losses", "val_loss"}) CHECK(on[i].at(key) == off[i].at(key));
    // A window costs memory for the flags that ranks meet by.
    CHECK(on[i].at("peak_bytes_per_rank") != off[i].at("peak_bytes_per_rank"));
  }
}

TEST_CASE("CUDA trains as the CPU does", "[train_gpt]") {
  if (octet::cuda_device_count() == 0) return;
  const Folder folder;
  std::ofstream(folder.file("words")) << words_text();
  const std::string arguments =
      kSmall + "--steps 20 --lr 3e-3 --ranks 1 --data '" + folder.file("words") + "' --device ";
  const json cuda = train(arguments + "cuda"), cpu = train(arguments + "cpu");
  for (std::size_t i = 0; i < 4; ++i) {
    check_run(cuda.at("runs")[i], 1, "cuda");
    const auto actual = cuda.at("runs")[i].at("losses").get<std::vector<double>>();
    const auto expected = cpu.at("runs")[i].at("losses").get<std::vector<double>>();
    CHECK(std::abs(actual.front() - expected.front()) < 1e-3);
    CHECK(std::abs(mean_of(actual, 15, 20) - mean_of(expected, 15, 20)) < 0.05);
  }
}

TEST_CASE("a file of one's own, just long enough and one byte too short", "[train_gpt]") {
  const Folder folder;
  // A context of 16 needs 17 bytes in the 5 % that are held out: 340 bytes in all.
  std::ofstream(folder.file("enough")) << std::string(340, 'a');
  std::ofstream(folder.file("short")) << std::string(339, 'a');
  const json document =
      train(kSmall + "--device cpu --levels O1 --steps 2 --data '" + folder.file("enough") + "'");
  CHECK(document.at("runs")[0].at("losses").size() == 2);

  const Outcome outcome = run_program(
      folder, kSmall + "--device cpu --levels O1 --data '" + folder.file("short") + "'");
  CHECK(outcome.exit_code == 1);
  CHECK(missing(outcome.err, {"too short", folder.file("short"), "339", "340", "16"}) == "");
}

TEST_CASE("bad input is named and ends with 1 before anything starts", "[train_gpt]") {
  struct Case {
    std::string arguments;
    std::vector<std::string> words;
  };
  const int gpus = octet::cuda_device_count();
  const Case too_many_gpus{"--device cuda --ranks " + std::to_string(gpus + 1),
                           {std::to_string(gpus + 1), "GPU", std::to_string(gpus)}};
  const Case no_gpu{"--device cuda", {"--device cuda", "no CUDA device"}};
  const std::vector<Case> cases{
      {"--data /nowhere/text", {"/nowhere/text", "does not exist"}},
      {"--data /tmp", {"/tmp", "not a regular file"}},
      {"--levels O0,O9", {"O9", "O0, O1, O2"}},
      {"--levels o1", {"o1"}},
      {"--fp8-recipe nvfp4", {"nvfp4", "tensorwise", "delayed", "blockwise", "mxfp8"}},
      {"--fp8-format e5m2", {"e5m2", "hybrid", "e4m3"}},
      {"--fp8-recipe delayed --fp8-amax-history-len 0", {"--fp8-amax-history-len 0", "1"}},
      {"--fp8-amax-history-len 4", {"--fp8-amax-history-len 4", "--fp8-recipe delayed"}},
      {"--fp8-recipe mxfp8 --fp8-amax-history-len 4", {"--fp8-amax-history-len 4", "delayed"}},
      {"--fp8-recipe delayed --fp8-amax-compute-algo min", {"min", "max or most_recent"}},
      {"--fp8-amax-compute-algo max", {"--fp8-amax-compute-algo max", "--fp8-recipe delayed"}},
      {"--fp8-recipe delayed --fp8-margin 65", {"--fp8-margin 65", "-64 to 64"}},
      {"--fp8-margin 1", {"--fp8-margin 1", "--fp8-recipe delayed"}},
      {"--width 100 --heads 4", {"--width 100", "multiple of 16"}},
      {"--width 128 --heads 3", {"--width 128", "--heads 3"}},
      {"--width 32 --heads 2", {"--width 32", "at least 64"}},
      {"--width 512 --heads 2", {"--width 512", "--heads 2", "128"}},
      {"--heads 0", {"--heads 0", "at least 1"}},
      {"--layers 0", {"--layers 0", "at least 1"}},
      {"--context 0", {"--context 0", "at least 1"}},
      {"--batch 0", {"--batch 0", "at least 1"}},
      {"--batch 16 --ranks 3", {"--batch 16", "--ranks 3"}},
      {"--micro-batches 0", {"--micro-batches 0", "at least 1"}},
      {"--batch 12 --ranks 2 --micro-batches 4", {"--micro-batches 4", "6 rows", "--batch 12"}},
      {"--bucket-elements 0", {"--bucket-elements 0", "at least 1"}},
      {"--schedule sometimes", {"--schedule sometimes", "overlap", "after_backward", "fused"}},
      {"--schedule fused --ranks 1 --levels O3", {"--schedule fused", "--ranks"}},
      {"--schedule fused --ranks 2 --levels O3,O2", {"--schedule fused", "O3", "not O2"}},
      {"--schedule fused --ranks 2 --levels O3", {"--schedule fused", "--clip-grad 0", "1"}},
      {"--windows sometimes", {"--windows sometimes", "auto, on or off"}},
      {"--clip-grad -1", {"--clip-grad -1", "positive"}},
      {"--ranks 0", {"--ranks 0", "at least 1"}},
      {"--ranks -2", {"--ranks -2", "at least 1"}},
      {"--steps 0", {"--steps 0", "at least 1"}},
      {"--steps -5", {"--steps -5", "at least 1"}},
      {"--steps many", {"--steps", "many"}},
      {"--log-every 0", {"--log-every 0", "at least 1"}},
      {"--lr 0", {"--lr 0", "positive"}},
      {"--lr nan", {"--lr nan", "positive"}},
      {"--seed -1", {"--seed -1", "negative"}},
      {"--device gpu", {"--device gpu", "auto, cpu or cuda"}},
      {"--json /nowhere/out.json", {"/nowhere/out.json"}},
      {"--json /tmp", {"/tmp"}},
      {"--colour red", {"--colour"}},
      gpus > 0 ? too_many_gpus : no_gpu,
  };
  const Folder folder;
  for (const Case& c : cases) {
    const std::string device = c.arguments.find("--device") == 0 ? "" : " --device cpu";
    const Outcome outcome = run_program(folder, c.arguments + device);
    INFO(c.arguments << "\n" << outcome.err);
    CHECK(outcome.exit_code == 1);
    CHECK(outcome.out.empty());
    CHECK(count_of(outcome.err, "\n") == 1);
    CHECK(outcome.err.find("train_gpt: ") == 0);
    for (const std::string& word : c.words) CHECK(missing(outcome.err, {word}) == "");
  }
}

TEST_CASE("--help names every option", "[train_gpt]") {
  const Folder folder;
  const Outcome outcome = run_program(folder, "--help");
  CHECK(outcome.exit_code == 0);
  CHECK(outcome.err.empty());
  CHECK(missing(outcome.out, {"--data",
                              "--levels",
                              "--ranks",
                              "--steps",
                              "--device",
                              "--layers",
                              "--width",
                              "--heads",
                              "--context",
                              "--batch",
                              "--lr",
                              "--clip-grad",
                              "--seed",
                              "--log-every",
                              "--json",
                              "--fp8-recipe",
                              "--fp8-format",
                              "--fp8-margin",
                              "--fp8-amax-history-len",
                              "--fp8-amax-compute-algo",
                              "--micro-batches",
                              "--schedule",
                              "--bucket-elements"}) == "");
}
