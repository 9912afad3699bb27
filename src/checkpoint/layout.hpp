// SPDX-License-Identifier: Apache-2.0
// Which file and which tensor a piece of the state has.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "octet/checkpoint/checkpoint.hpp"
#include "octet/checkpoint/safetensors.hpp"
#include "octet/engine/state.hpp"

namespace octet {

/// "octet-00000100.json".
std::string index_name(std::int64_t step);
/// "octet-00000100-0123456789abcdef-rank-00003-of-00008.safetensors".
std::string rank_file_name(std::int64_t step, const std::string& id, int rank, int ranks);
/// The step of an index of this name; nothing for any other name.
std::optional<std::int64_t> step_of_index(std::string_view name);
/// Whether a file of this name belongs to a checkpoint, or to one that was never finished. An index
/// belongs to nothing.
bool is_checkpoint_file(std::string_view name);
/// "__metadata__" of a rank's file.
std::map<std::string, std::string> header_metadata(std::int64_t step, const std::string& id,
                                                   int rank, int ranks);
std::string path_in(const std::string& directory, const std::string& name);

/// Elements [begin, begin + count) of an array as a tensor of a file: codes in the parameter's
/// shape where they are whole rows, scales in a row. No two ranges, nor kinds of state, have one
/// name.
FileTensor range_tensor(const ParamState& param, const StateArray& array, std::int64_t begin,
                        std::int64_t count);
/// [4, parameters, 4] f32: weight, master, m and v of every parameter, of each TensorScale the four
/// words as they lie in memory.
FileTensor scales_tensor(std::int64_t scale_count);
FileTensor extra_tensor(const std::string& name, std::uint64_t bytes);

}  // namespace octet
