// SPDX-License-Identifier: Apache-2.0
// train_gpt saved, and gone on with by other numbers of ranks and other shardings.
#include <cmath>
#include <fstream>
#include <random>
#include <string>
#include <vector>

#include "examples/program.hpp"
#include "support/catch.hpp"
#include "support/errors.hpp"

using namespace octet::test;
using nlohmann::json;

namespace {

/// A text that is always the same, unlike the repository's own.
std::string text_file(const Folder& folder) {
  std::minstd_rand generator(7);
  std::string text;
  while (text.size() < 100000) {
    const auto word = generator() % 40;
    for (unsigned i = 0; i < 2 + word % 5; ++i) {
      text += static_cast<char>('a' + (word * 7 + i * 3) % 26);
    }
    text += generator() % 12 == 0 ? '\n' : ' ';
  }
  const std::string path = folder.file("text");
  std::ofstream(path) << text;
  return path;
}

constexpr int kSteps = 24, kSaved = 10;

class Runs {
 public:
  Runs() : data_(text_file(folder_)) {}

  json train(const std::string& arguments) {
    const std::string path = folder_.file("out.json");
    const Outcome result = run(arguments + " --json '" + path + "'");
    INFO(arguments << "\n" << result.err);
    REQUIRE(result.exit_code == 0);
    return json::parse(read_file(path)).at("runs").at(0);
  }
  Outcome run(const std::string& arguments) {
    return run_program(folder_,
                       "--device cpu --layers 2 --width 64 --heads 2 --context 16 "
                       "--batch 24 --steps " +
                           std::to_string(kSteps) + " --data '" + data_ + "' " + arguments);
  }
  std::string file(const std::string& name) const { return folder_.file(name); }

 private:
  Folder folder_;
  std::string data_;
};

std::vector<float> losses_of(const json& run) { return run.at("losses").get<std::vector<float>>(); }

}  // namespace

TEST_CASE("a run that ends and goes on has the losses of one that did not end") {
  for (const std::string& setup :
       {std::string("--levels O3 --ranks 3 --fp8-recipe delayed --fp8-amax-history-len 7"),
        std::string("--levels small --ranks 2 --sharding parameters"),
        std::string("--levels O1 --ranks 2 --sharding gradients --reduced-gradient e4m3 "
                    "--offload-states")}) {
    CAPTURE(setup);
    Runs runs;
    const std::string folder = runs.file("saved");
    const std::vector<float> all = losses_of(runs.train(setup));
    const std::vector<float> begin = losses_of(runs.train(
        setup + " --exit-interval " + std::to_string(kSaved) + " --save '" + folder + "'"));
    const std::vector<float> end = losses_of(runs.train(setup + " --load '" + folder + "'"));
    std::vector<float> joined = begin;
    joined.insert(joined.end(), end.begin(), end.end());
    CHECK(begin.size() == kSaved);
    CHECK(joined == all);
  }
}

TEST_CASE("other ranks and shardings go on near the losses of the run that saved") {
  Runs runs;
  const std::string folder = runs.file("saved");
  // The format of the mean gradient that all shardings can have.
  const std::string level = "--levels O3 --reduced-gradient e4m3 ", setup = level + "--ranks 4 ";
  const std::vector<float> all = losses_of(runs.train(setup));
  // Saved twice, of which the last stays.
  runs.train(setup + "--exit-interval " + std::to_string(kSaved) + " --save-interval 4 --save '" +
             folder + "'");
  for (const char* other :
       {"--ranks 1 --sharding none", "--ranks 2", "--ranks 3 --sharding gradients",
        "--ranks 8 --sharding parameters", "--ranks 6 --bucket-elements 1"}) {
    CAPTURE(other);
    const std::vector<float> end =
        losses_of(runs.train(level + other + " --load '" + folder + "'"));
    REQUIRE(end.size() == kSteps - kSaved);
    for (std::size_t i = 0; i < end.size(); ++i) {
      CAPTURE(i);
      // Only means over ranks are rounded differently.
      CHECK(std::abs(end[i] - all[kSaved + i]) < 0.02f);
    }
    CHECK(end.back() < all[kSaved] - 0.1f);
  }
}

TEST_CASE("a checkpoint of another model, and none, are errors that say so") {
  Runs runs;
  const std::string folder = runs.file("saved");
  runs.train("--levels O2 --ranks 1 --exit-interval 2 --save '" + folder + "'");
  const auto fails = [&](const std::string& arguments, const std::string& word) {
    const Outcome result = runs.run(arguments);
    CHECK(result.exit_code == 1);
    CHECK(missing(result.err, {word}) == "");
  };
  fails("--levels O1 --ranks 1 --load '" + folder + "'", "format");
  fails("--levels O2 --ranks 2 --sharding optimizer --load '" + folder + "'", "reduced_gradient");
  // Before it trains: with all of its steps it would have something to save.
  fails("--levels O2 --ranks 1 --exit-interval 1 --save '" + folder + "'", "checkpoint of step 2");
  fails("--levels O2 --ranks 1 --save '" + folder + "'", "--load that one");
  fails("--levels O2 --ranks 1 --load '" + runs.file("nowhere") + "'", "nowhere");
  fails("--levels O1,O2 --ranks 1 --load '" + folder + "'", "one level");
  fails("--levels O2 --ranks 1 --save-interval 3", "--save");
}
