// SPDX-License-Identifier: Apache-2.0
// GradientReducer alone, without an engine: order, zeros, overlap, and what it refuses.
#include "octet/comm/gradient_reducer.hpp"

#include <algorithm>
#include <numeric>

#include "support/catch.hpp"
#include "support/errors.hpp"
#include "support/mean_ranks.hpp"
#include "support/random.hpp"
#include "support/ranks.hpp"

namespace octet::test {
namespace {

using Path = MeanReducer::Path;

constexpr std::int64_t kSizes[] = {1, 130, 4096, 33, 257, 1000, 7};
constexpr int kParams = 7;

/// The gradient of a parameter on a rank in a step, as stored; zeros where it has none.
Contribution gradient_of(int rank, int param, int step, bool used = true) {
  const auto count = static_cast<std::size_t>(kSizes[param]);
  const auto seed = static_cast<std::uint32_t>(10000 * step + 100 * rank + param);
  if (!used) return {std::vector<std::uint8_t>(count, 0), TensorScale{}};
  return contribute(DType::e4m3, normal_values(count, seed, 0.01f * static_cast<float>(1 + param)));
}

/// Whether a rank has a gradient for a parameter: some on one rank only, some on none.
bool is_used(int rank, int param, int step) {
  return param != step % kParams && (param + rank + step) % 4 != 0;
}

/// Parameters in buckets of `size`, the last registered first.
std::vector<std::vector<int>> buckets_of(int size) {
  std::vector<std::vector<int>> buckets;
  for (int param = kParams - 1; param >= 0; --param) {
    if (buckets.empty() || static_cast<int>(buckets.back().size()) == size) buckets.emplace_back();
    buckets.back().push_back(param);
  }
  return buckets;
}

/// Gradients and shards of one rank, and the reducer over them.
struct RankModel {
  Context ctx;
  Path path;
  std::vector<std::vector<int>> order;
  std::vector<Tensor> gradients, shards;  ///< by parameter
  Buffer scales, flag;
  std::vector<TensorScale*> scale_of;
  std::vector<Owners> owners;  ///< of every bucket
  std::unique_ptr<GradientReducer> reducer;

  RankModel(const Context& context, Communicator& comm, Path p, int bucket_size, Schedule schedule)
      : ctx(context), path(p), order(buckets_of(bucket_size)), shards(kParams) {
    for (std::int64_t size : kSizes) gradients.emplace_back(ctx, DType::e4m3, Shape{size});
    scales = upload(ctx, std::vector<TensorScale>(kParams));
    flag = upload(ctx, std::vector<std::uint32_t>{0});
    scale_of.resize(kParams);
    std::vector<GradientBucket> buckets;
    std::size_t slot = 0;
    for (const std::vector<int>& params : order) {
      GradientBucket bucket{.params = params, .scales = scales.as<TensorScale>() + slot};
      bucket.owners = owners_of(params, comm.size());
      for (std::size_t t = 0; t < params.size(); ++t) {
        const auto param = static_cast<std::size_t>(params[t]);
        scale_of[param] = scales.as<TensorScale>() + slot++;
        ReduceTensor tensor{.gradient = gradients[param].view()};
        if (path == Path::sharded) {
          const auto& own = bucket.owners[static_cast<std::size_t>(comm.rank())];
          shards[param] = Tensor(ctx, DType::f32, {owned_by(own, t)});
          tensor.shard = shards[param].view();
        }
        bucket.tensors.push_back(tensor);
      }
      owners.push_back(bucket.owners);
      buckets.push_back(std::move(bucket));
    }
    reducer = std::make_unique<GradientReducer>(ctx, comm, path, buckets, flag.as<std::uint32_t>(),
                                                schedule);
  }

  /// Chunks of 100 elements in turn.
  static Owners owners_of(const std::vector<int>& params, int ranks) {
    Owners owners(static_cast<std::size_t>(ranks));
    int chunk = 0;
    for (std::size_t t = 0; t < params.size(); ++t) {
      const std::int64_t numel = kSizes[params[t]];
      for (std::int64_t begin = 0; begin < numel; begin += 100) {
        owners[static_cast<std::size_t>(chunk++ % ranks)].push_back(
            {static_cast<std::int32_t>(t), begin, std::min<std::int64_t>(100, numel - begin)});
      }
    }
    return owners;
  }

