// SPDX-License-Identifier: Apache-2.0
// Causal attention in FP32, tile by tile, so that no [context, context] matrix meets memory
// ("FlashAttention", Dao et al., arXiv 2205.14135). A block of 256 threads, 16 by 16, works on one
// tile of kTile rows of one head; every thread holds kTile/16 by kTile/16 scores and kTile/16 by
// kHead/16 outputs in registers. The backward pass runs once per query tile (dq) and once per key
// tile (dk, dv), computing the scores anew, so that nothing is summed by atomics.
#include <cmath>

#include "cuda_support.cuh"
#include "kernels_math.hpp"

namespace train_gpt {
namespace {

using octet::Context;

constexpr int kSide = 16;
constexpr int kThreads = kSide * kSide;

/// What a block needs to find its head.
struct HeadView {
  std::int64_t first;  ///< token at time 0
  std::int64_t column;
  std::int64_t context;
  int size;  ///< head width, at most kHead

  __device__ HeadView(const AttentionShape& s, std::int64_t index)
      : first((index / s.heads) * s.context),
        column((index % s.heads) * s.head_width()),
        context(s.context),
        size(static_cast<int>(s.head_width())) {}
};

/// Sizes of one instance. kHead is the head width rounded up; the excess is zero.
template <int kHeadWidth, int kTileRows>
struct Tile {
  static constexpr int kHead = kHeadWidth;
  static constexpr int kRows = kTileRows;
  static constexpr int kPerThread = kRows / kSide;
  static constexpr int kColumns = kHead / kSide;
  // A row is 4 floats longer than its contents: 16-byte aligned, and 8 rows meet all 32 banks.
  static constexpr int kStride = kHead + 4;
  static constexpr int kScoreStride = kRows + 4;
  static constexpr int kFloats = kRows * kStride;
  static constexpr int kScoreFloats = kRows * kScoreStride;
};

/// Reads kRows rows of a head from `row0` on, times factor; rows and columns outside are zero.
template <class T>
__device__ void load_tile(const HeadView& head, const float* data, std::int64_t stride,
                          std::int64_t row0, float factor, float* tile) {
  for (int i = static_cast<int>(threadIdx.x); i < T::kRows * T::kHead; i += kThreads) {
    const int row = i / T::kHead, d = i % T::kHead;
    const bool inside = row0 + row < head.context && d < head.size;
    const std::int64_t at = (head.first + row0 + row) * stride + head.column + d;
    tile[row * T::kStride + d] = inside ? factor * data[at] : 0.0f;
  }
}

/// out[i][j] = dot of row ty + 16 i of a with row tx + 16 j of b.
template <class T>
__device__ void row_products(const float* a, const float* b, int ty, int tx,
                             float (&out)[T::kPerThread][T::kPerThread]) {
  constexpr int kN = T::kPerThread;
  for (int i = 0; i < kN; ++i) {
    for (int j = 0; j < kN; ++j) out[i][j] = 0.0f;
  }
#pragma unroll 4
  for (int d = 0; d < T::kHead; d += 4) {
    float4 x[kN], y[kN];
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      x[i] = *reinterpret_cast<const float4*>(a + (ty + kSide * i) * T::kStride + d);
      y[i] = *reinterpret_cast<const float4*>(b + (tx + kSide * i) * T::kStride + d);
    }
#pragma unroll
    for (int i = 0; i < kN; ++i) {
#pragma unroll
      for (int j = 0; j < kN; ++j) {
        out[i][j] = fmaf(x[i].x, y[j].x, out[i][j]);
        out[i][j] = fmaf(x[i].y, y[j].y, out[i][j]);
        out[i][j] = fmaf(x[i].z, y[j].z, out[i][j]);
        out[i][j] = fmaf(x[i].w, y[j].w, out[i][j]);
      }
    }
  }
}

/// kCount neighbouring floats of shared memory, aligned to their size.
template <int kCount>
__device__ void read_run(const float* from, float (&to)[kCount]) {
  if constexpr (kCount % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      const float4 v = *reinterpret_cast<const float4*>(from + i);
      to[i] = v.x;
      to[i + 1] = v.y;
      to[i + 2] = v.z;
      to[i + 3] = v.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) to[i] = from[i];
  }
}

template <class T>
using Outputs = float[T::kPerThread][T::kColumns];

