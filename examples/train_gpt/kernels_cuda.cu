// SPDX-License-Identifier: Apache-2.0
#include <cmath>

#include "cuda_support.cuh"
#include "kernels_math.hpp"

namespace train_gpt {
namespace {

using octet::Context;

// Sums over the tokens are made in two launches: slices of the tokens first, then over the slices.
// 32 slices of a few columns fill the device even for one narrow LayerNorm.
constexpr std::int64_t kNormSlices = 32;
constexpr std::int64_t kTokenSlices = 8;
constexpr int kElementThreads = 256;
constexpr int kWarpsPerBlock = 8;

struct Table {
  const void* data;
  octet::DType dtype;
  const octet::TensorScale* scale;

  explicit Table(const octet::ScaledView& view)
      : data(view.data.data), dtype(view.data.dtype), scale(view.scale) {}
  __device__ float at(std::int64_t i) const {
    return weight_at(data, dtype, i) * (scale != nullptr ? scale->scale_inv : 1.0f);
  }
};

__device__ inline std::int64_t byte_at(const Windows& windows, std::int64_t token, int ahead) {
  const std::int64_t row = token / windows.context, t = token % windows.context;
  return windows.text[row * (windows.context + 1) + t + ahead];
}

__global__ void embedding_forward_kernel(Windows windows, Table tokens, Table positions,
                                         std::int64_t width, float* x) {
  const std::int64_t i = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= windows.tokens() * width) return;
  const std::int64_t token = i / width, c = i % width;
  x[i] = tokens.at(byte_at(windows, token, 0) * width + c) +
         positions.at(token % windows.context * width + c);
}

void embedding_forward(const Context& ctx, const Windows& windows, const octet::ScaledView& tokens,
                       const octet::ScaledView& positions, float* x) {
  const std::int64_t width = tokens.data.shape[1];
  const cudaStream_t stream = enter(ctx);
  embedding_forward_kernel<<<blocks_for(windows.tokens() * width, kElementThreads), kElementThreads,
                             0, stream>>>(windows, Table(tokens), Table(positions), width, x);
  check_launch("embedding_forward_kernel");
}

/// out[j] (+)= sum of partial[s * count + j] over the slices, in their order.
__global__ void sum_slices_kernel(const float* partial, std::int64_t slices, std::int64_t count,
                                  bool add, float* out) {
  const std::int64_t j = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (j >= count) return;
  float sum = add ? out[j] : 0.0f;
  for (std::int64_t s = 0; s < slices; ++s) sum += partial[s * count + j];
  out[j] = sum;
}

void sum_slices(cudaStream_t stream, const float* partial, std::int64_t slices, std::int64_t count,
                bool add, float* out) {
  sum_slices_kernel<<<blocks_for(count, kElementThreads), kElementThreads, 0, stream>>>(
      partial, slices, count, add, out);
  check_launch("sum_slices_kernel");
}

/// One block sums the rows of dx of one byte value in one slice of the tokens; a thread owns
/// columns. The bytes of a stretch are kept in shared memory.
__global__ void token_gradient_kernel(Windows windows, const float* dx, std::int64_t vocabulary,
                                      std::int64_t width, float* partial) {
  constexpr int kStretch = 1024;
  __shared__ std::uint8_t bytes[kStretch];
  const std::int64_t value = blockIdx.x, slice = blockIdx.y;
  const std::int64_t length = (windows.tokens() + kTokenSlices - 1) / kTokenSlices;
  const std::int64_t begin = slice * length;
  const std::int64_t end = begin + length < windows.tokens() ? begin + length : windows.tokens();
  float* out = partial + (slice * vocabulary + value) * width;
  for (std::int64_t c0 = 0; c0 < width; c0 += blockDim.x) {
    const std::int64_t c = c0 + threadIdx.x;
    float sum = 0.0f;
    for (std::int64_t first = begin; first < end; first += kStretch) {
      const int count = static_cast<int>(end - first < kStretch ? end - first : kStretch);
      __syncthreads();
      for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) {
        bytes[i] = static_cast<std::uint8_t>(byte_at(windows, first + i, 0));
      }
      __syncthreads();
      if (c < width) {
        for (int i = 0; i < count; ++i) {
          if (bytes[i] == value) sum += dx[(first + i) * width + c];
        }
      }
    }
    if (c < width) out[c] = sum;
  }
}

