// SPDX-License-Identifier: Apache-2.0
// A whole step, gradients and Linear included, or of AdamW or a Linear alone, captured once and
// replayed: the bits of the eager run, with learning rates and inputs that change between replays.
#include <array>
#include <cmath>
#include <sstream>
#include <vector>

#include "octet/octet.hpp"
#include "support/adamw_model.hpp"
#include "support/catch.hpp"
#include "support/compare.hpp"
#include "support/cuda_stream.hpp"
#include "support/devices.hpp"
#include "support/random.hpp"

namespace octet::test {
namespace {

constexpr std::int64_t kTokens = 48;
constexpr std::int64_t kIn = 96;
constexpr std::int64_t kOut = 64;
constexpr std::array<float, 6> kRates = {1e-3f, 2e-3f, 5e-4f, 4e-3f, 1e-3f, 3e-3f};

/// One linear layer and a vector, trained on a fixed batch.
class Trainer {
 public:
  Trainer(const Context& ctx, Level level, Fp8Recipe recipe, WeightFormat format)
      : ctx_(ctx),
        comm_(make_single(ctx)),
        gemms_(ctx),
        engine_(ctx, *comm_, {.level = level, .formats = formats_with(level, format)}),
        x_(upload(ctx, normal_values(kTokens * kIn, 1))),
        dy_(upload(ctx, normal_values(kTokens * kOut, 2))),
        init_(upload(ctx, normal_values(kIn * kOut, 3, 0.02f))),
        y_(ctx, DType::f32, {kTokens, kOut}),
        dx_(ctx, DType::f32, {kTokens, kIn}),
        dw_(ctx, DType::f32, {kOut, kIn}),
        dbias_(ctx, DType::f32, {kOut}),
        lr_(ctx, sizeof(float)) {
    weight_ = engine_.add({.name = "w",
                           .shape = {kOut, kIn},
                           .init = view_of(ctx, init_, DType::f32, {kOut, kIn}),
                           .group = AdamWGroup{.weight_decay = 0.1f}});
    bias_ = engine_.add(
        {.name = "b", .shape = {kOut}, .init = view_of(ctx, init_, DType::f32, {kOut})});
    engine_.freeze();
    const DType weight = dtype_of(format);
    linear_ = std::make_unique<Linear>(gemms_, LinearConfig{.in_features = kIn,
                                                            .out_features = kOut,
                                                            .max_tokens = kTokens,
                                                            .fp8 = is_fp8(weight),
                                                            .recipe = recipe,
                                                            .weight_dtype = weight,
                                                            .bias = true,
                                                            .gelu = true,
                                                            .nonfinite = engine_.nonfinite_flag()});
  }

  void set_rate(float rate) { write_one(ctx_, lr_.data(), rate); }

  void enqueue_step() {
    const WeightFormat format = engine_.weight_format(weight_);
    const bool blocks = has_block_scales(format), transposed = is_transposed(format);
    const ScaledView w = blocks ? ScaledView{} : engine_.weight(weight_);
    const BlockScaledView in_blocks = blocks ? engine_.block_weight(weight_) : BlockScaledView{};
    linear_->forward({.x = view_of(ctx_, x_, DType::f32, {kTokens, kIn}),
                      .weight = w,
                      .block_weight = in_blocks,
                      .bias = engine_.weight(bias_).data,
                      .y = y_});
    linear_->backward(
        {.dy = view_of(ctx_, dy_, DType::f32, {kTokens, kOut}),
         .weight = w,
         .block_weight = in_blocks,
         .weight_transposed =
             transposed && !blocks ? engine_.weight_transposed(weight_) : TensorView{},
         .block_weight_transposed =
             transposed && blocks ? engine_.block_weight_transposed(weight_) : BlockScaledView{},
         .dx = dx_,
         .dw = {dw_.view(), nullptr},
         .dbias = dbias_});
    engine_.add_gradient(weight_, dw_);
    engine_.add_gradient(bias_, dbias_);
    engine_.step({.lr = 0.0f, .lr_device = lr_.as<const float>(), .max_norm = 1.0f});
  }

  std::vector<std::uint8_t> state() const {
    std::vector<std::uint8_t> bytes;
    const auto append = [&bytes](const std::vector<std::uint8_t>& part) {
      bytes.insert(bytes.end(), part.begin(), part.end());
    };
    append(download_bytes(ctx_, dx_));
    for (int i : {weight_.index, bias_.index}) {
      const AdamW& adamw = engine_.optimizer();
      const WeightFormat format = engine_.weight_format({i});
      append(download_bytes(ctx_, has_block_scales(format) ? engine_.block_weight({i}).data
                                                           : engine_.weight({i}).data));
      append(block_scale_bytes(ctx_, adamw, i, format));
      if (format == WeightFormat::e4m3_and_transpose) {
        append(download_bytes(ctx_, engine_.weight_transposed({i})));
      } else if (is_transposed(format)) {
        append(download_bytes(ctx_, engine_.block_weight_transposed({i}).data));
      }
      for (const StateView& view : {adamw.master(i), adamw.m(i), adamw.v(i)}) {
        append(download_state(ctx_, view));
      }
    }
    return bytes;
  }

