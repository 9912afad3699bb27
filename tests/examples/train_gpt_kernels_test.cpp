// SPDX-License-Identifier: Apache-2.0
// The kernels of examples/train_gpt on every device: forward against plain loops in double,
// backward against central differences of those loops.
#include "kernels.hpp"

#include <cmath>
#include <functional>
#include <string>
#include <vector>

#include "support/catch.hpp"
#include "support/compare.hpp"
#include "support/devices.hpp"
#include "support/guarded.hpp"
#include "support/random.hpp"
#include "support/reference.hpp"

using namespace octet::test;
using octet::Buffer;
using octet::Context;
using octet::DType;
using train_gpt::AttentionShape;
using train_gpt::Kernels;
using train_gpt::Windows;

namespace {

using Doubles = std::vector<double>;
using Floats = std::vector<float>;

const Kernels& kernels_of(const Context& ctx) {
  return ctx.device().type == octet::DeviceType::cuda ? train_gpt::cuda_kernels()
                                                      : train_gpt::cpu_kernels();
}

Doubles wide(const Floats& values) { return {values.begin(), values.end()}; }

std::size_t size(std::int64_t count) { return static_cast<std::size_t>(count); }

/// Device memory for floats between guards.
struct Output {
  Output(const Context& ctx, std::int64_t count) : guarded(ctx, size(count) * sizeof(float)) {}
  Output(const Context& ctx, const Floats& start) : Output(ctx, std::int64_t(start.size())) {
    write(ctx, guarded.data(), start);
  }
  float* data() { return static_cast<float*>(guarded.data()); }
  Floats values() const {
    REQUIRE(guarded.intact());
    return guarded.values<float>();
  }
  Guarded guarded;
};

/// Empty when every value is within `tolerance` of the largest expected magnitude (at least 1e-3 of
/// 1) of its reference.
std::string far_off(const Floats& actual, const Doubles& expected, double tolerance) {
  if (actual.size() != expected.size()) return "sizes differ";
  double largest = 1e-3;
  for (double x : expected) largest = std::max(largest, std::abs(x));
  for (std::size_t i = 0; i < actual.size(); ++i) {
    if (std::abs(double(actual[i]) - expected[i]) <= tolerance * largest) continue;
    return std::to_string(i) + ": " + std::to_string(actual[i]) + " instead of " +
           std::to_string(expected[i]);
  }
  return "";
}

double dot(const Doubles& a, const Floats& b) {
  double sum = 0.0;
  for (std::size_t i = 0; i < a.size(); ++i) sum += a[i] * double(b[i]);
  return sum;
}

/// Compares gradients with central differences of f at `samples` elements of x, spread over it.
std::string wrong_gradient(const Floats& gradient, const Floats& x, std::size_t samples,
                           const std::function<double(const Doubles&)>& f) {
  constexpr double kStep = 1e-4, kTolerance = 2e-4;
  Doubles at = wide(x);
  double largest = 1e-3;
  for (float g : gradient) largest = std::max(largest, double(std::abs(g)));
  const std::size_t stride = std::max<std::size_t>(1, x.size() / samples);
  for (std::size_t i = 0; i < x.size(); i += stride) {
    const double kept = at[i];
    at[i] = kept + kStep;
    const double above = f(at);
    at[i] = kept - kStep;
    const double below = f(at);
    at[i] = kept;
    const double expected = (above - below) / (2 * kStep);
    if (std::abs(double(gradient[i]) - expected) <= kTolerance * largest) continue;
    return std::to_string(i) + ": " + std::to_string(gradient[i]) + " instead of " +
           std::to_string(expected);
  }
  return "";
}

std::vector<std::uint8_t> random_text(std::int64_t rows, std::int64_t context) {
  Draws draws(7);
  std::vector<std::uint8_t> text(size(rows * (context + 1)));
  // Few different bytes, so that most occur several times, and the last one of all.
  for (std::uint8_t& byte : text) byte = static_cast<std::uint8_t>(draws() % 5 + 100);
  text.front() = 255;
  text.back() = 255;
  return text;
}

Doubles layernorm(const Doubles& x, const Doubles& gain, const Doubles& bias) {
  const std::size_t width = gain.size();
  Doubles y(x.size());
  for (std::size_t row = 0; row < x.size(); row += width) {
    double mean = 0.0, variance = 0.0;
    for (std::size_t c = 0; c < width; ++c) mean += x[row + c] / double(width);
    for (std::size_t c = 0; c < width; ++c) {
      variance += (x[row + c] - mean) * (x[row + c] - mean) / double(width);
    }
    for (std::size_t c = 0; c < width; ++c) {
      y[row + c] =
          (x[row + c] - mean) / std::sqrt(variance + double(train_gpt::kLayerNormEps)) * gain[c] +
          bias[c];
    }
  }
  return y;
}

Doubles attention(const AttentionShape& s, const Doubles& qkv) {
  Doubles out(size(s.rows * s.context * s.width), 0.0);
  const auto at = [&](std::int64_t row, std::int64_t t, std::int64_t part, std::int64_t c) {
    return qkv[size(((row * s.context + t) * 3 + part) * s.width + c)];
  };
  for (std::int64_t row = 0; row < s.rows; ++row) {
    for (std::int64_t c0 = 0; c0 < s.width; c0 += s.head_width()) {
      for (std::int64_t t = 0; t < s.context; ++t) {
        Doubles weight;
        double sum = 0.0;
        for (std::int64_t u = 0; u <= t; ++u) {
          double score = 0.0;
          for (std::int64_t c = c0; c < c0 + s.head_width(); ++c) {
            score += at(row, t, 0, c) * at(row, u, 1, c);
          }
          weight.push_back(std::exp(score / std::sqrt(double(s.head_width()))));
          sum += weight.back();
        }
        for (std::int64_t u = 0; u <= t; ++u) {
          for (std::int64_t c = c0; c < c0 + s.head_width(); ++c) {
            out[size((row * s.context + t) * s.width + c)] +=
                weight[size(u)] / sum * at(row, u, 2, c);
          }
        }
      }
    }
  }
  return out;
}

double gelu(double x) {
  return 0.5 * x * (1.0 + std::tanh(std::sqrt(2.0 / M_PI) * (x + 0.044715 * x * x * x)));
}

double cross_entropy(const std::vector<std::uint8_t>& text, std::int64_t context,
                     std::int64_t vocabulary, const Doubles& logits) {
  double loss = 0.0;
  const std::int64_t tokens = std::int64_t(logits.size()) / vocabulary;
  for (std::int64_t i = 0; i < tokens; ++i) {
    double sum = 0.0, largest = -INFINITY;
    const double* row = logits.data() + i * vocabulary;
    for (std::int64_t j = 0; j < vocabulary; ++j) largest = std::max(largest, row[j]);
    for (std::int64_t j = 0; j < vocabulary; ++j) sum += std::exp(row[j] - largest);
    const std::uint8_t target = text[size(i / context * (context + 1) + i % context + 1)];
    loss += (largest + std::log(sum) - row[target]) / double(tokens);
  }
  return loss;
}

/// A weight as an engine would hold it: random codes of a format, decoded by the reference table.
struct StoredWeight {
  StoredWeight(const Context& ctx, DType dtype, octet::Shape shape, std::uint32_t seed)
      : values(size(shape.numel())) {
    const Floats drawn = normal_values(values.size(), seed, 0.5f);
    octet::TensorScale scale;
    if (dtype == DType::f32) {
      buffer = upload(ctx, drawn);
      values = wide(drawn);
    } else if (dtype == DType::bf16) {
      fill<std::uint16_t>(ctx, dtype, drawn);
    } else {
      scale = {0.25f, 4.0f, 0.0f};
      fill<std::uint8_t>(ctx, dtype, drawn);
      for (double& value : values) value *= 0.25;
    }
    scale_buffer = upload(ctx, std::vector<octet::TensorScale>{scale});
    view.data = view_of(ctx, buffer, dtype, shape);
    if (dtype == DType::e4m3) view.scale = scale_buffer.as<octet::TensorScale>();
  }

