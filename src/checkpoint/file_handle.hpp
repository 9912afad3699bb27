// SPDX-License-Identifier: Apache-2.0
// File descriptors, and errors of the system that name the file.
#pragma once

#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <string>
#include <string_view>

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
  FileHandle(const FileHandle&) = delete;
  FileHandle& operator=(const FileHandle&) = delete;
  int get() const { return fd_; }
  bool is_open() const { return fd_ >= 0; }
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

}  // namespace octet