 private:
  static Formats formats_with(Level level, WeightFormat weight) {
    Formats formats = formats_of(level);
    formats.state.weight = weight;
    return formats;
  }

  Context ctx_;
  std::unique_ptr<Communicator> comm_;
  GemmRegistry gemms_;
  Engine engine_;
  Buffer x_, dy_, init_;
  Tensor y_, dx_, dw_, dbias_;
  Buffer lr_;
  ParamId weight_, bias_;
  std::unique_ptr<Linear> linear_;
};

void check_replay(Level level, Fp8Recipe recipe, WeightFormat format) {
  CAPTURE(name_of(level), name_of(recipe), name_of(format));
  const Stream stream;
  const Context ctx = Context::cuda(0, stream.get());
  Trainer eager(ctx, level, recipe, format);
  for (float rate : kRates) {
    eager.set_rate(rate);
    eager.enqueue_step();
  }

  Trainer captured(ctx, level, recipe, format);
  captured.set_rate(kRates[0]);
  captured.enqueue_step();  // plans of GEMMs are made at their first call
  ctx.synchronize();
  Graph graph(stream.get(), [&] { captured.enqueue_step(); });
  for (std::size_t i = 1; i < kRates.size(); ++i) {
    captured.set_rate(kRates[i]);
    graph.launch();
  }
  ctx.synchronize();
  REQUIRE(first_difference(captured.state(), eager.state()) == "");
}

/// AdamW over matrices in several formats, the gradient of one of them without a known amax, and
/// over more vectors than a block of adamw_prepare takes; a learning rate in device memory.
class Matrices {
 public:
  explicit Matrices(const Context& ctx)
      : model_(ctx, {.weight_decay = 0.1f, .seed = 3}, cases()), lr_(ctx, sizeof(float)) {
    for (int i = 0; i < kCount; ++i) {
      model_.initialise(i, normal_values(elements(i), static_cast<std::uint32_t>(i), 0.02f));
    }
  }

  /// What changes from step to step: the rate and the gradients.
  void set(std::size_t step) {
    write_one(model_.context(), lr_.data(), kRates[step]);
    for (int i = 0; i < kCount; ++i) {
      const auto seed = static_cast<std::uint32_t>(100 * step) + static_cast<std::uint32_t>(i);
      model_.set_gradient(i, normal_values(elements(i), seed, 0.1f));
    }
  }

  void enqueue_step() {
    model_.optimizer().measure(model_.flag());
    model_.optimizer().step(
        {.lr_device = lr_.as<const float>(), .max_norm = 1.0f, .nonfinite = model_.flag()});
  }

  void raise_flag() { write_one(model_.context(), model_.flag(), std::uint32_t{1}); }

  const AdamwModel& model() const { return model_; }

 private:
  static constexpr int kMatrices = 5;
  static constexpr int kCount = kMatrices + 150;
  static constexpr std::int64_t kVectorElements = 1000;

  static std::size_t elements(int i) { return i < kMatrices ? 128 * 256 : kVectorElements; }

  static std::vector<ParamCase> cases() {
    StateFormats transposed = kO2, none = kO2;
    transposed.weight = WeightFormat::e4m3_and_transpose;
    none.weight = WeightFormat::none;
    const Shape shape = {128, 256};
    std::vector<ParamCase> list = {{.shape = shape, .formats = kO2, .gradient = DType::e4m3},
                                   {.shape = shape, .formats = transposed, .gradient = DType::e4m3},
                                   {.shape = shape,
                                    .formats = kSmall,
                                    .gradient = DType::e4m3,
                                    .amax = GradientAmax::measured},
                                   {.shape = shape, .formats = none, .gradient = DType::bf16},
                                   {.shape = shape, .formats = kO2, .gradient = DType::f32}};
    const ParamCase rows[] = {
        {.shape = {kVectorElements}, .formats = kO0, .gradient = DType::bf16},
        {.shape = {kVectorElements}, .formats = kO1, .gradient = DType::e4m3},
        {.shape = {kVectorElements}, .formats = kO2, .gradient = DType::e4m3}};
    while (list.size() < kCount) list.push_back(rows[list.size() % 3]);
    return list;
  }

