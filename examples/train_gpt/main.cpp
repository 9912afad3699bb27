// SPDX-License-Identifier: Apache-2.0
// Trains one byte-level GPT per level, from the same weights on the same batches, and compares what
// each level costs and gives.
#include <cstdio>
#include <exception>
#include <optional>
#include <vector>

#include "data.hpp"
#include "options.hpp"
#include "progress.hpp"
#include "ranks.hpp"
#include "report.hpp"
#include "trainer.hpp"

namespace {

int run(int argc, char** argv) {
  using namespace train_gpt;
  const auto options = parse_options(argc, argv);
  if (!options) return 0;
  const bool speaks = options->launch.rank == 0;  // one of all processes
  const TextData data = TextData::load(options->data, options->model.context);
  if (speaks) {
    std::fprintf(stderr, "data: %s, %lld bytes\n", data.name().c_str(),
                 static_cast<long long>(data.bytes()));
  }
  Progress progress(stderr, options->steps, options->log_every, options->tokens_per_step());

  std::optional<LaunchedRank> launched;
  if (options->is_launched()) {
    launched.emplace(options->device, options->launch, options->schedule);
  }
  std::vector<RunResult> runs;
  for (const Setup& setup : options->setups) {
    runs.push_back(train(*options, setup, data, progress, launched ? &*launched : nullptr));
  }
  if (speaks) {
    std::fputs(to_markdown(runs).c_str(), stdout);
    if (!options->json.empty()) write_json(options->json, runs);
  }

  int exit_code = 0;
  for (const RunResult& result : runs) {
    if (!result.disagreements.empty()) exit_code = 1;
    if (!speaks) continue;
    for (const std::string& text : result.disagreements) {
      std::fprintf(stderr, "train_gpt: plan and measurement disagree at %s: %s\n",
                   result.name.c_str(), text.c_str());
    }
  }
  return exit_code;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "train_gpt: %s\n", error.what());
    return 1;
  }
}
