// SPDX-License-Identifier: Apache-2.0
#include "trainer.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <mutex>
#include <numbers>
#include <optional>
#include <utility>

#include "octet/octet.hpp"
#include "ranks.hpp"

namespace train_gpt {
namespace {

constexpr float kWeightDecay = 0.1f;
constexpr std::int64_t kMostValidationBatches = 40;
/// On CUDA the losses are read back, and so the host waits, only every so many steps.
constexpr int kCudaStepsPerRead = 10;

/// What one rank has to say at the end.
struct RankReport {
  octet::Plan plan;
  std::uint64_t peak_bytes = 0;
  std::uint64_t wire_bytes = 0;  ///< of all steps
  octet::GemmCounts gemms;
  std::int64_t skipped_steps = 0;
  double validation_loss = 0.0;  ///< sum over this rank's batches
  std::vector<float> losses;
  double step_seconds = 0.0;
};

/// Shows the mean loss of a step as soon as the last rank has read its own.
class LossBoard {
 public:
  LossBoard(Progress& progress, int ranks)
      : progress_(progress), losses_(static_cast<std::size_t>(ranks)) {}

  void post(int rank, const std::vector<float>& losses) {
    const std::lock_guard lock(mutex_);
    losses_[static_cast<std::size_t>(rank)] = losses;
    std::size_t steps = losses.size();
    for (const auto& each : losses_) steps = std::min(steps, each.size());
    if (steps <= shown_) return;
    float sum = 0.0f;
    for (const auto& each : losses_) sum += each[steps - 1];
    progress_.update(static_cast<int>(steps), sum / static_cast<float>(losses_.size()));
    shown_ = steps;
  }

 private:
  Progress& progress_;
  std::mutex mutex_;
  std::vector<std::vector<float>> losses_;
  std::size_t shown_ = 0;
};

/// With the recipe blockwise the weights come with scales of tiles, as the products read them,
/// instead of one scale that every call would spread over blocks. Without a transposed copy, which
/// would cost a byte per parameter to save the backward one pass over a weight. A split master is
/// half a weight of one scale, so that stays.
std::optional<octet::Formats> engine_formats(const Setup& setup, octet::Fp8Recipe recipe) {
  octet::Formats formats = setup.formats.value_or(octet::formats_of(setup.level));
  const octet::StateFormats& state = formats.state;
  if (recipe != octet::Fp8Recipe::blockwise || state.weight != octet::WeightFormat::e4m3 ||
      state.master == octet::StateFormat::split) {
    return setup.formats;
  }
  formats.state.weight = octet::WeightFormat::e4m3_tile;
  return formats;
}

/// Everything one rank does for one level.
class RankTrainer {
 public:
  RankTrainer(const Options& options, const Setup& setup, const TextData& data, const Rank& rank)
      : options_(options),
        data_(data),
        rank_(rank.index),
        ctx_(rank.ctx),
        comm_(rank.comm),
        gemms_(ctx_),
        engine_(ctx_, comm_,
                {.level = setup.level,
                 .formats = engine_formats(setup, options.model.fp8.recipe),
                 .adamw = {.weight_decay = kWeightDecay, .seed = options.seed},
                 .bucket_elements = options.bucket_elements,
                 .schedule = options.schedule,
                 .clipping = options.clip_grad > 0.0f,
                 .micro_batches = options.model.micro_batches}),
        model_(ctx_, engine_, gemms_, rank.kernels, options.model, options.rows_per_pass(),
               options.seed),
        windows_(ctx_, static_cast<std::size_t>(options.rows_per_pass()) *
                           static_cast<std::size_t>(options.model.context + 1)),
        losses_(ctx_, octet::DType::f32,
                {std::int64_t{options.steps} * options.model.micro_batches}) {}

  RankReport run(LossBoard& board) {
    RankReport report;
    train(report, board);
    validate(report);
    report.plan = engine_.plan();
    report.peak_bytes = ctx_.memory_use().peak;
    const octet::Context& side = comm_.context();
    if (side.state() != ctx_.state()) report.peak_bytes += side.memory_use().peak;
    return report;
  }

