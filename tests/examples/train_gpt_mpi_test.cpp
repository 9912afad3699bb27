// SPDX-License-Identifier: Apache-2.0
// train_gpt with one process per rank under mpiexec (MPIEXEC, a path from the build).
#include <string>

#include "examples/program.hpp"
#include "support/catch.hpp"
#include "support/errors.hpp"

using namespace octet::test;
using nlohmann::json;

namespace {

const std::string kArguments =
    "--device cpu --layers 1 --width 64 --heads 2 --context 16 --batch 8 --steps 5 --log-every 1 ";
const std::string kFour = "'" MPIEXEC "' -n 4";

json train(const std::string& arguments, const std::string& launcher, Outcome* outcome) {
  const Folder folder;
  const std::string path = folder.file("out.json");
  *outcome = run_program(folder, arguments + " --json '" + path + "'", launcher);
  INFO(launcher << " " << arguments << "\n" << outcome->err);
  REQUIRE(outcome->exit_code == 0);
  return json::parse(read_file(path));
}

std::size_t lines_of(const std::string& text, const std::string& start) {
  std::size_t count = text.starts_with(start) ? 1 : 0;
  for (auto at = text.find("\n" + start); at != std::string::npos;
       at = text.find("\n" + start, at + 1)) {
    ++count;
  }
  return count;
}

}  // namespace

TEST_CASE("four processes have the losses, bytes and table of four threads", "[train_gpt]") {
  Outcome by_threads, by_mpi;
  const std::string arguments = kArguments + "--levels O0,O1,O3,small";
  const json threads = train(arguments + " --ranks 4", "", &by_threads).at("runs");
  const json mpi = train(arguments, kFour, &by_mpi).at("runs");
  REQUIRE(mpi.size() == 4);
  for (std::size_t i = 0; i < mpi.size(); ++i) {
    json a = threads[i], b = mpi[i];
    CAPTURE(b.at("level"));
    REQUIRE(b.at("losses").size() == 5);
    CHECK(b.at("ranks") == 4);
    CHECK(b.at("wire_bytes_per_parameter_per_step") > 0.1);
    for (json* run : {&a, &b}) {  // all else to the bit
      run->erase("step_seconds");
      if (i > 0) run->erase("peak_bytes_per_rank");  // a process keeps its workspace for the next
    }
    CHECK(a == b);
  }
  // Only rank 0 speaks.
  CHECK(lines_of(by_mpi.out, "| O0 |") == 1);
  CHECK(lines_of(by_mpi.err, "data: ") == 1);
  CHECK(lines_of(by_mpi.err, "O3  step 5/5") == 1);
}

TEST_CASE("micro-batches and every schedule: processes have the bits of threads", "[train_gpt]") {
  const std::string overlap =
      kArguments + "--levels O2,O3 --micro-batches 2 --schedule overlap --bucket-elements 5000";
  const std::string fused =
      kArguments + "--levels O3 --micro-batches 2 --schedule fused --clip-grad 0";
  for (const std::string& arguments : {overlap, fused}) {
    Outcome outcome;
    const json threads = train(arguments + " --ranks 4", "", &outcome).at("runs");
    const json mpi = train(arguments, kFour, &outcome).at("runs");
    REQUIRE(mpi.size() == threads.size());
    for (std::size_t i = 0; i < mpi.size(); ++i) {
      for (const char* key : {"level", "ranks", "schedule", "micro_batches", "losses", "val_loss",
                              "wire_bytes_per_parameter_per_step", "state_bytes_per_parameter"}) {
        CAPTURE(arguments, key);
        CHECK(mpi[i].at(key) == threads[i].at(key));
      }
    }
  }
}

TEST_CASE("what does not fit the launcher ends the job with a reason", "[train_gpt]") {
  const Folder folder;
  const Outcome ranks = run_program(folder, kArguments + "--ranks 2", kFour);
  CHECK(ranks.exit_code != 0);
  CHECK(missing(ranks.err, {"--ranks 2", "openmpi has started 4 processes"}) == "");
  const Outcome batch = run_program(folder, kArguments + "--batch 9", kFour);
  CHECK(batch.exit_code != 0);
  const Outcome windows = run_program(folder, kArguments + "--levels O2 --windows on", kFour);
  CHECK(windows.exit_code != 0);
  CHECK(missing(windows.err, {"EngineConfig::windows is true", "mpi ranks do not reach"}) == "");
  const Outcome torchrun =
      run_program(folder, kArguments, "RANK=0 WORLD_SIZE=2 MASTER_ADDR=localhost MASTER_PORT=1");
  CHECK(torchrun.exit_code == 1);
  CHECK(missing(torchrun.err, {"2 ranks on CPUs", "mpiexec", "torchrun"}) == "");
}
