// SPDX-License-Identifier: Apache-2.0
// Steps of the model of engine_model.hpp as a trainer makes them, forward and backward by units,
// with gradients that wait in device memory: the host never waits for the device in between.
#pragma once

#include <algorithm>
#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "support/compare.hpp"
#include "support/engine_model.hpp"

namespace octet::test {

/// The same gradients, made once for many runs; of ranks beyond `ranks` those of the last.
inline GradientFn remembered(const GradientFn& make, int ranks, int steps, int micro_batches) {
  using Key = std::tuple<int, std::size_t, int>;
  const auto kept = std::make_shared<std::map<Key, std::vector<float>>>();
  for (int rank = 0; rank < ranks; ++rank) {
    for (int step = 1; step <= steps; ++step) {
      for (int m = 0; m < micro_batches; ++m) {
        for (std::size_t p = 0; p < model_params().size(); ++p) {
          const int at = micro_step(step, m);
          (*kept)[{rank, p, at}] = make(rank, p, at);
        }
      }
    }
  }
  return [kept, ranks](int rank, std::size_t p, int at) {
    return kept->at({std::min(rank, ranks - 1), p, at});
  };
}

/// Device bytes, copied in the order of a stream when they are there.
class Log {
 public:
  Log(const Context& ctx, std::size_t capacity) : ctx_(ctx), memory_(ctx, capacity) {}
  void add(const void* data, std::size_t bytes) {
    require(used_ + bytes <= memory_.bytes(), "the log holds ", memory_.bytes(), " bytes only");
    copy_bytes(ctx_, static_cast<char*>(memory_.data()) + used_, data, bytes);
    used_ += bytes;
  }
  void restart() { used_ = 0; }
  Bytes bytes() const { return download<std::uint8_t>(ctx_, memory_.data(), used_); }

 private:
  Context ctx_;
  Buffer memory_;
  std::size_t used_ = 0;
};

/// What make_passes() and the norm of a step add to a log, at most.
inline std::size_t log_bytes_per_step() {
  std::size_t elements = 0;
  for (const ModelParam& param : model_params()) elements += numel_of(param);
  return 2 * 4 * elements + sizeof(float);
}

/// A forward and a backward pass of every micro-batch. Weights are logged whenever a unit is used
/// in the first; hand_over(micro_batch, p) has to hand over the gradient of a parameter.
template <class HandOver>
void make_passes(Engine& engine, int micro_batches, Log& log, const HandOver& hand_over) {
  const auto use = [&](int m, int unit, bool backward) {
    engine.gather(unit);
    for (std::size_t p = model_params().size(); p-- > 0;) {
      if (unit_of(p) != unit) continue;
      const TensorView weight = engine.weight({static_cast<int>(p)}).data;
      if (m == 0) log.add(weight.data, weight.bytes());
      if (backward) hand_over(m, p);
    }
    engine.release(unit);
  };
  for (int m = 0; m < micro_batches; ++m) {
    for (int unit = 0; unit < kModelUnits; ++unit) use(m, unit, false);
    for (int unit = kModelUnits; unit-- > 0;) use(m, unit, true);
  }
}

/// What a rank ends with, and all weights that it used and the norms, step by step.
struct PassesResult {
  RankResult held;
  Bytes seen;
};

/// One rank's run.
class PassesRun {
 public:
  PassesRun(const Context& ctx, Communicator& comm, const RunOptions& options)
      : ctx_(ctx),
        comm_(comm),
        options_(options),
        engine_(ctx, comm, options.config),
        log_(ctx, static_cast<std::size_t>(options.steps) * log_bytes_per_step()),
        here_(comm.context(), 4),
        all_here_(comm.context(), 4 * static_cast<std::size_t>(comm.size())) {
    add_parameters(engine_, ctx, keep_);
    engine_.freeze();
    for (int step = 1; step <= options.steps; ++step) {
      for (int m = 0; m < options.config.micro_batches; ++m) {
        for (std::size_t p = 0; p < model_params().size(); ++p) {
          gradients_.push_back(upload(ctx, options.gradient(comm.rank(), p, micro_step(step, m))));
        }
      }
    }
    meet();
  }