/// out[i][j] += sum over u of score[ty + 16 i][u] * b[u][tx * kColumns + j].
template <class T>
__device__ void add_score_rows(const float* score, const float* b, int ty, int tx,
                               Outputs<T>& out) {
#pragma unroll 2
  for (int u = 0; u < T::kRows; u += 4) {
    float s[T::kPerThread][4];
#pragma unroll
    for (int i = 0; i < T::kPerThread; ++i) {
      read_run<4>(score + (ty + kSide * i) * T::kScoreStride + u, s[i]);
    }
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      float x[T::kColumns];
      read_run<T::kColumns>(b + (u + v) * T::kStride + tx * T::kColumns, x);
#pragma unroll
      for (int i = 0; i < T::kPerThread; ++i) {
#pragma unroll
        for (int j = 0; j < T::kColumns; ++j) out[i][j] = fmaf(s[i][v], x[j], out[i][j]);
      }
    }
  }
}

/// out[i][j] += sum over u of score[u][ty * kPerThread + i] * b[u][tx * kColumns + j].
template <class T>
__device__ void add_score_columns(const float* score, const float* b, int ty, int tx,
                                  Outputs<T>& out) {
#pragma unroll 4
  for (int u = 0; u < T::kRows; ++u) {
    float s[T::kPerThread], x[T::kColumns];
    read_run<T::kPerThread>(score + u * T::kScoreStride + ty * T::kPerThread, s);
    read_run<T::kColumns>(b + u * T::kStride + tx * T::kColumns, x);
#pragma unroll
    for (int i = 0; i < T::kPerThread; ++i) {
#pragma unroll
      for (int j = 0; j < T::kColumns; ++j) out[i][j] = fmaf(s[i], x[j], out[i][j]);
    }
  }
}

/// Writes factor * acc of tile row `row` to a head's row, where both exist.
template <class T>
__device__ void store_row(const HeadView& head, float* data, std::int64_t stride, std::int64_t row,
                          int tx, float factor, const float (&acc)[T::kColumns]) {
  if (row >= head.context) return;
  float* to = data + (head.first + row) * stride + head.column;
  for (int j = 0; j < T::kColumns; ++j) {
    if (tx * T::kColumns + j < head.size) to[tx * T::kColumns + j] = factor * acc[j];
  }
}

/// Late queries see the most keys: their tiles start first, so that none of them comes last.
__device__ std::int64_t query_tile() { return std::int64_t{gridDim.y - 1 - blockIdx.y}; }

template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    attention_forward_kernel(AttentionShape shape, float scale, const float* qkv, float* out,
                             float* log_sum) {
  constexpr int kN = T::kPerThread;
  extern __shared__ float4 shared[];
  float* q = reinterpret_cast<float*>(shared);
  float *k = q + T::kFloats, *v = k + T::kFloats, *score = v + T::kFloats;
  const HeadView head(shape, blockIdx.x);
  const int ty = static_cast<int>(threadIdx.x) / kSide, tx = static_cast<int>(threadIdx.x) % kSide;
  const std::int64_t stride = 3 * shape.width, q0 = query_tile() * T::kRows;
  load_tile<T>(head, qkv, stride, q0, scale, q);
  Outputs<T> acc = {};
  float largest[kN], sum[kN];
  for (int i = 0; i < kN; ++i) {
    largest[i] = -INFINITY;
    sum[i] = 0.0f;
  }
  for (std::int64_t k0 = 0; k0 <= q0; k0 += T::kRows) {
    __syncthreads();
    load_tile<T>(head, qkv + shape.width, stride, k0, 1.0f, k);
    load_tile<T>(head, qkv + 2 * shape.width, stride, k0, 1.0f, v);
    __syncthreads();
    float s[kN][kN];
    row_products<T>(q, k, ty, tx, s);
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      float most = -INFINITY;
      for (int j = 0; j < kN; ++j) {
        // Key 0 is never masked, so `most` is finite in the first tile and `largest` from then on.
        if (k0 + tx + kSide * j > q0 + ty + kSide * i) s[i][j] = -INFINITY;
        most = fmaxf(most, s[i][j]);
      }
      most = fmaxf(largest[i], lane_max<kSide>(most));
      const float shrink = __expf(largest[i] - most);
      float part = 0.0f;
      for (int j = 0; j < kN; ++j) {
        const float p = __expf(s[i][j] - most);
        score[(ty + kSide * i) * T::kScoreStride + tx + kSide * j] = p;
        part += p;
      }
      sum[i] = sum[i] * shrink + lane_sum<kSide>(part);
      largest[i] = most;
      for (int j = 0; j < T::kColumns; ++j) acc[i][j] *= shrink;
    }
    __syncthreads();
    add_score_rows<T>(score, v, ty, tx, acc);
  }
  for (int i = 0; i < kN; ++i) {
    const std::int64_t row = q0 + ty + kSide * i;
    store_row<T>(head, out, shape.width, row, tx, 1.0f / sum[i], acc[i]);
    if (tx == 0 && row < head.context) {
      log_sum[blockIdx.x * head.context + row] = largest[i] + logf(sum[i]);
    }
  }
}

