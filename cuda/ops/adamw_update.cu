// SPDX-License-Identifier: Apache-2.0
// The second half of a step. One kernel for every combination of formats, which it reads from the
// table; the combinations of the levels have paths with vector access and hardware conversions, and
// the same bits.
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include "cuda/check.hpp"
#include "cuda/ops/cuda_ops.hpp"
#include "octet/ops/detail/adamw_math.hpp"

namespace octet::detail::cuda {
namespace {

constexpr int kThreads = 256;
// 80 registers a thread: the specialised paths need no more, the general one spills a little.
constexpr int kBlocksPerSm = 3;
// Elements that a thread of a specialised path holds at a time: 16 bytes of a 2-byte format.
constexpr int kVector = 8;

constexpr AdamwFormats kRowO0 = {
    .gradient = DType::bf16, .weight = DType::bf16, .has_weight = true};
constexpr AdamwFormats kRowO1 = {
    .gradient = DType::e4m3, .master = DType::f16, .weight = DType::e4m3, .has_weight = true};
constexpr AdamwFormats kRowO2 = {.gradient = DType::e4m3,
                                 .master = DType::f16,
                                 .m = DType::e4m3,
                                 .v = DType::f16,
                                 .weight = DType::e4m3,
                                 .has_weight = true};

/// The conversions of SoftwareCodec as single instructions: the same bits for every code that is
/// not a NaN, and states hold none.
struct HardwareCodec {
  __device__ static float decode(DType dtype, std::uint32_t code) {
    if (dtype == DType::f16) {
      return __half2float(__ushort_as_half(static_cast<std::uint16_t>(code)));
    }
    if (dtype == DType::e4m3) {
      return __half2float(
          __half(__nv_cvt_fp8_to_halfraw(static_cast<std::uint8_t>(code), __NV_E4M3)));
    }
    return SoftwareCodec::decode(dtype, code);
  }
  __device__ static std::uint32_t nearest(DType dtype, float y) {
    if (dtype == DType::e4m3) return __nv_cvt_float_to_fp8(y, __NV_SATFINITE, __NV_E4M3);
    return SoftwareCodec::nearest(dtype, y);
  }
};

template <std::size_t Bytes>
struct CodeOf {
  using Type = std::uint32_t;
};
template <>
struct CodeOf<2> {
  using Type = std::uint16_t;
};
template <>
struct CodeOf<1> {
  using Type = std::uint8_t;
};

/// Consecutive codes of one format, loaded and stored as 8 or 16 bytes at a time.
template <DType D>
struct alignas(size_of(D) == 1 ? 8 : 16) Codes {
  using Code = typename CodeOf<size_of(D)>::Type;
  Code code[kVector];
  __device__ void set(int k, std::uint32_t value) { code[k] = static_cast<Code>(value); }
};

template <DType D>
__device__ Codes<D> load_codes(const void* data, std::int64_t i) {
  return *reinterpret_cast<const Codes<D>*>(static_cast<const char*>(data) + i * size_of(D));
}
template <DType D>
__device__ void store_codes(void* data, std::int64_t i, const Codes<D>& codes) {
  *reinterpret_cast<Codes<D>*>(static_cast<char*>(data) + i * size_of(D)) = codes;
}

__device__ bool is_aligned(const void* data, DType dtype, std::int64_t i) {
  const auto bytes = static_cast<std::int64_t>(size_of(dtype));
  const auto address = reinterpret_cast<std::uintptr_t>(static_cast<const char*>(data) + i * bytes);
  return address % (bytes == 1 ? 8 : 16) == 0;
}

__device__ bool is_aligned(const AdamwTensor& t, const AdamwOffsets& at) {
  return is_aligned(t.gradient, t.gradient_dtype, at.gradient) &&
         is_aligned(t.master, t.master_dtype, at.master) && is_aligned(t.m, t.m_dtype, at.state) &&
         is_aligned(t.v, t.v_dtype, at.state) && is_aligned(t.weight, t.weight_dtype, at.weight);
}

template <AdamwFormats F>
__device__ bool has_formats(const AdamwTensor& t) {
  return t.gradient_dtype == F.gradient && t.master_dtype == F.master && t.m_dtype == F.m &&
         t.v_dtype == F.v && t.weight_dtype == F.weight && t.weight != nullptr;
}

/// What all elements of a segment share.
struct Work {
  AdamwScalars s;
  AdamwTensor tensor;
  AdamwScales scales;
  AdamwOffsets at;
  std::uint64_t seed;
  std::uint64_t first;  ///< global index of the first element
  std::int64_t count;
  float factor;

