// SPDX-License-Identifier: Apache-2.0
#include "checkpoint/save.hpp"

#include <algorithm>
#include <filesystem>
#include <random>
#include <set>

#include "checkpoint/directory.hpp"
#include "checkpoint/layout.hpp"
#include "checkpoint/shown.hpp"
#include "octet/checkpoint/xxh64.hpp"

namespace octet {
namespace {

using nlohmann::json;
namespace fs = std::filesystem;

/// What is hashed and written at a time, small enough to stay in a cache between the two.
constexpr std::size_t kWriteBytes = std::size_t{1} << 20;

bool is_utf8(const json& texts) {
  try {
    (void)texts.dump();
  } catch (const json::exception&) {
    return false;
  }
  return true;
}

void check_options(const SaveOptions& options) {
  require(options.keep >= 1, "SaveOptions::keep is ", options.keep, "; it must be at least 1");
  std::set<std::string> names;
  for (const ExtraState& extra : options.extras) {
    require(!extra.name.empty(), "SaveOptions::extras: a buffer of ", extra.bytes,
            " bytes has no name");
    require(names.insert(extra.name).second, "SaveOptions::extras: two are named \"", extra.name,
            "\"");
    require(extra.data != nullptr || extra.bytes == 0, "SaveOptions::extras: \"", extra.name,
            "\" has a null pointer");
    require(is_utf8(extra.name), "SaveOptions::extras: the name ", shown_text(extra.name),
            " is not valid UTF-8");
  }
  require(is_utf8(options.metadata), "SaveOptions::metadata is not valid UTF-8");
}

// Wide elements first: every tensor is aligned to its elements.
void list_parts(Save& save) {
  for (std::size_t p = 0; p < save.state.params.size(); ++p) {
    const ParamState& param = save.state.params[p];
    for (std::size_t a = 0; a < param.arrays.size(); ++a) {
      for (const StateRange& range : param.arrays[a].owned) {
        save.parts.push_back(
            {.tensor = range_tensor(param, param.arrays[a], range.begin, range.count),
             .data = range.data,
             .param = static_cast<int>(p),
             .array = static_cast<int>(a),
             .begin = range.begin,
             .count = range.count});
      }
    }
  }
  if (save.rank == 0) {
    save.parts.push_back(
        {.tensor = scales_tensor(save.state.scale_count), .data = save.state.scales});
  }
  for (std::size_t i = 0; i < save.options.extras.size(); ++i) {
    const ExtraState& extra = save.options.extras[i];
    save.parts.push_back({.tensor = extra_tensor(extra.name, extra.bytes),
                          .data = extra.data,
                          .extra = static_cast<int>(i)});
  }
  std::stable_sort(save.parts.begin(), save.parts.end(), [](const SavePart& a, const SavePart& b) {
    return file_dtype_bits(a.tensor.dtype) > file_dtype_bits(b.tensor.dtype);
  });
}

/// What must be the same on every rank.
json common_of(const Save& save) {
  json extras = json::array();
  for (const ExtraState& extra : save.options.extras) extras.push_back({extra.name, extra.bytes});
  return {{"step", save.step},
          {"skipped", save.skipped},
          {"SaveOptions::keep", save.options.keep},
          {"SaveOptions::extras", std::move(extras)},
          {"SaveOptions::metadata", save.options.metadata}};
}

void require_equal(const std::vector<json>& fragments) {
  const json& first = fragments[0].at("common");
  for (std::size_t r = 1; r < fragments.size(); ++r) {
    for (const auto& field : first.items()) {
      const json& other = fragments[r].at("common").at(field.key());
      require(other == field.value(), "save_checkpoint: the ranks differ: ", field.key(), " is ",
              field.value().dump(), " on rank 0 and ", other.dump(), " on rank ", r);
    }
  }
}

/// A run that went back would have the newest of two histories taken for its own.
void check_directory(const std::string& directory, std::int64_t step) {
  const std::vector<std::int64_t> steps = checkpoint_steps(directory);
  require(steps.empty() || steps.back() <= step, directory, ": has a checkpoint of step ",
          steps.empty() ? 0 : steps.back(), ", later than this of step ", step,
          "; a run that goes back to an earlier step saves in a directory of its own");
}

json fragment_of(const Save& save) {
  json parts = json::array();
  for (const SavePart& part : save.parts) {
    json one = json_of({save.rank, part.tensor.name, part.hash});
    one["param"] = part.param;
    one["array"] = part.array;
    one["begin"] = part.begin;
    one["count"] = part.count;
    one["extra"] = part.extra;
    parts.push_back(std::move(one));
  }
  return {{"common", common_of(save)}, {"bytes", save.file_bytes}, {"parts", std::move(parts)}};
}

void add_part(Index& index, const json& part) {
  IndexTensor tensor{.file = part.at("file").get<int>(),
                     .name = part.at("tensor").get<std::string>(),
                     .hash = JsonField("", part).at("xxh64").hash()};
  const int p = part.at("param").get<int>(), extra = part.at("extra").get<int>();
  if (p >= 0) {
    index.params[static_cast<std::size_t>(p)]
        .arrays[part.at("array").get<std::size_t>()]
        .ranges.push_back({std::move(tensor), part.at("begin").get<std::int64_t>(),
                           part.at("count").get<std::int64_t>()});
  } else if (extra >= 0) {
    index.extras[static_cast<std::size_t>(extra)].ranks.push_back(std::move(tensor));
  } else {
    index.scales = std::move(tensor);
  }
}

IndexGradients index_gradients(const GradientFormats& formats) {
  return {.gradient = std::string(name_of(formats.gradient)),
          .reduced = std::string(name_of(formats.reduced)),
          .accumulator = std::string(name_of(formats.accumulator)),
          .micro_batches = formats.micro_batches};
}

Index make_index(const Save& save, const std::vector<json>& fragments) {
  Index index{.id = hex_of(save.id),
              .step = save.step,
              .skipped = save.skipped,
              .level = save.level,
              .sharding = save.sharding,
              .adamw = save.state.adamw,
              .gradients = index_gradients(save.state.gradients),
              .metadata = save.options.metadata};
  for (const ParamState& param : save.state.params) {
    IndexParam one{.name = param.name, .shape = {}, .hyper = param.hyper, .arrays = {}};
    for (int i = 0; i < param.shape.rank(); ++i) one.shape.push_back(param.shape[i]);
    for (const StateArray& array : param.arrays) {
      one.arrays.push_back({std::string(array.name), std::string(array.format), {}});
    }
    index.params.push_back(std::move(one));
  }
  for (const ExtraState& extra : save.options.extras) {
    index.extras.push_back({extra.name, extra.bytes, {}});
  }
  for (int rank = 0; rank < save.ranks; ++rank) {
    const json& fragment = fragments[static_cast<std::size_t>(rank)];
    index.files.push_back({rank_file_name(save.step, hex_of(save.id), rank, save.ranks),
                           fragment.at("bytes").get<std::uint64_t>()});
    for (const json& part : fragment.at("parts")) add_part(index, part);
  }
  for (IndexParam& param : index.params) {
    for (IndexArray& array : param.arrays) {
      std::sort(array.ranges.begin(), array.ranges.end(),
                [](const IndexRange& a, const IndexRange& b) { return a.begin < b.begin; });
    }
  }
  return index;
}

/// Every rank says that its file is on the disk; it must be on the one that rank 0 sees.
void check_files(const std::string& directory, const Index& index) {
  for (const IndexFile& file : index.files) {
    const std::string path = path_in(directory, file.name);
    std::error_code error;
    const std::uint64_t bytes = fs::file_size(path, error);
    require(!error && bytes == file.bytes, path, ": its rank wrote ", file.bytes,
            " bytes, but rank 0 sees ", error ? error.message() : std::to_string(bytes),
            "; all ranks must see one directory");
  }
}

}  // namespace

std::string Save::path() const {
  return path_in(directory, rank_file_name(step, hex_of(id), rank, ranks));
}

std::size_t Save::part_bytes() const {
  std::size_t bytes = 0;
  for (const SavePart& part : parts) bytes += part.tensor.bytes;
  return bytes;
}

std::uint64_t open_directory(const std::string& directory, Communicator& comm) {
  make_directory(directory);
  std::string id;
  if (comm.rank() == 0) {
    // commit() tries again, and tells what is in the way.
    (void)problem_of([&] { remove_unused(directory); });
    std::random_device device;
    id = std::to_string((std::uint64_t{device()} << 32) | device());
  }
  return std::stoull(all_gather_text_sync(comm, id).front());
}

Save describe_save(Engine& engine, const Communicator& comm, const std::string& directory,
                   const SaveOptions& options) {
  check_options(options);
  Save save{.directory = directory,
            .level = std::string(name_of(engine.plan().level)),
            .sharding = std::string(name_of(engine.plan().sharding)),
            .options = options,
            .state = engine.state(),
            .rank = comm.rank(),
            .ranks = comm.size()};
  require(engine.plan().ranks == save.ranks, "save_checkpoint: the communicator has ", save.ranks,
          " ranks, the engine ", engine.plan().ranks, "; it must be the engine's");
  list_parts(save);
  return save;
}

void write_rank_file(Save& save, const AdamwScalars& scalars, const PartSource& source) {
  save.step = scalars.step;
  save.skipped = scalars.skipped;
  make_directory(save.directory);  // who opened it may have been gone for long
  if (save.rank == 0) check_directory(save.directory, save.step);
  std::vector<FileTensor> tensors;
  for (const SavePart& part : save.parts) tensors.push_back(part.tensor);
  SafetensorsWriter writer(save.path(), std::move(tensors),
                           header_metadata(save.step, hex_of(save.id), save.rank, save.ranks));
  for (SavePart& part : save.parts) {
    Xxh64 sum;
    for (std::size_t at = 0; at < part.tensor.bytes; at += kWriteBytes) {
      const std::size_t bytes = std::min<std::size_t>(kWriteBytes, part.tensor.bytes - at);
      const void* data = source(part, at, bytes);
      sum.add(data, bytes);
      writer.write(data, bytes);
    }
    part.hash = sum.value();
  }
  save.file_bytes = writer.file_bytes();
  writer.finish();
}

CheckpointInfo commit(Save& save, Communicator& comm, const std::string& problem) {
  Index index;
  try {
    set_up_together_sync(comm, [&] {
      require(problem.empty(), problem);
      std::vector<json> fragments;
      for (const std::string& text : all_gather_text_sync(comm, fragment_of(save).dump())) {
        fragments.push_back(json::parse(text));
      }
      require_equal(fragments);
      index = make_index(save, fragments);
    });
    set_up_together_sync(comm, [&] {
      if (save.rank != 0) return;
      parse_index(index_name(save.step), index_text(index));  // a reader's rules are the writer's
      check_files(save.directory, index);
      write_index(save.directory, index);
    });
  } catch (const SetUpError&) {
    // The index will never be in place, so this file will never be part of a checkpoint.
    std::error_code ignored;
    fs::remove(save.path(), ignored);
    throw;
  }
  CheckpointInfo info = info_of(save.directory, index);
  set_up_together_sync(comm, [&] {
    if (save.rank != 0) return;
    put_index_in_place(save.directory, index);
    info.not_removed = problem_of([&] { remove_old(save.directory, save.options.keep); });
  });
  return info;
}

}  // namespace octet
