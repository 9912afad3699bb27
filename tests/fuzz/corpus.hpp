// SPDX-License-Identifier: Apache-2.0
// A fuzzer's corpus, replayed and changed in every build.
#pragma once

#include <algorithm>
#include <filesystem>
#include <set>
#include <string>
#include <vector>

#include "support/catch.hpp"
#include "support/folder.hpp"
#include "support/random.hpp"

namespace octet::test {

inline std::vector<std::filesystem::path> corpus_files(const char* folder) {
  std::vector<std::filesystem::path> files;
  for (const auto& file : std::filesystem::directory_iterator(folder)) files.push_back(file.path());
  std::sort(files.begin(), files.end());
  return files;
}

/// Files with the names in `valid` pass, and no others that have names; those of the fuzzer's own
/// finds are hashes.
template <class Passes>
void check_corpus(const char* folder, const std::set<std::string>& valid, const Passes& passes) {
  std::size_t seen = 0;
  for (const auto& path : corpus_files(folder)) {
    const std::string name = path.filename().string();
    const bool passed = passes(read_file(path.string()));
    INFO(name);
    if (name.size() < 40) CHECK(passed == valid.contains(name));
    seen += valid.contains(name) ? 1 : 0;
  }
  CHECK(seen == valid.size());
}

/// Up to four random changes of a random file, `rounds` times. Some must pass.
template <class Passes>
void check_changes(const char* folder, int rounds, const Passes& passes) {
  std::vector<std::string> files;
  for (const auto& path : corpus_files(folder)) files.push_back(read_file(path.string()));
  Draws draws(7);
  std::size_t passed = 0;
  for (int round = 0; round < rounds; ++round) {
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
    passed += passes(bytes) ? 1 : 0;
  }
  CHECK(passed > 0);
}

}  // namespace octet::test
