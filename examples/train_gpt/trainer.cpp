// SPDX-License-Identifier: Apache-2.0
#include "trainer.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <numbers>
#include <optional>
#include <sstream>
#include <type_traits>
#include <utility>

#include "octet/octet.hpp"

namespace train_gpt {
namespace {

constexpr float kWeightDecay = 0.1f;
constexpr std::int64_t kMostValidationBatches = 40;
/// On CUDA the losses are read back, and so the host waits, only every so many steps.
constexpr int kCudaStepsPerRead = 10;

/// Bytes that the plan predicted and the run measured.
struct Bytes {
  std::uint64_t planned = 0;
  std::uint64_t measured = 0;
};

/// What one rank has to say at the end, as it travels to the others.
struct RankNumbers {
  octet::Sharding sharding = octet::Sharding::none;
  std::int64_t parameters = 0;
  std::int64_t fp8_parameters = 0;
  Bytes managed_state, all_state;
  Bytes wire;  ///< of all steps
  std::uint64_t peak = 0;
  std::int64_t fp8_gemms = 0;
  std::int64_t converted_gemms = 0;
  std::int64_t skipped_steps = 0;
  double validation_loss = 0.0;  ///< sum over this rank's batches
  double step_seconds = 0.0;
};
static_assert(std::is_trivially_copyable_v<RankNumbers>);

struct RankReport {
  RankNumbers numbers;
  std::vector<float> losses;
  std::vector<std::string> disagreements;  ///< of plan and measurement
};

/// What every rank has, in rank order.
template <class T>
std::vector<std::vector<T>> gather(octet::Communicator& comm, const std::vector<T>& own) {
  const std::string text(reinterpret_cast<const char*>(own.data()), own.size() * sizeof(T));
  std::vector<std::vector<T>> all;
  for (const std::string& theirs : octet::all_gather_text_sync(comm, text)) {
    std::vector<T>& values = all.emplace_back(theirs.size() / sizeof(T));
    std::copy(theirs.begin(), theirs.end(), reinterpret_cast<char*>(values.data()));
  }
  return all;
}

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
                 .sharding = options.sharding,
                 .formats = engine_formats(setup, options.model.fp8.recipe),
                 .adamw = {.weight_decay = kWeightDecay, .seed = options.seed},
                 .reduced_gradient = options.reduced_gradient,
                 .bucket_elements = options.bucket_elements,
                 .schedule = options.schedule,
                 .windows = options.windows,
                 .clipping = options.clip_grad > 0.0f,
                 .micro_batches = options.model.micro_batches,
                 .offload_states = options.offload_states}),
        model_(ctx_, engine_, gemms_, rank.kernels, options.model, options.rows_per_pass(),
               options.seed),
        checkpoints_(engine_, comm_, options.save),
        wire_before_(wire_now(0)),
        windows_(ctx_, static_cast<std::size_t>(options.rows_per_pass()) *
                           static_cast<std::size_t>(options.model.context + 1)),
        losses_(ctx_, octet::DType::f32,
                {std::int64_t{options.steps} * options.model.micro_batches}),
        own_loss_(comm_.context(), sizeof(float)),
        all_losses_(comm_.context(), static_cast<std::size_t>(options.ranks) * sizeof(float)) {}

  RankReport run(Progress& progress) {
    RankReport report;
    const std::int64_t applied = options_.load.empty() ? 0 : load();
    if (!options_.save.empty()) require_no_later(applied);
    train(report, progress);
    validate(report.numbers);
    report.numbers.peak = ctx_.memory_use().peak;
    const octet::Context& side = comm_.context();
    if (side.state() != ctx_.state()) report.numbers.peak += side.memory_use().peak;
    compare_with_plan(report);
    return report;
  }

 private:
  static constexpr const char* kNextStep = "train_gpt.next_step";

  /// Weights, optimizer and delayed scaling as they were, and the step that comes next. Returns the
  /// steps that were applied, which skipped ones are not.
  std::int64_t load() {
    const octet::CheckpointInfo info =
        octet::load_checkpoint(engine_, comm_, options_.load, {.extras = model_.extra_states()});
    model_.restored();
    const auto next = info.metadata.find(kNextStep);
    octet::require(next != info.metadata.end(), info.index, ": its metadata have no \"", kNextStep,
                   "\"; --load goes on with what train_gpt has saved");
    first_step_ = std::stoi(next->second);
    octet::require(first_step_ < options_.steps, "--load ", options_.load, ": ", first_step_,
                   " steps are done; --steps must be larger, not ", options_.steps);
    wire_before_ = wire_now(0);
    return info.step;
  }

  /// Saving would find them, but only when all until then is trained.
  void require_no_later(std::int64_t applied) const {
    const std::vector<std::int64_t> steps = octet::checkpoint_steps(options_.save);
    octet::require(steps.empty() || steps.back() <= applied, "--save ", options_.save,
                   ": the folder has a checkpoint of step ", steps.empty() ? 0 : steps.back(),
                   ", and this run begins with ", applied,
                   " steps done; --load that one or save in another folder");
  }

  /// Payload bytes that the communicator has carried so far, and what `steps` steps and the gathers
  /// of units until now make of the plan.
  Bytes wire_now(int steps) const {
    const octet::Plan& plan = engine_.plan();
    Bytes wire = {plan.wire_bytes_per_step * static_cast<std::uint64_t>(steps),
                  comm_.wire_bytes().payload};
    for (std::size_t u = 0; u < plan.unit_gather_bytes.size(); ++u) {
      wire.planned += plan.unit_gather_bytes[u] *
                      static_cast<std::uint64_t>(engine_.unit_gathers(static_cast<int>(u)));
    }
    return wire;
  }

  /// The number of steps that are done when this run ends.
  int last_step() const {
    return options_.exit_interval == 0
               ? options_.steps
               : std::min(options_.steps, first_step_ + options_.exit_interval);
  }

  /// At the end, and every --save-interval steps: a copy is made, and training goes on while it is
  /// written.
  void save_after(int done) {
    if (options_.save.empty()) return;
    const bool is_end = done == last_step();
    if (!is_end && (options_.save_interval == 0 || done % options_.save_interval != 0)) return;
    checkpoints_.start(
        {.extras = model_.extra_states(), .metadata = {{kNextStep, std::to_string(done)}}});
    if (is_end) checkpoints_.finish();
  }

  void train(RankReport& report, Progress& progress) {
    using Clock = std::chrono::steady_clock;
    const int every = options_.device == octet::DeviceType::cuda ? kCudaStepsPerRead : 1;
    std::vector<double> seconds;  // per step, between two reads
    std::optional<octet::StepResult> result;
    Clock::time_point start = Clock::now();
    for (int step = first_step_; step < last_step(); ++step) {
      result.emplace(train_step(step));
      const int done = step + 1;
      save_after(done);
      if (done % every != 0 && done != last_step()) continue;
      const int read = first_step_ + static_cast<int>(report.losses.size());
      read_losses(report.losses, done);
      const Clock::time_point now = Clock::now();
      seconds.push_back(std::chrono::duration<double>(now - std::exchange(start, now)).count() /
                        (done - read));
      const float mean = mean_over_ranks(report.losses.back());
      if (rank_ == 0) progress.update(done, mean);
    }
    RankNumbers& numbers = report.numbers;
    const Bytes wire = wire_now(last_step() - first_step_);
    numbers.wire = {wire.planned - wire_before_.planned, wire.measured - wire_before_.measured};
    numbers.fp8_gemms = gemms_.counts().fp8;
    numbers.converted_gemms = gemms_.counts().with_conversion;
    numbers.skipped_steps = result->skipped.read_sync();
    numbers.step_seconds = median_after_start(std::move(seconds));
  }

  /// Works on the communicator's stream, which may be another one than the rank's, and waits.
  float mean_over_ranks(float own) {
    const octet::Context& ctx = comm_.context();
    octet::copy_bytes(ctx, own_loss_.data(), &own, sizeof(own));
    comm_.all_gather(own_loss_.data(), all_losses_.data(), sizeof(own));
    const auto all =
        octet::read_sync<float>(ctx, all_losses_.data(), static_cast<std::size_t>(options_.ranks));
    float sum = 0.0f;
    for (float loss : all) sum += loss;
    return sum / static_cast<float>(options_.ranks);
  }

  void compare_with_plan(RankReport& report) const {
    const octet::Plan& plan = engine_.plan();
    RankNumbers& numbers = report.numbers;
    numbers.sharding = plan.sharding;
    numbers.parameters = plan.parameters;
    numbers.fp8_parameters = plan.fp8_parameters;
    numbers.managed_state = {plan.state_bytes(true, false), plan.state_bytes(true, true)};
    numbers.all_state = {plan.state_bytes(false, false), plan.state_bytes(false, true)};
    const auto compare = [&](const std::string& what, const Bytes& bytes) {
      if (bytes.planned == bytes.measured) return;
      report.disagreements.push_back("rank " + std::to_string(rank_) + ", " + what + ": " +
                                     std::to_string(bytes.planned) + " bytes planned, " +
                                     std::to_string(bytes.measured) + " measured");
    };
    for (const octet::MemoryRow& row : plan.memory) {
      compare(row.what + (row.fp8_managed ? " of FP8-managed parameters" : ""),
              {row.predicted, row.measured});
    }
    compare("sent in all steps", numbers.wire);
  }

  /// Those of the steps up to `done`, each the mean of its micro-batches. Waits for the stream.
  void read_losses(std::vector<float>& losses, int done) {
    const auto parts = static_cast<std::size_t>(micro_batches());
    const std::size_t from = (static_cast<std::size_t>(first_step_) + losses.size()) * parts;
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
  void validate(RankNumbers& numbers) {
    const std::int64_t rows = options_.rows_per_pass();
    const std::int64_t total = data_.validation_count(options_.batch, kMostValidationBatches);
    for (std::int64_t batch = 0; batch < total; batch += options_.batch) {
      for (int m = 0; m < micro_batches(); ++m) {
        model_.forward(upload(data_.validation_windows(batch + first_row(m), rows, total)),
                       losses_.as<float>(), Pass::validation);
        const float loss = octet::read_sync<float>(ctx_, losses_.as<float>(), 1).front();
        in_flight_.clear();
        numbers.validation_loss +=
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
  octet::CheckpointWriter checkpoints_;
  int first_step_ = 0;
  Bytes wire_before_;  ///< when training began
  octet::Buffer windows_;
  octet::Tensor losses_;                 ///< one per micro-batch
  octet::Buffer own_loss_, all_losses_;  ///< of one step: of this rank, of every rank
  std::vector<std::vector<std::uint8_t>> in_flight_;
};

/// All ranks' reports, on every rank.
std::vector<RankReport> gather_reports(octet::Communicator& comm, const RankReport& own) {
  std::string lines;
  for (const std::string& text : own.disagreements) lines += text + '\n';
  const auto numbers = gather(comm, std::vector<RankNumbers>{own.numbers});
  const auto losses = gather(comm, own.losses);
  const std::vector<std::string> texts = octet::all_gather_text_sync(comm, lines);
  std::vector<RankReport> reports(numbers.size());
  for (std::size_t rank = 0; rank < reports.size(); ++rank) {
    reports[rank].numbers = numbers[rank].front();
    reports[rank].losses = losses[rank];
    std::istringstream stream(texts[rank]);
    for (std::string line; std::getline(stream, line);) reports[rank].disagreements.push_back(line);
  }
  return reports;
}

RunResult summarise(const Options& options, const Setup& setup,
                    const std::vector<RankReport>& reports) {
  const RankNumbers& first = reports.front().numbers;
  const auto ranks = static_cast<double>(reports.size());
  const double managed = static_cast<double>(first.fp8_parameters) * ranks;
  const double all = static_cast<double>(first.parameters) * ranks;
  RunResult result;
  result.name = setup.name;
  result.sharding = first.sharding;
  result.ranks = options.ranks;
  result.schedule = options.schedule;
  result.clip_grad = options.clip_grad;
  result.micro_batches = options.model.micro_batches;
  result.device = options.device;
  result.parameters = first.parameters;
  result.fp8 = options.model.fp8;
  const auto per_step = [&](std::int64_t count) {
    return static_cast<double>(count) / static_cast<double>(reports.front().losses.size());
  };
  result.fp8_gemms_per_step = per_step(first.fp8_gemms);
  result.converted_gemms_per_step = per_step(first.converted_gemms);
  result.step_seconds = first.step_seconds;
  result.skipped_steps = first.skipped_steps;
  result.losses.assign(reports.front().losses.size(), 0.0f);
  for (const RankReport& report : reports) {
    const RankNumbers& numbers = report.numbers;
    const auto add = [](Figure& figure, const Bytes& bytes, double per) {
      figure.measured += static_cast<double>(bytes.measured) / per;
      figure.planned += static_cast<double>(bytes.planned) / per;
    };
    add(result.state_bytes_managed, numbers.managed_state, managed);
    add(result.state_bytes_all, numbers.all_state, all);
    add(result.wire_bytes, numbers.wire, all * static_cast<double>(report.losses.size()));
    result.peak_bytes = std::max(result.peak_bytes, numbers.peak);
    result.validation_loss += numbers.validation_loss;
    for (std::size_t i = 0; i < result.losses.size(); ++i) {
      result.losses[i] += report.losses[i] / static_cast<float>(reports.size());
    }
    result.disagreements.insert(result.disagreements.end(), report.disagreements.begin(),
                                report.disagreements.end());
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
                Progress& progress, LaunchedRank* launched) {
  RunResult result;
  progress.begin(setup.name);
  const auto run = [&](const Rank& rank) {
    const RankReport own = RankTrainer(options, setup, data, rank).run(progress);
    const std::vector<RankReport> reports = gather_reports(rank.comm, own);
    if (rank.index == 0 || launched != nullptr) result = summarise(options, setup, reports);
  };
  if (launched != nullptr) {
    launched->run(run);
  } else {
    run_ranks(options.device, options.ranks, options.schedule, run);
  }
  return result;
}

}  // namespace train_gpt
