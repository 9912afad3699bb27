// SPDX-License-Identifier: Apache-2.0
// What was measured: of each backend and problem the fastest way and its time, in memory and, if
// wanted, in a text file that several processes may add to.
#pragma once

#include <string>
#include <unordered_map>

namespace octet::detail {

struct Measured {
  std::string candidate;  ///< empty: the backend has just one way
  double microseconds = 0.0;
};

class RankingFile {
 public:
  /// Reads a file and adds to it from now on. One that is not there is made by the first add().
  /// Throws octet::Error naming file and line for what is not a ranking.
  void open(const std::string& path);
  /// Null when nothing is known.
  const Measured* find(const std::string& key) const;
  /// Keeps a measurement; the newest of a key counts. Throws octet::Error if it cannot be written,
  /// or a candidate that is not one line without tabs.
  void add(const std::string& key, const Measured& measured);

 private:
  std::string path_;
  std::unordered_map<std::string, Measured> entries_;
};

/// What a measurement depends on, as one line without tabs at its ends.
std::string ranking_key(const std::string& device, const std::string& backend,
                        const std::string& version, const std::string& problem);

}  // namespace octet::detail
