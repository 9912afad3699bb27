// SPDX-License-Identifier: Apache-2.0
// The corpus of the indexes' fuzzer and changes of it, in every build: no crash, nothing but
// octet::Error.
#include <algorithm>
#include <filesystem>
#include <set>
#include <vector>

#include "fuzz/index_input.hpp"
#include "support/catch.hpp"
#include "support/folder.hpp"
#include "support/random.hpp"

using namespace octet;
using namespace octet::test;

namespace {

std::vector<std::filesystem::path> corpus() {
  std::vector<std::filesystem::path> files;
  for (const auto& file : std::filesystem::directory_iterator(CORPUS)) files.push_back(file.path());
  std::sort(files.begin(), files.end());
  return files;
}

}  // namespace

TEST_CASE("The corpus of indexes is replayed: what is valid passes, nothing else does") {
  const std::set<std::string> valid = {"content", "weight_map"};
  std::size_t seen = 0;
  for (const auto& path : corpus()) {
    const std::string name = path.filename().string();
    const bool passed = check_index(read_file(path.string()));
    INFO(name);
    // Names of the fuzzer's own finds are hashes.
    if (name.size() < 40) CHECK(passed == valid.contains(name));
    seen += valid.contains(name) ? 1 : 0;
  }
  CHECK(seen == valid.size());
}

TEST_CASE("An index that is nested as deep as one likes is refused without recursion") {
  for (const std::size_t depth : {std::size_t{17}, std::size_t{100'000}, std::size_t{2'000'000}}) {
    const std::string nest = std::string(depth, '[') + std::string(depth, ']');
    for (const std::string& text :
         {nest, R"({"content":)" + nest + "}", R"({"content":{"a":)" + nest + "}}"}) {
      CHECK(!check_index(text));
    }
  }
}

TEST_CASE("Random changes of the corpus of indexes make no crash") {
  std::vector<std::string> files;
  for (const auto& path : corpus()) files.push_back(read_file(path.string()));
  Draws draws(7);
  std::size_t passed = 0;
  for (int round = 0; round < 10'000; ++round) {
    std::string bytes = files[draws() % files.size()];
    for (std::uint32_t change = draws() % 4; !bytes.empty() && change < 4; ++change) {
      const std::size_t at = draws() % bytes.size();
      const std::string& from = files[draws() % files.size()];
      const std::size_t begin = from.empty() ? 0 : draws() % from.size();
      switch (draws() % 4) {
        case 0: bytes[at] = static_cast<char>(draws()); break;
        case 1: bytes.erase(at, 1 + draws() % 8); break;
        case 2: bytes.insert(at, from, begin, 1 + draws() % 24); break;
        default: bytes.replace(at, 1 + draws() % 24, from, begin, 1 + draws() % 24);
      }
    }
    passed += check_index(bytes) ? 1 : 0;
  }
  CHECK(passed > 0);
}