 private:
  void train(RankReport& report, LossBoard& board) {
    using Clock = std::chrono::steady_clock;
    const int every = options_.device == octet::DeviceType::cuda ? kCudaStepsPerRead : 1;
    std::vector<double> seconds;  // per step, between two reads
    std::optional<octet::StepResult> result;
    Clock::time_point start = Clock::now();
    for (int step = 0; step < options_.steps; ++step) {
      result.emplace(train_step(step));
      const int done = step + 1;
      if (done % every != 0 && done != options_.steps) continue;
      const auto read = static_cast<int>(report.losses.size());
      read_losses(report.losses, done);
      const Clock::time_point now = Clock::now();
      seconds.push_back(std::chrono::duration<double>(now - std::exchange(start, now)).count() /
                        (done - read));
      board.post(rank_, report.losses);
    }
    report.wire_bytes = comm_.wire_bytes().payload;
    report.gemms = gemms_.counts();
    report.skipped_steps = result->skipped.read_sync();
    report.step_seconds = median_after_start(std::move(seconds));
  }

  /// Those of the steps up to `done`, each the mean of its micro-batches. Waits for the stream.
  void read_losses(std::vector<float>& losses, int done) {
    const auto parts = static_cast<std::size_t>(micro_batches());
    const std::size_t from = losses.size() * parts;
    const auto fresh = octet::read_sync<float>(ctx_, losses_.as<float>() + from,
                                               static_cast<std::size_t>(done) * parts - from);
    in_flight_.clear();
    for (std::size_t i = 0; i < fresh.size(); i += parts) {
      float sum = 0.0f;
      for (std::size_t m = 0; m < parts; ++m) sum += fresh[i + m];
      losses.push_back(sum / static_cast<float>(parts));
    }
  }

  int micro_batches() const { return options_.model.micro_batches; }
  /// The first row of a micro-batch in the global batch.
  std::int64_t first_row(int micro_batch) const {
    return (std::int64_t{rank_} * micro_batches() + micro_batch) * options_.rows_per_pass();
  }

  octet::StepResult train_step(int step) {
    const std::int64_t rows = options_.rows_per_pass();
    for (int m = 0; m < micro_batches(); ++m) {
      const Windows windows =
          upload(data_.training_windows(options_.seed, step, first_row(m), rows));
      model_.forward(windows, losses_.as<float>() + step * micro_batches() + m);
      model_.backward(windows);
    }
    octet::StepResult result = engine_.step(
        {.lr = learning_rate(options_.lr, step, options_.steps), .max_norm = options_.clip_grad});
    model_.end_step();
    return result;
  }

  /// The same batches for every level and number of ranks; the ranks take turns.
  void validate(RankReport& report) {
    const std::int64_t rows = options_.rows_per_pass();
    const std::int64_t total = data_.validation_count(options_.batch, kMostValidationBatches);
    for (std::int64_t batch = 0; batch < total; batch += options_.batch) {
      for (int m = 0; m < micro_batches(); ++m) {
        model_.forward(upload(data_.validation_windows(batch + first_row(m), rows, total)),
                       losses_.as<float>(), Pass::validation);
        const float loss = octet::read_sync<float>(ctx_, losses_.as<float>(), 1).front();
        in_flight_.clear();
        report.validation_loss +=
            static_cast<double>(loss) * static_cast<double>(rows) / static_cast<double>(total);
      }
    }
  }

  /// Copies a batch to the device. The host's copy must live until the stream has read it: until
  /// the next wait for it.
  Windows upload(std::vector<std::uint8_t> text) {
    const std::vector<std::uint8_t>& kept = in_flight_.emplace_back(std::move(text));
    octet::copy_bytes(ctx_, windows_.data(), kept.data(), kept.size());
    return {windows_.as<std::uint8_t>(), options_.rows_per_pass(), options_.model.context};
  }

  /// Median without the first tenth, in which caches and clocks warm up.
  static double median_after_start(std::vector<double> seconds) {
    const auto skip = static_cast<std::ptrdiff_t>(seconds.size() / 10);
    seconds.erase(seconds.begin(), seconds.begin() + skip);
    const auto middle = seconds.begin() + static_cast<std::ptrdiff_t>(seconds.size() / 2);
    std::nth_element(seconds.begin(), middle, seconds.end());
    return *middle;
  }