  AdamwModel model_;
  Buffer lr_;
};

/// A Linear's forward and backward, and the update of its delayed scales, on inputs that change.
struct LinearCase {
  Fp8Recipe recipe = Fp8Recipe::tensorwise;
  DType weight = DType::e4m3;
  std::int64_t tokens = kTokens;
  bool bias = false, gelu = false;
  /// dx goes through the GELU of a Linear before; dw and dbias add to what is there.
  bool dgelu = false, accumulate = false, cache = false;
};

std::string to_string(const LinearCase& c) {
  std::ostringstream text;
  text << name_of(c.recipe) << ", " << name_of(c.weight) << " weight, " << c.tokens
       << " tokens, bias " << c.bias << ", gelu " << c.gelu << ", dgelu " << c.dgelu
       << ", accumulate " << c.accumulate << ", cache " << c.cache;
  return text.str();
}

class LinearCalls {
 public:
  LinearCalls(const Context& ctx, const LinearCase& c)
      : c_(c),
        ctx_(ctx),
        gemms_(ctx),
        counters_(upload<CastCounters>(ctx, {{}})),
        flag_(upload<std::uint32_t>(ctx, {0})),
        linear_(gemms_, {.in_features = kIn,
                         .out_features = kOut,
                         .max_tokens = c.tokens,
                         .recipe = c.recipe,
                         .weight_dtype = c.weight,
                         .bias = c.bias,
                         .gelu = c.gelu,
                         .cache_weight = c.cache,
                         .counters = counters_.as<CastCounters>(),
                         .nonfinite = flag_.as<std::uint32_t>()}),
        scaling_(ctx, {.amax_history_len = 2}, linear_.delayed_entries()),
        wide_(upload(ctx, normal_values(kIn * kOut, 3, 0.02f))),
        codes_(ctx, DType::e4m3, {kOut, kIn}),
        x_(ctx, DType::f32, {c.tokens, kIn}),
        dy_(ctx, DType::f32, {c.tokens, kOut}),
        pre_(ctx, DType::bf16, {c.tokens, kIn}),
        bias_(ctx, DType::bf16, {kOut}),
        y_(ctx, DType::bf16, {c.tokens, kOut}),
        dx_(ctx, DType::bf16, {c.tokens, kIn}),
        dw_(ctx, DType::f32, {kOut, kIn}),
        dbias_(ctx, DType::f32, {kOut}) {
    weight_ = {view_of(ctx, wide_, DType::f32, {kOut, kIn}), nullptr};
    if (c.weight == DType::e4m3) {
      quantize(ctx, {.in = weight_.data, .out = codes_.view()});
      weight_ = codes_.view();
    }
    for (const Tensor* each : {&dw_, &dbias_}) zero_bytes(ctx, each->view().data, each->bytes());
    ctx.synchronize();
  }

  /// Inputs, of another size each time, so that scales must follow.
  void set(std::uint32_t seed) {
    const float size = std::ldexp(1.0f, static_cast<int>(5 * seed % 7) - 3);
    put(x_, 10 * seed, size);
    put(dy_, 10 * seed + 1, 1e-3f * size);
    put(pre_, 10 * seed + 2, 1.0f);
    put(bias_, 10 * seed + 3, 1.0f);
  }

  void enqueue() {
    linear_.forward(
        {.x = x_, .weight = weight_, .bias = c_.bias ? bias_.view() : TensorView{}, .y = y_});
    linear_.backward({.dy = dy_,
                      .weight = weight_,
                      .dx = dx_,
                      .input_pre_activation = c_.dgelu ? pre_.view() : TensorView{},
                      .dw = {dw_.view(), nullptr},
                      .dbias = c_.bias ? dbias_.view() : TensorView{},
                      .accumulate = c_.accumulate});
    scaling_.update();
  }

  /// All that is left of a call.
  std::vector<std::uint8_t> results() const {
    std::vector<std::uint8_t> bytes;
    const auto append = [&](const TensorView& view) {
      const auto part = download_bytes(ctx_, view);
      bytes.insert(bytes.end(), part.begin(), part.end());
    };
    for (const Tensor* each : {&y_, &dx_, &dw_, &dbias_}) append(*each);
    if (c_.gelu) append(linear_.pre_activation());
    for (const DelayedScaling::Entry& entry : linear_.delayed_entries()) {
      append({entry.scale, DType::f32, {3}, ctx_.device()});  // without the padding
    }
    append(view_of(ctx_, counters_, DType::f32, {4}));
    append(view_of(ctx_, flag_, DType::f32, {1}));
    return bytes;
  }

 private:
  void put(const Tensor& to, std::uint32_t seed, float size) {
    const auto count = static_cast<std::size_t>(to.view().numel());
    const Encoded values = encode_values(to.view().dtype, normal_values(count, seed, size));
    write(ctx_, to.view().data, values.bytes);
  }

