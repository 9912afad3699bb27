// SPDX-License-Identifier: Apache-2.0
// Ranks under mpiexec that are killed, stopped, late or leave: the job ends or throws CommError on
// the others, and never hangs. MPIEXEC and RANKS_PROGRAM come from the build.
#include <sys/types.h>

#include <chrono>
#include <string>
#include <vector>

#include "support/catch.hpp"
#include "support/errors.hpp"
#include "support/folder.hpp"
#include "support/mpi_job.hpp"

using namespace octet::test;
using namespace std::chrono_literals;

namespace {

using Clock = std::chrono::steady_clock;

struct Job {
  int exit_code = -1;  ///< of mpiexec; -1 when it had to be killed
  std::chrono::duration<double> seconds{};
  std::vector<std::string> texts;  ///< what each rank left behind
  std::vector<pid_t> pids;
};

Job run(const std::string& mode, int ranks, const std::vector<std::string>& options = {}) {
  const Folder folder;
  std::vector<std::string> words = {MPIEXEC, "-n", std::to_string(ranks)};
  words.insert(words.end(), options.begin(), options.end());
  words.insert(words.end(), {RANKS_PROGRAM, mode, folder.file("")});
  const auto begin = Clock::now();
  const pid_t pid = start_job(words, folder.file("out"));
  REQUIRE(pid > 0);
  Job job;
  job.exit_code = end_of_job(pid, begin + 30s);
  job.seconds = Clock::now() - begin;
  for (int rank = 0; rank < ranks; ++rank) {
    std::istringstream file(read_file(folder.file(std::to_string(rank))));
    pid_t rank_pid = 0;
    file >> rank_pid;
    job.pids.push_back(rank_pid);
    job.texts.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
  }
  UNSCOPED_INFO(mode << ": " << read_file(folder.file("out")));
  return job;
}

void check_gone(const Job& job) {
  for (pid_t pid : job.pids) {
    REQUIRE(pid > 0);
    CHECK(is_gone(pid));
  }
}

}  // namespace

TEST_CASE("ranks that behave end well, also when one is late by less than the deadline") {
  for (const std::string mode : {"behave", "late"}) {
    const Job job = run(mode, 3);
    CHECK(job.exit_code == 0);
    for (const std::string& text : job.texts) {
      CHECK(missing(text, {"done", "create_mpi", "finalised"}) == "");
    }
    check_gone(job);
  }
}

TEST_CASE("a rank that is killed ends the job") {
  const Job job = run("kill", 3);
  CHECK(job.exit_code > 0);
  CHECK(job.seconds < 20s);
  CHECK(job.texts[1] == " has begun");
  check_gone(job);
}

TEST_CASE("a killed rank is named by the others where the launcher lets them live") {
  if (!jobs_survive(MPIEXEC)) return;
  const Job job = run("kill", 3, {"--enable-recovery"});
  CHECK(job.seconds < 20s);
  CHECK(job.texts[1] == " has begun");
  for (const int rank : {0, 2}) {
    const std::string& text = job.texts[static_cast<std::size_t>(rank)];
    const std::string number = std::to_string(rank);
    CHECK(missing(text, {"CommError: exchange (collective ",
                         "on rank " + number + " of 3: ", "rank 1 of 3", "1500 ms",
                         "; where: exchange ", " on " + number + " because of rank 1"}) == "");
  }
  check_gone(job);
}

TEST_CASE("a rank that is stopped is named by the others, and the job ends") {
  const Job job = run("stop", 3);
  CHECK(job.exit_code > 0);
  CHECK(job.seconds < 20s);
  // Whoever fails first ends the job, perhaps before the other has thrown.
  const bool first = missing(job.texts[0], {"CommError", "rank 1 of 3", "1500 ms",
                                            "on 0 because of rank 1"}) == "";
  const bool last = missing(job.texts[2], {"CommError", "rank 1 of 3", "1500 ms",
                                           "on 2 because of rank 1"}) == "";
  CAPTURE(job.texts[0], job.texts[2]);
  CHECK((first || last));
  // Who ends the job wakes the stopped rank, which may find out why before it is ended too.
  CAPTURE(job.texts[1]);
  CHECK((job.texts[1] == " has begun" || missing(job.texts[1], {"gave up", "rank 1"}) == ""));
  check_gone(job);
}

TEST_CASE("a rank that leaves without a word ends the job") {
  const Job job = run("exit", 3);
  CHECK(job.exit_code > 0);
  CHECK(job.seconds < 20s);
  check_gone(job);
}

TEST_CASE("a rank that fails ends the job and says why") {
  const Job job = run("throw", 3);
  CHECK(job.exit_code > 0);
  CHECK(job.seconds < 20s);
  CHECK(missing(job.texts[1], {"Error: out of paper"}) == "");
  for (int other : {0, 2}) {
    const std::string& text = job.texts[static_cast<std::size_t>(other)];
    CHECK((text == " has begun" || missing(text, {"rank 1 gave up", "because of rank 1"}) == ""));
  }
  check_gone(job);
}