  template <class Code>
  void fill(const Context& ctx, DType dtype, const Floats& drawn) {
    const FormatTable table(dtype);
    std::vector<Code> codes;
    for (std::size_t i = 0; i < drawn.size(); ++i) {
      codes.push_back(static_cast<Code>(table.encode(double(drawn[i]))));
      values[i] = table.decode(codes.back());
    }
    buffer = upload(ctx, codes);
  }

  Doubles values;
  Buffer buffer, scale_buffer;
  octet::ScaledView view;
};

const AttentionShape kAttentionShapes[] = {
    // rows, context, heads, width: around the tiles of 64 and 32 rows and of 32, 64, 128 columns
    {1, 1, 1, 16},  {2, 5, 4, 20},   {1, 63, 1, 16},  {1, 64, 2, 64},  {3, 65, 2, 66},
    {1, 70, 1, 64}, {2, 130, 1, 33}, {1, 33, 1, 128}, {2, 37, 2, 130}, {1, 129, 1, 65},
};

}  // namespace

TEST_CASE("embedding reads weights of every format", "[train_gpt]") {
  for (Context ctx : test_contexts()) {
    for (DType dtype : {DType::f32, DType::bf16, DType::e4m3}) {
      for (std::int64_t context : {1, 5, 67}) {
        const std::int64_t rows = 3, width = 48;
        INFO(to_string(ctx.device()) << ", " << name_of(dtype) << ", context " << context);
        const auto text = random_text(rows, context);
        const Buffer device_text = upload(ctx, text);
        const StoredWeight tokens(ctx, dtype, {256, width}, 1);
        const StoredWeight positions(ctx, dtype, {context, width}, 2);
        Output x(ctx, rows * context * width);
        kernels_of(ctx).embedding_forward(ctx, {device_text.as<std::uint8_t>(), rows, context},
                                          tokens.view, positions.view, x.data());
        Doubles expected;
        for (std::int64_t i = 0; i < rows * context; ++i) {
          const std::int64_t byte = text[size(i / context * (context + 1) + i % context)];
          for (std::int64_t c = 0; c < width; ++c) {
            expected.push_back(tokens.values[size(byte * width + c)] +
                               positions.values[size(i % context * width + c)]);
          }
        }
        REQUIRE(far_off(x.values(), expected, 1e-6) == "");
      }
    }
  }
}

