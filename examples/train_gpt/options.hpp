// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "model.hpp"
#include "octet/comm/bootstrap.hpp"
#include "octet/comm/gradient_reducer.hpp"
#include "octet/core/tensor_view.hpp"
#include "octet/engine/level.hpp"

namespace train_gpt {

/// What is trained and compared: a level, or "small", which is O2 with octet::small_formats().
struct Setup {
  std::string name;
  octet::Level level = octet::Level::O0;
  std::optional<octet::Formats> formats = {};
};

struct Options {
  std::string data;  ///< empty: the repository's own text
  std::vector<Setup> setups;
  octet::DeviceType device = octet::DeviceType::cpu;
  octet::Launch launch;  ///< of more than one process when a launcher has started this one
  int ranks = 1;
  octet::Schedule schedule = octet::Schedule::after_backward;
  std::int64_t bucket_elements = 0;
  std::optional<bool> windows = {};              ///< EngineConfig::windows
  std::optional<octet::Sharding> sharding = {};  ///< default: the level's
  std::optional<octet::DType> reduced_gradient = {};
  bool offload_states = false;
  int steps = 300;
  GptConfig model;
  int batch = 0;  ///< rows of the global batch
  float lr = 0.0f;
  float clip_grad = 1.0f;  ///< 0: no clipping
  std::uint64_t seed = 0;
  int log_every = 20;
  std::string json;  ///< empty: no file
  /// Folders of checkpoints; empty: none. Saved every so many steps (0: not), and at the end.
  std::string load, save;
  int save_interval = 0;
  int exit_interval = 0;  ///< steps after which this run ends, of those that --steps plans; 0: all

  bool is_launched() const { return launch.size > 1; }
  /// Rows of a micro-batch on a rank.
  int rows_per_pass() const { return batch / ranks / model.micro_batches; }
  std::int64_t tokens_per_step() const { return std::int64_t{batch} * model.context; }
};

/// Reads and checks the command line; what was left out depends on the device. Empty when only
/// --help was asked for and printed. Throws octet::Error naming the option, its value and what is
/// allowed, before anything has started.
std::optional<Options> parse_options(int argc, char** argv);

}  // namespace train_gpt
