// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace train_gpt {

/// A text as bytes; the last 5 % are held out for validation. A window is context + 1 bytes.
class TextData {
 public:
  /// Reads a file, or, for an empty path, the sources and documents of this repository. Throws
  /// octet::Error naming the file when it cannot be read or is too short for the context.
  static TextData load(const std::string& path, std::int64_t context);

  TextData(std::string name, std::vector<std::uint8_t> bytes, std::int64_t context);

  /// Windows of the training part for rows first_row, first_row + 1, ... of the global batch of a
  /// step. They depend on (seed, step, row) only, so every level, device and number of ranks sees
  /// the same batches.
  std::vector<std::uint8_t> training_windows(std::uint64_t seed, std::int64_t step,
                                             std::int64_t first_row, std::int64_t rows) const;
  /// Windows first, first + 1, ... of `total`, spread evenly over the held-out part.
  std::vector<std::uint8_t> validation_windows(std::int64_t first, std::int64_t rows,
                                               std::int64_t total) const;
  /// How many windows to validate on: about one reading of the held-out part, but at most `most`
  /// batches, and whole batches.
  std::int64_t validation_count(std::int64_t batch, std::int64_t most) const;

  const std::string& name() const { return name_; }
  std::int64_t bytes() const { return static_cast<std::int64_t>(bytes_.size()); }

 private:
  std::int64_t window() const { return context_ + 1; }

  std::string name_;
  std::vector<std::uint8_t> bytes_;
  std::int64_t context_;
  std::int64_t training_;  ///< bytes of the training part
};

}  // namespace train_gpt
