// SPDX-License-Identifier: Apache-2.0
// Jobs of mpiexec whose ranks are killed.
#pragma once

#include <fcntl.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <string>
#include <thread>
#include <vector>

namespace octet::test {

/// Starts mpiexec with its arguments; what it prints goes to the file `printed`.
inline pid_t start_job(std::vector<std::string> words, const std::string& printed) {
  const pid_t pid = fork();
  if (pid != 0) return pid;
  const int out = open(printed.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600);
  dup2(out, 1);
  dup2(out, 2);
  dup2(open("/dev/null", O_RDONLY), 0);
  std::vector<char*> arguments;
  for (std::string& word : words) arguments.push_back(word.data());
  arguments.push_back(nullptr);
  execvp(arguments[0], arguments.data());
  _exit(127);
}

/// Waits for mpiexec and returns its exit status, -1 when it had to be killed: asks it to end, then
/// makes it end, when it takes too long.
inline int end_of_job(pid_t pid, std::chrono::steady_clock::time_point until) {
  for (int signal : {SIGTERM, SIGKILL}) {
    int status = 0;
    while (std::chrono::steady_clock::now() < until) {
      if (waitpid(pid, &status, WNOHANG) == pid) {
        return WIFEXITED(status) && signal == SIGTERM ? WEXITSTATUS(status) : -1;
      }
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    kill(pid, signal);
    until = std::chrono::steady_clock::now() + std::chrono::seconds(5);
  }
  waitpid(pid, nullptr, 0);
  return -1;
}

/// Whether a rank of a job that is over has ended, too; a moment after it at the latest.
inline bool is_gone(pid_t pid) {
  const auto until = std::chrono::steady_clock::now() + std::chrono::seconds(5);
  while (kill(pid, 0) == 0 && std::chrono::steady_clock::now() < until) {
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  return kill(pid, 0) != 0;
}

/// Open MPI 4 can be asked to let a job go on when a rank is killed.
inline bool jobs_survive(const std::string& mpiexec) {
  std::FILE* const pipe = popen(("'" + mpiexec + "' --version 2>&1").c_str(), "r");
  char line[200] = "";
  const bool read = pipe != nullptr && std::fgets(line, sizeof(line), pipe) != nullptr;
  if (pipe != nullptr) pclose(pipe);
  const std::string version = line;  // "mpirun (Open MPI) 4.1.4", "mpiexec (OpenRTE) 4.1.4"
  return read && version.find("(Open") != std::string::npos &&
         version.find(") 4.") != std::string::npos;
}

}  // namespace octet::test