/// delta = dot of dout and out over a head: one warp per token and head.
__global__ void attention_delta_kernel(AttentionShape shape, const float* dout, const float* out,
                                       float* delta) {
  const std::int64_t warp = std::int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  if (warp >= shape.rows * shape.heads * shape.context) return;
  const HeadView head(shape, warp / shape.context);
  const std::int64_t at = (head.first + warp % shape.context) * shape.width + head.column;
  float sum = 0.0f;
  for (int d = static_cast<int>(threadIdx.x); d < head.size; d += 32) {
    sum += dout[at + d] * out[at + d];
  }
  sum = lane_sum<32>(sum);
  if (threadIdx.x == 0) delta[warp] = sum;
}

struct BackwardArgs {
  AttentionShape shape;
  float scale;
  const float *dout, *qkv, *log_sum, *delta;
  float* dqkv;
};

/// Scores of one pair of tiles: p into `score`, d(score) returned in registers.
template <class T>
__device__ void score_gradients(const BackwardArgs& args, const HeadView& head, std::int64_t q0,
                                std::int64_t k0, int ty, int tx, const float* q, const float* k,
                                const float* v, const float* up, float* score,
                                float (&ds)[T::kPerThread][T::kPerThread]) {
  constexpr int kN = T::kPerThread;
  float s[kN][kN];
  row_products<T>(q, k, ty, tx, s);
  row_products<T>(up, v, ty, tx, ds);
  for (int i = 0; i < kN; ++i) {
    const std::int64_t row = q0 + ty + kSide * i;
    const bool inside = row < head.context;
    const std::int64_t at = blockIdx.x * head.context + row;
    const float log_sum = inside ? args.log_sum[at] : 0.0f;
    const float delta = inside ? args.delta[at] : 0.0f;
    for (int j = 0; j < kN; ++j) {
      const bool seen = inside && k0 + tx + kSide * j <= row;
      const float p = seen ? __expf(s[i][j] - log_sum) : 0.0f;
      score[(ty + kSide * i) * T::kScoreStride + tx + kSide * j] = p;
      ds[i][j] = p * (ds[i][j] - delta);
    }
  }
}

