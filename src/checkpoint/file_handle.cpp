// SPDX-License-Identifier: Apache-2.0
#include "checkpoint/file_handle.hpp"

#include <fcntl.h>
#include <sys/stat.h>

#include <algorithm>

namespace octet {

OpenedFile open_to_read(const std::string& path) {
  // Opening a pipe would wait for somebody who writes into it.
  OpenedFile file{FileHandle(open(path.c_str(), O_RDONLY | O_NONBLOCK | O_CLOEXEC)), 0};
  if (!file.handle.is_open()) fail_io(path, "opened");
  struct stat status = {};
  if (fstat(file.handle.get(), &status) != 0) fail_io(path, "read");
  require(S_ISREG(status.st_mode), path, ": not a regular file");
  file.bytes = static_cast<std::uint64_t>(status.st_size);
  return file;
}

void read_all(int fd, std::string_view path, std::uint64_t offset, std::uint64_t bytes, void* to) {
  auto* next = static_cast<char*>(to);
  while (bytes > 0) {
    const ssize_t done =
        pread(fd, next, std::min<std::uint64_t>(bytes, 1u << 30), static_cast<off_t>(offset));
    if (done < 0 && errno == EINTR) continue;
    if (done < 0) fail_io(path, "read");
    require(done > 0, path, ": ended at byte ", offset, ", with ", bytes,
            " more to be read; it has become shorter");
    next += done;
    offset += static_cast<std::uint64_t>(done);
    bytes -= static_cast<std::uint64_t>(done);
  }
}

void write_all(int fd, std::string_view path, const void* data, std::uint64_t bytes) {
  const auto* next = static_cast<const char*>(data);
  while (bytes > 0) {
    const ssize_t done = write(fd, next, std::min<std::uint64_t>(bytes, 1u << 30));
    if (done < 0 && errno == EINTR) continue;
    if (done < 0) fail_io(path, "written");
    require(done > 0, path, " cannot be written: the system takes no more bytes");
    next += done;
    bytes -= static_cast<std::uint64_t>(done);
  }
}

std::string read_text(const std::string& path, std::uint64_t most) {
  const OpenedFile file = open_to_read(path);
  require(file.bytes <= most, path, ": has ", file.bytes, " bytes; at most ", most, " are allowed");
  std::string text(file.bytes, '\0');
  read_all(file.handle.get(), path, 0, text.size(), text.data());
  return text;
}

void flush_folder(const std::string& path) {
  const std::string folder = path.empty() ? "." : path;
  const FileHandle handle(open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  // Some file systems cannot flush a folder, and say so with EINVAL; then there is nothing to do.
  if (!handle.is_open() || (fsync(handle.get()) != 0 && errno != EINVAL)) {
    fail_io(folder, "flushed");
  }
}

}  // namespace octet