  /// Every gradient is cleared once it has been handed over: the engine must be done with it.
  /// before_each is called before every gradient.
  template <class BeforeEach>
  PassesResult operator()(const BeforeEach& before_each) {
    PassesResult result;
    for (int step = 1; step <= options_.steps; ++step) {
      make_passes(engine_, options_.config.micro_batches, log_, [&](int m, std::size_t p) {
        const Buffer& gradient = gradient_of(step, m, p);
        before_each();
        engine_.add_gradient({static_cast<int>(p)},
                             view_of(ctx_, gradient, DType::f32, model_params()[p].shape));
        zero_bytes(ctx_, gradient.data(), gradient.bytes());
      });
      const float max_norm = step % options_.clip_every == 0 ? options_.max_norm : 0.0f;
      const StepResult done = engine_.step({.lr = options_.lr, .max_norm = max_norm});
      log_.add(done.norm.device_pointer(), sizeof(float));
      if (step < options_.steps) continue;
      meet();
      result.held.step = done.step.read_sync();
      result.held.skipped = done.skipped.read_sync();
    }
    const auto counts = std::pair(result.held.step, result.held.skipped);
    result.held = read_back(engine_, ctx_);
    std::tie(result.held.step, result.held.skipped) = counts;
    result.seen = log_.bytes();
    meet();
    return result;
  }

 private:
  /// Waits until all ranks have done all work. Over windows kernels of ranks that share a GPU wait
  /// for one another, while freeing memory and copying much wait for all kernels of the GPU: so
  /// steps lie between two of these calls, apart from that.
  void meet() {
    ctx_.synchronize();
    comm_.all_gather(here_.data(), all_here_.data(), 4);
    comm_.synchronize();
  }

  const Buffer& gradient_of(int step, int m, std::size_t p) const {
    const auto batch = static_cast<std::size_t>((step - 1) * options_.config.micro_batches + m);
    return gradients_[batch * model_params().size() + p];
  }

  Context ctx_;
  Communicator& comm_;
  const RunOptions& options_;
  Engine engine_;
  Log log_;
  Buffer here_, all_here_;  ///< what meet() gathers, of no meaning
  std::vector<Buffer> keep_, gradients_;
};

inline PassesResult run_passes(const Context& ctx, Communicator& comm, const RunOptions& options) {
  PassesRun run(ctx, comm, options);
  return run([] {});
}

/// With ranks that are threads.
inline std::vector<PassesResult> run_passes(const RunOptions& options) {
  std::vector<PassesResult> results(static_cast<std::size_t>(options.ranks));
  run_ranks(
      options.ranks,
      [&](Communicator& comm) {
        const Context ctx = options.engine_context ? options.engine_context(comm) : comm.context();
        results[static_cast<std::size_t>(comm.rank())] = run_passes(ctx, comm, options);
      },
      options.rank_devices());
  return results;
}

/// Whether all ranks of a run hold and have seen what those of another have, however cut; names the
/// first thing that differs.
inline std::string passes_difference(const std::vector<PassesResult>& results,
                                     const std::vector<PassesResult>& expected) {
  const auto held = [](const std::vector<PassesResult>& all) {
    std::vector<RankResult> list;
    for (const PassesResult& each : all) list.push_back(each.held);
    return list;
  };
  const std::vector<RankResult> ranks = held(results);
  std::string difference = rank_difference(ranks);
  if (!difference.empty()) return difference;
  difference = first_difference(everything(ranks), everything(held(expected)));
  if (!difference.empty()) return "states: " + difference;
  for (std::size_t r = 0; r < results.size(); ++r) {
    const std::string rank = "rank " + std::to_string(r) + ": ";
    difference = first_difference(results[r].seen, expected[0].seen);
    if (!difference.empty()) return rank + "weights in use: " + difference;
    if (ranks[r].step != expected[0].held.step) return rank + "count of steps";
    if (ranks[r].skipped != expected[0].held.skipped) return rank + "count of skipped steps";
  }
  return {};
}

}  // namespace octet::test