__global__ void position_gradient_kernel(Windows windows, const float* dx, std::int64_t width,
                                         float* dpositions) {
  const std::int64_t i = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const std::int64_t count = windows.context * width;
  if (i >= count) return;
  float sum = 0.0f;
  for (std::int64_t row = 0; row < windows.rows; ++row) sum += dx[row * count + i];
  dpositions[i] = sum;
}

void embedding_backward(const Context& ctx, const Windows& windows, const float* dx,
                        std::int64_t vocabulary, std::int64_t width, float* dtokens,
                        float* dpositions) {
  octet::WorkspaceScope scope(ctx);
  const std::int64_t count = vocabulary * width;
  auto* partial = static_cast<float*>(
      scope.take(static_cast<std::size_t>(kTokenSlices * count) * sizeof(float)));
  const cudaStream_t stream = enter(ctx);
  const dim3 grid(static_cast<unsigned>(vocabulary), static_cast<unsigned>(kTokenSlices));
  token_gradient_kernel<<<grid, kElementThreads, 0, stream>>>(windows, dx, vocabulary, width,
                                                              partial);
  check_launch("token_gradient_kernel");
  sum_slices(stream, partial, kTokenSlices, count, true, dtokens);
  position_gradient_kernel<<<blocks_for(windows.context * width, kElementThreads), kElementThreads,
                             0, stream>>>(windows, dx, width, dpositions);
  check_launch("position_gradient_kernel");
}

/// One warp per row.
__global__ void layernorm_forward_kernel(const float* x, const float* gain, const float* bias,
                                         std::int64_t tokens, std::int64_t width, float* y,
                                         float* mean, float* rstd) {
  const std::int64_t i = std::int64_t{blockIdx.x} * kWarpsPerBlock + threadIdx.y;
  if (i >= tokens) return;
  x += i * width;
  y += i * width;
  float sum = 0.0f;
  for (std::int64_t c = threadIdx.x; c < width; c += 32) sum += x[c];
  const float m = lane_sum<32>(sum) / static_cast<float>(width);
  float squares = 0.0f;
  for (std::int64_t c = threadIdx.x; c < width; c += 32) squares += (x[c] - m) * (x[c] - m);
  const float r = 1.0f / sqrtf(lane_sum<32>(squares) / static_cast<float>(width) + kLayerNormEps);
  for (std::int64_t c = threadIdx.x; c < width; c += 32) y[c] = (x[c] - m) * r * gain[c] + bias[c];
  if (threadIdx.x == 0) {
    mean[i] = m;
    rstd[i] = r;
  }
}

const dim3 kWarps(32, kWarpsPerBlock);

void layernorm_forward(const Context& ctx, const float* x, const float* gain, const float* bias,
                       std::int64_t tokens, std::int64_t width, float* y, float* mean,
                       float* rstd) {
  const cudaStream_t stream = enter(ctx);
  layernorm_forward_kernel<<<blocks_for(tokens, kWarpsPerBlock), kWarps, 0, stream>>>(
      x, gain, bias, tokens, width, y, mean, rstd);
  check_launch("layernorm_forward_kernel");
}

/// One warp per row.
__global__ void layernorm_input_gradient_kernel(const float* dy, const float* x, const float* gain,
                                                const float* mean, const float* rstd,
                                                std::int64_t tokens, std::int64_t width,
                                                float* dx) {
  const std::int64_t i = std::int64_t{blockIdx.x} * kWarpsPerBlock + threadIdx.y;
  if (i >= tokens) return;
  x += i * width;
  dy += i * width;
  dx += i * width;
  const float m = mean[i], r = rstd[i];
  float sum = 0.0f, along = 0.0f;
  for (std::int64_t c = threadIdx.x; c < width; c += 32) {
    const float g = dy[c] * gain[c];
    sum += g;
    along += g * (x[c] - m) * r;
  }
  sum = lane_sum<32>(sum) / static_cast<float>(width);
  along = lane_sum<32>(along) / static_cast<float>(width);
  for (std::int64_t c = threadIdx.x; c < width; c += 32) {
    dx[c] += r * (dy[c] * gain[c] - sum - (x[c] - m) * r * along);
  }
}

