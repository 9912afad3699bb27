// SPDX-License-Identifier: Apache-2.0
// Runs the program under test (PROGRAM, a path from the build) and collects what it leaves behind.
#pragma once

#include <sys/wait.h>

#include <cstdlib>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>

#include "support/folder.hpp"

namespace octet::test {

struct Outcome {
  int exit_code = -1;
  std::string out, err;
};

/// `arguments` as a shell takes them; `launcher` goes before the program's name.
inline Outcome run_program(const Folder& folder, const std::string& arguments,
                           const std::string& launcher = "") {
  const std::string out = folder.file("out"), err = folder.file("err");
  const std::string command =
      launcher + " '" PROGRAM "' " + arguments + " >'" + out + "' 2>'" + err + "' </dev/null";
  const int status = std::system(command.c_str());
  return {WIFEXITED(status) ? WEXITSTATUS(status) : -1, read_file(out), read_file(err)};
}

}  // namespace octet::test
