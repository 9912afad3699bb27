// SPDX-License-Identifier: Apache-2.0
// Runs that are saved by N ranks and go on with M, beside runs that were never interrupted.
#include <filesystem>
#include <map>
#include <sstream>
#include <string>

#include "octet/checkpoint/safetensors.hpp"
#include "support/catch.hpp"
#include "support/checkpoint_run.hpp"
#include "support/compare.hpp"
#include "support/errors.hpp"
#include "support/folder.hpp"

namespace octet::test {
namespace {

constexpr int kSavedAt = 3, kEnd = 6;
constexpr int kRanks[] = {1, 2, 3, 4, 5, 6, 7, 8};
constexpr Sharding kShardings[] = {Sharding::none, Sharding::optimizer, Sharding::gradients};

EngineConfig config_of(Level level, Sharding sharding, std::int64_t bucket_elements) {
  return {.level = level,
          .sharding = sharding,
          .adamw = {.weight_decay = 0.1f, .seed = 5},
          .reduced_gradient = formats_of(level).gradient,  // what all shardings can have
          .bucket_elements = bucket_elements};
}

EngineConfig with_formats(EngineConfig config, const Formats& formats) {
  config.formats = formats;
  return config;
}

/// A run that never stops, as it is at kSavedAt and at kEnd.
const LegResult& whole_run(const EngineConfig& config, int ranks, bool common, DeviceType device,
                           const std::vector<SavedParam>& params) {
  static std::map<std::string, LegResult> kept;
  const StateFormats formats = config.formats.value_or(formats_of(config.level)).state;
  std::ostringstream key;
  key << name_of(config.level) << name_of(*config.sharding) << name_of(formats.weight)
      << name_of(formats.m) << name_of(config.reduced_gradient.value_or(DType::f32))
      << config.bucket_elements << config.offload_states << config.windows.value_or(false) << ranks
      << common << static_cast<int>(device) << to_string(params[0].shape);
  const auto found = kept.find(key.str());
  if (found != kept.end()) return found->second;
  return kept[key.str()] = run_leg({.config = config,
                                    .ranks = ranks,
                                    .end = kEnd,
                                    .watched = kSavedAt,
                                    .common = common,
                                    .device = device,
                                    .params = params});
}

/// The run that goes on, beside one with the same ranks and configuration that never stopped.
void check_resume(const std::string& directory, const EngineConfig& config, int ranks, bool common,
                  DeviceType device = DeviceType::cpu,
                  const std::vector<SavedParam>& params = saved_params()) {
  const LegResult& whole = whole_run(config, ranks, common, device, params);
  const LegResult resumed =
      run_leg({.config = config,
               .ranks = ranks,
               .begin = kSavedAt,
               .end = kEnd,
               .common = common,
               .device = device,
               .params = params,
               .before = [&](Engine& engine, Communicator& comm) {
                 const CheckpointInfo info = load_checkpoint(engine, comm, directory);
                 require(info.step == kSavedAt && info.skipped == 0, "wrong step ", info.step);
               }});
  for (std::size_t r = 0; r < static_cast<std::size_t>(ranks); ++r) {
    INFO("rank " << r << " of " << ranks);
    REQUIRE(first_difference(resumed.before[r], whole.watched[r]) == "");
    REQUIRE(first_difference(resumed.after[r], whole.after[r]) == "");
    REQUIRE(first_difference(resumed.after[r], resumed.before[r]) != "");
  }
}

void save(const std::string& directory, const EngineConfig& config, int ranks, bool common,
          DeviceType device = DeviceType::cpu,
          const std::vector<SavedParam>& params = saved_params()) {
  run_leg({.config = config,
           .ranks = ranks,
           .end = kSavedAt,
           .common = common,
           .device = device,
           .params = params,
           .after = [&](Engine& engine, Communicator& comm) {
             save_checkpoint(engine, comm, directory);
           }});
}

Formats matrix_formats(WeightFormat weight) {
  Formats formats = formats_of(Level::O2);
  formats.state.weight = weight;
  return formats;
}

}  // namespace

TEST_CASE("with as many ranks and gradients of their own a run goes on with its bits") {
  for (DeviceType device : rank_devices()) {
    for (int ranks : kRanks) {
      for (Level level : {Level::O0, Level::O1, Level::O2, Level::O3}) {
        const EngineConfig config = config_of(level, sharding_of(level), 20000);
        INFO(name_of(level) << " on " << ranks << " ranks");
        const Folder folder;
        save(folder.file("run"), config, ranks, false, device);
        check_resume(folder.file("run"), config, ranks, false, device);
      }
      for (Sharding sharding : {Sharding::optimizer, Sharding::gradients}) {
        const EngineConfig small =
            with_formats(config_of(Level::O2, sharding, std::int64_t{1} << 20), small_formats());
        INFO("small formats, " << name_of(sharding) << ", on " << ranks << " ranks");
        const Folder folder;
        save(folder.file("run"), small, ranks, false, device);
        check_resume(folder.file("run"), small, ranks, false, device);
      }
    }
  }
}

TEST_CASE("saved by N ranks, a run goes on with M, another sharding and other buckets") {
  int pair = 0;
  for (int saved_by : kRanks) {
    for (int ranks : kRanks) {
      // Each pair of ranks with another pair of shardings.
      const Sharding from = kShardings[pair % 3], to = kShardings[pair / 3 % 3];
      ++pair;
      for (const Formats& formats : {formats_of(Level::O2), small_formats()}) {
        INFO("saved by " << saved_by << ", " << name_of(from) << ", loaded by " << ranks << ", "
                         << name_of(to) << ", m in " << name_of(formats.state.m));
        const Folder folder;
        save(folder.file("run"), with_formats(config_of(Level::O2, from, 20000), formats), saved_by,
             true);
        check_resume(folder.file("run"), with_formats(config_of(Level::O2, to, 1), formats), ranks,
                     true);
        check_resume(folder.file("run"), with_formats(config_of(Level::O2, from, 1 << 20), formats),
                     ranks, true);
      }
    }
  }
}

TEST_CASE("sharded weights are saved as they are and loaded with any sharding, and back") {
  using S = Sharding;
  for (const Formats& formats :
       {formats_of(Level::O2), small_formats(), matrix_formats(WeightFormat::e4m3_tile)}) {
    for (const auto& [from, to] : {std::pair{S::parameters, S::none},
                                   {S::none, S::parameters},
                                   {S::gradients, S::parameters},
                                   {S::parameters, S::optimizer},
                                   {S::parameters, S::parameters}}) {
      for (const auto& [saved_by, ranks] : {std::pair{1, 3}, {3, 2}, {2, 5}, {4, 4}}) {
        INFO(name_of(formats.state.weight)
             << ", m in " << name_of(formats.state.m) << ": sharding " << name_of(from) << " of "
             << saved_by << " ranks, then " << name_of(to) << " of " << ranks);
        const Folder folder;
        save(folder.file("run"), with_formats(config_of(Level::O2, from, 20000), formats), saved_by,
             true);
        check_resume(folder.file("run"), with_formats(config_of(Level::O2, to, 20000), formats),
                     ranks, true);
      }
    }
  }
}

TEST_CASE("a resume that would change how gradients are reduced is refused, by all ranks") {
  constexpr int kTogether = 3;
  const Folder folder;
  const std::string directory = folder.file("run");
  EngineConfig whole = config_of(Level::O2, Sharding::none, 20000);
  whole.reduced_gradient.reset();
  save(directory, whole, kTogether, false);
  for (Sharding sharding : {Sharding::optimizer, Sharding::gradients, Sharding::parameters}) {
    INFO(name_of(sharding));
    EngineConfig cut = config_of(Level::O2, sharding, 20000);
    cut.reduced_gradient.reset();
    std::vector<std::string> errors(kTogether);
    run_leg({.config = cut, .ranks = kTogether, .before = [&](Engine& engine, auto& comm) {
               const Bytes old = held_bytes(engine, comm.context());
               errors[static_cast<std::size_t>(comm.rank())] =
                   error_of([&] { load_checkpoint(engine, comm, directory); });
               require(held_bytes(engine, comm.context()) == old, "the engine has changed");
               load_checkpoint(engine, comm, directory, {.change_hyper_parameters = true});
             }});
    for (const std::string& error : errors) {
      CHECK(missing(error, {"content.gradients", "reduced was \"e4m3\"", "has \"f32\"",
                            "EngineConfig::reduced_gradient", "change_hyper_parameters"}) == "");
    }
    // With the value that the run had its bits are those of all shardings.
    cut.reduced_gradient = DType::e4m3;
    check_resume(directory, cut, kTogether, false);
  }
}

TEST_CASE("weights with scales of blocks and transposed copies go on too") {
  for (DeviceType device : rank_devices()) {
    for (WeightFormat weight : {WeightFormat::e4m3_and_transpose, WeightFormat::e4m3_row_block,
                                WeightFormat::e4m3_tile, WeightFormat::e4m3_tile_and_transpose}) {
      const EngineConfig config =
          with_formats(config_of(Level::O2, Sharding::none, 20000), matrix_formats(weight));
      for (const auto& [saved_by, ranks] : {std::pair{1, 3}, {3, 1}, {2, 2}, {5, 2}}) {
        INFO(name_of(weight) << " saved by " << saved_by << ", loaded by " << ranks);
        const Folder folder;
        save(folder.file("run"), config, saved_by, true, device);
        check_resume(folder.file("run"), config, ranks, true, device);
      }
    }
  }
}

TEST_CASE("transposed copies go on with any sharding, made anew by every rank") {
  using S = Sharding;
  const auto config = [](WeightFormat weight, Sharding sharding) {
    return with_formats(config_of(Level::O2, sharding, 20000), matrix_formats(weight));
  };
  const std::vector<SavedParam> params = even_params();
  for (DeviceType device : rank_devices()) {
    for (WeightFormat weight :
         {WeightFormat::e4m3_and_transpose, WeightFormat::e4m3_tile_and_transpose}) {
      for (const auto& [from, to] : {std::pair{S::optimizer, S::none},
                                     {S::none, S::gradients},
                                     {S::gradients, S::optimizer},
                                     {S::optimizer, S::parameters},
                                     {S::parameters, S::gradients}}) {
        for (const auto& [saved_by, ranks] : {std::pair{1, 3}, {3, 2}, {2, 5}}) {
          INFO(name_of(weight) << ": sharding " << name_of(from) << " of " << saved_by
                               << " ranks, then " << name_of(to) << " of " << ranks);
          const Folder folder;
          save(folder.file("run"), config(weight, from), saved_by, true, device, params);
          check_resume(folder.file("run"), config(weight, to), ranks, true, device, params);
        }
      }
      EngineConfig windows = config(weight, S::optimizer);
      windows.windows = device == DeviceType::cpu;
      const Folder folder;
      save(folder.file("run"), config(weight, S::gradients), 2, true, device, params);
      check_resume(folder.file("run"), windows, 3, true, device, params);
    }
  }
}

TEST_CASE("weights that lie in a window are saved and loaded too") {
  EngineConfig apart = config_of(Level::O2, Sharding::optimizer, 20000);
  apart.windows = false;
  EngineConfig together = apart;
  together.windows = true;
  const Folder folder;
  save(folder.file("together"), together, 3, true);
  check_resume(folder.file("together"), apart, 2, true);
  save(folder.file("apart"), apart, 2, true);
  check_resume(folder.file("apart"), together, 3, true);
}

TEST_CASE("states in host memory are saved and loaded too") {
  for (DeviceType device : rank_devices()) {
    EngineConfig near =
        with_formats(config_of(Level::O2, Sharding::optimizer, 20000), small_formats());
    EngineConfig far = near;
    far.offload_states = true;
    const Folder folder;
    save(folder.file("far"), far, 2, true, device);
    check_resume(folder.file("far"), near, 3, true, device);
    check_resume(folder.file("far"), far, 2, true, device);
    save(folder.file("near"), near, 3, true, device);
    check_resume(folder.file("near"), far, 1, true, device);
  }
}

TEST_CASE("a transposed copy is no state: it may come and go") {
  const auto config = [](WeightFormat weight, Sharding sharding) {
    return with_formats(config_of(Level::O2, sharding, 20000), matrix_formats(weight));
  };
  for (const auto& [with, without] :
       {std::pair{WeightFormat::e4m3_and_transpose, WeightFormat::e4m3},
        {WeightFormat::e4m3_tile_and_transpose, WeightFormat::e4m3_tile}}) {
    INFO(name_of(with));
    const Folder folder;
    save(folder.file("with"), config(with, Sharding::none), 2, true);
    check_resume(folder.file("with"), config(without, Sharding::optimizer), 3, true);
    save(folder.file("without"), config(without, Sharding::optimizer), 3, true);
    check_resume(folder.file("without"), config(with, Sharding::none), 2, true);
  }
}

TEST_CASE("all states have their format in the file, and no element is written twice") {
  for (int ranks : {1, 3, 8}) {
    for (Sharding sharding : {Sharding::none, Sharding::optimizer}) {
      const Folder folder;
      const std::string directory = folder.file("run");
      save(directory, with_formats(config_of(Level::O2, sharding, 20000), small_formats()), ranks,
           true);
      std::map<std::string, std::int64_t> elements;
      std::uint64_t bytes = 0;
      const CheckpointInfo info = read_checkpoint_info(directory);
      CHECK(info.ranks == ranks);
      for (const auto& entry : std::filesystem::directory_iterator(directory)) {
        if (entry.path().extension() != ".safetensors") continue;
        const SafetensorsReader reader(entry.path().string());
        for (const FileTensor& tensor : reader.tensors()) {
          bytes += tensor.bytes;
          if (tensor.name == "scales") continue;
          std::string array = tensor.name.substr(tensor.name.find('.') + 1);
          array = array.substr(0, array.find('.'));
          const bool managed = tensor.name.starts_with("embedding") ||
                               tensor.name.starts_with("odd") || tensor.name.starts_with("wide");
          INFO(tensor.name);
          CHECK(tensor.dtype == (!managed || array.ends_with("_blocks") ? "F32"
                                 : array == "master"                    ? "I8"
                                                                        : "F8_E4M3"));
          if (managed) elements[array] += static_cast<std::int64_t>(numel_of(tensor));
        }
      }
      const std::int64_t managed = 300 * 97 + 129 * 131 + 32 * 640;
      for (const char* array : {"weight", "master", "m", "v"}) CHECK(elements[array] == managed);
      // Bytes of a state: 4 and two scales per 128; the rest has 12.
      std::int64_t blocks = 0, rest = 0;
      for (const SavedParam& param : saved_params()) {
        const bool is_managed = param.shape.rank() == 2 && param.shape.numel() >= 4096;
        if (is_managed) blocks += (param.shape.numel() + 127) / 128;
        if (!is_managed) rest += param.shape.numel();
      }
      CHECK(bytes == static_cast<std::uint64_t>(4 * managed + 8 * blocks + 12 * rest) +
                         4 * 16 * saved_params().size());
    }
  }
}

}  // namespace octet::test