TEST_CASE("embedding gradient sums the uses of each row", "[train_gpt]") {
  for (Context ctx : test_contexts()) {
    for (std::int64_t width : {16, 300}) {
      for (std::int64_t context : {1, 5, 67, 400}) {
        const std::int64_t rows = 3;
        INFO(to_string(ctx.device()) << ", width " << width << ", context " << context);
        const auto text = random_text(rows, context);
        const Buffer device_text = upload(ctx, text);
        const Floats dx = normal_values(size(rows * context * width), 3);
        const Floats start = normal_values(size(256 * width), 4);
        Doubles dtokens = wide(start), dpositions(size(context * width), 0.0);
        for (std::size_t i = 0; i < dx.size(); ++i) {
          const std::size_t token = i / size(width), c = i % size(width);
          const std::size_t t = token % size(context);
          const std::size_t byte = text[token / size(context) * size(context + 1) + t];
          dtokens[byte * size(width) + c] += double(dx[i]);
          dpositions[t * size(width) + c] += double(dx[i]);
        }
        ctx.reserve_workspace(kernels_of(ctx).workspace_bytes({rows, context, 1, width}, 256));
        Output tokens(ctx, start), positions(ctx, context * width);
        kernels_of(ctx).embedding_backward(ctx, {device_text.as<std::uint8_t>(), rows, context},
                                           upload(ctx, dx).as<float>(), 256, width, tokens.data(),
                                           positions.data());
        REQUIRE(far_off(tokens.values(), dtokens, 1e-5) == "");
        REQUIRE(far_off(positions.values(), dpositions, 1e-5) == "");
      }
    }
  }
}

TEST_CASE("layernorm and its gradients", "[train_gpt]") {
  for (Context ctx : test_contexts()) {
    for (const auto& [tokens, width] :
         {std::pair<std::int64_t, std::int64_t>{1, 16}, {7, 31}, {33, 64}, {77, 100}, {5, 515}}) {
      INFO(to_string(ctx.device()) << ", " << tokens << " tokens of " << width);
      const Kernels& kernels = kernels_of(ctx);
      const Floats x = normal_values(size(tokens * width), 1, 3.0f);
      const Floats gain = normal_values(size(width), 2), bias = normal_values(size(width), 3);
      const Floats dy = normal_values(size(tokens * width), 4);
      const Floats start = normal_values(size(tokens * width), 5);
      const Buffer dev_x = upload(ctx, x), dev_gain = upload(ctx, gain),
                   dev_bias = upload(ctx, bias);
      const Buffer dev_dy = upload(ctx, dy);
      Output y(ctx, tokens * width), mean(ctx, tokens), rstd(ctx, tokens);
      kernels.layernorm_forward(ctx, dev_x.as<float>(), dev_gain.as<float>(), dev_bias.as<float>(),
                                tokens, width, y.data(), mean.data(), rstd.data());
      REQUIRE(far_off(y.values(), layernorm(wide(x), wide(gain), wide(bias)), 1e-5) == "");

      Output dx(ctx, start), dgain(ctx, width), dbias(ctx, width);
      ctx.reserve_workspace(kernels.workspace_bytes({1, tokens, 1, width}, 1));
      kernels.layernorm_backward(ctx, dev_dy.as<float>(), dev_x.as<float>(), dev_gain.as<float>(),
                                 mean.data(), rstd.data(), tokens, width, dx.data(), dgain.data(),
                                 dbias.data());
      Floats added = dx.values();  // the gradient is added to what was there
      for (std::size_t i = 0; i < added.size(); ++i) added[i] -= start[i];
      CHECK(wrong_gradient(added, x, 100, [&](const Doubles& v) {
              return dot(layernorm(v, wide(gain), wide(bias)), dy);
            }) == "");
      CHECK(wrong_gradient(dgain.values(), gain, 40, [&](const Doubles& v) {
              return dot(layernorm(wide(x), v, wide(bias)), dy);
            }) == "");
      CHECK(wrong_gradient(dbias.values(), bias, 40, [&](const Doubles& v) {
              return dot(layernorm(wide(x), wide(gain), v), dy);
            }) == "");
    }
  }
}