  __device__ RandomWords words(std::int64_t i) const {
    return philox(seed, static_cast<std::uint64_t>(s.step),
                  (first + static_cast<std::uint64_t>(i)) >> 2);
  }
};

/// All whole vectors of a segment; returns the number of elements done.
template <AdamwFormats F>
__device__ std::int64_t update_vectors(const Work& work, AdamwAmax& amax) {
  const AdamwTensor& t = work.tensor;
  const std::int64_t end = work.count / kVector * kVector;
  for (std::int64_t i = std::int64_t{threadIdx.x} * kVector; i < end; i += kThreads * kVector) {
    const auto gradient = load_codes<F.gradient>(t.gradient, work.at.gradient + i);
    auto master = load_codes<F.master>(t.master, work.at.master + i);
    auto m = load_codes<F.m>(t.m, work.at.state + i);
    auto v = load_codes<F.v>(t.v, work.at.state + i);
    Codes<F.weight> weight;
#pragma unroll
    for (int quad = 0; quad < kVector; quad += 4) {
      const RandomWords words = work.words(i + quad);
#pragma unroll
      for (int k = quad; k < quad + 4; ++k) {
        AdamwCodes c{gradient.code[k], master.code[k], m.code[k], v.code[k], 0};
        update_codes<HardwareCodec>(work.s, F, true, work.scales, t.weight_decay, work.factor,
                                    words.word[k - quad], c, amax);
        master.set(k, c.master);
        m.set(k, c.m);
        v.set(k, c.v);
        weight.set(k, c.weight);
      }
    }
    store_codes<F.master>(t.master, work.at.master + i, master);
    store_codes<F.m>(t.m, work.at.state + i, m);
    store_codes<F.v>(t.v, work.at.state + i, v);
    store_codes<F.weight>(t.weight, work.at.weight + i, weight);
  }
  return end;
}

/// The elements from `begin`, a multiple of 4, on; any formats, any alignment.
__device__ void update_elements(const Work& work, std::int64_t begin, AdamwAmax& amax) {
  for (std::int64_t group = begin + 4 * std::int64_t{threadIdx.x}; group < work.count;
       group += 4 * kThreads) {
    const RandomWords words = work.words(group);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (group + i < work.count) {
        update_element(work.s, work.tensor, work.scales, work.at, group + i, work.factor,
                       words.word[i], amax);
      }
    }
  }
}

/// Raises the amax of the tensor's scales to the block's: one atomic each, exact in any order.
__device__ void raise_amax(const Work& work, const AdamwAmax& codes) {
  __shared__ AdamwAmax largest;
  if (threadIdx.x == 0) largest = AdamwAmax{};
  __syncthreads();
  const auto raise = [](std::uint32_t code, std::uint32_t* word) {
    const std::uint32_t of_warp = __reduce_max_sync(0xFFFFFFFFu, code);
    if (threadIdx.x % 32 == 0) atomicMax(word, of_warp);
  };
  raise(codes.m, &largest.m);
  raise(codes.v, &largest.v);
  raise(codes.master, &largest.master);
  raise(codes.weight, &largest.weight);
  __syncthreads();
  if (threadIdx.x != 0) return;
  const AdamwAmax amax = decoded_amax(formats_of(work.tensor), work.scales, largest);
  const auto publish = [](std::uint32_t bits, TensorScale* scale) {
    if (bits != 0) atomicMax(reinterpret_cast<std::uint32_t*>(&scale->amax), bits);
  };
  publish(amax.m, work.tensor.m_scale);
  publish(amax.v, work.tensor.v_scale);
  publish(amax.master, work.tensor.master_scale);
  publish(amax.weight, work.tensor.weight_scale);
}

__global__ void __launch_bounds__(kThreads, kBlocksPerSm) update_kernel(AdamwArgs args) {
  if (args.scalars->skip != 0) return;
  const Segment segment = args.segments[blockIdx.x];
  Work work;
  work.s = *args.scalars;
  work.tensor = args.tensors[segment.tensor];
  work.scales = args.scales[segment.tensor];
  work.at = offsets_of(work.tensor, segment);
  work.seed = args.config.seed;
  work.first = work.tensor.random_base + static_cast<std::uint64_t>(segment.begin);
  work.count = segment.count;
  work.factor = weight_factor(work.s, work.tensor.weight_decay);
  AdamwAmax codes;
  std::int64_t done = 0;
  if (work.s.stochastic != 0 && is_aligned(work.tensor, work.at)) {
    if (has_formats<kRowO2>(work.tensor)) {
      done = update_vectors<kRowO2>(work, codes);
    } else if (has_formats<kRowO1>(work.tensor)) {
      done = update_vectors<kRowO1>(work, codes);
    } else if (has_formats<kRowO0>(work.tensor)) {
      done = update_vectors<kRowO0>(work, codes);
    }
  }
  if (done < work.count) update_elements(work, done, codes);
  raise_amax(work, codes);
}

}  // namespace

void adamw_update(const Context& ctx, const AdamwArgs& args) {
  set_device(ctx);
  update_kernel<<<static_cast<unsigned>(args.segment_count), kThreads, 0, ctx.stream()>>>(args);
  OCTET_CUDA_CHECK(cudaGetLastError());
}

}  // namespace octet::detail::cuda
