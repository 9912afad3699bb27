// SPDX-License-Identifier: Apache-2.0
// The index of a checkpoint: what it says, as text and back.
#pragma once

#include <cstdint>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "octet/optim/adamw.hpp"

namespace octet {

/// A tensor of one of the files.
struct IndexTensor {
  int file = 0;  ///< the rank that wrote it
  std::string name = {};
  std::uint64_t hash = 0;  ///< XXH64 of its bytes
};

/// Elements of an array, and where they are.
struct IndexRange {
  IndexTensor tensor = {};
  std::int64_t begin = 0, count = 0;
};

struct IndexArray {
  std::string name = {}, format = {};
  std::vector<IndexRange> ranges = {};  ///< ascending, together all elements of the parameter
};

struct IndexParam {
  std::string name = {};
  std::vector<std::int64_t> shape = {};
  AdamwHyper hyper = {};
  std::vector<IndexArray> arrays = {};
};

struct IndexExtra {
  std::string name = {};
  std::uint64_t bytes = 0;
  std::vector<IndexTensor> ranks = {};  ///< one of every rank that saved
};

struct IndexFile {
  std::string name = {};
  std::uint64_t bytes = 0;
};

/// GradientFormats, as name_of() spells them.
struct IndexGradients {
  std::string gradient = {}, reduced = {}, accumulator = {};
  std::int64_t micro_batches = 1;
};

struct Index {
  std::string id = {};
  std::int64_t step = 0, skipped = 0;
  std::string level = {}, sharding = {};  ///< for people: nothing depends on them
  AdamWConfig adamw = {};                 ///< the modes and the seed; parameters have the rest
  IndexGradients gradients = {};
  std::map<std::string, std::string> metadata = {};
  std::vector<IndexFile> files = {};  ///< of every rank that saved
  std::vector<IndexParam> params = {};
  IndexTensor scales = {};  ///< all TensorScales
  std::vector<IndexExtra> extras = {};
};

nlohmann::json json_of(const IndexTensor& tensor);

/// With a checksum of itself.
std::string index_text(const Index& index);

/// Throws octet::Error naming `file` and field for what is no index, has another checksum, names
/// files that are not its own, or arrays whose ranges do not cover the parameter exactly once.
Index parse_index(const std::string& file, const std::string& text);

/// A value of a JSON text with where it stands, for errors: `file: place: what is wrong`.
class JsonField {
 public:
  JsonField(std::string file, const nlohmann::json& value, std::string place = {})
      : file_(std::move(file)), value_(&value), place_(std::move(place)) {}

  JsonField at(const char* key) const;  ///< of an object; an error where there is none
  std::vector<JsonField> items() const;
  std::string text() const;
  std::int64_t integer() const;  ///< not negative
  std::uint64_t unsigned_integer() const;
  float number() const;
  bool boolean() const;
  std::uint64_t hash() const;  ///< 16 hexadecimal digits
  const nlohmann::json& value() const { return *value_; }

  template <class... Parts>
  [[noreturn]] void refuse(const Parts&... parts) const {
    fail(file_, ": ", place_, place_.empty() ? "" : ": ", parts...);
  }

 private:
  std::string file_;
  const nlohmann::json* value_;
  std::string place_;
};

std::string hex_of(std::uint64_t value);

}  // namespace octet