TEST_CASE("causal attention and its gradient", "[train_gpt]") {
  for (Context ctx : test_contexts()) {
    for (const AttentionShape& shape : kAttentionShapes) {
      INFO(to_string(ctx.device()) << ", rows " << shape.rows << ", context " << shape.context
                                   << ", heads " << shape.heads << ", width " << shape.width);
      const Kernels& kernels = kernels_of(ctx);
      const std::int64_t count = shape.rows * shape.context * shape.width;
      const Floats qkv = normal_values(size(3 * count), 1, 1.5f);
      const Floats dout = normal_values(size(count), 2);
      const Buffer dev_qkv = upload(ctx, qkv), dev_dout = upload(ctx, dout);
      Output out(ctx, count), log_sum(ctx, shape.rows * shape.heads * shape.context);
      Output dqkv(ctx, 3 * count);
      kernels.attention_forward(ctx, shape, dev_qkv.as<float>(), out.data(), log_sum.data());
      REQUIRE(far_off(out.values(), attention(shape, wide(qkv)), 1e-5) == "");

      ctx.reserve_workspace(kernels.workspace_bytes(shape, 256));
      kernels.attention_backward(ctx, shape, dev_dout.as<float>(), dev_qkv.as<float>(), out.data(),
                                 log_sum.data(), dqkv.data());
      // One row of the batch is as good as another for differences; the last one shows the strides.
      const AttentionShape one{1, shape.context, shape.heads, shape.width};
      const std::size_t first = qkv.size() / size(shape.rows) * size(shape.rows - 1);
      const auto last_row = [&](const Floats& v, std::size_t parts) {
        return Floats(v.begin() + std::ptrdiff_t(first / 3 * parts), v.end());
      };
      CHECK(wrong_gradient(last_row(dqkv.values(), 3), last_row(qkv, 3), 60, [&](const Doubles& v) {
              return dot(attention(one, v), last_row(dout, 1));
            }) == "");
    }
  }
}

TEST_CASE("gelu, its gradient and add", "[train_gpt]") {
  Floats x = normal_values(1001, 1, 3.0f);
  for (float special : {0.0f, 30.0f, -30.0f, 1e-30f, 200.0f, -200.0f}) x.push_back(special);
  const Floats dy = normal_values(x.size(), 2);
  const auto count = std::int64_t(x.size());
  for (Context ctx : test_contexts()) {
    INFO(to_string(ctx.device()));
    const Kernels& kernels = kernels_of(ctx);
    const Buffer dev_x = upload(ctx, x), dev_dy = upload(ctx, dy);
    Output y(ctx, count), dx(ctx, dy), sum(ctx, count);
    kernels.gelu_forward(ctx, dev_x.as<float>(), count, y.data());
    kernels.gelu_backward(ctx, dev_x.as<float>(), count, dx.data());
    kernels.add(ctx, dev_x.as<float>(), dev_dy.as<float>(), count, sum.data());
    Doubles expected, slope;
    Floats added;
    for (std::size_t i = 0; i < x.size(); ++i) {
      const double v = double(x[i]), h = 1e-5;
      expected.push_back(gelu(v));
      slope.push_back(double(dy[i]) * (gelu(v + h) - gelu(v - h)) / (2 * h));
      added.push_back(x[i] + dy[i]);
    }
    const Floats actual = y.values();
    for (std::size_t i = 0; i < x.size(); ++i) {  // each on its own scale
      REQUIRE(std::abs(double(actual[i]) - expected[i]) <= 1e-6 + 1e-6 * std::abs(expected[i]));
    }
    REQUIRE(far_off(dx.values(), slope, 1e-5) == "");
    REQUIRE(first_difference(sum.values(), added) == "");
  }
}

