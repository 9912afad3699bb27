// SPDX-License-Identifier: Apache-2.0
// An engine and its communicator on two streams of a device: the bits of the CPU, with either
// stream late, and in a captured step.
#include "octet/comm/nccl.hpp"
#include "octet/ops/quantize.hpp"
#include "support/catch.hpp"
#include "support/compare.hpp"
#include "support/cuda_stream.hpp"
#include "support/engine_model.hpp"
#include "support/late_streams.hpp"

namespace octet::test {
namespace {

constexpr Level kLevels[] = {Level::O0, Level::O2, Level::O3};
constexpr int kSteps = 3;

RunOptions options_of(Level level, int ranks, std::int64_t bucket_elements, int micro_batches) {
  RunOptions options;
  options.config = {.level = level,
                    .adamw = {.weight_decay = 0.1f, .seed = 5},
                    .bucket_elements = bucket_elements,
                    .micro_batches = micro_batches};
  options.ranks = ranks;
  options.steps = kSteps;
  options.gradient = own_gradient;
  options.max_norm = 0.5f;
  return options;
}

/// All gradients of a rank in device memory, so that steps need no wait.
class Gradients {
 public:
  Gradients(const Context& ctx, const RunOptions& options, int rank) : ctx_(ctx) {
    const std::size_t count = model_params().size();
    for (int step = 1; step <= options.steps; ++step) {
      for (int m = 0; m < options.config.micro_batches; ++m) {
        for (std::size_t p = 0; p < count; ++p) {
          buffers_.push_back(upload(ctx, options.gradient(rank, p, micro_step(step, m))));
        }
      }
    }
  }

  /// Every gradient is cleared once it has been handed over: the engine must be done with it.
  void hand_over(Engine& engine, const RunOptions& options, int step, bool late) {
    const std::size_t count = model_params().size();
    const auto micro_batches = static_cast<std::size_t>(options.config.micro_batches);
    for (std::size_t m = 0; m < micro_batches; ++m) {
      for (std::size_t p = count; p-- > 0;) {
        const std::size_t at = (static_cast<std::size_t>(step - 1) * micro_batches + m) * count + p;
        if (late) delay(ctx_.stream());
        engine.add_gradient({static_cast<int>(p)},
                            view_of(ctx_, buffers_[at], DType::f32, model_params()[p].shape));
        zero_bytes(ctx_, buffers_[at].data(), buffers_[at].bytes());
      }
    }
  }

 private:
  Context ctx_;
  std::vector<Buffer> buffers_;
};

/// Steps enqueued one after the other; the host waits at the end only.
std::vector<RankResult> train_without_waiting(const RunOptions& options, bool late_compute,
                                              bool late_collectives) {
  std::vector<RankResult> results(static_cast<std::size_t>(options.ranks));
  run_ranks(
      options.ranks,
      [&](Communicator& inner) {
        Late late(inner);
        Communicator& comm = late_collectives ? static_cast<Communicator&>(late) : inner;
        const Context ctx = beside(inner);
        std::vector<Buffer> keep;
        Engine engine(ctx, comm, options.config);
        add_parameters(engine, ctx, keep);
        engine.freeze();
        Gradients gradients(ctx, options, inner.rank());
        for (int step = 1; step <= options.steps; ++step) {
          gradients.hand_over(engine, options, step, late_compute);
          engine.step({.lr = options.lr, .max_norm = options.max_norm});
        }
        RankResult& result = results[static_cast<std::size_t>(inner.rank())];
        result = read_back(engine, ctx);
        ctx.synchronize();
        inner.context().synchronize();
      },
      DeviceType::cuda);
  return results;
}

/// An engine with gradients that change from step to step but lie where they are.
class Captured {
 public:
  Captured(const Context& ctx, Communicator& comm, const EngineConfig& config)
      : ctx_(ctx), engine_(ctx, comm, config), lr_(ctx, sizeof(float)) {
    add_parameters(engine_, ctx, keep_);
    engine_.freeze();
    for (std::size_t p = 0; p < model_params().size(); ++p) {
      gradients_.emplace_back(ctx, DType::f32, model_params()[p].shape);
    }
  }

  void set(int step) {
    write_one(ctx_, lr_.data(), 1e-3f * static_cast<float>(step));
    for (std::size_t p = 0; p < gradients_.size(); ++p) {
      write(ctx_, gradients_[p].view().data, common_gradient(0, p, step));
    }
  }

  void enqueue() {
    for (int m = 0; m < 2; ++m) {
      for (std::size_t p = gradients_.size(); p-- > 1;) {  // "embedding" is never used
        engine_.add_gradient({static_cast<int>(p)}, gradients_[p]);
      }
    }
    engine_.step({.lr_device = lr_.as<const float>(), .max_norm = 1.0f});
  }

  Bytes state() { return everything({read_back(engine_, ctx_)}); }

