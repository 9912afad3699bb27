// SPDX-License-Identifier: Apache-2.0
// The optimizer's ops with tables made by hand: scalars, sums, bounds and what they refuse. The
// update itself is tested through octet::AdamW in optim/.
#include "octet/ops/adamw.hpp"

#include <limits>
#include <optional>

#include "octet/ops/detail/adamw_math.hpp"
#include "support/adamw_reference.hpp"
#include "support/catch.hpp"
#include "support/compare.hpp"
#include "support/devices.hpp"
#include "support/errors.hpp"
#include "support/guarded.hpp"
#include "support/random.hpp"
#include "support/reference.hpp"

namespace octet::test {
namespace {

/// One FP32 tensor with everything an AdamwArgs points to.
class Tables {
 public:
  Tables(const Context& ctx, const AdamWConfig& config, const Shape& shape)
      : ctx_(ctx),
        count_(static_cast<std::size_t>(shape.numel())),
        gradient_(ctx, count_ * 4),
        master_(ctx, count_ * 4),
        m_(ctx, count_ * 4),
        v_(ctx, count_ * 4),
        scales_(upload(ctx, std::vector<TensorScale>(5))),
        scalars_(ctx, sizeof(AdamwScalars)),
        steps_(ctx, sizeof(AdamwTensorStep)),
        scratch_(ctx, sizeof(AdamwScratch)),
        groups_(upload<AdamwHyper>(ctx, {config.of()})),
        group_scalars_(ctx, sizeof(AdamwGroupScalars)),
        flag_(upload<std::uint32_t>(ctx, {0})) {
    for (const Guarded* g : {&master_, &m_, &v_}) write(ctx, g->data(), std::vector<float>(count_));
    write_one(ctx, scalars_.data(), AdamwScalars{});
    write_one(ctx, scratch_.data(), AdamwScratch{});
    TensorScale* s = scales_.as<TensorScale>();
    tensor_.gradient = gradient_.data();
    tensor_.gradient_scale = s;
    tensor_.master = master_.data();
    tensor_.master_scale = s + 1;
    tensor_.m = m_.data();
    tensor_.m_scale = s + 2;
    tensor_.v = v_.data();
    tensor_.v_scale = s + 3;
    tensor_.weight_scale = s + 4;
    tensors_ = upload<AdamwTensor>(ctx, {tensor_});
    segments_host_ = segments_of({shape}, panels_of(0, shape));
    segments_ = upload(ctx, segments_host_);
    sums_.emplace(ctx, segments_host_.size() * 4);
    args.tensors = tensors_.as<AdamwTensor>();
    args.tensor_count = 1;
    args.segments = segments_.as<Segment>();
    args.segment_count = static_cast<std::int64_t>(segments_host_.size());
    args.scalars = static_cast<AdamwScalars*>(scalars_.data());
    args.groups = groups_.as<AdamwHyper>();
    args.group_scalars = static_cast<AdamwGroupScalars*>(group_scalars_.data());
    args.group_count = 1;
    args.steps = static_cast<AdamwTensorStep*>(steps_.data());
    args.scratch = static_cast<AdamwScratch*>(scratch_.data());
    args.config = config;
    args.nonfinite = flag_.as<std::uint32_t>();
    args.total_segments = args.segment_count;
    args.segment_sums = static_cast<const float*>(sums_->data());
  }

  void set_gradient(const std::vector<float>& values) {
    TensorScale scale;
    for (float value : values) scale.amax = std::max(scale.amax, std::abs(value));
    write(ctx_, gradient_.data(), values);
    write_one(ctx_, scales_.data(), scale);
  }
  void set_master(const std::vector<float>& values) {
    TensorScale scale;
    for (float value : values) scale.amax = std::max(scale.amax, std::abs(value));
    write(ctx_, master_.data(), values);
    write_one(ctx_, tensor_.master_scale, scale);
  }
  void measure() { adamw_measure(ctx_, args, static_cast<float*>(sums_->data())); }
  void step() {
    adamw_prepare(ctx_, args);
    adamw_update(ctx_, args);
  }

