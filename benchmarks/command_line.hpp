// SPDX-License-Identifier: Apache-2.0
// How every benchmark starts and ends.
#pragma once

#include <CLI/CLI.hpp>
#include <cstdio>
#include <exception>
#include <iostream>
#include <string>

namespace bench {

/// The exit code of a program: that of run() once its arguments are parsed, 0 for --help, 1 for
/// what is thrown, whose text goes to stderr behind the app's name.
template <class Run>
int parse_and_run(CLI::App& app, int argc, char** argv, const Run& run) {
  const std::string name = app.get_name();
  try {
    app.parse(argc, argv);
    return run();
  } catch (const CLI::CallForHelp&) {
    std::cout << app.help();
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s: %s\n", name.c_str(), error.what());
    return 1;
  }
}

}  // namespace bench