template <class T>
__device__ void store_scores(const float (&ds)[T::kPerThread][T::kPerThread], int ty, int tx,
                             float* score) {
  for (int i = 0; i < T::kPerThread; ++i) {
    for (int j = 0; j < T::kPerThread; ++j) {
      score[(ty + kSide * i) * T::kScoreStride + tx + kSide * j] = ds[i][j];
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) attention_query_gradient_kernel(BackwardArgs args) {
  extern __shared__ float4 shared[];
  float* q = reinterpret_cast<float*>(shared);
  float *up = q + T::kFloats, *k = up + T::kFloats, *v = k + T::kFloats, *score = v + T::kFloats;
  const HeadView head(args.shape, blockIdx.x);
  const int ty = static_cast<int>(threadIdx.x) / kSide, tx = static_cast<int>(threadIdx.x) % kSide;
  const std::int64_t width = args.shape.width, stride = 3 * width;
  const std::int64_t q0 = query_tile() * T::kRows;
  load_tile<T>(head, args.qkv, stride, q0, args.scale, q);
  load_tile<T>(head, args.dout, width, q0, 1.0f, up);
  Outputs<T> dq = {};
  for (std::int64_t k0 = 0; k0 <= q0; k0 += T::kRows) {
    __syncthreads();
    load_tile<T>(head, args.qkv + width, stride, k0, 1.0f, k);
    load_tile<T>(head, args.qkv + 2 * width, stride, k0, 1.0f, v);
    __syncthreads();
    float ds[T::kPerThread][T::kPerThread];
    score_gradients<T>(args, head, q0, k0, ty, tx, q, k, v, up, score, ds);
    store_scores<T>(ds, ty, tx, score);
    __syncthreads();
    add_score_rows<T>(score, k, ty, tx, dq);
  }
  for (int i = 0; i < T::kPerThread; ++i) {
    store_row<T>(head, args.dqkv, stride, q0 + ty + kSide * i, tx, args.scale, dq[i]);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) attention_key_gradient_kernel(BackwardArgs args) {
  extern __shared__ float4 shared[];
  float* q = reinterpret_cast<float*>(shared);
  float *up = q + T::kFloats, *k = up + T::kFloats, *v = k + T::kFloats, *score = v + T::kFloats;
  const HeadView head(args.shape, blockIdx.x);
  const int ty = static_cast<int>(threadIdx.x) / kSide, tx = static_cast<int>(threadIdx.x) % kSide;
  const std::int64_t width = args.shape.width, stride = 3 * width;
  const std::int64_t k0 = std::int64_t{blockIdx.y} * T::kRows;
  load_tile<T>(head, args.qkv + width, stride, k0, 1.0f, k);
  load_tile<T>(head, args.qkv + 2 * width, stride, k0, 1.0f, v);
  Outputs<T> dk = {}, dv = {};
  for (std::int64_t q0 = k0; q0 < head.context; q0 += T::kRows) {
    __syncthreads();
    load_tile<T>(head, args.qkv, stride, q0, args.scale, q);
    load_tile<T>(head, args.dout, width, q0, 1.0f, up);
    __syncthreads();
    float ds[T::kPerThread][T::kPerThread];
    score_gradients<T>(args, head, q0, k0, ty, tx, q, k, v, up, score, ds);
    __syncthreads();
    add_score_columns<T>(score, up, ty, tx, dv);
    __syncthreads();
    store_scores<T>(ds, ty, tx, score);
    __syncthreads();
    add_score_columns<T>(score, q, ty, tx, dk);
  }
  for (int i = 0; i < T::kPerThread; ++i) {
    const std::int64_t row = k0 + ty * T::kPerThread + i;
    store_row<T>(head, args.dqkv + width, stride, row, tx, 1.0f, dk[i]);
    store_row<T>(head, args.dqkv + 2 * width, stride, row, tx, 1.0f, dv[i]);
  }
}

/// Calls f with the instance for a head width. Wide heads take fewer rows, so that five tiles fit
/// into the 99 KiB of shared memory that every supported device has.
template <class F>
void with_tile(std::int64_t head_width, F f) {
  octet::require(head_width <= kMaxHeadWidth, "attention with head width ", head_width,
                 "; at most ", kMaxHeadWidth, " is allowed");
  if (head_width <= 32) {
    f(Tile<32, 64>{});
  } else if (head_width <= 64) {
    f(Tile<64, 64>{});
  } else {
    f(Tile<128, 32>{});
  }
}

template <class Kernel, class... Args>
void launch(Kernel kernel, const char* name, const Context& ctx, const AttentionShape& shape,
            int rows, int floats, Args... args) {
  const cudaStream_t stream = enter(ctx);
  const int bytes = floats * static_cast<int>(sizeof(float));
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
             name);
  const dim3 grid(static_cast<unsigned>(shape.rows * shape.heads), blocks_for(shape.context, rows));
  kernel<<<grid, kThreads, static_cast<std::size_t>(bytes), stream>>>(args...);
  check_launch(name);
}

float scale_of(const AttentionShape& shape) {
  return 1.0f / std::sqrt(static_cast<float>(shape.head_width()));
}

}  // namespace

void attention_forward_cuda(const Context& ctx, const AttentionShape& shape, const float* qkv,
                            float* out, float* log_sum) {
  with_tile(shape.head_width(), [&](auto tile) {
    using T = decltype(tile);
    launch(attention_forward_kernel<T>, "attention_forward_kernel", ctx, shape, T::kRows,
           3 * T::kFloats + T::kScoreFloats, shape, scale_of(shape), qkv, out, log_sum);
  });
}

void attention_backward_cuda(const Context& ctx, const AttentionShape& shape, const float* dout,
                             const float* qkv, const float* out, const float* log_sum,
                             float* dqkv) {
  octet::WorkspaceScope scope(ctx);
  const std::int64_t rows = shape.rows * shape.heads * shape.context;
  auto* delta = static_cast<float*>(scope.take(static_cast<std::size_t>(rows) * sizeof(float)));
  const cudaStream_t stream = enter(ctx);
  attention_delta_kernel<<<blocks_for(rows, 8), dim3(32, 8), 0, stream>>>(shape, dout, out, delta);
  check_launch("attention_delta_kernel");
  const BackwardArgs args{shape, scale_of(shape), dout, qkv, log_sum, delta, dqkv};
  with_tile(shape.head_width(), [&](auto tile) {
    using T = decltype(tile);
    constexpr int kFloats = 4 * T::kFloats + T::kScoreFloats;
    launch(attention_query_gradient_kernel<T>, "attention_query_gradient_kernel", ctx, shape,
           T::kRows, kFloats, args);
    launch(attention_key_gradient_kernel<T>, "attention_key_gradient_kernel", ctx, shape, T::kRows,
           kFloats, args);
  });
}

}  // namespace train_gpt
