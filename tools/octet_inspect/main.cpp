// SPDX-License-Identifier: Apache-2.0
// Lists what safetensors files hold, and what the values look like.
#include <CLI/CLI.hpp>
#include <cstdio>
#include <iostream>
#include <string>
#include <vector>

#include "octet/core/error.hpp"
#include "report.hpp"

namespace {

int run(const std::vector<std::string>& paths, bool as_json) {
  int exit_code = 0;
  nlohmann::ordered_json files = nlohmann::ordered_json::array();
  bool first = true;
  for (const std::string& path : paths) {
    try {
      const octet::SafetensorsReader file(path);
      const std::vector<inspect::TensorReport> list = inspect::inspect(file);
      if (as_json) {
        files.push_back(inspect::to_json(file, list));
      } else {
        std::cout << (first ? "" : "\n") << inspect::to_text(file, list);
      }
      first = false;
    } catch (const octet::Error& error) {
      std::fprintf(stderr, "octet_inspect: %s\n", error.what());
      exit_code = 1;
    } catch (const std::exception& error) {  // memory for a file of any size, say
      std::fprintf(stderr, "octet_inspect: %s: %s\n", path.c_str(), error.what());
      exit_code = 1;
    }
  }
  // A path need not be UTF-8, which JSON is.
  using Json = nlohmann::ordered_json;
  if (as_json) {
    std::cout << Json{{"files", files}}.dump(2, ' ', false, Json::error_handler_t::replace) << "\n";
  }
  return exit_code;
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app(
      "Lists the tensors of safetensors files with dtype, shape, the factors that decode FP8 "
      "(NAME_scale_inv, NAME_scale, or what octet's checkpoints have), the largest "
      "magnitude so decoded, and the shares of zeros, of codes at FP8's maximum, of subnormal ones "
      "and of those that are not finite. Exit status 1 if a file is not sound, with the reason.",
      "octet_inspect");
  std::vector<std::string> paths;
  bool as_json = false;
  app.add_option("FILE", paths, "safetensors files")->required();
  app.add_flag("--json", as_json, "JSON instead of tables");
  try {
    app.parse(argc, argv);
    return run(paths, as_json);
  } catch (const CLI::CallForHelp&) {
    std::cout << app.help();
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "octet_inspect: %s\n", error.what());
    return 1;
  }
}
