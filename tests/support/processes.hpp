// SPDX-License-Identifier: Apache-2.0
// Ranks as processes: this test program, started again with other variables in its environment.
#pragma once

#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

#include "octet/comm/nccl.hpp"

namespace octet::test {

using ProcessClock = std::chrono::steady_clock;

/// No process of a test lives longer.
constexpr unsigned kProcessSeconds = 180;

/// "NAME=value", in front of this process's own: the first entry wins.
inline std::vector<std::string> environment_with(const std::vector<std::string>& variables) {
  std::vector<std::string> all = variables;
  for (char** entry = environ; *entry != nullptr; ++entry) all.emplace_back(*entry);
  return all;
}

/// What makes NCCL take ranks that share one GPU for ranks on two hosts, over sockets.
inline std::vector<std::string> shared_gpu_variables(int rank) {
  return {"NCCL_HOSTID=octet-test-host-" + std::to_string(rank), "NCCL_P2P_DISABLE=1",
          "NCCL_SHM_DISABLE=1", "NCCL_IB_DISABLE=1"};
}

/// Runs one test case of this program in a new process, which ends with this one at the latest.
/// Everything is made before fork(), because little is allowed between it and exec.
inline pid_t start_test(const std::string& test_case, const std::vector<std::string>& variables) {
  std::vector<std::string> entries = environment_with(variables);
  std::vector<char*> environment;
  for (std::string& entry : entries) environment.push_back(entry.data());
  environment.push_back(nullptr);
  std::string program = "/proc/self/exe", test = test_case;
  char* arguments[] = {program.data(), test.data(), nullptr};
  const pid_t child = fork();
  if (child == 0) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    alarm(kProcessSeconds);
    execve(program.c_str(), arguments, environment.data());
    _exit(127);
  }
  return child;
}

/// Exit status of a child; minus the signal that ended it; -1000 if this had to end it.
inline int finish(pid_t child, ProcessClock::time_point until) {
  int status = 0;
  while (waitpid(child, &status, WNOHANG) == 0) {
    if (ProcessClock::now() > until) {
      kill(child, SIGKILL);
      waitpid(child, &status, 0);
      return -1000;
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
  }
  return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}

/// The file appears with all its bytes at once.
inline void publish(const std::string& file, const NcclId& id = {}) {
  const std::string unfinished = file + ".part";
  {
    std::ofstream out(unfinished, std::ios::binary);
    out.write(reinterpret_cast<const char*>(id.data()), static_cast<std::streamsize>(id.size()));
  }
  require(std::rename(unfinished.c_str(), file.c_str()) == 0, "cannot create ", file);
}

/// Waits for a published file.
inline NcclId await(const std::string& file, std::chrono::seconds patience) {
  const auto until = ProcessClock::now() + patience;
  NcclId id{};
  for (;;) {
    std::ifstream in(file, std::ios::binary);
    if (in.read(reinterpret_cast<char*>(id.data()), static_cast<std::streamsize>(id.size()))) {
      return id;
    }
    require(ProcessClock::now() < until, "there is no ", file);
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
}

}  // namespace octet::test
