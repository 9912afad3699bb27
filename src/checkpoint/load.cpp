// SPDX-License-Identifier: Apache-2.0
// Loading: agree on the checkpoint, compare it with the engine, check all data, and only then read.
#include <algorithm>
#include <filesystem>
#include <map>
#include <optional>

#include "checkpoint/directory.hpp"
#include "checkpoint/host_buffer.hpp"
#include "checkpoint/layout.hpp"
#include "checkpoint/matches.hpp"
#include "checkpoint/shown.hpp"
#include "octet/checkpoint/xxh64.hpp"

namespace octet {
namespace {

/// Calls visit(held, range, begin, end) for the elements of an array that both have.
template <class Visit>
void visit_common(const StateArray& array, const IndexArray& saved, const Visit& visit) {
  for (const StateRange& held : array.held) {
    for (const IndexRange& range : saved.ranges) {
      const std::int64_t begin = std::max(held.begin, range.begin);
      const std::int64_t end = std::min(held.begin + held.count, range.begin + range.count);
      if (begin < end) visit(held, range, begin, end);
    }
  }
}

/// A tensor that the index names, as it must be in its file.
struct Expected {
  const IndexTensor* index = nullptr;
  FileTensor tensor = {};
};

class Load {
 public:
  Load(Engine& engine, Communicator& comm, std::string directory, const LoadOptions& options)
      : engine_(engine), comm_(comm), directory_(std::move(directory)), options_(options) {}

  /// Together; changes nothing of the engine.
  void check();
  /// Together.
  void read();
  CheckpointInfo info() const { return info_of(directory_, index_); }

 private:
  void agree();
  void list_expected();
  void add_expected(const IndexTensor& index, FileTensor tensor);
  void check_data();
  /// Opens every file that this rank reads, and takes the memory that reading needs.
  void get_ready();
  int source_of_extras() const;
  void check_hash(const Expected& expected);
  const SafetensorsReader& file(int rank);
  void check_header(const SafetensorsReader& reader, int rank) const;
  void read_array(const StateArray& array, const IndexArray& saved);
  void read_tensor(const IndexTensor& tensor, std::uint64_t offset, std::uint64_t bytes, void* to);
  void read_scalars();