/// A block sums 32 columns over one slice of the tokens: each of its warps every eighth row, then
/// the warps in their order. partial: [slices][gain then bias].
__global__ void layernorm_weight_gradient_kernel(const float* dy, const float* x, const float* mean,
                                                 const float* rstd, std::int64_t tokens,
                                                 std::int64_t width, float* partial) {
  __shared__ float sums[2][kWarpsPerBlock][32];
  const std::int64_t c = std::int64_t{blockIdx.x} * 32 + threadIdx.x, slice = blockIdx.y;
  const std::int64_t length = (tokens + kNormSlices - 1) / kNormSlices;
  const std::int64_t end = (slice + 1) * length < tokens ? (slice + 1) * length : tokens;
  float gain = 0.0f, bias = 0.0f;
  if (c < width) {
    for (std::int64_t i = slice * length + threadIdx.y; i < end; i += kWarpsPerBlock) {
      const float d = dy[i * width + c];
      gain += d * (x[i * width + c] - mean[i]) * rstd[i];
      bias += d;
    }
  }
  sums[0][threadIdx.y][threadIdx.x] = gain;
  sums[1][threadIdx.y][threadIdx.x] = bias;
  __syncthreads();
  if (threadIdx.y >= 2 || c >= width) return;
  float sum = 0.0f;
  for (int warp = 0; warp < kWarpsPerBlock; ++warp) sum += sums[threadIdx.y][warp][threadIdx.x];
  partial[(slice * 2 + threadIdx.y) * width + c] = sum;
}

__global__ void layernorm_sum_kernel(const float* partial, std::int64_t width, float* dgain,
                                     float* dbias) {
  const std::int64_t j = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (j >= 2 * width) return;
  float sum = 0.0f;
  for (std::int64_t s = 0; s < kNormSlices; ++s) sum += partial[s * 2 * width + j];
  (j < width ? dgain[j] : dbias[j - width]) = sum;
}

void layernorm_backward(const Context& ctx, const float* dy, const float* x, const float* gain,
                        const float* mean, const float* rstd, std::int64_t tokens,
                        std::int64_t width, float* dx, float* dgain, float* dbias) {
  octet::WorkspaceScope scope(ctx);
  auto* partial = static_cast<float*>(
      scope.take(static_cast<std::size_t>(2 * kNormSlices * width) * sizeof(float)));
  const cudaStream_t stream = enter(ctx);
  layernorm_input_gradient_kernel<<<blocks_for(tokens, kWarpsPerBlock), kWarps, 0, stream>>>(
      dy, x, gain, mean, rstd, tokens, width, dx);
  check_launch("layernorm_input_gradient_kernel");
  const dim3 grid(blocks_for(width, 32), static_cast<unsigned>(kNormSlices));
  layernorm_weight_gradient_kernel<<<grid, kWarps, 0, stream>>>(dy, x, mean, rstd, tokens, width,
                                                                partial);
  check_launch("layernorm_weight_gradient_kernel");
  layernorm_sum_kernel<<<blocks_for(2 * width, kElementThreads), kElementThreads, 0, stream>>>(
      partial, width, dgain, dbias);
  check_launch("layernorm_sum_kernel");
}

/// Calls f(i) for every element, one thread each.
template <class F>
__global__ void for_each_kernel(std::int64_t count, F f) {
  const std::int64_t i = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i < count) f(i);
}

template <class F>
void for_each(const Context& ctx, std::int64_t count, const char* what, F f) {
  const cudaStream_t stream = enter(ctx);
  for_each_kernel<<<blocks_for(count, kElementThreads), kElementThreads, 0, stream>>>(count, f);
  check_launch(what);
}

struct Gelu {
  const float* x;
  float* y;
  __device__ void operator()(std::int64_t i) const { y[i] = gelu(x[i]); }
};

struct GeluGradient {
  const float* x;
  float* dy;
  __device__ void operator()(std::int64_t i) const { dy[i] *= gelu_slope(x[i]); }
};

struct Add {
  const float *a, *b;
  float* out;
  __device__ void operator()(std::int64_t i) const { out[i] = a[i] + b[i]; }
};

