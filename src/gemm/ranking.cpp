// SPDX-License-Identifier: Apache-2.0
#include "gemm/ranking.hpp"

#include <charconv>
#include <fstream>
#include <locale>
#include <sstream>

#include "octet/core/error.hpp"

namespace octet::detail {
namespace {

constexpr const char* kHeader =
    "# octet GEMM ranking 1: device, backend, version, problem, way, us";
/// Fields of a line: the four of a key, the candidate, the time.
constexpr int kFields = 6;

/// Cuts a line at its tabs. False unless it has the fields of an entry and a time above zero.
bool parse(const std::string& line, std::string& key, Measured& measured) {
  std::size_t ends[kFields - 1];
  std::size_t from = 0;
  for (std::size_t& end : ends) {
    end = line.find('\t', from);
    if (end == std::string::npos) return false;
    from = end + 1;
  }
  key = line.substr(0, ends[3]);
  measured.candidate = line.substr(ends[3] + 1, ends[4] - ends[3] - 1);
  const char* const last = line.data() + line.size();
  const auto [stop, error] = std::from_chars(line.data() + from, last, measured.microseconds);
  return error == std::errc() && stop == last && measured.microseconds > 0.0;
}

std::string without_tabs(std::string text) {
  for (char& c : text) {
    if (c == '\t' || c == '\n') c = ' ';
  }
  return text;
}

}  // namespace

std::string ranking_key(const std::string& device, const std::string& backend,
                        const std::string& version, const std::string& problem) {
  return without_tabs(device) + "\t" + without_tabs(backend) + "\t" + without_tabs(version) + "\t" +
         problem;
}

void RankingFile::open(const std::string& path) {
  std::unordered_map<std::string, Measured> read;
  std::ifstream file(path);
  std::string line;
  for (int number = 1; std::getline(file, line); ++number) {
    if (line.empty() || line.front() == '#') continue;
    std::string key;
    Measured measured;
    require(parse(line, key, measured), "GEMM ranking ", path, ", line ", number, ": \"", line,
            "\" is not device, backend, version, problem, way and microseconds with tabs between");
    read[key] = measured;
  }
  entries_ = std::move(read);
  path_ = path;
}

const Measured* RankingFile::find(const std::string& key) const {
  const auto found = entries_.find(key);
  return found == entries_.end() ? nullptr : &found->second;
}

void RankingFile::add(const std::string& key, const Measured& measured) {
  require(measured.candidate.find_first_of("\t\n") == std::string::npos, "GEMM ranking: the way \"",
          measured.candidate, "\" has a tab or a line break, which cannot be kept in a file");
  if (!path_.empty()) {
    const bool is_new = !std::ifstream(path_).good();
    std::ostringstream text;
    text.imbue(std::locale::classic());  // as from_chars reads
    if (is_new) text << kHeader << "\n";
    text << key << "\t" << measured.candidate << "\t" << measured.microseconds << "\n";
    // One write of whole lines, so that lines of several processes do not mix.
    std::ofstream file(path_, std::ios::app);
    file << text.str() << std::flush;
    require(file.good(), "GEMM ranking ", path_, ": the file cannot be written");
  }
  entries_[key] = measured;
}

}  // namespace octet::detail
