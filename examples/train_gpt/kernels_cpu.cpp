// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels.hpp"
#include "kernels_math.hpp"

namespace train_gpt {
namespace {

using octet::Context;

float scale_inv_of(const octet::ScaledView& weight) {
  return weight.scale != nullptr ? weight.scale->scale_inv : 1.0f;
}

void embedding_forward(const Context&, const Windows& windows, const octet::ScaledView& tokens,
                       const octet::ScaledView& positions, float* x) {
  const std::int64_t width = tokens.data.shape[1];
  const float token_scale = scale_inv_of(tokens), position_scale = scale_inv_of(positions);
#pragma omp parallel for schedule(static)
  for (std::int64_t i = 0; i < windows.tokens(); ++i) {
    const std::int64_t row = i / windows.context, t = i % windows.context;
    const std::int64_t byte = windows.text[row * (windows.context + 1) + t];
    for (std::int64_t c = 0; c < width; ++c) {
      x[i * width + c] =
          weight_at(tokens.data.data, tokens.data.dtype, byte * width + c) * token_scale +
          weight_at(positions.data.data, positions.data.dtype, t * width + c) * position_scale;
    }
  }
}

/// Calls f(begin, end) for stretches of the columns: each column is summed by one thread in the
/// order of the rows, so the number of threads cannot change the sums.
template <class F>
void for_column_stretches(std::int64_t width, F f) {
  constexpr std::int64_t kStretch = 32;
  const std::int64_t stretches = (width + kStretch - 1) / kStretch;
#pragma omp parallel for schedule(static)
  for (std::int64_t s = 0; s < stretches; ++s) {
    f(s * kStretch, std::min(width, (s + 1) * kStretch));
  }
}

void embedding_backward(const Context&, const Windows& windows, const float* dx, std::int64_t,
                        std::int64_t width, float* dtokens, float* dpositions) {
  std::fill(dpositions, dpositions + windows.context * width, 0.0f);
  for_column_stretches(width, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = 0; i < windows.tokens(); ++i) {
      const std::int64_t row = i / windows.context, t = i % windows.context;
      float* token = dtokens + windows.text[row * (windows.context + 1) + t] * width;
      float* position = dpositions + t * width;
      for (std::int64_t c = begin; c < end; ++c) {
        token[c] += dx[i * width + c];
        position[c] += dx[i * width + c];
      }
    }
  });
}

void layernorm_forward(const Context&, const float* x, const float* gain, const float* bias,
                       std::int64_t tokens, std::int64_t width, float* y, float* mean,
                       float* rstd) {
#pragma omp parallel for schedule(static)
  for (std::int64_t i = 0; i < tokens; ++i) {
    const float* in = x + i * width;
    float* out = y + i * width;
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (std::int64_t c = 0; c < width; ++c) sum += in[c];
    const float m = sum / static_cast<float>(width);
    float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
    for (std::int64_t c = 0; c < width; ++c) squares += (in[c] - m) * (in[c] - m);
    const float r = 1.0f / std::sqrt(squares / static_cast<float>(width) + kLayerNormEps);
#pragma omp simd
    for (std::int64_t c = 0; c < width; ++c) out[c] = (in[c] - m) * r * gain[c] + bias[c];
    mean[i] = m;
    rstd[i] = r;
  }
}

void layernorm_backward(const Context&, const float* dy, const float* x, const float* gain,
                        const float* mean, const float* rstd, std::int64_t tokens,
                        std::int64_t width, float* dx, float* dgain, float* dbias) {
#pragma omp parallel for schedule(static)
  for (std::int64_t i = 0; i < tokens; ++i) {
    const float *in = x + i * width, *up = dy + i * width;
    float* out = dx + i * width;
    const float m = mean[i], r = rstd[i];
    float sum = 0.0f, along = 0.0f;
#pragma omp simd reduction(+ : sum, along)
    for (std::int64_t c = 0; c < width; ++c) {
      sum += up[c] * gain[c];
      along += up[c] * gain[c] * (in[c] - m) * r;
    }
    sum /= static_cast<float>(width);
    along /= static_cast<float>(width);
#pragma omp simd
    for (std::int64_t c = 0; c < width; ++c) {
      out[c] += r * (up[c] * gain[c] - sum - (in[c] - m) * r * along);
    }
  }
  std::fill(dgain, dgain + width, 0.0f);
  std::fill(dbias, dbias + width, 0.0f);
  for_column_stretches(width, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = 0; i < tokens; ++i) {
      for (std::int64_t c = begin; c < end; ++c) {
        dgain[c] += dy[i * width + c] * (x[i * width + c] - mean[i]) * rstd[i];
        dbias[c] += dy[i * width + c];
      }
    }
  });
}

float dot(const float* a, const float* b, std::int64_t count) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (std::int64_t i = 0; i < count; ++i) sum += a[i] * b[i];
  return sum;
}

void add_scaled(float factor, const float* a, std::int64_t count, float* out) {
#pragma omp simd
  for (std::int64_t i = 0; i < count; ++i) out[i] += factor * a[i];
}

/// Pointers of one head of one row of the batch; a step in time is `stride` (or `width`) apart.
struct Head {
  Head(const AttentionShape& s, std::int64_t index)
      : first((index / s.heads) * s.context), column((index % s.heads) * s.head_width()) {}
  std::int64_t first;   ///< token at time 0
  std::int64_t column;  ///< first column of the head
};