 private:
  Context ctx_;
  Engine engine_;
  Buffer lr_;
  std::vector<Buffer> keep_;
  std::vector<Tensor> gradients_;
};

void check_replay(Level level, const std::function<std::unique_ptr<Communicator>(Context)>& make) {
  const Stream stream, side;
  const Context ctx = Context::cuda(0, stream.get());
  const EngineConfig config{.level = level, .bucket_elements = 20000, .micro_batches = 2};
  const auto eager_comm = make(ctx);  // one stream
  const auto comm = make(Context::cuda(0, side.get()));
  CAPTURE(name_of(level), comm->name());
  Captured eager(ctx, *eager_comm, config), captured(ctx, *comm, config);
  for (Captured* each : {&eager, &captured}) {
    each->set(1);
    each->enqueue();  // kernels are loaded at their first call
  }
  ctx.synchronize();
  Graph graph(stream.get(), [&] { captured.enqueue(); });
  for (int step = 2; step <= 5; ++step) {
    const Bytes before = captured.state();
    for (Captured* each : {&eager, &captured}) each->set(step);
    eager.enqueue();
    graph.launch();
    REQUIRE(first_difference(captured.state(), eager.state()) == "");
    REQUIRE(first_difference(captured.state(), before) != "");
  }
}

}  // namespace

TEST_CASE("two streams have the bits of the CPU, whichever is late") {
  if (cuda_device_count() == 0) {
    WARN("no CUDA device: nothing to overlap");
    return;
  }
  for (Level level : kLevels) {
    for (int ranks : {1, 2, 3}) {
      for (std::int64_t elements : {1, 20000}) {
        for (int micro_batches : {1, 2}) {
          const RunOptions options = options_of(level, ranks, elements, micro_batches);
          const Bytes expected = everything(train(options));
          for (int late = 0; late < 3; ++late) {
            const auto results = train_without_waiting(options, late == 1, late == 2);
            CAPTURE(name_of(level), ranks, elements, micro_batches, late);
            CHECK(rank_difference(results) == "");
            CHECK(first_difference(everything(results), expected) == "");
          }
        }
      }
    }
  }
}

TEST_CASE("contributions on two streams have the bits of the CPU, whichever is late") {
  if (cuda_device_count() == 0) {
    WARN("no CUDA device: nothing to overlap");
    return;
  }
  for (std::int64_t elements : {1, 20000}) {
    RunOptions options = options_of(Level::O3, 3, elements, 2);
    options.max_norm = 0.0f;
    const Bytes expected = everything(train(options));
    options.config.schedule = Schedule::fused;
    options.config.clipping = false;
    for (int late = 0; late < 3; ++late) {
      const auto results = train_without_waiting(options, late == 1, late == 2);
      CAPTURE(elements, late);
      CHECK(rank_difference(results) == "");
      CHECK(first_difference(everything(results), expected) == "");
    }
  }
}

TEST_CASE("the plan of two streams says that they overlap, and what that costs") {
  if (cuda_device_count() == 0) {
    WARN("no CUDA device: nothing to overlap");
    return;
  }
  RunOptions options = options_of(Level::O2, 2, 20000, 1);
  options.device = DeviceType::cuda;
  for (bool overlapped : {false, true}) {
    if (overlapped) options.engine_context = beside;
    const Plan plan = train(options)[0].plan;
    CAPTURE(overlapped, plan.schedule);
    CHECK((plan.schedule.find("communicator's own stream") != std::string::npos) == overlapped);
    CHECK((plan.to_markdown().find("read their input twice") != std::string::npos) == overlapped);
  }
}

TEST_CASE("a context that shares its device casts to the same bits") {
  if (cuda_device_count() == 0) {
    WARN("no CUDA device: nothing to share");
    return;
  }
  const Stream stream;
  Context ctx = Context::cuda(0, stream.get());
  for (std::int64_t rows : {1, 127, 1000}) {
    const Shape shape{rows, 520};
    const Buffer in = upload(ctx, normal_values(static_cast<std::size_t>(shape.numel()), 3, 0.02f));
    std::vector<Bytes> results;
    for (bool shares : {false, true}) {
      ctx.set_shares_device(shares);
      const ScaledTensor out(ctx, DType::e4m3, shape);
      const Tensor transposed(ctx, DType::e4m3, {520, (rows + 15) / 16 * 16});
      quantize(ctx,
               {.in = view_of(ctx, in, DType::f32, shape), .out = out, .transposed = transposed});
      Bytes bytes = download_bytes(ctx, out.view().data);
      const Bytes more = download_bytes(ctx, transposed);
      bytes.insert(bytes.end(), more.begin(), more.end());
      const auto scale = download<std::uint8_t>(ctx, out.view().scale, 12);
      bytes.insert(bytes.end(), scale.begin(), scale.end());
      results.push_back(bytes);
    }
    CHECK(first_difference(results[1], results[0]) == "");
  }
}

TEST_CASE("a step on two streams is captured and replays with the bits of one stream") {
  if (cuda_device_count() == 0) {
    WARN("no CUDA device: nothing to capture");
    return;
  }
  for (Level level : kLevels) {
    check_replay(level, [](const Context& ctx) { return make_single(ctx); });
    if (has_nccl()) {
      check_replay(level,
                   [](const Context& ctx) { return create_nccl(make_nccl_id(), 0, 1, ctx); });
    }
  }
}

}  // namespace octet::test