  LinearCase c_;
  Context ctx_;
  GemmRegistry gemms_;
  Buffer counters_, flag_;
  Linear linear_;
  DelayedScaling scaling_;
  Buffer wide_;
  ScaledTensor codes_;
  ScaledView weight_;
  Tensor x_, dy_, pre_, bias_, y_, dx_, dw_, dbias_;
};

void check_replay(const LinearCase& c) {
  CAPTURE(to_string(c));
  const Stream stream;
  const Context ctx = Context::cuda(0, stream.get());
  LinearCalls eager(ctx, c), captured(ctx, c);
  for (LinearCalls* each : {&eager, &captured}) {
    each->set(0);
    each->enqueue();  // plans are made, delayed scaling measures, a kept weight is cast
  }
  Graph graph(stream.get(), [&] { captured.enqueue(); });
  std::vector<std::uint8_t> before = captured.results();
  for (std::uint32_t seed = 1; seed <= 4; ++seed) {
    for (LinearCalls* each : {&eager, &captured}) each->set(seed);
    eager.enqueue();
    graph.launch();
    const std::vector<std::uint8_t> results = captured.results();
    REQUIRE(first_difference(results, eager.results()) == "");
    REQUIRE(first_difference(results, before) != "");
    before = results;
  }
}

}  // namespace

TEST_CASE("a captured step replays with the bits of the eager one") {
  if (cuda_device_count() == 0) {
    WARN("no CUDA device: nothing to capture");
    return;
  }
  for (Level level : {Level::O0, Level::O1, Level::O2}) {
    check_replay(level, Fp8Recipe::tensorwise, formats_of(level).state.weight);
  }
  for (Fp8Recipe recipe : {Fp8Recipe::delayed, Fp8Recipe::blockwise, Fp8Recipe::mxfp8}) {
    check_replay(Level::O2, recipe, WeightFormat::e4m3);
  }
  check_replay(Level::O2, Fp8Recipe::tensorwise, WeightFormat::e4m3_and_transpose);
  for (WeightFormat tiles : {WeightFormat::e4m3_tile, WeightFormat::e4m3_tile_and_transpose}) {
    check_replay(Level::O2, Fp8Recipe::blockwise, tiles);
  }
}

TEST_CASE("a captured forward and backward of a Linear replays with the bits of plain calls") {
  if (cuda_device_count() == 0) {
    WARN("no CUDA device: nothing to capture");
    return;
  }
  for (Fp8Recipe recipe :
       {Fp8Recipe::delayed, Fp8Recipe::tensorwise, Fp8Recipe::blockwise, Fp8Recipe::mxfp8}) {
    for (DType weight : {DType::e4m3, DType::f32}) {
      // A number of tokens that FP8 units take as it is, and one that they do not.
      for (std::int64_t tokens : {kTokens, std::int64_t{37}}) {
        for (int bits = 0; bits < 8; ++bits) {
          check_replay({.recipe = recipe,
                        .weight = weight,
                        .tokens = tokens,
                        .bias = (bits & 1) != 0,
                        .gelu = (bits & 2) != 0,
                        .dgelu = (bits & 4) != 0,
                        .accumulate = bits == 0 || bits == 7,
                        .cache = bits == 1 || bits == 6});
        }
      }
    }
  }
}

TEST_CASE("a captured measure() and step() of AdamW replay with the bits of the eager ones") {
  if (cuda_device_count() == 0) {
    WARN("no CUDA device: nothing to capture");
    return;
  }
  const Stream stream;
  const Context ctx = Context::cuda(0, stream.get());
  Matrices eager(ctx), captured(ctx);
  eager.set(0);
  eager.enqueue_step();  // kernels are loaded at their first call
  captured.set(0);
  captured.enqueue_step();
  Graph graph(stream.get(), [&] { captured.enqueue_step(); });
  constexpr std::size_t kSkipped = 3;  // a NaN somewhere
  for (std::size_t i = 1; i < kRates.size(); ++i) {
    CAPTURE(i);
    const std::vector<std::uint8_t> before = captured.model().all_bytes();
    for (Matrices* each : {&eager, &captured}) {
      each->set(i);
      if (i == kSkipped) each->raise_flag();
    }
    eager.enqueue_step();
    graph.launch();
    const AdamwScalars scalars = captured.model().scalars();
    CHECK(scalars.step + scalars.skipped == static_cast<std::int64_t>(i) + 1);
    CHECK(scalars.skipped == (i < kSkipped ? 0 : 1));
    CHECK(scalars.lr == kRates[i]);
    CHECK(scalars.clip < 1.0f);
    CHECK(bits_of(scalars.clip) == bits_of(eager.model().scalars().clip));
    CHECK(first_difference(captured.model().all_bytes(), eager.model().all_bytes()) == "");
    CHECK((first_difference(captured.model().all_bytes(), before) == "") == (i == kSkipped));
  }
}

}  // namespace octet::test
