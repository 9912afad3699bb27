// SPDX-License-Identifier: Apache-2.0
// The directory that checkpoints are in.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "checkpoint/index.hpp"
#include "octet/checkpoint/checkpoint.hpp"

namespace octet {

/// With those above it, where they are missing; outlasts a loss of power.
void make_directory(const std::string& directory);

/// Of the newest checkpoint, or that which is asked for if it is there. Throws octet::Error.
std::int64_t find_step(const std::string& directory, std::optional<std::int64_t> step);
Index read_index(const std::string& directory, std::int64_t step);

/// What a caller is told of it.
CheckpointInfo info_of(const std::string& directory, const Index& index);

/// Writes an index under a temporary name and flushes it; where that fails nothing is left.
void write_index(const std::string& directory, const Index& index);
/// Renames what write_index() has written, and flushes the directory.
void put_index_in_place(const std::string& directory, const Index& index);

/// Removes all but the `keep` newest checkpoints, oldest first, then remove_unused(). Each
/// checkpoint goes index first, so that what is left of it is no checkpoint.
void remove_old(const std::string& directory, int keep);
/// Removes all files of checkpoints that no index names.
void remove_unused(const std::string& directory);

}  // namespace octet