  void make_ready(int param, const Contribution& gradient) {
    write(ctx, gradients[static_cast<std::size_t>(param)].view().data, gradient.bytes);
    write_one(ctx, scale_of[static_cast<std::size_t>(param)], gradient.scale);
    reducer->ready(param);
  }

  /// Empty, or the first parameter whose mean is not the reference's.
  std::string wrong(const std::vector<std::vector<Contribution>>& by_param, int rank) const {
    for (std::size_t b = 0; b < order.size(); ++b) {
      for (std::size_t t = 0; t < order[b].size(); ++t) {
        const auto param = static_cast<std::size_t>(order[b][t]);
        const auto means = reference_means(DType::e4m3, by_param[param]);
        const bool sharded = path == Path::sharded;
        const TensorScale scale = reference_mean_scale(
            sharded ? DType::f32 : DType::e4m3, reference_bound(DType::e4m3, by_param[param]));
        const auto stored = download_one<TensorScale>(ctx, scale_of[param]);
        const std::string where = "parameter " + std::to_string(param) + ": ";
        if (std::memcmp(&stored, &scale, sizeof(scale)) != 0) return where + "its scale";
        std::string difference;
        if (sharded) {
          const auto& own = owners[b][static_cast<std::size_t>(rank)];
          const auto count = static_cast<std::size_t>(owned_by(own, t));
          difference = first_difference(download<float>(ctx, shards[param].view().data, count),
                                        pieces_of(own, t, means));
        } else {
          difference = first_difference(download_bytes(ctx, gradients[param]),
                                        reference_rounded(DType::e4m3, means, scale.scale));
        }
        if (!difference.empty()) return where + difference;
      }
    }
    return {};
  }

