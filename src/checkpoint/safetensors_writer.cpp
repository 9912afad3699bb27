// SPDX-License-Identifier: Apache-2.0
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <utility>

#include "checkpoint/file_handle.hpp"
#include "checkpoint/shown.hpp"
#include "octet/checkpoint/safetensors.hpp"

namespace octet {
namespace {

/// A string of JSON.
std::string json_text(const std::string& path, const std::string& text) {
  try {
    return nlohmann::json(text).dump();
  } catch (const nlohmann::json::exception&) {
    fail(path, ": the name or text ", shown_text(text), " is not valid UTF-8");
  }
}

/// Lays the tensors out and returns the header, padded with spaces to end at a multiple of 8.
std::string make_header(const std::string& path, std::vector<FileTensor>& tensors,
                        const std::map<std::string, std::string>& metadata) {
  std::string text = "{";
  if (!metadata.empty()) {
    for (const auto& [key, value] : metadata) {
      text += text.size() == 1 ? "\"__metadata__\":{" : ",";
      text += json_text(path, key) + ":" + json_text(path, value);
    }
    text += "}";
  }
  std::uint64_t end = 0;
  for (FileTensor& tensor : tensors) {
    require(tensor.name != "__metadata__", path, ": a tensor has the name __metadata__");
    tensor.begin = end;
    require(!__builtin_add_overflow(end, tensor.bytes, &end), path, ": tensor ",
            shown_text(tensor.name), ": bytes is ", tensor.bytes, ", which is too large");
    text += (text.size() == 1 ? "" : ",") + json_text(path, tensor.name) +
            ":{\"dtype\":" + json_text(path, tensor.dtype) +
            ",\"shape\":" + nlohmann::json(tensor.shape).dump() + ",\"data_offsets\":[" +
            std::to_string(tensor.begin) + "," + std::to_string(end) + "]}";
  }
  text += "}";
  text.resize((text.size() + 7) / 8 * 8, ' ');
  require(text.size() <= kMaxHeaderBytes, path, ": the header takes ", text.size(),
          " bytes; at most ", kMaxHeaderBytes, " are allowed");
  parse_safetensors_header(path, text, end);  // the reader's rules are the writer's
  return text;
}

void rename_file(const std::string& from, const std::string& to) {
  if (std::rename(from.c_str(), to.c_str()) != 0) fail_io(from, "renamed to " + to);
}

void flush_folder_of(const std::string& path) {
  flush_folder(std::filesystem::path(path).parent_path().string());
}

/// Creates a file, or takes over what a writer that died has left, and locks it. The lock ends with
/// the descriptor. Throws octet::Error where another writer holds it.
int create_locked(const std::string& path) {
  for (;;) {
    FileHandle file(open(path.c_str(), O_WRONLY | O_CREAT | O_NONBLOCK | O_CLOEXEC, 0666));
    if (!file.is_open()) fail_io(path, "created");
    struct stat own = {}, now = {};
    if (fstat(file.get(), &own) != 0) fail_io(path, "created");
    // File systems without locks say so otherwise; then nothing guards the name.
    const bool is_held = flock(file.get(), LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK;
    require(!is_held, path, " cannot be created: another writer is at work on it");
    // Between the two calls that writer may have finished: this is its file then.
    if (stat(path.c_str(), &now) != 0 || now.st_ino != own.st_ino || now.st_dev != own.st_dev) {
      continue;
    }
    if (S_ISREG(own.st_mode) && ftruncate(file.get(), 0) != 0) fail_io(path, "created");
    return file.release();
  }
}

}  // namespace

struct SafetensorsWriter::Impl {
  /// What the destructor has to do, and what may still be called.
  enum class State { writing, aside, finished };

  Impl(const std::string& name, std::vector<FileTensor> list,
       const std::map<std::string, std::string>& metadata)
      : path(name), temporary(name + ".tmp"), tensors(std::move(list)) {
    const std::string header = make_header(path, tensors, metadata);
    for (const FileTensor& tensor : tensors) data_bytes += tensor.bytes;
    header_bytes = 8 + header.size();
    file.reset(create_locked(temporary));
    try {
      char length[8];
      for (int i = 0; i < 8; ++i) length[i] = static_cast<char>(header.size() >> (8 * i) & 0xFF);
      write_all(file.get(), temporary, length, sizeof length);
      write_all(file.get(), temporary, header.data(), header.size());
    } catch (...) {
      remove_temporary();
      throw;
    }
  }

  ~Impl() {
    if (state == State::writing) remove_temporary();
  }

  // While it is locked: another writer may begin once it is not.
  void remove_temporary() {
    unlink(temporary.c_str());
    file.reset(-1);
  }

  void flush() {
    const auto missing = [&] {
      const auto unfinished = std::upper_bound(tensors.begin(), tensors.end(), written,
                                               [](std::uint64_t at, const FileTensor& tensor) {
                                                 return at < tensor.begin + tensor.bytes;
                                               });
      return unfinished == tensors.end() ? std::string() : shown_text(unfinished->name);
    };
    require(written == data_bytes, path, ": ", written, " of ", data_bytes,
            " bytes were written; the data of tensor ", missing(), " are not whole");
    if (fsync(file.get()) != 0) fail_io(temporary, "flushed");
  }

  std::string path, temporary;
  std::vector<FileTensor> tensors;
  std::uint64_t header_bytes = 0, data_bytes = 0, written = 0;
  State state = State::writing;
  FileHandle file{-1};
};

SafetensorsWriter::SafetensorsWriter(const std::string& path, std::vector<FileTensor> tensors,
                                     const std::map<std::string, std::string>& metadata)
    : impl_(std::make_unique<Impl>(path, std::move(tensors), metadata)) {}
SafetensorsWriter::~SafetensorsWriter() = default;
SafetensorsWriter::SafetensorsWriter(SafetensorsWriter&&) noexcept = default;
SafetensorsWriter& SafetensorsWriter::operator=(SafetensorsWriter&&) noexcept = default;

const std::string& SafetensorsWriter::path() const { return impl_->path; }
const std::string& SafetensorsWriter::temporary_path() const { return impl_->temporary; }
const std::vector<FileTensor>& SafetensorsWriter::tensors() const { return impl_->tensors; }
std::uint64_t SafetensorsWriter::file_bytes() const {
  return impl_->header_bytes + impl_->data_bytes;
}

void SafetensorsWriter::write(const void* data, std::uint64_t bytes) {
  Impl& w = *impl_;
  require(w.state == Impl::State::writing, w.path, ": write() after put_aside() or finish()");
  require(bytes <= w.data_bytes - w.written, w.path, ": ", bytes, " bytes after ", w.written,
          " were to be written; the tensors take ", w.data_bytes);
  write_all(w.file.get(), w.temporary, data, bytes);
  w.written += bytes;
}

void SafetensorsWriter::put_aside() {
  Impl& w = *impl_;
  require(w.state == Impl::State::writing, w.path, ": put_aside() after put_aside() or finish()");
  w.flush();
  w.state = Impl::State::aside;
}

void SafetensorsWriter::finish() {
  Impl& w = *impl_;
  require(w.state != Impl::State::finished, w.path, ": finish() was called already");
  if (w.state == Impl::State::writing) w.flush();
  rename_file(w.temporary, w.path);
  w.state = Impl::State::finished;  // the temporary name is nobody's now, or another writer's
  if (w.file.close_now() != 0) fail_io(w.path, "closed");
  flush_folder_of(w.path);
}

void rename_durably(const std::string& from, const std::string& to) {
  rename_file(from, to);
  flush_folder_of(to);
}

}  // namespace octet
