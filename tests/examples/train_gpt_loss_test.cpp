// SPDX-License-Identifier: Apache-2.0
// What the levels, the recipes of FP8 products and the number of ranks cost in loss: O1, O2 and O3,
// O2 with every recipe, and O3 with one rank and with four of the same global batch, end within 1 %
// of O0's validation loss in the mean of three seeds. On the repository's own text, or on the file
// that OCTET_LOSS_DATA names. (Ranks under MPI have the bits of threads: train_gpt_mpi_test.)
#include <cmath>
#include <cstdlib>
#include <map>
#include <string>

#include "examples/program.hpp"
#include "support/catch.hpp"

using namespace octet::test;
using nlohmann::json;

namespace {
struct Run {
  int ranks;
  const char* options;
};
constexpr int kUsualRanks = 2;
constexpr Run kRuns[] = {{kUsualRanks, ""},
                         {kUsualRanks, "--levels O2 --fp8-recipe delayed"},
                         {kUsualRanks, "--levels O2 --fp8-recipe blockwise"},
                         {kUsualRanks, "--levels O2 --fp8-recipe mxfp8"},
                         {1, "--levels O3"},
                         {4, "--levels O3"}};
}  // namespace

TEST_CASE("validation loss of every level, recipe and number of ranks within 1 % of the baseline",
          "[slow]") {
  constexpr int kSeeds = 3;
  const char* data = std::getenv("OCTET_LOSS_DATA");
  const Folder folder;
  const std::string path = folder.file("out.json");
  std::map<std::string, double> loss;
  std::string report;
  for (int seed = 1; seed <= kSeeds; ++seed) {
    for (const Run& each : kRuns) {
      std::string arguments =
          "--device cpu --steps 300 --layers 2 --width 64 --heads 4 --context 64 "
          "--batch 16 --log-every 100 --seed " +
          std::to_string(seed) + " --ranks " + std::to_string(each.ranks) + " --json '" + path +
          "' " + each.options;
      if (data != nullptr) arguments += " --data '" + std::string(data) + "'";
      const Outcome outcome = run_program(folder, arguments);
      INFO(outcome.err);
      REQUIRE(outcome.exit_code == 0);
      report += outcome.out + "\n";
      const json document = json::parse(read_file(path));
      for (const json& run : document.at("runs")) {
        CHECK(run.at("skipped_steps") == 0);
        const std::string level = run.at("level");
        const json& recipe = run.at("fp8_recipe");
        std::string name = recipe.is_null() ? level : level + " " + recipe.get<std::string>();
        if (each.ranks != kUsualRanks) name += ", ranks " + std::to_string(each.ranks);
        loss[name] += run.at("val_loss").get<double>() / kSeeds;
      }
    }
  }
  INFO(report);
  REQUIRE(loss.size() == 9);
  CHECK(loss.at("O0") < 3.0);  // it has learnt more than the frequencies of the bytes
  for (const auto& [name, mean] : loss) {
    INFO(name << ": " << mean << ", O0: " << loss.at("O0"));
    CHECK(std::abs(mean - loss.at("O0")) <= 0.01 * loss.at("O0"));
  }
}