TEST_CASE("cross-entropy and its gradient", "[train_gpt]") {
  for (Context ctx : test_contexts()) {
    for (std::int64_t context : {1, 6, 67}) {
      INFO(to_string(ctx.device()) << ", context " << context);
      const std::int64_t rows = 3, vocabulary = 256, tokens = rows * context;
      const auto text = random_text(rows, context);
      const Buffer device_text = upload(ctx, text);
      Floats logits = normal_values(size(tokens * vocabulary), 1, 3.0f);
      logits[5] = 80.0f;
      logits[6] = -90.0f;
      Output gradient(ctx, logits), token_loss(ctx, tokens), loss(ctx, 1);
      kernels_of(ctx).cross_entropy(ctx, {device_text.as<std::uint8_t>(), rows, context},
                                    vocabulary, 4 * tokens, gradient.data(), token_loss.data(),
                                    loss.data());
      const auto reference = [&](const Doubles& v) {
        return cross_entropy(text, context, vocabulary, v);
      };
      REQUIRE(far_off(loss.values(), {reference(wide(logits))}, 1e-6) == "");
      // One of four micro-batches.
      CHECK(wrong_gradient(gradient.values(), logits, 300,
                           [&](const Doubles& v) { return reference(v) / 4; }) == "");
    }
  }
}

TEST_CASE("a NaN reaches the loss", "[train_gpt]") {
  for (Context ctx : test_contexts()) {
    INFO(to_string(ctx.device()));
    const std::int64_t rows = 2, context = 4, tokens = rows * context;
    const Buffer device_text = upload(ctx, random_text(rows, context));
    Floats logits = normal_values(size(tokens * 256), 1);
    logits[300] = NAN;
    Output gradient(ctx, logits), token_loss(ctx, tokens), loss(ctx, 1);
    kernels_of(ctx).cross_entropy(ctx, {device_text.as<std::uint8_t>(), rows, context}, 256, tokens,
                                  gradient.data(), token_loss.data(), loss.data());
    CHECK(std::isnan(loss.values().front()));
    const AttentionShape shape{1, 9, 1, 16};
    Floats qkv = normal_values(9 * 48, 2);
    qkv[3 * 48 + 20] = NAN;  // a key at time 3
    Output out(ctx, 9 * 16), log_sum(ctx, 9);
    kernels_of(ctx).attention_forward(ctx, shape, upload(ctx, qkv).as<float>(), out.data(),
                                      log_sum.data());
    CHECK(std::isfinite(out.values()[2 * 16]));
    CHECK(std::isnan(out.values()[3 * 16]));
  }
}

TEST_CASE("gradients are the same bits in every run", "[train_gpt]") {
  const AttentionShape shape{4, 96, 2, 64};
  const std::int64_t tokens = shape.rows * shape.context, count = tokens * shape.width;
  const Floats qkv = normal_values(size(3 * count), 1), dout = normal_values(size(count), 2);
  const auto text = random_text(shape.rows, shape.context);
  for (Context ctx : test_contexts()) {
    INFO(to_string(ctx.device()));
    const Kernels& kernels = kernels_of(ctx);
    ctx.reserve_workspace(kernels.workspace_bytes(shape, 256));
    const Buffer dev_text = upload(ctx, text);
    const Buffer dev_qkv = upload(ctx, qkv), dev_dout = upload(ctx, dout);
    std::vector<Floats> first;
    for (int run = 0; run < 3; ++run) {
      Output out(ctx, count), log_sum(ctx, tokens * shape.heads), dqkv(ctx, 3 * count);
      kernels.attention_forward(ctx, shape, dev_qkv.as<float>(), out.data(), log_sum.data());
      kernels.attention_backward(ctx, shape, dev_dout.as<float>(), dev_qkv.as<float>(), out.data(),
                                 log_sum.data(), dqkv.data());
      Output dtokens(ctx, Floats(size(256 * shape.width), 0.0f));
      Output dpositions(ctx, shape.context * shape.width);
      kernels.embedding_backward(
          ctx, Windows{dev_text.as<std::uint8_t>(), shape.rows, shape.context},
          dev_dout.as<float>(), 256, shape.width, dtokens.data(), dpositions.data());
      const std::vector<Floats> results{out.values(), dqkv.values(), dtokens.values(),
                                        dpositions.values()};
      if (run == 0) first = results;
      for (std::size_t i = 0; i < results.size(); ++i) {
        REQUIRE(first_difference(results[i], first[i]) == "");
      }
    }
  }
}