  /// Empty, or the first parameter of which a rank's contribution is not what that rank stored.
  std::string wrong_parts(const std::vector<RankGradients>& parts, int step, int rank) const {
    for (std::size_t b = 0; b < order.size(); ++b) {
      const auto& own = owners[b][static_cast<std::size_t>(rank)];
      for (std::size_t t = 0; t < order[b].size(); ++t) {
        const int param = order[b][t];
        const RankGradients& of = parts[static_cast<std::size_t>(param)];
        for (int r = 0; r < static_cast<int>(of.ranks.size()); ++r) {
          const RankGradient& part = of.ranks[static_cast<std::size_t>(r)];
          const Contribution from = gradient_of(r, param, step, is_used(r, param, step));
          const auto expected = part.is_shard ? pieces_of(own, t, from.bytes) : from.bytes;
          const auto scale = download_one<TensorScale>(ctx, of.scales + r * of.scale_stride);
          const std::string where =
              "parameter " + std::to_string(param) + " of rank " + std::to_string(r) + ": ";
          if (part.is_shard == (r == rank)) return where + "whole or shard";
          if (scale.scale_inv != from.scale.scale_inv) return where + "its scale";
          const std::string difference =
              first_difference(download<std::uint8_t>(ctx, part.data, expected.size()), expected);
          if (!difference.empty()) return where + difference;
        }
      }
    }
    return {};
  }
};

std::vector<int> random_order(int rank, int step) {
  std::vector<int> order(kParams);
  std::iota(order.begin(), order.end(), 0);
  Draws draws(static_cast<std::uint32_t>(100 * rank + step));
  std::shuffle(order.begin(), order.end(), draws);
  return order;
}

}  // namespace

TEST_CASE("means are right in any order of readiness, with parameters unused here or everywhere") {
  for (Path path : {Path::two_shot, Path::sharded}) {
    for (int ranks : {2, 3, 5, 8}) {
      for (int bucket_size : {1, 3, kParams}) {
        for (Schedule schedule : {Schedule::after_backward, Schedule::overlap}) {
          std::vector<std::string> errors(static_cast<std::size_t>(ranks));
          run_ranks(ranks, [&](Communicator& comm) {
            RankModel model(Context::cpu(), comm, path, bucket_size, schedule);
            std::string& error = errors[static_cast<std::size_t>(comm.rank())];
            for (int step = 0; step < 3; ++step) {
              const std::uint64_t before = comm.wire_bytes().payload;
              for (int param : random_order(comm.rank(), step)) {
                if (!is_used(comm.rank(), param, step)) continue;
                model.make_ready(param, gradient_of(comm.rank(), param, step));
              }
              if (schedule == Schedule::after_backward &&
                  (model.reducer->launched() != 0 || comm.wire_bytes().payload != before)) {
                error += "launched before finish(); ";
              }
              model.reducer->finish();
              std::vector<std::vector<Contribution>> all(kParams);
              for (int param = 0; param < kParams; ++param) {
                for (int r = 0; r < ranks; ++r) {
                  all[static_cast<std::size_t>(param)].push_back(
                      gradient_of(r, param, step, is_used(r, param, step)));
                }
              }
              error += model.wrong(all, comm.rank());
              if (comm.wire_bytes().payload - before != model.reducer->payload_bytes()) {
                error += "payload; ";
              }
            }
          });
          CAPTURE(path == Path::sharded, ranks, bucket_size, name_of(schedule));
          for (const std::string& error : errors) CHECK(error == "");
        }
      }
    }
  }
}

TEST_CASE("with the schedule fused the contributions lie with the owners, by parameter") {
  for (Path path : {Path::contributions, Path::sharded}) {
    for (int bucket_size : {1, 3, kParams}) {
      std::vector<std::string> errors(3);
      run_ranks(3, [&](Communicator& comm) {
        RankModel model(Context::cpu(), comm, path, bucket_size, Schedule::fused);
        std::string& error = errors[static_cast<std::size_t>(comm.rank())];
        const std::vector<RankGradients> parts = model.reducer->contributions();
        for (int step = 0; step < 2; ++step) {
          const std::uint64_t before = comm.wire_bytes().payload;
          for (int param : random_order(comm.rank(), step)) {
            if (!is_used(comm.rank(), param, step)) continue;
            model.make_ready(param, gradient_of(comm.rank(), param, step));
          }
          if (comm.wire_bytes().payload != before) error += "launched before collect(); ";
          model.reducer->collect();
          error += model.wrong_parts(parts, step, comm.rank());
          if (comm.wire_bytes().payload - before != model.reducer->payload_bytes()) {
            error += "payload; ";
          }
        }
      });
      CAPTURE(path == Path::sharded, bucket_size);
      for (const std::string& error : errors) CHECK(error == "");
    }
  }
}

TEST_CASE("buckets are launched in the order of the list and not before they are full") {
  const Context ctx = Context::cpu();
  const auto comm = make_single(Context::cpu());
  RankModel model(ctx, *comm, Path::two_shot, 3, Schedule::overlap);  // 6 5 4 | 3 2 1 | 0
  const std::vector<std::pair<int, int>> launched = {{3, 0}, {0, 0}, {6, 0}, {5, 0},
                                                     {2, 0}, {4, 1}, {1, 3}};
  for (int step = 0; step < 2; ++step) {
    for (const auto& [param, expected] : launched) {
      model.make_ready(param, gradient_of(0, param, step));
      CAPTURE(param);
      CHECK(model.reducer->launched() == expected);
    }
    model.reducer->finish();
    CHECK(model.reducer->launched() == 0);
  }
}

TEST_CASE("a NaN raises the flag of every rank") {
  for (Schedule schedule : {Schedule::after_backward, Schedule::overlap}) {
    std::vector<std::uint32_t> flags(3);
    run_ranks(3, [&](Communicator& comm) {
      RankModel model(Context::cpu(), comm, Path::sharded, 2, schedule);
      for (int param = 0; param < kParams; ++param) {
        Contribution gradient = gradient_of(comm.rank(), param, 1);
        if (comm.rank() == 1 && param == 4) {
          gradient.bytes[3] = 0x7F;
          gradient.scale.amax = NAN;
        }
        model.make_ready(param, gradient);
      }
      model.reducer->finish();
      flags[static_cast<std::size_t>(comm.rank())] =
          download_one<std::uint32_t>(model.ctx, model.flag.data());
    });
    CHECK(flags == std::vector<std::uint32_t>{1, 1, 1});
  }
}

TEST_CASE("a reducer is usable again after a pass that was given up by destroying it") {
  const Context ctx = Context::cpu();
  const auto comm = make_single(Context::cpu());
  std::optional<RankModel> model(std::in_place, ctx, *comm, Path::sharded, 1, Schedule::overlap);
  model->make_ready(6, gradient_of(0, 6, 0));
  CHECK(model->reducer->launched() == 1);
  const std::size_t held = comm->context().memory_use().current;
  CHECK(held > 0);
  model.reset();
  CHECK(comm->context().memory_use().current == 0);
  model.emplace(ctx, *comm, Path::sharded, 1, Schedule::overlap);
  CHECK(comm->context().memory_use().current == held);
  model->reducer->finish();
}

TEST_CASE("what a reducer holds is counted, and nothing is allocated in a pass") {
  run_ranks(2, [](Communicator& comm) {
    Context ctx = Context::cpu(), theirs = comm.context();
    RankModel model(ctx, comm, Path::two_shot, 2, Schedule::overlap);
    const MemoryUse own = ctx.memory_use(), comms = theirs.memory_use();
    require(model.reducer->buffer_bytes() == comms.current + sizeof(TensorScale), "held ",
            comms.current, " bytes, says ", model.reducer->buffer_bytes());
    ctx.reset_peak();
    theirs.reset_peak();
    for (int param = 0; param < kParams; ++param) {
      model.make_ready(param, gradient_of(comm.rank(), param, 0));
    }
    model.reducer->finish();
    require(ctx.memory_use().peak == own.current && theirs.memory_use().peak == comms.current,
            "a pass allocates");
  });
}

TEST_CASE("an empty reducer finishes, and what does not fit is refused by name") {
  const Context ctx = Context::cpu();
  const auto comm = make_single(ctx);
  const Buffer flag = upload(ctx, std::vector<std::uint32_t>{0});
  const Buffer scales = upload(ctx, std::vector<TensorScale>(2));
  const Tensor gradient(ctx, DType::e4m3, {4});
  const auto make = [&](const std::vector<GradientBucket>& buckets) {
    return GradientReducer(ctx, *comm, Path::two_shot, buckets, flag.as<std::uint32_t>(),
                           Schedule::after_backward)
        .launched();
  };
  CHECK(error_of([&] {
          GradientReducer none(ctx, *comm, Path::two_shot, {}, flag.as<std::uint32_t>(),
                               Schedule::after_backward);
          none.finish();
        }) == "no error");
  const GradientBucket good{.params = {0},
                            .tensors = {{.gradient = gradient.view()}},
                            .scales = scales.as<TensorScale>(),
                            .owners = {{{0, 0, 4}}}};
  CHECK(error_of([&] { make({good}); }) == "no error");
  const auto error_with = [&](auto change) {
    GradientBucket bucket = good;
    change(bucket);
    return error_of([&] { make({bucket}); });
  };
  CHECK(missing(error_with([](GradientBucket& b) { b.params = {1}; }), {"parameter 1"}) == "");
  CHECK(missing(error_with([](GradientBucket& b) {
                  b.params = {0, 1};
                }),
                {"2 params", "1 tensors"}) == "");
  CHECK(missing(error_with([](GradientBucket& b) { b.scales = nullptr; }), {"scales"}) == "");
  CHECK(missing(error_of([&] {
                  make({good, good});
                }),
                {"parameter 0", "bucket 0", "bucket 1"}) == "");
  CHECK(missing(error_of([&] {
                  GradientReducer(ctx, *comm, Path::two_shot, {good}, nullptr,
                                  Schedule::after_backward);
                }),
                {"nonfinite"}) == "");
  GradientReducer reducer(ctx, *comm, Path::two_shot, {good}, flag.as<std::uint32_t>(),
                          Schedule::after_backward);
  CHECK(missing(error_of([&] { reducer.ready(1); }), {"parameter 1"}) == "");
  CHECK(missing(error_of([&] { reducer.ready(-1); }), {"parameter -1"}) == "");
  reducer.ready(0);
  CHECK(missing(error_of([&] { reducer.ready(0); }), {"parameter 0", "already"}) == "");
  CHECK(missing(error_of([&] { reducer.collect(); }), {"collect", "after_backward", "fused"}) ==
        "");
  reducer.finish();
  reducer.ready(0);
  CHECK(missing(error_of([&] {
                  GradientReducer(ctx, *comm, Path::two_shot, {good}, flag.as<std::uint32_t>(),
                                  Schedule::fused);
                }),
                {"fused", "two_shot"}) == "");
}

TEST_CASE("buckets that share memory: the one before is launched, its missing gradients are zero") {
  const Context ctx = Context::cpu();
  const auto comm = make_single(ctx);
  const auto index = [](int i) { return static_cast<std::size_t>(i); };
  // Three buckets of two parameters each; the first and the last lie in the same memory.
  const Tensor first(ctx, DType::e4m3, {2, 4}), second(ctx, DType::e4m3, {2, 4});
  const Buffer scales = upload(ctx, std::vector<TensorScale>(6));
  const Buffer flag = upload(ctx, std::vector<std::uint32_t>{0});
  std::vector<Tensor> shards;
  std::vector<GradientBucket> buckets;
  for (int b = 0; b < 3; ++b) {
    GradientBucket bucket{.params = {2 * b, 2 * b + 1},
                          .scales = scales.as<TensorScale>() + 2 * b,
                          .owners = {{{0, 0, 4}, {1, 0, 4}}},
                          .after = b == 2 ? 0 : -1};
    for (int t = 0; t < 2; ++t) {
      shards.emplace_back(ctx, DType::f32, Shape{4});
      auto* data = (b == 1 ? second : first).as<std::uint8_t>() + 4 * t;
      bucket.tensors.push_back({{data, DType::e4m3, {4}, ctx.device()}, shards.back().view()});
    }
    buckets.push_back(bucket);
  }
  const auto make = [&](Schedule schedule) {
    return std::make_unique<GradientReducer>(ctx, *comm, Path::sharded, buckets,
                                             flag.as<std::uint32_t>(), schedule);
  };
  for (Schedule schedule : {Schedule::after_backward, Schedule::overlap}) {
    const auto reducer = make(schedule);
    const auto put = [&](int param, float value) {
      reducer->open(param);
      const Contribution c = contribute(DType::e4m3, std::vector<float>(4, value));
      write(ctx, buckets[index(param / 2)].tensors[index(param % 2)].gradient.data, c.bytes);
      write_one(ctx, scales.as<TensorScale>() + param, c.scale);
      reducer->ready(param);
    };
    for (bool complete : {false, true, false}) {
      CAPTURE(name_of(schedule), complete);
      put(0, 2.0f);
      if (complete) put(1, 3.0f);
      CHECK(reducer->launched() == (complete && schedule == Schedule::overlap ? 1 : 0));
      put(4, 5.0f);
      CHECK(reducer->launched() == 1);
      CHECK_FALSE(reducer->is_open(1));
      CHECK(reducer->is_open(2));
      CHECK(missing(error_of([&] { reducer->open(1); }), {"bucket 0", "parameter 1"}) == "");
      CHECK(missing(error_of([&] { reducer->ready(1); }), {"ready", "parameter 1"}) == "");
      put(3, 7.0f);
      reducer->finish();
      const float expected[] = {2.0f, complete ? 3.0f : 0.0f, 0.0f, 7.0f, 5.0f, 0.0f};
      for (int param = 0; param < 6; ++param) {
        CAPTURE(param);
        CHECK(download<float>(ctx, shards[index(param)].as<float>(), 4)[3] == expected[param]);
      }
    }
  }
  // A caller that says itself when.
  {
    const auto reducer = make(Schedule::after_backward);
    reducer->launch_through(0);
    CHECK(reducer->launched() == 1);
    CHECK_FALSE(reducer->is_open(0));
    reducer->launch_through(2);
    CHECK(reducer->launched() == 3);
    reducer->launch_through(1);
    CHECK(reducer->launched() == 3);
    reducer->finish();
    for (int param = 0; param < 6; ++param) {
      CHECK(download<float>(ctx, shards[index(param)].as<float>(), 4)[3] == 0.0f);
    }
    for (int b : {-1, 3}) {
      CHECK(missing(error_of([&] { reducer->launch_through(b); }),
                    {"bucket " + std::to_string(b), "0 to 2"}) == "");
    }
  }
  CHECK(missing(error_of([&] { make(Schedule::fused); }), {"bucket 2", "fused"}) == "");
  buckets[1].after = 1;
  CHECK(missing(error_of([&] { make(Schedule::overlap); }), {"bucket 1", "earlier"}) == "");
}

}  // namespace octet::test
