// SPDX-License-Identifier: Apache-2.0
// File descriptors, and errors of the system that name the file.
#pragma once

#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <utility>

#include "octet/core/error.hpp"

namespace octet {

/// Throws octet::Error: "PATH cannot be WHAT: reason", the reason that errno has.
[[noreturn]] inline void fail_io(std::string_view path, std::string_view what) {
  const int error = errno;
  fail(path, " cannot be ", what, ": ", std::strerror(error));
}

/// Owns a file descriptor.
class FileHandle {
 public:
  explicit FileHandle(int fd) : fd_(fd) {}
  ~FileHandle() { close_now(); }
  FileHandle(FileHandle&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  FileHandle(const FileHandle&) = delete;
  FileHandle& operator=(const FileHandle&) = delete;
  int get() const { return fd_; }
  bool is_open() const { return fd_ >= 0; }
  int release() { return std::exchange(fd_, -1); }
  void reset(int fd) {
    close_now();
    fd_ = fd;
  }
  /// What close() returned; 0 where nothing is open.
  int close_now() {
    const int result = fd_ >= 0 ? close(fd_) : 0;
    fd_ = -1;
    return result;
  }

 private:
  int fd_;
};

struct OpenedFile {
  FileHandle handle;
  std::uint64_t bytes = 0;
};

/// These throw octet::Error naming the path. A regular file, for reading.
OpenedFile open_to_read(const std::string& path);
/// `bytes` bytes from `offset` on.
void read_all(int fd, std::string_view path, std::uint64_t offset, std::uint64_t bytes, void* to);
void write_all(int fd, std::string_view path, const void* data, std::uint64_t bytes);
/// A whole file of at most `most` bytes.
std::string read_text(const std::string& path, std::uint64_t most);
/// Names of files in a folder (empty: the current one) outlast a loss of power.
void flush_folder(const std::string& path);

}  // namespace octet