  const Options& options_;
  const TextData& data_;
  int rank_;
  octet::Context& ctx_;
  octet::Communicator& comm_;
  octet::GemmRegistry gemms_;
  octet::Engine engine_;
  Gpt model_;
  octet::Buffer windows_;
  octet::Tensor losses_;  ///< one per step
  std::vector<std::vector<std::uint8_t>> in_flight_;
};

void compare(const RankReport& report, int rank, int steps, std::vector<std::string>& out) {
  const auto differs = [&](const std::string& what, std::uint64_t planned, std::uint64_t measured) {
    if (planned == measured) return;
    out.push_back("rank " + std::to_string(rank) + ", " + what + ": " + std::to_string(planned) +
                  " bytes planned, " + std::to_string(measured) + " measured");
  };
  for (const octet::MemoryRow& row : report.plan.memory) {
    differs(row.what + (row.fp8_managed ? " of FP8-managed parameters" : ""), row.predicted,
            row.measured);
  }
  differs("sent in all steps", report.plan.wire_bytes_per_step * static_cast<std::uint64_t>(steps),
          report.wire_bytes);
}

RunResult summarise(const Options& options, const Setup& setup,
                    const std::vector<RankReport>& reports) {
  const RankReport& first = reports.front();
  const auto ranks = static_cast<double>(reports.size());
  const double managed = static_cast<double>(first.plan.fp8_parameters) * ranks;
  const double all = static_cast<double>(first.plan.parameters) * ranks;
  RunResult result;
  result.name = setup.name;
  result.sharding = first.plan.sharding;
  result.ranks = options.ranks;
  result.schedule = options.schedule;
  result.clip_grad = options.clip_grad;
  result.micro_batches = options.model.micro_batches;
  result.device = options.device;
  result.parameters = first.plan.parameters;
  result.fp8 = options.model.fp8;
  const auto per_step = [&](std::int64_t count) {
    return static_cast<double>(count) / options.steps;
  };
  result.fp8_gemms_per_step = per_step(first.gemms.fp8);
  result.converted_gemms_per_step = per_step(first.gemms.with_conversion);
  result.step_seconds = first.step_seconds;
  result.skipped_steps = first.skipped_steps;
  result.losses.assign(static_cast<std::size_t>(options.steps), 0.0f);
  for (std::size_t rank = 0; rank < reports.size(); ++rank) {
    const RankReport& report = reports[rank];
    const auto add = [](Figure& figure, std::uint64_t measured, std::uint64_t planned, double per) {
      figure.measured += static_cast<double>(measured) / per;
      figure.planned += static_cast<double>(planned) / per;
    };
    add(result.state_bytes_managed, report.plan.state_bytes(true, true),
        report.plan.state_bytes(true, false), managed);
    add(result.state_bytes_all, report.plan.state_bytes(false, true),
        report.plan.state_bytes(false, false), all);
    add(result.wire_bytes, report.wire_bytes,
        report.plan.wire_bytes_per_step * static_cast<std::uint64_t>(options.steps),
        all * options.steps);
    result.peak_bytes = std::max(result.peak_bytes, report.peak_bytes);
    result.validation_loss += report.validation_loss;
    for (std::size_t i = 0; i < result.losses.size(); ++i) {
      result.losses[i] += report.losses[i] / static_cast<float>(reports.size());
    }
    compare(report, static_cast<int>(rank), options.steps, result.disagreements);
  }
  return result;
}

}  // namespace

float learning_rate(float peak, int step, int steps) {
  const int warm_up = std::clamp(steps / 10, 1, 100);
  if (step < warm_up) return peak * static_cast<float>(step + 1) / static_cast<float>(warm_up);
  const double done = static_cast<double>(step - warm_up) / std::max(1, steps - warm_up);
  const double cosine = 0.5 * (1.0 + std::cos(std::numbers::pi * done));
  return peak * static_cast<float>(0.1 + 0.9 * cosine);
}

RunResult train(const Options& options, const Setup& setup, const TextData& data,
                Progress& progress) {
  LossBoard board(progress, options.ranks);
  std::vector<RankReport> reports(static_cast<std::size_t>(options.ranks));
  progress.begin(setup.name);
  run_ranks(options.device, options.ranks, options.schedule, [&](const Rank& rank) {
    RankTrainer trainer(options, setup, data, rank);
    reports[static_cast<std::size_t>(rank.index)] = trainer.run(board);
  });
  return summarise(options, setup, reports);
}

}  // namespace train_gpt
