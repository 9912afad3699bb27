// SPDX-License-Identifier: Apache-2.0
#include "data.hpp"

#include <algorithm>
#include <array>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <utility>

#include "octet/core/error.hpp"
#include "random.hpp"

namespace train_gpt {
namespace {

namespace fs = std::filesystem;

constexpr std::int64_t kHeldOutPercent = 5;

void append_file(const fs::path& path, std::vector<std::uint8_t>& bytes) {
  std::ifstream file(path, std::ios::binary);
  octet::require(file.good(), "data file ", path.string(), " cannot be read");
  bytes.insert(bytes.end(), std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
}

/// The text files below the repository's folders, in an order that no file system decides.
std::vector<fs::path> repository_files(const fs::path& root) {
  constexpr std::array kFolders{"include", "src", "cuda", "tests", "examples", "docs"};
  constexpr std::array kEndings{".hpp", ".cpp", ".cu", ".cuh", ".md", ".py"};
  std::vector<fs::path> files;
  if (fs::is_regular_file(root / "README.md")) files.push_back(root / "README.md");
  for (const char* folder : kFolders) {
    if (!fs::is_directory(root / folder)) continue;
    for (const auto& entry : fs::recursive_directory_iterator(root / folder)) {
      const std::string ending = entry.path().extension().string();
      if (entry.is_regular_file() && std::count(kEndings.begin(), kEndings.end(), ending) > 0) {
        files.push_back(entry.path());
      }
    }
  }
  std::sort(files.begin(), files.end());
  return files;
}

}  // namespace

TextData TextData::load(const std::string& path, std::int64_t context) {
  std::vector<std::uint8_t> bytes;
  if (!path.empty()) {
    octet::require(fs::exists(path), "data file ", path, " does not exist");
    octet::require(fs::is_regular_file(path), "data file ", path, " is not a regular file");
    append_file(path, bytes);
    return {path, std::move(bytes), context};
  }
  const fs::path root = TRAIN_GPT_SOURCE_DIR;
  octet::require(fs::is_directory(root), "the default data, the sources in ", root.string(),
                 ", are not there any more; name a text with --data FILE");
  for (const fs::path& file : repository_files(root)) append_file(file, bytes);
  return {"sources and documents of the repository", std::move(bytes), context};
}

TextData::TextData(std::string name, std::vector<std::uint8_t> bytes, std::int64_t context)
    : name_(std::move(name)), bytes_(std::move(bytes)), context_(context) {
  const std::int64_t held_out = this->bytes() * kHeldOutPercent / 100;
  training_ = this->bytes() - held_out;
  const std::int64_t needed = (window() * 100 + kHeldOutPercent - 1) / kHeldOutPercent;
  octet::require(held_out >= window(), "data file ", name_, " is too short: it has ", this->bytes(),
                 " bytes, a context of ", context_, " with ", kHeldOutPercent,
                 " % held out needs at least ", needed);
}

std::vector<std::uint8_t> TextData::training_windows(std::uint64_t seed, std::int64_t step,
                                                     std::int64_t first_row,
                                                     std::int64_t rows) const {
  const auto starts = static_cast<std::uint64_t>(training_ - window() + 1);
  std::vector<std::uint8_t> windows;
  windows.reserve(static_cast<std::size_t>(rows * window()));
  for (std::int64_t row = first_row; row < first_row + rows; ++row) {
    const std::uint64_t bits =
        random_bits(seed, static_cast<std::uint64_t>(step), static_cast<std::uint64_t>(row));
    const auto start = bytes_.begin() + static_cast<std::int64_t>(bits % starts);
    windows.insert(windows.end(), start, start + window());
  }
  return windows;
}

std::vector<std::uint8_t> TextData::validation_windows(std::int64_t first, std::int64_t rows,
                                                       std::int64_t total) const {
  const std::int64_t last_start = bytes() - training_ - window();
  std::vector<std::uint8_t> windows;
  windows.reserve(static_cast<std::size_t>(rows * window()));
  for (std::int64_t i = first; i < first + rows; ++i) {
    const std::int64_t start = total > 1 ? last_start * i / (total - 1) : 0;
    const auto from = bytes_.begin() + training_ + start;
    windows.insert(windows.end(), from, from + window());
  }
  return windows;
}

std::int64_t TextData::validation_count(std::int64_t batch, std::int64_t most) const {
  const std::int64_t batches = (bytes() - training_) / window() / batch;
  return batch * std::clamp<std::int64_t>(batches, 1, most);
}

}  // namespace train_gpt
