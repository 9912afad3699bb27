// SPDX-License-Identifier: Apache-2.0
#include "checkpoint/directory.hpp"

#include <fcntl.h>

#include <algorithm>
#include <filesystem>
#include <set>

#include "checkpoint/file_handle.hpp"
#include "checkpoint/layout.hpp"

namespace octet {
namespace {

namespace fs = std::filesystem;

/// Far more than an index has: 20 million ranges would take as much.
constexpr std::uint64_t kMaxIndexBytes = std::uint64_t{1} << 32;

std::string temporary_index(const std::string& directory, const Index& index) {
  return path_in(directory, index_name(index.step)) + ".tmp";
}

std::vector<std::string> names_in(const std::string& directory) {
  std::vector<std::string> names;
  std::error_code error;
  for (fs::directory_iterator it(directory, error), end; !error && it != end; it.increment(error)) {
    names.push_back(it->path().filename().string());
  }
  const bool is_missing = error == std::errc::no_such_file_or_directory;
  require(!error || is_missing, directory, " cannot be read: ", error.message());
  std::sort(names.begin(), names.end());
  return names;
}

void remove_file(const std::string& path) {
  std::error_code error;
  fs::remove(path, error);
  require(!error, path, " cannot be removed: ", error.message());
}

/// Of a checkpoint whose index is damaged, everything that may be its own.
std::vector<std::string> files_of(const std::string& directory, std::int64_t step) {
  std::vector<std::string> names;
  try {
    for (const IndexFile& file : read_index(directory, step).files) names.push_back(file.name);
  } catch (const Error&) {
    const std::string index = index_name(step);
    const std::string prefix = index.substr(0, index.find('.')) + "-";
    for (const std::string& name : names_in(directory)) {
      if (name.starts_with(prefix)) names.push_back(name);
    }
  }
  return names;
}

}  // namespace

void make_directory(const std::string& directory) {
  require(!directory.empty(), "the directory of checkpoints has an empty name");
  // Nothing is asked of those that are there: they may be another's, and lead over links.
  std::vector<fs::path> missing;
  std::error_code error;
  for (fs::path at = directory; !at.empty() && !fs::is_directory(at, error);
       at = at.parent_path()) {
    missing.push_back(at);
  }
  for (; !missing.empty(); missing.pop_back()) {
    const fs::path& path = missing.back();
    const bool is_new = fs::create_directory(path, error);
    require(!error, path.string(), " cannot be created: ", error.message());
    if (is_new) flush_folder(path.parent_path().string());
  }
}

std::vector<std::int64_t> checkpoint_steps(const std::string& directory) {
  std::vector<std::int64_t> steps;
  for (const std::string& name : names_in(directory)) {
    if (const auto step = step_of_index(name)) steps.push_back(*step);
  }
  std::sort(steps.begin(), steps.end());
  return steps;
}

std::int64_t find_step(const std::string& directory, std::optional<std::int64_t> step) {
  const std::vector<std::int64_t> steps = checkpoint_steps(directory);
  require(!steps.empty(), directory, ": there is no complete checkpoint (no octet-STEP.json)");
  if (!step.has_value()) return steps.back();
  require(std::find(steps.begin(), steps.end(), *step) != steps.end(), directory,
          ": there is no complete checkpoint of step ", *step, "; the newest is of step ",
          steps.back());
  return *step;
}

Index read_index(const std::string& directory, std::int64_t step) {
  const std::string path = path_in(directory, index_name(step));
  Index index = parse_index(path, read_text(path, kMaxIndexBytes));
  require(index.step == step, path, ": content.step is ", index.step, "; by its name it is ", step);
  return index;
}

CheckpointInfo read_checkpoint_info(const std::string& directory,
                                    std::optional<std::int64_t> step) {
  const std::int64_t found = find_step(directory, step);
  return info_of(directory, read_index(directory, found));
}

CheckpointInfo info_of(const std::string& directory, const Index& index) {
  CheckpointInfo info{.index = path_in(directory, index_name(index.step)),
                      .id = index.id,
                      .step = index.step,
                      .skipped = index.skipped,
                      .ranks = static_cast<int>(index.files.size()),
                      .bytes = 0,
                      .metadata = index.metadata};
  for (const IndexFile& file : index.files) info.bytes += file.bytes;
  return info;
}

void write_index(const std::string& directory, const Index& index) {
  const std::string temporary = temporary_index(directory, index);
  const std::string text = index_text(index);
  FileHandle file(open(temporary.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666));
  if (!file.is_open()) fail_io(temporary, "created");
  try {
    write_all(file.get(), temporary, text.data(), text.size());
    if (fsync(file.get()) != 0 || file.close_now() != 0) fail_io(temporary, "flushed");
  } catch (const Error&) {
    unlink(temporary.c_str());
    throw;
  }
}

void put_index_in_place(const std::string& directory, const Index& index) {
  rename_durably(temporary_index(directory, index), path_in(directory, index_name(index.step)));
}

void remove_old(const std::string& directory, int keep) {
  const std::vector<std::int64_t> steps = checkpoint_steps(directory);
  const auto kept = std::min(steps.size(), static_cast<std::size_t>(keep));
  for (std::size_t i = 0; i + kept < steps.size(); ++i) {
    remove_file(path_in(directory, index_name(steps[i])));
  }
  remove_unused(directory);
}

void remove_unused(const std::string& directory) {
  std::set<std::string> used;
  for (std::int64_t step : checkpoint_steps(directory)) {
    for (const std::string& name : files_of(directory, step)) used.insert(name);
  }
  std::vector<std::string> unused;
  for (const std::string& name : names_in(directory)) {
    if (is_checkpoint_file(name) && !used.contains(name)) unused.push_back(name);
  }
  // Data must not be gone from the disk before the index that named them.
  if (!unused.empty()) flush_folder(directory);
  for (const std::string& name : unused) remove_file(path_in(directory, name));
}

}  // namespace octet
