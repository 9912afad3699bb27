// SPDX-License-Identifier: Apache-2.0
// Ranks under mpiexec that are killed, stopped, late or leave: the job ends or throws CommError on
// the others, and never hangs. MPIEXEC and RANKS_PROGRAM come from the build.
#include <fcntl.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <string>
#include <thread>
#include <vector>

#include "support/catch.hpp"
#include "support/errors.hpp"
#include "support/folder.hpp"

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

pid_t start(const Folder& folder, std::vector<std::string> words) {
  const pid_t pid = fork();
  if (pid != 0) return pid;
  const int out = open(folder.file("out").c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600);
  dup2(out, 1);
  dup2(out, 2);
  dup2(open("/dev/null", O_RDONLY), 0);
  std::vector<char*> arguments;
  for (std::string& word : words) arguments.push_back(word.data());
  arguments.push_back(nullptr);
  execvp(arguments[0], arguments.data());
  _exit(127);
}

/// Waits for a process, and asks it to end, then makes it end, when it takes too long.
int end_of(pid_t pid, Clock::time_point until) {
  for (int signal : {SIGTERM, SIGKILL}) {
    int status = 0;
    while (Clock::now() < until) {
      if (waitpid(pid, &status, WNOHANG) == pid) {
        return WIFEXITED(status) && signal == SIGTERM ? WEXITSTATUS(status) : -1;
      }
      std::this_thread::sleep_for(10ms);
    }
    kill(pid, signal);
    until = Clock::now() + 5s;
  }
  waitpid(pid, nullptr, 0);
  return -1;
}

Job run(const std::string& mode, int ranks, const std::vector<std::string>& options = {}) {
  const Folder folder;
  std::vector<std::string> words = {MPIEXEC, "-n", std::to_string(ranks)};
  words.insert(words.end(), options.begin(), options.end());
  words.insert(words.end(), {RANKS_PROGRAM, mode, folder.file("")});
  const auto begin = Clock::now();
  const pid_t pid = start(folder, words);
  REQUIRE(pid > 0);
  Job job;
  job.exit_code = end_of(pid, begin + 30s);
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

/// Nothing of a job is left, stopped processes included.
void check_gone(const Job& job) {
  for (pid_t pid : job.pids) {
    REQUIRE(pid > 0);
    const auto until = Clock::now() + 5s;
    while (kill(pid, 0) == 0 && Clock::now() < until) std::this_thread::sleep_for(10ms);
    CHECK(kill(pid, 0) != 0);
  }
}

/// Open MPI 4 can be asked to let a job go on when a rank is killed.
bool can_survive() {
  std::FILE* const pipe = popen("'" MPIEXEC "' --version 2>&1", "r");
  char line[200] = "";
  const bool read = pipe != nullptr && std::fgets(line, sizeof(line), pipe) != nullptr;
  if (pipe != nullptr) pclose(pipe);
  const std::string version = line;  // "mpirun (Open MPI) 4.1.4", "mpiexec (OpenRTE) 4.1.4"
  return read && version.find("(Open") != std::string::npos &&
         version.find(") 4.") != std::string::npos;
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
  if (!can_survive()) return;
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
