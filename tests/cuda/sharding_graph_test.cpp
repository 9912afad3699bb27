// SPDX-License-Identifier: Apache-2.0
// A whole step, gather() and release() of all units included, captured once and replayed: the bits
// of eager steps for every sharding. Ranks that are threads meet on the host in every collective,
// which a graph does not keep, so more than one rank needs NCCL and a GPU for each.
#include "support/catch.hpp"
#include "support/nccl_ranks.hpp"
#include "support/unit_passes.hpp"

namespace octet::test {
namespace {

constexpr Sharding kShardings[] = {Sharding::none, Sharding::optimizer, Sharding::gradients,
                                   Sharding::parameters};
constexpr int kWarmUp = 2, kReplays = 4;
constexpr std::size_t kUnused = 2;  ///< the parameter without gradients

/// Steps whose gradients and learning rate change but lie where they are.
class Steps {
 public:
  Steps(const Context& ctx, Communicator& comm, const EngineConfig& config)
      : ctx_(ctx),
        rank_(comm.rank()),
        config_(config),
        engine_(ctx, comm, config),
        log_(ctx, log_bytes_per_step()),
        lr_(ctx, sizeof(float)) {
    add_parameters(engine_, ctx, keep_);
    engine_.freeze();
    for (const ModelParam& param : model_params()) {
      gradients_.emplace_back(ctx, DType::f32, param.shape);
    }
  }

  void set(int step) {
    static const GradientFn gradient = remembered(own_gradient, 2, kWarmUp + kReplays + 1, 1);
    write_one(ctx_, lr_.data(), 1e-3f * static_cast<float>(step));
    for (std::size_t p = 0; p < gradients_.size(); ++p) {
      write(ctx_, gradients_[p].view().data, gradient(rank_, p, step));
    }
  }

  void enqueue() {
    log_.restart();
    make_passes(engine_, config_.micro_batches, log_, [&](int, std::size_t p) {
      if (p != kUnused) engine_.add_gradient({static_cast<int>(p)}, gradients_[p]);
    });
    const bool clips = config_.schedule != Schedule::fused;  // else the means are summed apart
    const StepResult done =
        engine_.step({.lr_device = lr_.as<const float>(), .max_norm = clips ? 1.0f : 0.0f});
    log_.add(done.norm.device_pointer(), sizeof(float));
  }

  /// What the last step left: this rank's states, all scales, the weights in use, the norm. Without
  /// gather(): what the host knows of units is not what replays have done to them.
  Bytes seen() const {
    Bytes all = log_.bytes();
    const auto append = [&all](const Bytes& part) {
      all.insert(all.end(), part.begin(), part.end());
    };
    const AdamW& optimizer = engine_.optimizer();
    for (int p = 0; p < static_cast<int>(model_params().size()); ++p) {
      for (const StateView& view : {optimizer.master(p), optimizer.m(p), optimizer.v(p)}) {
        append(codes_of(ctx_, view));
        append(blocks_of(ctx_, view));
      }
    }
    const auto scales = static_cast<std::size_t>(optimizer.scale_count());
    append(download<std::uint8_t>(ctx_, optimizer.scales(), scales * sizeof(TensorScale)));
    return all;
  }

  RankResult result() { return read_back(engine_, ctx_); }