void attention_forward(const Context&, const AttentionShape& s, const float* qkv, float* out,
                       float* log_sum) {
  const std::int64_t size = s.head_width(), stride = 3 * s.width;
  const float scale = 1.0f / std::sqrt(static_cast<float>(size));
#pragma omp parallel for schedule(static)
  for (std::int64_t index = 0; index < s.rows * s.heads; ++index) {
    const Head head(s, index);
    const float* q = qkv + head.first * stride + head.column;
    const float *k = q + s.width, *v = k + s.width;
    std::vector<float> weight(static_cast<std::size_t>(s.context));
    float* p = weight.data();
    for (std::int64_t t = 0; t < s.context; ++t) {
      float largest = -INFINITY;
      for (std::int64_t u = 0; u <= t; ++u) {
        p[u] = scale * dot(q + t * stride, k + u * stride, size);
        largest = std::max(largest, p[u]);
      }
      float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
      for (std::int64_t u = 0; u <= t; ++u) {
        p[u] = exp_of(p[u] - largest);
        sum += p[u];
      }
      float* to = out + (head.first + t) * s.width + head.column;
      std::fill(to, to + size, 0.0f);
      for (std::int64_t u = 0; u <= t; ++u) add_scaled(p[u] / sum, v + u * stride, size, to);
      log_sum[index * s.context + t] = largest + std::log(sum);
    }
  }
}

void attention_backward(const Context&, const AttentionShape& s, const float* dout,
                        const float* qkv, const float* out, const float* log_sum, float* dqkv) {
  const std::int64_t size = s.head_width(), stride = 3 * s.width;
  const float scale = 1.0f / std::sqrt(static_cast<float>(size));
#pragma omp parallel for schedule(static)
  for (std::int64_t index = 0; index < s.rows * s.heads; ++index) {
    const Head head(s, index);
    const std::int64_t start = head.first * stride + head.column;
    const float *q = qkv + start, *k = q + s.width, *v = k + s.width;
    float *dq = dqkv + start, *dk = dq + s.width, *dv = dk + s.width;
    for (std::int64_t t = 0; t < s.context; ++t) {
      for (float* part : {dq, dk, dv}) std::fill(part + t * stride, part + t * stride + size, 0.0f);
    }
    for (std::int64_t t = 0; t < s.context; ++t) {
      const std::int64_t at = (head.first + t) * s.width + head.column;
      const float* up = dout + at;
      const float mean = dot(up, out + at, size);
      for (std::int64_t u = 0; u <= t; ++u) {
        const float score = scale * dot(q + t * stride, k + u * stride, size);
        const float p = exp_of(score - log_sum[index * s.context + t]);
        const float ds = scale * p * (dot(up, v + u * stride, size) - mean);
        add_scaled(ds, k + u * stride, size, dq + t * stride);
        add_scaled(ds, q + t * stride, size, dk + u * stride);
        add_scaled(p, up, size, dv + u * stride);
      }
    }
  }
}

void gelu_forward(const Context&, const float* x, std::int64_t count, float* y) {
#pragma omp parallel for simd schedule(static)
  for (std::int64_t i = 0; i < count; ++i) y[i] = gelu(x[i]);
}

void gelu_backward(const Context&, const float* x, std::int64_t count, float* dy) {
#pragma omp parallel for simd schedule(static)
  for (std::int64_t i = 0; i < count; ++i) dy[i] *= gelu_slope(x[i]);
}

void add(const Context&, const float* a, const float* b, std::int64_t count, float* out) {
#pragma omp parallel for simd schedule(static)
  for (std::int64_t i = 0; i < count; ++i) out[i] = a[i] + b[i];
}

void cross_entropy(const Context&, const Windows& windows, std::int64_t vocabulary,
                   std::int64_t mean_tokens, float* logits, float* token_loss, float* loss) {
  const std::int64_t tokens = windows.tokens();
  const float share = 1.0f / static_cast<float>(mean_tokens);
#pragma omp parallel for schedule(static)
  for (std::int64_t i = 0; i < tokens; ++i) {
    float* row = logits + i * vocabulary;
    const std::int64_t window = i / windows.context, t = i % windows.context;
    const std::int64_t target = windows.text[window * (windows.context + 1) + t + 1];
    const float largest = *std::max_element(row, row + vocabulary);
    const float aim = row[target] - largest;
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (std::int64_t j = 0; j < vocabulary; ++j) {
      row[j] = exp_of(row[j] - largest);
      sum += row[j];
    }
    token_loss[i] = std::log(sum) - aim;
    const float factor = share / sum;
#pragma omp simd
    for (std::int64_t j = 0; j < vocabulary; ++j) row[j] *= factor;
    row[target] -= share;
  }
  double sum = 0.0;
  for (std::int64_t i = 0; i < tokens; ++i) sum += static_cast<double>(token_loss[i]);
  *loss = static_cast<float>(sum / static_cast<double>(tokens));
}

}  // namespace

const Kernels& cpu_kernels() {
  static constexpr Kernels kKernels{
      .embedding_forward = embedding_forward,
      .embedding_backward = embedding_backward,
      .layernorm_forward = layernorm_forward,
      .layernorm_backward = layernorm_backward,
      .attention_forward = attention_forward,
      .attention_backward = attention_backward,
      .gelu_forward = gelu_forward,
      .gelu_backward = gelu_backward,
      .add = add,
      .cross_entropy = cross_entropy,
      .workspace_bytes = [](const AttentionShape&, std::int64_t) { return std::size_t{0}; },
      .create_stream = [](int, bool) -> CUstream_st* { return nullptr; },
      .destroy_stream = [](int, CUstream_st*) {},
  };
  return kKernels;
}

}  // namespace train_gpt
