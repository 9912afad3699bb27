// SPDX-License-Identifier: Apache-2.0
// kill -9 at random moments while ranks train and save: the last complete checkpoint always loads,
// and it is what the run was at that step.
#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <random>

#include "support/catch.hpp"
#include "support/checkpoint_run.hpp"
#include "support/compare.hpp"
#include "support/folder.hpp"
#include "support/processes.hpp"

namespace octet::test {
namespace {

constexpr int kKills = 200;
constexpr const char* kVariable = "OCTET_TEST_CHECKPOINTS";

}  // namespace

// Goes on from the last checkpoint and saves for ever, in both ways.
TEST_CASE("saves until it is killed", "[.]") {
  const char* const directory = std::getenv(kVariable);
  REQUIRE(directory != nullptr);
  run_leg({.config = saved_config(), .ranks = 2, .before = [&](Engine& engine, Communicator& comm) {
             std::int64_t step = 0;
             if (!checkpoint_steps(directory).empty()) {
               step = load_checkpoint(engine, comm, directory).step;
             }
             CheckpointWriter writer(engine, comm, directory);
             for (;;) {
               take_step(engine, comm.context(), static_cast<int>(++step), comm.rank(), true);
               if (step % 2 == 0) {
                 writer.start({.keep = 2});
               } else {
                 writer.finish();
                 save_checkpoint(engine, comm, directory);
               }
             }
           }});
}

TEST_CASE("a checkpoint survives kill -9 at any moment") {
  const Folder folder;
  const std::string directory = folder.file("run");
  const Context ctx = Context::cpu();
  const auto comm = make_single(ctx);
  Engine engine(ctx, *comm, saved_config()), twin(ctx, *comm, saved_config());
  std::vector<Buffer> keep;
  add_saved_params(engine, ctx, keep);
  add_saved_params(twin, ctx, keep);
  engine.freeze();
  twin.freeze();

  // How long a child takes to its first checkpoint here; kills come within twice that at first.
  const auto start = [&] {
    const pid_t child =
        start_test("saves until it is killed", {std::string(kVariable) + "=" + directory});
    require(child > 0, "no process could be started");
    return child;
  };
  const auto began = ProcessClock::now();
  const pid_t first = start();
  while (checkpoint_steps(directory).empty() &&
         ProcessClock::now() < began + std::chrono::seconds(60)) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  auto longest =
      2 * std::chrono::duration_cast<std::chrono::microseconds>(ProcessClock::now() - began);
  kill(first, SIGKILL);
  finish(first, ProcessClock::now() + std::chrono::seconds(10));
  REQUIRE(!checkpoint_steps(directory).empty());

  std::mt19937 random(1);
  std::int64_t step = 0;
  int unfinished = 0, advanced = 0;
  for (int kill_number = 0; kill_number < kKills; ++kill_number) {
    const pid_t child = start();
    std::this_thread::sleep_for(std::chrono::microseconds(random() % longest.count()));
    kill(child, SIGKILL);
    REQUIRE(finish(child, ProcessClock::now() + std::chrono::seconds(10)) == -SIGKILL);

    const std::vector<std::int64_t> steps = checkpoint_steps(directory);
    REQUIRE(!steps.empty());
    const CheckpointInfo info = load_checkpoint(engine, *comm, directory);
    REQUIRE(info.step == steps.back());
    REQUIRE(info.step >= step);
    advanced += info.step > step;
    // On a machine that has become busier children get more time, until half of them come to save.
    longest += (info.step > step ? -1 : 1) * longest / 32;
    for (; step < info.step; ++step) take_step(twin, ctx, static_cast<int>(step) + 1, 0, true);
    REQUIRE(first_difference(held_bytes(engine, ctx), held_bytes(twin, ctx)) == "");
    std::size_t files = 0;
    for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator(directory)) {
      ++files;
    }
    unfinished += files != 3 * steps.size();
  }
  CHECK(advanced > kKills / 4);    // the children came to save
  CHECK(unfinished > kKills / 8);  // and were killed while they did
}

}  // namespace octet::test