/// One warp per token.
__global__ void cross_entropy_kernel(Windows windows, std::int64_t vocabulary,
                                     std::int64_t mean_tokens, float* logits, float* token_loss) {
  const std::int64_t i = std::int64_t{blockIdx.x} * kWarpsPerBlock + threadIdx.y;
  if (i >= windows.tokens()) return;
  float* row = logits + i * vocabulary;
  const std::int64_t target = byte_at(windows, i, 1);
  float largest = -INFINITY;
  for (std::int64_t j = threadIdx.x; j < vocabulary; j += 32) largest = fmaxf(largest, row[j]);
  largest = lane_max<32>(largest);
  const float aim = row[target] - largest;
  float sum = 0.0f;
  for (std::int64_t j = threadIdx.x; j < vocabulary; j += 32) sum += exp_of(row[j] - largest);
  sum = lane_sum<32>(sum);
  const float share = 1.0f / static_cast<float>(mean_tokens);
  for (std::int64_t j = threadIdx.x; j < vocabulary; j += 32) {
    row[j] = exp_of(row[j] - largest) * (share / sum) - (j == target ? share : 0.0f);
  }
  if (threadIdx.x == 0) token_loss[i] = logf(sum) - aim;
}

/// One block: strided sums, then a tree.
__global__ void mean_kernel(const float* values, std::int64_t count, float* mean) {
  __shared__ double sums[kElementThreads];
  double sum = 0.0;
  for (std::int64_t i = threadIdx.x; i < count; i += kElementThreads) sum += values[i];
  sums[threadIdx.x] = sum;
  for (unsigned half = kElementThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  if (threadIdx.x == 0) *mean = static_cast<float>(sums[0] / static_cast<double>(count));
}

void cross_entropy(const Context& ctx, const Windows& windows, std::int64_t vocabulary,
                   std::int64_t mean_tokens, float* logits, float* token_loss, float* loss) {
  const cudaStream_t stream = enter(ctx);
  cross_entropy_kernel<<<blocks_for(windows.tokens(), kWarpsPerBlock), kWarps, 0, stream>>>(
      windows, vocabulary, mean_tokens, logits, token_loss);
  check_launch("cross_entropy_kernel");
  mean_kernel<<<1, kElementThreads, 0, stream>>>(token_loss, windows.tokens(), loss);
  check_launch("mean_kernel");
}

std::size_t workspace_bytes(const AttentionShape& shape, std::int64_t vocabulary) {
  const std::int64_t floats =
      std::max({kTokenSlices * vocabulary * shape.width, 2 * kNormSlices * shape.width,
                shape.rows * shape.heads * shape.context});
  return octet::WorkspaceScope::padded(static_cast<std::size_t>(floats) * sizeof(float));
}

CUstream_st* create_stream(int device, bool urgent) {
  check_cuda(cudaSetDevice(device), "cudaSetDevice");
  cudaStream_t stream = nullptr;
  int least = 0, greatest = 0;
  check_cuda(cudaDeviceGetStreamPriorityRange(&least, &greatest), "stream priorities");
  check_cuda(
      cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, urgent ? greatest : least),
      "cudaStreamCreate");
  return stream;
}

void destroy_stream(int device, CUstream_st* stream) {
  cudaSetDevice(device);
  cudaStreamDestroy(stream);
}

}  // namespace

const Kernels& cuda_kernels() {
  static constexpr Kernels kKernels{
      .embedding_forward = embedding_forward,
      .embedding_backward = embedding_backward,
      .layernorm_forward = layernorm_forward,
      .layernorm_backward = layernorm_backward,
      .attention_forward = attention_forward_cuda,
      .attention_backward = attention_backward_cuda,
      .gelu_forward =
          [](const Context& ctx, const float* x, std::int64_t count, float* y) {
            for_each(ctx, count, "gelu", Gelu{x, y});
          },
      .gelu_backward =
          [](const Context& ctx, const float* x, std::int64_t count, float* dy) {
            for_each(ctx, count, "gelu gradient", GeluGradient{x, dy});
          },
      .add =
          [](const Context& ctx, const float* a, const float* b, std::int64_t count, float* out) {
            for_each(ctx, count, "add", Add{a, b, out});
          },
      .cross_entropy = cross_entropy,
      .workspace_bytes = workspace_bytes,
      .create_stream = create_stream,
      .destroy_stream = destroy_stream,
  };
  return kKernels;
}

}  // namespace train_gpt
