// SPDX-License-Identifier: Apache-2.0
// What any bytes must do to the readers of indexes, of checkpoints and of hubs' weights: pass and
// then hold what was promised, or throw octet::Error. For the fuzzer and for the test that replays
// its corpus.
#pragma once

#include <filesystem>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <string_view>

#include "checkpoint/index.hpp"
#include "fuzz/attempt.hpp"
#include "octet/checkpoint/weights.hpp"
#include "octet/checkpoint/xxh64.hpp"

namespace octet::test {

inline void check_promises(const Index& index) {
  const auto is_in = [&](const IndexTensor& tensor) {
    return tensor.file >= 0 && static_cast<std::size_t>(tensor.file) < index.files.size();
  };
  promise(index.step >= 0 && index.skipped >= 0, "negative steps were let through");
  promise(!index.files.empty() && is_in(index.scales), "a file that is not there was let through");
  for (const IndexFile& file : index.files) {
    promise(file.name.find('/') == std::string::npos, "a path was let through");
  }
  for (const IndexParam& param : index.params) {
    std::int64_t numel = 1;
    for (std::int64_t dim : param.shape) {
      promise(dim >= 0 && !__builtin_mul_overflow(numel, dim, &numel), "a shape was let through");
    }
    for (const IndexArray& array : param.arrays) {
      std::int64_t end = 0;
      for (const IndexRange& range : array.ranges) {
        promise(is_in(range.tensor) && range.begin == end && range.count > 0, "a range is wrong");
        end += range.count;
      }
      promise(end == numel, "ranges do not cover the parameter");
    }
  }
  for (const IndexExtra& extra : index.extras) {
    promise(extra.ranks.size() == index.files.size(), "an extra is not of all ranks");
    for (const IndexTensor& tensor : extra.ranks) promise(is_in(tensor), "an extra is nowhere");
  }
}

/// The text of an index around a content, with its checksum; empty for what is no content that can
/// be written as text. Without it no change of a content would come behind the checksum.
inline std::string index_around(std::string_view content) {
  using nlohmann::json;
  try {
    const json value = json::parse(content, [](int depth, json::parse_event_t, const json&) {
      if (depth > 100) throw std::length_error("deep");
      return true;
    });
    const std::string text = value.dump();
    return json{{"format", "octet checkpoint"},
                {"version", 1},
                {"xxh64", hex_of(xxh64(text.data(), text.size()))},
                {"content", value}}
        .dump();
  } catch (const std::exception&) {
    return {};
  }
}

/// Takes the bytes for a whole index, for the content of one, and for a hub's. True where one of
/// them passed.
inline bool check_index(const std::string& bytes) {
  bool passed = takes([&] {
    const Index index = parse_index("fuzz", bytes);
    check_promises(index);
    check_promises(parse_index("again", index_text(index)));
  });
  const std::string around = index_around(bytes);
  if (!around.empty()) passed |= takes([&] { check_promises(parse_index("fuzz", around)); });
  passed |= takes([&] {
    for (const auto& [name, file] : parse_weight_index("fuzz", bytes)) {
      const std::filesystem::path path = std::filesystem::path(file).lexically_normal();
      promise(!path.is_absolute() && *path.begin() != "..", "a path out of the folder passed");
    }
  });
  return passed;
}

}  // namespace octet::test
