// SPDX-License-Identifier: Apache-2.0
// One process of a job under mpiexec is killed while all save: the others learn of it or end, and
// the last complete checkpoint loads, also on fewer ranks. MPIEXEC comes from the build.
#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <thread>

#include "octet/comm/mpi.hpp"
#include "support/catch.hpp"
#include "support/checkpoint_run.hpp"
#include "support/compare.hpp"
#include "support/errors.hpp"
#include "support/folder.hpp"
#include "support/mpi_job.hpp"

namespace octet::test {
namespace {

namespace fs = std::filesystem;
using namespace std::chrono_literals;

constexpr const char* kFolder = "OCTET_TEST_FOLDER";
/// Microseconds after the second save has begun; without it rank 1 is killed once it has begun.
constexpr const char* kDelay = "OCTET_TEST_DELAY";
constexpr int kTogether = 3;

void save_for_ever(Communicator& comm, const std::string& directory) {
  const Context ctx = comm.context();
  Engine engine(ctx, comm, saved_config());
  std::vector<Buffer> keep;
  add_saved_params(engine, ctx, keep);
  engine.freeze();
  std::int64_t step = 0;
  if (!checkpoint_steps(directory).empty()) step = load_checkpoint(engine, comm, directory).step;
  CheckpointWriter writer(engine, comm, directory);
  const char* const delay = std::getenv(kDelay);
  for (int saves = 0;; ++saves) {
    take_step(engine, ctx, static_cast<int>(++step), comm.rank(), true);
    const bool ends = saves == 1 && comm.rank() == 1;
    if (ends && delay != nullptr) {
      std::thread([wait = std::chrono::microseconds(std::atoi(delay))] {
        std::this_thread::sleep_for(wait);
        raise(SIGKILL);
      }).detach();
    }
    writer.start();
    if (ends && delay == nullptr) raise(SIGKILL);
    writer.finish();
  }
}

struct Job {
  int exit_code = -1;
  std::chrono::duration<double> seconds{};
  std::string texts[kTogether];
};

Job run_job(const std::string& directory, const char* delay, bool survives) {
  const Folder folder;
  setenv(kFolder, folder.file("").c_str(), 1);
  setenv("OCTET_TEST_DIRECTORY", directory.c_str(), 1);
  delay != nullptr ? setenv(kDelay, delay, 1) : unsetenv(kDelay);
  std::vector<std::string> words = {MPIEXEC, "-n", std::to_string(kTogether)};
  if (survives) words.push_back("--enable-recovery");
  words.insert(words.end(),
               {fs::read_symlink("/proc/self/exe").string(), "a rank that saves until it ends"});
  const auto begin = std::chrono::steady_clock::now();
  const pid_t pid = start_job(words, folder.file("out"));
  REQUIRE(pid > 0);
  Job job;
  job.exit_code = end_of_job(pid, begin + 40s);
  job.seconds = std::chrono::steady_clock::now() - begin;
  UNSCOPED_INFO(read_file(folder.file("out")));
  for (int rank = 0; rank < kTogether; ++rank) {
    std::istringstream file(read_file(folder.file(std::to_string(rank))));
    pid_t rank_pid = 0;
    file >> rank_pid;
    std::getline(file, job.texts[rank]);
    REQUIRE(rank_pid > 0);
    CHECK(is_gone(rank_pid));
  }
  return job;
}

/// Loads the last checkpoint with fewer ranks, beside a run that was never interrupted.
void check_loads(const std::string& directory) {
  const std::int64_t step = read_checkpoint_info(directory).step;
  const int end = static_cast<int>(step);
  const LegResult whole = run_leg({.config = saved_config(), .ranks = 2, .end = end});
  const LegResult loaded =
      run_leg({.config = saved_config(),
               .ranks = 2,
               .begin = end,
               .end = end,
               .before = [&](Engine& e, auto& c) {
                 require(load_checkpoint(e, c, directory).step == step, "another step");
               }});
  for (std::size_t r = 0; r < 2; ++r) {
    REQUIRE(first_difference(loaded.after[r], whole.after[r]) == "");
  }
}

std::size_t files_in(const std::string& directory) {
  return static_cast<std::size_t>(
      std::distance(fs::directory_iterator(directory), fs::directory_iterator()));
}

}  // namespace

TEST_CASE("a rank that saves until it ends", "[.]") {
  const char* const folder = std::getenv(kFolder);
  const char* const directory = std::getenv("OCTET_TEST_DIRECTORY");
  REQUIRE(folder != nullptr);
  REQUIRE(directory != nullptr);
  const auto comm = create_mpi(Context::cpu(), {.deadline = 3s});
  const auto leave = [&](const std::string& text) {
    std::ofstream(folder + std::to_string(comm->rank())) << getpid() << " " << text;
  };
  leave("has begun");
  try {
    save_for_ever(*comm, directory);
  } catch (const CommError& error) {
    leave(std::string("CommError: ") + error.what());
  } catch (const std::exception& error) {
    leave(std::string("Error: ") + error.what());
  }
}

TEST_CASE("a rank that is killed while it writes ends the job, and the checkpoint before loads") {
  const Folder folder;
  const std::string directory = folder.file("run");
  for (int job_number = 1; job_number <= 2; ++job_number) {  // the second sweeps after the first
    const Job job = run_job(directory, nullptr, false);
    CHECK(job.exit_code > 0);
    CHECK(job.seconds < 30s);
    CHECK(job.texts[1] == " has begun");
    CHECK(checkpoint_steps(directory) == std::vector<std::int64_t>{job_number});
    check_loads(directory);
  }
}

TEST_CASE(
    "where the launcher lets the others live they throw, and leave what the next one sweeps") {
  if (!jobs_survive(MPIEXEC)) return;
  const Folder folder;
  const std::string directory = folder.file("run");
  const Job job = run_job(directory, nullptr, true);
  CHECK(job.seconds < 30s);
  for (int rank : {0, 2}) {
    CHECK(missing(job.texts[rank], {"CommError: ", "on rank " + std::to_string(rank) + " of 3",
                                    "rank 1 of 3"}) == "");
  }
  CHECK(checkpoint_steps(directory) == std::vector<std::int64_t>{1});
  CHECK(files_in(directory) > 1 + kTogether);
  check_loads(directory);
  run_leg({.config = saved_config(), .ranks = 2, .before = [&](Engine& engine, Communicator& comm) {
             load_checkpoint(engine, comm, directory);
             save_checkpoint(engine, comm, directory);
           }});
  CHECK(files_in(directory) == 1 + 2);
}

TEST_CASE("whenever a rank is killed, the last complete checkpoint loads") {
  const Folder folder;
  const std::string directory = folder.file("run");
  std::int64_t step = 0;
  for (const char* delay : {"0", "300", "1000", "2000", "4000", "8000"}) {
    INFO(delay << " microseconds");
    const Job job = run_job(directory, delay, false);
    CHECK(job.exit_code > 0);
    const std::int64_t newest = checkpoint_steps(directory).back();
    CHECK(newest > step);
    step = newest;
    check_loads(directory);
  }
}

}  // namespace octet::test
