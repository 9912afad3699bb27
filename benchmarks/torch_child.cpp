// SPDX-License-Identifier: Apache-2.0
#include "torch_child.hpp"

#include <poll.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>

namespace bench {
namespace {

constexpr int kNoPython = 127;       // as a shell has it
constexpr int kNoTorch = 3;          // python3 itself ends with 2 where there is no such script
constexpr int kTimeoutMs = 180'000;  // the first import of PyTorch can take a minute

}  // namespace

TorchChild::TorchChild(const std::string& script) {
  int ends[2];
  octet::require(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0,
                 "socketpair: ", std::strerror(errno));
  child_ = fork();
  if (child_ == 0) {
    dup2(ends[1], STDIN_FILENO);
    dup2(ends[1], STDOUT_FILENO);
    execlp("python3", "python3", script.c_str(), static_cast<char*>(nullptr));
    _exit(kNoPython);
  }
  close(ends[1]);
  socket_ = ends[0];
  octet::require(child_ > 0, "fork: ", std::strerror(errno));
  const auto greeting = read_line();
  if (!greeting) {
    const int code = wait();
    octet::require(code != kNoPython, "--torch: python3 cannot be started");
    octet::require(code == kNoTorch, script, " ended with exit code ", code);
    return;
  }
  const auto reply = nlohmann::json::parse(*greeting, nullptr, false);
  octet::require(reply.is_object() && reply.contains("torch"), script, " said \"", *greeting,
                 "\" instead of its version");
  version_ = reply["torch"].get<std::string>();
}

TorchChild::~TorchChild() {
  close(socket_);
  if (child_ > 0) wait();
}

bool TorchChild::prepare(const octet::GemmProblem& p) {
  const nlohmann::json reply = ask({{"m", p.m},
                                    {"n", p.n},
                                    {"k", p.k},
                                    {"a", p.a == octet::DType::e5m2 ? "e5m2" : "e4m3"},
                                    {"fast", p.accumulation == octet::Accumulation::fast}});
  if (!reply.contains("error")) return true;
  std::fprintf(stderr, "torch cannot run %s: %s\n", to_string(p).c_str(),
               reply["error"].get<std::string>().c_str());
  return false;
}

double TorchChild::batch_ms(int runs) {
  const nlohmann::json reply = ask({{"runs", runs}});
  octet::require(reply.contains("ms"), "torch_scaled_mm.py gave no time: ", reply.dump());
  return reply["ms"].get<double>();
}

nlohmann::json TorchChild::ask(const nlohmann::json& request) {
  const std::string line = request.dump() + "\n";
  const auto sent = send(socket_, line.data(), line.size(), MSG_NOSIGNAL);
  const auto answer = sent == static_cast<ssize_t>(line.size()) ? read_line() : std::nullopt;
  if (!answer) octet::fail("torch_scaled_mm.py ended with exit code ", wait());
  const auto reply = nlohmann::json::parse(*answer, nullptr, false);
  octet::require(reply.is_object(), "torch_scaled_mm.py answered \"", *answer, "\"");
  return reply;
}

/// Empty when the child has closed its end.
std::optional<std::string> TorchChild::read_line() {
  for (;;) {
    const std::size_t end = unread_.find('\n');
    if (end != std::string::npos) {
      const std::string line = unread_.substr(0, end);
      unread_.erase(0, end + 1);
      return line;
    }
    pollfd waiting{socket_, POLLIN, 0};
    const int ready = poll(&waiting, 1, kTimeoutMs);
    if (ready < 0 && errno == EINTR) continue;
    if (ready == 0) kill(child_, SIGKILL);
    octet::require(ready > 0, "torch_scaled_mm.py did not answer for ", kTimeoutMs / 1000, " s");
    char part[4096];
    const ssize_t count = read(socket_, part, sizeof part);
    if (count <= 0) return std::nullopt;
    unread_.append(part, static_cast<std::size_t>(count));
  }
}

/// Exit code of the child, or minus the signal that ended it.
int TorchChild::wait() {
  int status = 0;
  waitpid(child_, &status, 0);
  child_ = -1;
  return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}

}  // namespace bench