 private:
  Context ctx_;
  int rank_;
  EngineConfig config_;
  Engine engine_;
  Log log_;
  Buffer lr_;
  std::vector<Buffer> keep_;
  std::vector<Tensor> gradients_;
};

/// On one rank: the first thing that a replay does otherwise than a step.
std::string replay_difference(const Context& ctx, Communicator& comm, const EngineConfig& config) {
  Steps eager(ctx, comm, config), captured(ctx, comm, config);
  int step = 0;
  while (step < kWarmUp) {  // kernels are loaded, ranks connected, the order of units known
    ++step;
    for (Steps* each : {&eager, &captured}) {
      each->set(step);
      each->enqueue();
    }
  }
  ctx.synchronize();
  comm.synchronize();
  all_gather_text_sync(comm, "ready");
  Graph graph(ctx.stream(), [&] { captured.enqueue(); });
  Bytes before = captured.seen();
  for (int replay = 1; replay <= kReplays; ++replay) {
    ++step;
    for (Steps* each : {&eager, &captured}) each->set(step);
    eager.enqueue();
    graph.launch();
    const Bytes seen = captured.seen();
    const std::string difference = first_difference(seen, eager.seen());
    if (!difference.empty()) return "replay " + std::to_string(replay) + ": " + difference;
    if (seen == before) return "replay " + std::to_string(replay) + " changes nothing";
    before = seen;
  }
  // A step after the replays: weights through gather(), whole.
  ++step;
  for (Steps* each : {&eager, &captured}) {
    each->set(step);
    each->enqueue();
  }
  const RankResult got = captured.result(), expected = eager.result();
  for (std::size_t p = 0; p < model_params().size(); ++p) {
    if (got.weights[p] != expected.weights[p]) return "weight \"" + model_params()[p].name + "\"";
  }
  return first_difference(captured.seen(), eager.seen());
}

EngineConfig config_of(Sharding sharding, bool small, bool offload) {
  return {.level = Level::O2,
          .sharding = sharding,
          .formats = small ? small_formats() : formats_of(Level::O2),
          .adamw = {.weight_decay = 0.1f, .seed = 5},
          .bucket_elements = 20000,
          .micro_batches = 2,
          .offload_states = offload};
}

/// Every sharding on one stream and on two; the first thing that is wrong.
std::string shardings_difference(Communicator& comm) {
  const Context apart = beside(comm);
  const bool reaches = window_refusal(comm).empty();
  for (int bits = 0; bits < 16; ++bits) {
    const bool two_streams = (bits & 1) != 0, small = (bits & 2) != 0;
    const bool offload = (bits & 4) != 0, windows = (bits & 8) != 0;
    if (windows && !reaches) continue;
    const Context& ctx = two_streams ? apart : comm.context();
    std::vector<EngineConfig> configs;
    for (Sharding sharding : kShardings) configs.push_back(config_of(sharding, small, offload));
    if (comm.size() > 1) {
      configs.push_back(config_of(Sharding::optimizer, small, offload));
      configs.back().schedule = Schedule::fused;
    }
    for (EngineConfig& config : configs) {
      config.windows = windows;
      const std::string difference = replay_difference(ctx, comm, config);
      if (difference.empty()) continue;
      return std::string(name_of(*config.sharding)) + ", two streams " +
             std::to_string(two_streams) + ", small formats " + std::to_string(small) +
             ", offload " + std::to_string(offload) + ", windows " + std::to_string(windows) +
             ", fused " + std::to_string(config.schedule == Schedule::fused) + ": " + difference;
    }
  }
  return {};
}

}  // namespace

TEST_CASE("with one rank a captured step of every sharding replays with the bits of eager ones") {
  if (cuda_device_count() == 0) {
    WARN("no CUDA device: nothing to capture");
    return;
  }
  const auto single = make_single(Context::cuda(0, lasting_stream()));
  CHECK(shardings_difference(*single) == "");
  run_ranks(
      1,
      [&](Communicator& comm) {
        const std::string difference = shardings_difference(comm);
        require(difference.empty(), difference);
      },
      DeviceType::cuda);
}

TEST_CASE(
    "with NCCL ranks, two where there are two GPUs, captured steps of every sharding do too") {
  const int most = nccl_ranks();
  if (most < 2) WARN("skipped: two NCCL ranks, for want of NCCL or of two CUDA devices");
  for (int ranks = 1; ranks <= most; ++ranks) {
    std::vector<std::string> wrong(static_cast<std::size_t>(ranks));
    CHECK(run_nccl_ranks(ranks, [&](Communicator& comm) {
            wrong[static_cast<std::size_t>(comm.rank())] = shardings_difference(comm);
          }) == "");
    for (const std::string& each : wrong) CHECK(each == "");
  }
}

}  // namespace octet::test
