// SPDX-License-Identifier: Apache-2.0
#include "checkpoint/directory.hpp"

#include <fcntl.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <set>

#include "checkpoint/file_handle.hpp"
#include "checkpoint/layout.hpp"

namespace octet {
namespace {

namespace fs = std::filesystem;

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

std::string read_text(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  require(file.is_open(), path, " cannot be opened");
  std::string text{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  require(!file.bad(), path, " cannot be read");
  return text;
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
  const fs::path path = fs::absolute(directory).lexically_normal();
  fs::path below;
  for (const fs::path& part : path) {
    const fs::path parent = below;
    below /= part;
    std::error_code error;
    if (!fs::create_directory(below, error)) {
      require(!error, below.string(), " cannot be created: ", error.message());
      continue;  // it was there
    }
    const FileHandle handle(open(parent.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    if (!handle.is_open() || (fsync(handle.get()) != 0 && errno != EINVAL)) {
      fail_io(parent.string(), "flushed");
    }
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
  Index index = parse_index(path, read_text(path));
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
  const std::string path = path_in(directory, index_name(index.step)), temporary = path + ".tmp";
  const std::string text = index_text(index);
  FileHandle file(open(temporary.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666));
  if (!file.is_open()) fail_io(temporary, "created");
  for (std::size_t done = 0; done < text.size();) {
    const ssize_t count = write(file.get(), text.data() + done, text.size() - done);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) fail_io(temporary, "written");
    done += static_cast<std::size_t>(count);
  }
  if (fsync(file.get()) != 0 || file.close_now() != 0) fail_io(temporary, "flushed");
  rename_durably(temporary, path);
}

void remove_old(const std::string& directory, int keep) {
  std::vector<std::int64_t> steps = checkpoint_steps(directory);
  const auto kept = std::min(steps.size(), static_cast<std::size_t>(keep));
  for (std::size_t i = 0; i + kept < steps.size(); ++i) {
    remove_file(path_in(directory, index_name(steps[i])));
  }
  steps.erase(steps.begin(), steps.end() - static_cast<std::ptrdiff_t>(kept));
  std::set<std::string> used;
  for (std::int64_t step : steps) {
    for (const std::string& name : files_of(directory, step)) used.insert(name);
  }
  for (const std::string& name : names_in(directory)) {
    if (is_checkpoint_file(name) && !used.contains(name)) remove_file(path_in(directory, name));
  }
}

}  // namespace octet
