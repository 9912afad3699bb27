// SPDX-License-Identifier: Apache-2.0
// mpi_failure_ranks MODE FOLDER: one rank of the job that mpi_failure_test starts. Rank 1 does what
// MODE says in the middle of a run of collectives; every rank leaves in FOLDER/<rank> what came of
// it. Exit status 0, or 3 after octet::CommError.
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdio>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

#include "octet/comm/mpi.hpp"

namespace {

constexpr auto kDeadline = std::chrono::milliseconds(1500);

void misbehave(const std::string& mode) {
  if (mode == "kill") raise(SIGKILL);
  if (mode == "stop") raise(SIGSTOP);
  if (mode == "exit") _exit(0);
  if (mode == "late") std::this_thread::sleep_for(kDeadline / 3);
  if (mode == "throw") octet::fail("out of paper");
}

void run(octet::Communicator& comm, const std::string& mode) {
  const int next = (comm.rank() + 1) % comm.size();
  const int previous = (comm.rank() + comm.size() - 1) % comm.size();
  std::vector<char> own(std::size_t{1} << 20), theirs(own.size());
  for (int i = 0; i < 60; ++i) {
    if (i == 30 && comm.rank() == 1) misbehave(mode);
    const octet::SendPart send{own.data(), own.size(), next};
    const octet::RecvPart recv{theirs.data(), theirs.size(), previous};
    comm.exchange({&send, 1}, {&recv, 1});
  }
}

}  // namespace

int main(int, char** argv) {
  const std::string mode = argv[1];
  std::string name = "unknown";
  const auto leave = [&](const std::string& text) {
    std::ofstream(std::string(argv[2]) + "/" + name) << getpid() << " " << text;
  };
  try {
    {
      const auto comm = octet::create_mpi(octet::Context::cpu(), {.deadline = kDeadline});
      name = std::to_string(comm->rank());
      leave("has begun");
      run(*comm, mode);
    }
    std::string again = "created";
    try {
      octet::create_mpi(octet::Context::cpu());
    } catch (const octet::Error& error) {
      again = error.what();
    }
    leave("done; again: " + again);
    return 0;
  } catch (const octet::CommError& error) {
    const octet::CommError::Where& where = error.where();
    leave(std::string("CommError: ") + error.what() + "; where: " + where.op + " " +
          std::to_string(where.collective) + " on " + std::to_string(where.rank) + " because of " +
          octet::to_string_of_ranks(where.ranks));
    return 3;
  } catch (const octet::Error& error) {
    leave(std::string("Error: ") + error.what());
    return 4;
  }
}