  AdamwScalars scalars() const { return scalars_.values<AdamwScalars>().front(); }
  AdamwGroupScalars group_scalars() const {
    return group_scalars_.values<AdamwGroupScalars>().front();
  }
  std::vector<float> sums() const { return sums_->values<float>(); }
  std::vector<float> master() const { return master_.values<float>(); }
  std::vector<float> m() const { return m_.values<float>(); }
  std::vector<float> v() const { return v_.values<float>(); }
  const std::vector<Segment>& segments() const { return segments_host_; }
  std::uint32_t flag() const { return download_one<std::uint32_t>(ctx_, flag_.data()); }
  bool intact() const {
    return gradient_.intact() && master_.intact() && m_.intact() && v_.intact() &&
           scalars_.intact() && steps_.intact() && scratch_.intact() && group_scalars_.intact() &&
           sums_->intact();
  }

  AdamwArgs args;

 private:
  Context ctx_;
  std::size_t count_;
  Guarded gradient_, master_, m_, v_;
  Buffer scales_;
  Guarded scalars_, steps_, scratch_;
  Buffer groups_;
  Guarded group_scalars_;
  Buffer flag_;
  AdamwTensor tensor_;
  Buffer tensors_, segments_;
  std::vector<Segment> segments_host_;
  std::optional<Guarded> sums_;
};

/// The sum of a segment as defined: 256 lanes that take runs of 16 elements in turn, then a tree.
float sum_of_segment(const std::vector<float>& g, const Segment& segment) {
  std::vector<float> lanes(256, 0.0f);
  for (std::size_t i = 0; i < static_cast<std::size_t>(segment.count); ++i) {
    const float x = g[static_cast<std::size_t>(segment.begin) + i];
    float& lane = lanes[i / 16 % 256];
    lane = std::fma(x, x, lane);
  }
  for (std::size_t width = 128; width > 0; width /= 2) {
    for (std::size_t i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

bool near(float actual, double expected, double relative) {
  return std::abs(static_cast<double>(actual) - expected) <= relative * std::abs(expected);
}

}  // namespace

TEST_CASE("scalars of a step follow their definitions") {
  for (const Context& ctx : test_contexts()) {
    for (const auto& betas : {std::pair{0.9f, 0.95f}, std::pair{0.9f, 0.999f},
                              std::pair{0.0f, 0.5f}, std::pair{0.5f, 0.26f}}) {
      const AdamWConfig config{.beta1 = betas.first, .beta2 = betas.second, .eps = 1e-6f};
      Tables tables(ctx, config, {3});
      tables.set_gradient({1.0f, -2.0f, 0.0f});
      const AdamwReference reference(config, 0.25f, 0.0f);
      for (std::int64_t t : {1, 2, 3, 4, 10, 63, 64, 65, 1000, 20000}) {
        AdamwScalars start;
        start.step = t - 1;
        write_one(ctx, tables.args.scalars, start);
        tables.args.lr = 0.25f;
        adamw_prepare(ctx, tables.args);
        const AdamwGroupScalars s = tables.group_scalars();
        INFO(to_string(ctx.device())
             << ", betas " << betas.first << " " << betas.second << ", t " << t);
        CHECK(tables.scalars().step == t);
        CHECK(tables.scalars().lr == 0.25f);
        CHECK(tables.scalars().clip == 1.0f);
        CHECK(s.lr == 0.25f);
        CHECK(near(s.root_factor, reference.k2(t) / reference.k1(t), 2e-7));
        CHECK(near(s.root_eps, reference.eps / reference.k1(t), 2e-7));
        CHECK(s.beta1 == config.beta1);
        CHECK(s.beta2 == config.beta2);
        CHECK(near(s.one_minus_beta1, 1 - reference.beta1, 1e-7));
        CHECK(near(s.one_minus_beta2, 1 - reference.beta2, 1e-7));
        CHECK(near(s.bound, reference.bound(t), 1e-6));
        CHECK(s.l2 == 0.0f);
        CHECK(s.weight_factor == 1.0f);
      }
    }
  }
}

TEST_CASE("the bound is 1 in the first step and has the known limits") {
  for (const Context& ctx : test_contexts()) {
    const struct {
      float beta2;
      double limit;
    } rows[] = {{0.999f, 7.27}, {0.95f, 1.165}};
    for (const auto& row : rows) {
      Tables tables(ctx, {.beta1 = 0.9f, .beta2 = row.beta2}, {3});
      tables.set_gradient({1.0f, 1.0f, 1.0f});
      adamw_prepare(ctx, tables.args);
      CHECK(near(tables.group_scalars().bound, 1.0, 1e-6));
      AdamwScalars late;
      late.step = 1000000;
      write_one(ctx, tables.args.scalars, late);
      adamw_prepare(ctx, tables.args);
      CHECK(near(tables.group_scalars().bound, row.limit, 1e-3));
    }
  }
}

TEST_CASE("the ratio is clamped where v was lost") {
  for (const Context& ctx : test_contexts()) {
    Tables tables(ctx, {.eps = 1e-8f}, {2});
    tables.set_gradient({0.0f, 0.0f});
    tables.args.lr = 0.5f;
    AdamwTensor tensor = download_one<AdamwTensor>(ctx, tables.args.tensors);
    write(ctx, tensor.m, std::vector<float>{1e-3f, -1e-3f});  // v is 0: m / eps is 1e5
    write_one(ctx, tensor.m_scale, TensorScale{1.0f, 1.0f, 1e-3f});
    tables.step();
    CHECK(near(tables.master()[0], -0.5, 1e-6));
    CHECK(near(tables.master()[1], 0.5, 1e-6));
  }
}

TEST_CASE("sums of squares, segment by segment, of every size") {
  for (const Context& ctx : test_contexts()) {
    for (const Shape& shape :
         {Shape{1}, Shape{255}, Shape{256}, Shape{257}, Shape{16383}, Shape{16384}, Shape{16385},
          Shape{40000}, Shape{129, 131}, Shape{300, 97}}) {
      Tables tables(ctx, {}, shape);
      const auto count = static_cast<std::size_t>(shape.numel());
      const std::vector<float> g = normal_values(count, 1);
      tables.set_gradient(g);
      tables.measure();
      const std::vector<float> sums = tables.sums();
      INFO(to_string(ctx.device()) << " " << to_string(shape));
      for (const Segment& segment : tables.segments()) {
        double expected = 0;
        for (std::int32_t i = 0; i < segment.count; ++i) {
          const auto at = static_cast<std::size_t>(segment.begin + i);
          expected += static_cast<double>(g[at]) * static_cast<double>(g[at]);
        }
        const float sum = sums[static_cast<std::size_t>(segment.index)];
        CHECK(near(sum, expected, 2e-6));
        CHECK(bits_of(sum) == bits_of(sum_of_segment(g, segment)));
      }
      CHECK(tables.intact());
      const std::vector<float> again = tables.sums();
      tables.measure();
      CHECK(first_difference(tables.sums(), again) == "");
    }
  }
}

TEST_CASE("norm and clip factor from the sums of all segments") {
  for (const Context& ctx : test_contexts()) {
    // 1,024 segments a block, 64 blocks at most.
    for (std::size_t count :
         std::initializer_list<std::size_t>{1, 2, 3, 1000, 1025, 3073, 5119, 66560, 200000}) {
      Tables tables(ctx, {}, {3});
      tables.set_gradient({1.0f, 1.0f, 1.0f});
      std::vector<float> sums(count);
      double squares = 0;
      for (std::size_t i = 0; i < count; ++i) {
        sums[i] = std::ldexp(1.0f + 0.001f * static_cast<float>(i), static_cast<int>(i % 40) - 20);
        squares += static_cast<double>(sums[i]);
      }
      const Buffer all = upload(ctx, sums);
      tables.args.segment_sums = all.as<float>();
      tables.args.total_segments = static_cast<std::int64_t>(count);
      const double norm = std::sqrt(squares);
      const double tree = detail::pairwise_sum(tables.args.total_segments, [&](std::int64_t i) {
        return static_cast<double>(sums[static_cast<std::size_t>(i)]);
      });
      for (double part : {0.5, 0.999, 1.001, 4.0}) {
        tables.args.max_norm = static_cast<float>(part * norm);
        adamw_prepare(ctx, tables.args);
        const AdamwScalars s = tables.scalars();
        INFO(to_string(ctx.device()) << ", " << count << " segments, limit " << part << " norms");
        CHECK(std::abs(s.sum_squares / squares - 1) < 1e-12);
        CHECK(s.sum_squares == tree);
        CHECK(near(s.norm, norm, 1e-7));
        if (part < 1) {
          CHECK(near(s.clip, static_cast<double>(tables.args.max_norm) / norm, 1e-7));
        } else {
          CHECK(s.clip == 1.0f);
        }
      }
    }
  }
}

TEST_CASE("a step without tensors counts") {
  for (const Context& ctx : test_contexts()) {
    Tables tables(ctx, {}, {3});
    tables.args.tensor_count = 0;
    tables.args.segment_count = 0;
    tables.step();
    tables.args.max_norm = 0.5f;
    for (std::int64_t segments : {0, 1, 3000}) {
      const Buffer sums = upload(ctx, std::vector<float>(static_cast<std::size_t>(segments), 1.0f));
      tables.args.segment_sums = sums.as<float>();
      tables.args.total_segments = segments;
      tables.step();
      CHECK(tables.scalars().sum_squares == static_cast<double>(segments));
    }
    CHECK(tables.scalars().step == 4);
  }
}

TEST_CASE("a zero norm clips nothing; a norm that is no number skips") {
  for (const Context& ctx : test_contexts()) {
    Tables tables(ctx, {}, {3});
    tables.set_gradient({0.0f, 0.0f, 0.0f});
    tables.args.max_norm = 1.0f;
    tables.args.total_segments = 2;
    for (float sum : {0.0f, INFINITY, NAN}) {
      const Buffer sums = upload<float>(ctx, {sum, 0.0f});
      tables.args.segment_sums = sums.as<float>();
      adamw_prepare(ctx, tables.args);
      const AdamwScalars s = tables.scalars();
      CHECK(s.skip == (sum == 0.0f ? 0u : 1u));
      if (sum == 0.0f) CHECK(s.clip == 1.0f);
    }
    CHECK(tables.scalars().step == 1);
    CHECK(tables.scalars().skipped == 2);
  }
}

TEST_CASE("the update writes all of its tensors and nothing else") {
  for (const Context& ctx : test_contexts()) {
    for (const Shape& shape :
         {Shape{1}, Shape{3}, Shape{255}, Shape{257}, Shape{16385}, Shape{129, 131}}) {
      const AdamWConfig config{};
      Tables tables(ctx, config, shape);
      const auto count = static_cast<std::size_t>(shape.numel());
      const std::vector<float> g = normal_values(count, 2), w = normal_values(count, 3);
      tables.set_gradient(g);
      tables.set_master(w);
      tables.args.lr = 1e-2f;
      tables.step();
      const AdamwReference reference(config, 1e-2f, 0.0f);
      Doubles gd(g.begin(), g.end()), wd(w.begin(), w.end()), m(count, 0.0), v(count, 0.0);
      reference.step(1, gd, wd, m, v);
      const std::vector<float> new_w = tables.master(), new_m = tables.m(), new_v = tables.v();
      int wrong = 0;
      for (std::size_t i = 0; i < count; ++i) {
        wrong += std::abs(static_cast<double>(new_w[i]) - wd[i]) > 1e-6;
        wrong += !near(new_m[i], m[i], 1e-6);
        wrong += !near(new_v[i], v[i], 1e-6);
      }
      INFO(to_string(ctx.device()) << " " << to_string(shape));
      CHECK(wrong == 0);
      CHECK(tables.intact());
    }
  }
}

TEST_CASE("the flag skips, is taken down and leaves the state alone") {
  for (const Context& ctx : test_contexts()) {
    Tables tables(ctx, {}, {100});
    tables.set_gradient(normal_values(100, 4));
    tables.set_master(normal_values(100, 5));
    tables.args.lr = 1e-2f;
    write_one(ctx, tables.args.nonfinite, std::uint32_t{1});
    tables.step();
    CHECK(first_difference(tables.master(), normal_values(100, 5)) == "");
    CHECK(first_difference(tables.m(), std::vector<float>(100, 0.0f)) == "");
    CHECK(tables.flag() == 0);
    CHECK(tables.scalars().step == 0);
    CHECK(tables.scalars().skipped == 1);
    tables.step();
    CHECK(tables.scalars().step == 1);
    CHECK(first_difference(tables.master(), normal_values(100, 5)) != "");
  }
}

TEST_CASE("arguments that do not fit are refused by name") {
  for (const Context& ctx : test_contexts()) {
    Tables tables(ctx, {}, {3});
    tables.set_gradient({1.0f, 1.0f, 1.0f});
    const AdamwArgs good = tables.args;
    const auto error_with = [&](auto change) {
      AdamwArgs args = good;
      change(args);
      return error_of([&] { adamw_prepare(ctx, args); });
    };
    CHECK(missing(error_with([](AdamwArgs& a) { a.tensors = nullptr; }), {"tensors"}) == "");
    CHECK(missing(error_with([](AdamwArgs& a) { a.scalars = nullptr; }), {"scalars"}) == "");
    CHECK(missing(error_with([](AdamwArgs& a) { a.steps = nullptr; }), {"steps"}) == "");
    CHECK(missing(error_with([](AdamwArgs& a) { a.scratch = nullptr; }), {"scratch"}) == "");
    CHECK(missing(error_with([](AdamwArgs& a) { a.groups = nullptr; }), {"groups"}) == "");
    CHECK(missing(error_with([](AdamwArgs& a) { a.group_count = 0; }), {"groups"}) == "");
    CHECK(missing(error_with([](AdamwArgs& a) { a.group_scalars = nullptr; }), {"group_scalars"}) ==
          "");
    CHECK(missing(error_with([](AdamwArgs& a) { a.segments = nullptr; }), {"segment"}) == "");
    CHECK(missing(error_with([](AdamwArgs& a) { a.max_norm = -1.0f; }), {"max_norm", "-1"}) == "");
    CHECK(missing(error_with([](AdamwArgs& a) { a.max_norm = NAN; }), {"max_norm", "nan"}) == "");
    CHECK(missing(error_with([](AdamwArgs& a) {
                    a.max_norm = 1.0f;
                    a.segment_sums = nullptr;
                  }),
                  {"segment_sums"}) == "");
    CHECK(missing(error_with([](AdamwArgs& a) { a.lr = -1.0f; }), {"lr", "-1"}) == "");
    CHECK(missing(error_with([](AdamwArgs& a) { a.lr = NAN; }), {"lr", "nan"}) == "");
    CHECK(missing(error_with([](AdamwArgs& a) { a.config.amsgrad = true; }), {"amsgrad"}) == "");
    CHECK(error_of([&] { adamw_measure(ctx, good, nullptr); }) != "no error");
    CHECK(tables.scalars().step == 0);
    CHECK(error_with([](AdamwArgs&) {}) == "no error");
  }
}

}  // namespace octet::test
