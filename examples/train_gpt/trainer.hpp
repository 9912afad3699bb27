// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "data.hpp"
#include "options.hpp"
#include "progress.hpp"
#include "ranks.hpp"

namespace train_gpt {

/// A figure that the plan predicted and the run measured; the mean over the ranks.
struct Figure {
  double measured = 0.0;
  double planned = 0.0;
};

/// What one level came to.
struct RunResult {
  std::string name;  ///< of the setup
  octet::Sharding sharding = octet::Sharding::none;
  int ranks = 1;
  octet::Schedule schedule = octet::Schedule::after_backward;
  float clip_grad = 0.0f;
  int micro_batches = 1;
  octet::DeviceType device = octet::DeviceType::cpu;
  std::int64_t parameters = 0;
  Fp8Settings fp8;
  double validation_loss = 0.0;
  std::vector<float> losses;     ///< of every step, the mean over the ranks
  Figure state_bytes_managed;    ///< per FP8-managed parameter
  Figure state_bytes_all;        ///< per parameter
  Figure wire_bytes;             ///< per parameter and step
  std::uint64_t peak_bytes = 0;  ///< the most that any rank had allocated at one time
  double fp8_gemms_per_step = 0.0;
  double converted_gemms_per_step = 0.0;  ///< GemmCounts::with_conversion
  double step_seconds = 0.0;              ///< median
  std::int64_t skipped_steps = 0;
  /// Where the measured bytes are not the planned ones: must be empty.
  std::vector<std::string> disagreements;
};

/// Trains one level from scratch and validates it, on ranks that are threads, or, if `launched` is
/// not null, as that one rank. Every process has the same result; rank 0 shows the progress. Throws
/// octet::Error naming the rank when one fails.
RunResult train(const Options& options, const Setup& setup, const TextData& data,
                Progress& progress, LaunchedRank* launched);

/// Learning rate of a step: linear warm-up over the first tenth (at most 100 steps), then half a
/// cosine down to a tenth of the peak.
float learning_rate(float peak, int step, int steps);

}  // namespace train_gpt
