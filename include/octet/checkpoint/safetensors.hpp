// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "octet/core/dtype.hpp"

namespace octet {

/// One tensor of a safetensors file: row-major, little-endian.
struct FileTensor {
  std::string name = {};
  /// As the format spells it: BOOL, U8, I8, U16, I16, U32, I32, U64, I64, F16, BF16, F32, F64, C64,
  /// F8_E4M3, F8_E5M2, F8_E8M0, F8_E4M3FNUZ, F8_E5M2FNUZ, F4, F6_E2M3, F6_E3M2.
  std::string dtype = {};
  std::vector<std::int64_t> shape = {};  ///< empty: a single element
  std::uint64_t begin = 0;               ///< offset in the data of the file
  std::uint64_t bytes = 0;
  bool operator==(const FileTensor&) const = default;
};

/// The name that safetensors has for a dtype: "F32", "BF16", "F16", "F8_E4M3", "F8_E5M2".
std::string_view file_dtype(DType dtype);
/// The other way round; nothing for what the library does not compute with.
std::optional<DType> dtype_of_file(std::string_view dtype);
/// Bits of one element; 0 for names that the format does not have.
int file_dtype_bits(std::string_view dtype);

/// Elements of a shape of a file.
std::uint64_t numel_of(const FileTensor& tensor);

/// What stands in front of a file's data.
struct SafetensorsHeader {
  std::vector<FileTensor> tensors = {};              ///< in the order of their data
  std::map<std::string, std::string> metadata = {};  ///< "__metadata__"
};

/// A header of more bytes is refused, as by other readers of the format.
inline constexpr std::uint64_t kMaxHeaderBytes = 100'000'000;

/// Length of the header of a file of `file_bytes` bytes, of which the first 8 are `prefix`. Throws
/// octet::Error for files that are too short for it and headers beyond kMaxHeaderBytes.
std::uint64_t safetensors_header_bytes(std::string_view file, std::string_view prefix,
                                       std::uint64_t file_bytes);

/// Reads and checks a header, of a file with `data_bytes` bytes behind it: JSON with every name
/// once; known dtypes; shapes of integers whose product is that of the bytes; offsets that cover
/// the data without overlap, hole or rest; metadata of strings. Throws octet::Error that names
/// `file`, the tensor and the field. A pure function of its arguments.
/// Source: https://huggingface.co/docs/safetensors (format).
SafetensorsHeader parse_safetensors_header(std::string_view file, std::string_view header,
                                           std::uint64_t data_bytes);

/// A file that is open for reading. The whole header is checked before anything else can be done:
/// throws octet::Error naming file and field. read() may be called by several threads at a time.
class SafetensorsReader {
 public:
  explicit SafetensorsReader(const std::string& path);
  ~SafetensorsReader();
  SafetensorsReader(SafetensorsReader&& other) noexcept;
  SafetensorsReader& operator=(SafetensorsReader&& other) noexcept;

  const std::string& path() const;
  /// In the order of their data.
  const std::vector<FileTensor>& tensors() const;
  const std::map<std::string, std::string>& metadata() const;
  /// Null when there is none.
  const FileTensor* find(std::string_view name) const;
  /// Throws octet::Error naming file and tensor when there is none.
  const FileTensor& at(std::string_view name) const;
  /// `bytes` bytes of a tensor from `offset` on, to host memory. Throws octet::Error for a range
  /// beyond the tensor, and when the file fails or has become shorter.
  void read(const FileTensor& tensor, std::uint64_t offset, std::uint64_t bytes, void* to) const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

/// Writes a file under a temporary name, so that what stands under the final one is whole at any
/// moment: finish() flushes it to the disk, renames it and flushes the folder.
class SafetensorsWriter {
 public:
  /// The tensors' data follow one another in this order (`begin` is not read), and start at a
  /// multiple of 8 in the file. Creates or overwrites temporary_path(), which is locked (flock)
  /// against other writers of the same path, in this process or another. Throws octet::Error for
  /// lists that a reader would refuse, before anything is created, where it cannot be, and where
  /// another writer is at work.
  SafetensorsWriter(const std::string& path, std::vector<FileTensor> tensors,
                    const std::map<std::string, std::string>& metadata = {});
  /// Removes the temporary file, unless finish() or put_aside() was reached.
  ~SafetensorsWriter();
  SafetensorsWriter(SafetensorsWriter&& other) noexcept;
  SafetensorsWriter& operator=(SafetensorsWriter&& other) noexcept;

  const std::string& path() const;
  /// path() + ".tmp".
  const std::string& temporary_path() const;
  /// As given, with `begin` set.
  const std::vector<FileTensor>& tensors() const;
  /// Bytes of the whole file.
  std::uint64_t file_bytes() const;

  /// Host memory: the data of the tensors, one after the other, in any pieces. Throws octet::Error
  /// for more than the tensors take and when the disk fails.
  void write(const void* data, std::uint64_t bytes);
  /// Throws octet::Error when bytes are missing or the disk fails; path() is then as it was, unless
  /// all that failed is the last flush of its folder.
  void finish();
  /// The first half of finish(): all bytes are on the disk, under temporary_path(), which stays and
  /// is the caller's now; finish() afterwards renames it. For files that appear together.
  void put_aside();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

/// Renames a file over another of the same folder, and flushes the folder, so that the new name
/// outlasts a loss of power. Throws octet::Error.
void rename_durably(const std::string& from, const std::string& to);

}  // namespace octet
