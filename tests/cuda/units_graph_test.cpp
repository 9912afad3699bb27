// SPDX-License-Identifier: Apache-2.0
// Units in turn by replays of a captured step and by gather() outside of it, as a trainer does that
// captures its steps and evaluates in between: the weights of an engine that captures nothing.
#include "support/catch.hpp"
#include "support/compare.hpp"
#include "support/engine_model.hpp"
#include "support/nccl_ranks.hpp"

namespace octet::test {
namespace {

constexpr int kParams = 6, kWarmUp = 2, kReplays = 4;

Shape shape_of(int p) { return {160 + 32 * p, 96}; }

/// Steps whose gradients and learning rate change but lie where they are.
class Model {
 public:
  Model(const Context& ctx, Communicator& comm, int units)
      : ctx_(ctx),
        rank_(comm.rank()),
        units_(units),
        engine_(ctx, comm, {.level = Level::O2, .sharding = Sharding::parameters}),
        lr_(ctx, sizeof(float)) {
    for (int p = 0; p < kParams; ++p) {
      const auto count = static_cast<std::size_t>(shape_of(p).numel());
      keep_.push_back(upload(ctx, normal_values(count, 7 + static_cast<std::uint32_t>(p), 0.02f)));
      engine_.add({.name = "p" + std::to_string(p),
                   .shape = shape_of(p),
                   .init = view_of(ctx, keep_.back(), DType::f32, shape_of(p)),
                   .unit = unit_of(p)});
      gradients_.emplace_back(ctx, DType::f32, shape_of(p));
      seen_.emplace_back(ctx, DType::e4m3, shape_of(p));
    }
    engine_.freeze();
  }

  void set(int step) {
    write_one(ctx_, lr_.data(), 1e-3f * static_cast<float>(step));
    for (int p = 0; p < kParams; ++p) {
      const auto seed = static_cast<std::uint32_t>(100 * step + 10 * p + rank_);
      const TensorView view = gradients_[static_cast<std::size_t>(p)];
      write(ctx_, view.data, normal_values(static_cast<std::size_t>(view.numel()), seed, 0.01f));
    }
  }

  void enqueue_step() {
    for (int u = 0; u < units_; ++u) use(u, false);
    for (int u = units_; u-- > 0;) use(u, true);
    engine_.step({.lr_device = lr_.as<const float>()});
  }

  /// Outside of captures: all weights, as units have them.
  Bytes weights() {
    for (int u = 0; u < units_; ++u) use(u, false);
    return seen();
  }
  /// The weights that the last forward pass had.
  Bytes seen() const {
    Bytes all;
    for (const Tensor& tensor : seen_) {
      const Bytes part = download_bytes(ctx_, tensor);
      all.insert(all.end(), part.begin(), part.end());
    }
    return all;
  }

 private:
  int unit_of(int p) const { return p * units_ / kParams; }

  void use(int unit, bool is_backward) {
    engine_.gather(unit);
    for (int p = 0; p < kParams; ++p) {
      if (unit_of(p) != unit) continue;
      const TensorView weight = engine_.weight({p}).data;
      const auto at = static_cast<std::size_t>(p);
      if (is_backward) {
        engine_.add_gradient({p}, gradients_[at]);
      } else {
        copy_bytes(ctx_, seen_[at].view().data, weight.data, weight.bytes());
      }
    }
    engine_.release(unit);
  }

  Context ctx_;
  int rank_, units_;
  Engine engine_;
  Buffer lr_;
  std::vector<Buffer> keep_;
  std::vector<Tensor> gradients_, seen_;
};

/// On one rank: the first thing that is otherwise than without captures.
std::string difference_with(const Context& ctx, Communicator& comm, int units) {
  Model eager(ctx, comm, units), captured(ctx, comm, units);
  int step = 0;
  const auto both = [&](auto call) {
    for (Model* model : {&eager, &captured}) call(*model);
  };
  const auto step_both = [&] {
    ++step;
    both([&](Model& model) {
      model.set(step);
      model.enqueue_step();
    });
  };
  while (step < kWarmUp) step_both();
  // Units are in memory when the capture begins.
  Bytes before = captured.weights();
  if (before != eager.weights()) return "before the capture";
  ctx.synchronize();
  comm.synchronize();
  all_gather_text_sync(comm, "ready");
  Graph graph(ctx.stream(), [&] { captured.enqueue_step(); });
  for (int replay = 1; replay <= kReplays; ++replay) {
    const std::string when = "replay " + std::to_string(replay) + ": ";
    ++step;
    both([&](Model& model) { model.set(step); });
    eager.enqueue_step();
    graph.launch();
    if (captured.seen() != eager.seen()) return when + "weights in use";
    const Bytes weights = captured.weights();
    if (weights != eager.weights()) return when + "weights gathered after it";
    if (weights == before) return when + "changes nothing";
    before = weights;
    if (replay != kReplays / 2) continue;
    step_both();
    if (captured.weights() != eager.weights()) return when + "an eager step after it";
  }
  return {};
}

}  // namespace

TEST_CASE("evaluations between replays of captured steps use the weights of eager steps") {
  const int ranks = nccl_ranks();
  if (ranks < 2) {
    WARN("skipped: two NCCL ranks, for want of NCCL or of two CUDA devices");
    return;
  }
  std::vector<std::string> wrong(static_cast<std::size_t>(ranks));
  CHECK(run_nccl_ranks(ranks, [&](Communicator& comm) {
          for (int units : {1, 2, 3}) {
            for (bool apart : {false, true}) {
              const Context ctx = apart ? beside(comm) : comm.context();
              const std::string difference = difference_with(ctx, comm, units);
              if (difference.empty()) continue;
              wrong[static_cast<std::size_t>(comm.rank())] +=
                  std::to_string(units) + " units, two streams " + std::to_string(apart) + ", " +
                  difference + "; ";
            }
          }
        }) == "");
  for (const std::string& each : wrong) CHECK(each == "");
}

}  // namespace octet::test