  Engine& engine_;
  Communicator& comm_;
  std::string directory_;
  const LoadOptions& options_;
  std::optional<EngineState> state_;
  Buffer piece_;  ///< host memory, on the way to a device
  Index index_;
  std::vector<std::vector<Expected>> expected_;  ///< of every file
  std::map<int, SafetensorsReader> files_;
};

// Rank 0 says which is the newest: the others may see an older directory.
void Load::agree() {
  const std::string mine =
      comm_.rank() == 0 ? std::to_string(find_step(directory_, options_.step)) : "";
  const std::string step = all_gather_text_sync(comm_, mine)[0];
  index_ = read_index(directory_, std::stoll(step));
  const std::vector<std::string> ids = all_gather_text_sync(comm_, index_.id);
  for (std::size_t r = 1; r < ids.size(); ++r) {
    require(ids[r] == ids[0], directory_, ": step ", step, " has id ", ids[0], " on rank 0 and ",
            ids[r], " on rank ", r, "; all ranks must see one directory");
  }
}

void Load::check() {
  state_.emplace(engine_.state());
  require(engine_.plan().ranks == comm_.size(), "load_checkpoint: the communicator has ",
          comm_.size(), " ranks, the engine ", engine_.plan().ranks, "; it must be the engine's");
  require(state_->whole_units.empty(), "load_checkpoint: of the units, ", state_->whole_units,
          " are whole; all must have been released first, because what they hold changes");
  agree();
  const std::string path = info().index;
  require_match(path, index_, *state_, options_.change_hyper_parameters);
  require_extras(path, index_, options_);
  list_expected();
  check_data();
  get_ready();
}

// What can fail on one rank alone must not come when others have begun to change.
void Load::get_ready() {
  for (std::size_t p = 0; p < state_->params.size(); ++p) {
    const ParamState& param = state_->params[p];
    for (std::size_t a = 0; a < param.arrays.size(); ++a) {
      visit_common(param.arrays[a], index_.params[p].arrays[a],
                   [this](const StateRange&, const IndexRange& saved, std::int64_t, std::int64_t) {
                     file(saved.tensor.file);
                   });
    }
  }
  file(index_.scales.file);
  if (!options_.extras.empty()) file(source_of_extras());
  const Context& ctx = state_->ctx;
  if (ctx.device().type != DeviceType::cpu) piece_ = host_buffer(ctx, kCopyBytes);
}

int Load::source_of_extras() const { return comm_.rank() % static_cast<int>(index_.files.size()); }

void Load::list_expected() {
  expected_.resize(index_.files.size());
  for (std::size_t p = 0; p < index_.params.size(); ++p) {
    const ParamState& param = state_->params[p];
    for (std::size_t a = 0; a < param.arrays.size(); ++a) {
      for (const IndexRange& range : index_.params[p].arrays[a].ranges) {
        add_expected(range.tensor, range_tensor(param, param.arrays[a], range.begin, range.count));
      }
    }
  }
  add_expected(index_.scales, scales_tensor(state_->scale_count));
  for (const IndexExtra& extra : index_.extras) {
    for (const IndexTensor& tensor : extra.ranks) {
      add_expected(tensor, extra_tensor(extra.name, extra.bytes));
    }
  }
}

// Names follow from what a tensor is, so no two are one.
void Load::add_expected(const IndexTensor& index, FileTensor tensor) {
  require(index.name == tensor.name, info().index, ": content: a tensor is named ",
          shown_text(index.name), "; by what it holds it must be ", shown_text(tensor.name));
  expected_[static_cast<std::size_t>(index.file)].push_back({&index, std::move(tensor)});
}

// Headers by turns, data in equal parts.
void Load::check_data() {
  const int ranks = comm_.size(), rank = comm_.rank();
  std::uint64_t total = 0, begin = 0;
  for (const auto& list : expected_) {
    for (const Expected& e : list) total += e.tensor.bytes;
  }
  const std::uint64_t share = total / static_cast<std::uint64_t>(ranks) + 1;
  for (std::size_t f = 0; f < expected_.size(); ++f) {
    if (static_cast<int>(f) % ranks == rank) file(static_cast<int>(f));
    for (const Expected& e : expected_[f]) {
      if (begin / share == static_cast<std::uint64_t>(rank)) check_hash(e);
      begin += e.tensor.bytes;
    }
  }
}

void Load::check_hash(const Expected& expected) {
  const SafetensorsReader& reader = file(expected.index->file);
  const FileTensor& tensor = reader.at(expected.index->name);
  std::vector<std::byte> piece(std::min<std::uint64_t>(tensor.bytes, std::uint64_t{1} << 20));
  Xxh64 sum;
  for (std::uint64_t at = 0; at < tensor.bytes; at += piece.size()) {
    const std::uint64_t bytes = std::min<std::uint64_t>(piece.size(), tensor.bytes - at);
    reader.read(tensor, at, bytes, piece.data());
    sum.add(piece.data(), bytes);
  }
  require(sum.value() == expected.index->hash, reader.path(), ": tensor ", shown_text(tensor.name),
          ": its data have the checksum ", hex_of(sum.value()), "; by the index it is ",
          hex_of(expected.index->hash), ", so they are damaged");
}

const SafetensorsReader& Load::file(int rank) {
  const auto found = files_.find(rank);
  if (found != files_.end()) return found->second;
  const IndexFile& entry = index_.files[static_cast<std::size_t>(rank)];
  const std::string path = path_in(directory_, entry.name);
  std::error_code error;
  const std::uint64_t bytes = std::filesystem::file_size(path, error);
  require(!error, path, ": the file of rank ", rank, " is missing: ", error.message());
  require(bytes == entry.bytes, path, ": has ", bytes, " bytes; by the index it has ", entry.bytes);
  SafetensorsReader reader(path);
  check_header(reader, rank);
  return files_.emplace(rank, std::move(reader)).first->second;
}

void Load::check_header(const SafetensorsReader& reader, int rank) const {
  const auto expected_metadata =
      header_metadata(index_.step, index_.id, rank, static_cast<int>(index_.files.size()));
  for (const auto& [key, value] : expected_metadata) {
    const auto found = reader.metadata().find(key);
    require(found != reader.metadata().end(), reader.path(), ": __metadata__ has no \"", key, "\"");
    require(found->second == value, reader.path(), ": __metadata__: ", key, " is ",
            shown_text(found->second), "; that of the index is \"", value,
            "\": the files are not of one save");
  }
  const std::vector<Expected>& expected = expected_[static_cast<std::size_t>(rank)];
  require(reader.tensors().size() == expected.size(), reader.path(), ": has ",
          reader.tensors().size(), " tensors; by the index it has ", expected.size());
  for (const Expected& e : expected) {
    const FileTensor& tensor = reader.at(e.tensor.name);
    require(tensor.dtype == e.tensor.dtype, reader.path(), ": tensor ", shown_text(tensor.name),
            ": dtype is ", tensor.dtype, "; it must be ", e.tensor.dtype);
    require(tensor.shape == e.tensor.shape && tensor.bytes == e.tensor.bytes, reader.path(),
            ": tensor ", shown_text(tensor.name), ": shape is ", shown_shape(tensor.shape),
            "; it must be ", shown_shape(e.tensor.shape));
  }
}

void Load::read() {
  for (std::size_t p = 0; p < state_->params.size(); ++p) {
    const ParamState& param = state_->params[p];
    for (std::size_t a = 0; a < param.arrays.size(); ++a) {
      read_array(param.arrays[a], index_.params[p].arrays[a]);
    }
  }
  read_tensor(index_.scales, 0, scales_tensor(state_->scale_count).bytes, state_->scales);
  const auto source = static_cast<std::size_t>(source_of_extras());
  for (const ExtraState& extra : options_.extras) {
    read_tensor(find_extra(index_, extra.name)->ranks[source], 0, extra.bytes, extra.data);
  }
  read_scalars();
  engine_.state_loaded();
}

void Load::read_array(const StateArray& array, const IndexArray& saved) {
  visit_common(
      array, saved,
      [&](const StateRange& held, const IndexRange& range, std::int64_t begin, std::int64_t end) {
        // An entry that is cut short is the last of the parameter.
        read_tensor(range.tensor, array.bytes(begin - range.begin), array.bytes(end - begin),
                    static_cast<std::byte*>(held.data) + array.bytes(begin - held.begin));
      });
}

void Load::read_tensor(const IndexTensor& tensor, std::uint64_t offset, std::uint64_t bytes,
                       void* to) {
  const SafetensorsReader& reader = file(tensor.file);
  const FileTensor& from = reader.at(tensor.name);
  const Context& ctx = state_->ctx;
  if (ctx.device().type == DeviceType::cpu) return reader.read(from, offset, bytes, to);
  for (std::uint64_t at = 0; at < bytes; at += kCopyBytes) {
    const std::uint64_t count = std::min<std::uint64_t>(kCopyBytes, bytes - at);
    reader.read(from, offset + at, count, piece_.data());
    copy_bytes(ctx, static_cast<std::byte*>(to) + at, piece_.data(), count);
    ctx.synchronize();  // the piece is filled again
  }
}

void Load::read_scalars() {
  AdamwScalars scalars;
  scalars.step = index_.step;
  scalars.skipped = index_.skipped;
  copy_bytes(state_->ctx, state_->scalars, &scalars, sizeof(scalars));
  state_->ctx.synchronize();
}

}  // namespace

CheckpointInfo load_checkpoint(Engine& engine, Communicator& comm, const std::string& directory,
                               const LoadOptions& options) {
  Load load(engine, comm, directory, options);
  set_up_together_sync(comm, [&] { load.check(); });
  try {
    set_up_together_sync(comm, [&] { load.read(); });
  } catch (const SetUpError& error) {
    fail(error.what(),
         " (after all was checked: the engine is partly loaded, and of no use until "
         "another load succeeds)");
  }
  return load.info();
}

}  // namespace octet
