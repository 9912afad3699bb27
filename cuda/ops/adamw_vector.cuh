// SPDX-License-Identifier: Apache-2.0
// Eight elements of the update in the registers of a thread, in a row or (where states are FP32) in
// two runs of four, for formats known at compile time: the formulas of adamw_element.hpp with wide
// accesses and hardware conversions. The bits are the same.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include "octet/ops/detail/adamw_element.hpp"

namespace octet::detail::cuda {

constexpr int kVector = 8;
/// Threads that hold one block of 128 elements.
constexpr int kBlockThreads = kStateBlock / kVector;

/// The codes of a vector, packed, in the order of memory.
template <std::size_t Bytes>
struct alignas(Bytes == 1 ? 8 : 16) Packed {
  std::uint32_t word[2 * Bytes];
};

// Every byte is used once, so it may be evicted first. (FP32 states are faster without that hint:
// load_quad.)
template <std::size_t Bytes>
__device__ Packed<Bytes> load_packed(const char* data, int i) {
  const char* at = data + std::int64_t{i} * Bytes;
  Packed<Bytes> p;
  if constexpr (Bytes == 1) {
    const uint2 x = __ldcs(reinterpret_cast<const uint2*>(at));
    p.word[0] = x.x, p.word[1] = x.y;
  } else {
#pragma unroll
    for (unsigned k = 0; k < Bytes / 2; ++k) {
      const uint4 x = __ldcs(reinterpret_cast<const uint4*>(at) + k);
      p.word[4 * k] = x.x, p.word[4 * k + 1] = x.y;
      p.word[4 * k + 2] = x.z, p.word[4 * k + 3] = x.w;
    }
  }
  return p;
}
template <std::size_t Bytes>
__device__ void store_packed(char* data, int i, const Packed<Bytes>& p) {
  char* at = data + std::int64_t{i} * Bytes;
  if constexpr (Bytes == 1) {
    __stcs(reinterpret_cast<uint2*>(at), make_uint2(p.word[0], p.word[1]));
  } else {
#pragma unroll
    for (unsigned k = 0; k < Bytes / 2; ++k) {
      __stcs(reinterpret_cast<uint4*>(at) + k,
             make_uint4(p.word[4 * k], p.word[4 * k + 1], p.word[4 * k + 2], p.word[4 * k + 3]));
    }
  }
}

/// Quad 0 or 1 of a vector, from element i of `data` on; no hint to evict.
template <std::size_t Bytes>
__device__ void load_quad(Packed<Bytes>& p, int quad, const char* data, int i) {
  const char* at = data + std::int64_t{i} * Bytes;
  std::uint32_t* word = p.word + quad * Bytes;
  if constexpr (Bytes == 1) {
    word[0] = __ldcg(reinterpret_cast<const std::uint32_t*>(at));
  } else if constexpr (Bytes == 2) {
    const uint2 x = __ldcg(reinterpret_cast<const uint2*>(at));
    word[0] = x.x, word[1] = x.y;
  } else {
    const uint4 x = __ldcg(reinterpret_cast<const uint4*>(at));
    word[0] = x.x, word[1] = x.y, word[2] = x.z, word[3] = x.w;
  }
}
template <std::size_t Bytes>
__device__ void store_quad(char* data, int i, const Packed<Bytes>& p, int quad) {
  char* at = data + std::int64_t{i} * Bytes;
  const std::uint32_t* word = p.word + quad * Bytes;
  if constexpr (Bytes == 1) {
    __stcg(reinterpret_cast<std::uint32_t*>(at), word[0]);
  } else if constexpr (Bytes == 2) {
    __stcg(reinterpret_cast<uint2*>(at), make_uint2(word[0], word[1]));
  } else {
    __stcg(reinterpret_cast<uint4*>(at), make_uint4(word[0], word[1], word[2], word[3]));
  }
}

__device__ inline __half2 half2_of(std::uint32_t word) {
  return __half2(bit_cast<__half2_raw>(word));
}

// Codes as they decode, before any scale.
__device__ inline void decode_f32(const Packed<4>& p, float (&x)[kVector]) {
#pragma unroll
  for (int i = 0; i < kVector; ++i) x[i] = bits_float(p.word[i]);
}
__device__ inline void decode_bf16(const Packed<2>& p, float (&x)[kVector]) {
#pragma unroll
  for (int i = 0; i < kVector; i += 2) {
    x[i] = bits_float(p.word[i / 2] << 16);
    x[i + 1] = bits_float(p.word[i / 2] & 0xFFFF0000u);
  }
}
__device__ inline void decode_f16(const Packed<2>& p, float (&x)[kVector]) {
#pragma unroll
  for (int i = 0; i < kVector; i += 2) {
    const float2 pair = __half22float2(half2_of(p.word[i / 2]));
    x[i] = pair.x;
    x[i + 1] = pair.y;
  }
}
__device__ inline void decode_e4m3(const Packed<1>& p, float (&x)[kVector]) {
#pragma unroll
  for (int i = 0; i < kVector; i += 2) {
    const auto codes = static_cast<__nv_fp8x2_storage_t>(p.word[i / 4] >> (8 * (i % 4)));
    const float2 pair = __half22float2(__half2(__nv_cvt_fp8x2_to_halfraw2(codes, __NV_E4M3)));
    x[i] = pair.x;
    x[i + 1] = pair.y;
  }
}
/// These come out 2^-120 times what they stand for.
__device__ inline void decode_split(const Packed<1>& weight, const Packed<1>& remainder,
                                    float (&x)[kVector]) {
#pragma unroll
  for (int i = 0; i < kVector; i += 2) {
    // Two split codes: weight above remainder, one less above where the remainder is negative.
    const std::uint32_t order = i % 4 == 0 ? 0x5140u : 0x7362u;
    const std::uint32_t bytes = __byte_perm(remainder.word[i / 4], weight.word[i / 4], order);
    const std::uint32_t pair = bytes - ((bytes & 0x00800080u) << 1);
    const auto decoded = [](std::uint32_t shifted) {  // sign on top, M below
      const auto spread = static_cast<std::uint32_t>(static_cast<std::int32_t>(shifted) >> 4);
      return bits_float(spread & 0x87FFF000u);
    };
    x[i] = decoded(pair << 16);
    x[i + 1] = decoded(pair & 0xFFFF0000u);
  }
}

template <StateFormat F>
__device__ void decode(const Packed<size_of(F)>& p, float (&x)[kVector]) {
  if constexpr (F == StateFormat::f32) {
    decode_f32(p, x);
  } else if constexpr (F == StateFormat::bf16) {
    decode_bf16(p, x);
  } else if constexpr (F == StateFormat::f16) {
    decode_f16(p, x);
  } else {
    decode_e4m3(p, x);
  }
}
template <DType D>
__device__ void decode(const Packed<size_of(D)>& p, float (&x)[kVector]) {
  if constexpr (D == DType::f32) {
    decode_f32(p, x);
  } else if constexpr (D == DType::bf16) {
    decode_bf16(p, x);
  } else {
    decode_e4m3(p, x);
  }
}

/// Root and quotient without a branch: the approximations of the hardware and the corrections that
/// make them the IEEE results, as long as no operand is so small that a correction underflows.
/// is_exact() tells whether that was so; if not the caller takes IeeeMath. (Division: Markstein,
/// "Computation of elementary functions on the IBM RISC System/6000", 1990.)
class FastMath {
 public:
  static constexpr float kSmallestRadicand = 0x1p-100f, kSmallestNumerator = 0x1p-80f;

  __device__ bool is_exact() const {
    return radicand_ >= float_bits(kSmallestRadicand) - 1 &&
           numerator_ >= float_bits(kSmallestNumerator) - 1;
  }
  /// x must not be negative.
  __device__ float root(float x) {
    radicand_ = min(radicand_, less_one(float_bits(x)));
    float inverse;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(fmaxf(x, kSmallestRadicand)));
    const float root = x * inverse;
    return fma_of(fma_of(-root, root, x), 0.5f * inverse, root);
  }
  /// b and 1 / b must be normal.
  __device__ float quotient(float a, float b) {
    numerator_ = min(numerator_, less_one(magnitude_bits(a)));
    float inverse;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(b));
    inverse = fma_of(fma_of(-b, inverse, 1.0f), inverse, inverse);
    float q = a * inverse;
    q = fma_of(fma_of(-b, q, a), inverse, q);
    return fma_of(fma_of(-b, q, a), inverse, q);
  }

 private:
  /// Zero is exact: one less is the largest number.
  __device__ static std::uint32_t less_one(std::uint32_t bits) { return bits - 1; }

  std::uint32_t radicand_ = 0xFFFFFFFFu, numerator_ = 0xFFFFFFFFu;  ///< the smallest, less one
};

/// Which bits of a code stand on top of 32: all of a byte or a half, so that the sign is in place
/// and packing takes the upper bytes.
constexpr int top_of(StateFormat format) {
  return size_of(format) == 4 ? 0 : size_of(format) == 2 || format == StateFormat::split ? 16 : 24;
}

/// The random fields of a word where round_stochastic puts them, below the code on top, and the
/// half bit.
template <StateFormat F>
__device__ std::uint32_t noise_m(std::uint32_t word) {
  if constexpr (top_of(F) == 24) return (word & (0x3FFu << 14)) | (1u << 13);
  return ((word >> 8) & (0x3FFu << 6)) | (1u << 5);
}
template <StateFormat F>
__device__ std::uint32_t noise_v(std::uint32_t word) {
  if constexpr (top_of(F) == 24) return ((word << 10) & (0xFFFu << 12)) | (1u << 11);
  return ((word << 2) & (0xFFFu << 4)) | (1u << 3);
}
__device__ inline std::uint32_t noise_master(std::uint32_t word) {
  return (__funnelshift_l(word, word, 14) & (0x3FFu << 6)) | (1u << 5);
}

/// A scaled magnitude at most at the largest code, so that no bit leaves the top. With a gradient
/// within its amax nothing is ever cut off.
__device__ inline std::uint32_t saturated(float magnitude, std::uint32_t largest) {
  return min(float_bits(magnitude), largest);
}

/// Magnitude of a state's code on top, rounded stochastically. Scales are `ordinary`, so the power
/// of two that lines up the subnormals joins the scale. Of a block no code can pass the largest,
/// because its scale comes from its own amax.
template <StateFormat F>
__device__ std::uint32_t rounded(float magnitude, float scale, std::uint32_t noise) {
  if constexpr (F == StateFormat::f32) {
    return float_bits(magnitude);
  } else if constexpr (F == StateFormat::bf16) {
    const std::uint32_t sum = float_bits(magnitude) + noise;
    return sum < 0x7F800000u ? sum : 0x7F7F0000u;
  } else if constexpr (F == StateFormat::f16) {
    return (saturated(magnitude * (scale * 0x1p-112f), 0x7BFFu << 13) << 3) + noise;
  } else if constexpr (F == StateFormat::split || F == StateFormat::e4m3) {
    return (saturated(magnitude * (scale * 0x1p-120f), E4M3Format::kMaxCode << 20) << 4) + noise;
  } else {  // a quotient scale does not commute with rounding
    return (float_bits((magnitude * scale) * 0x1p-120f) << 4) + noise;
  }
}

/// A code on top from its magnitude and the value whose sign it takes.
template <StateFormat F>
__device__ std::uint32_t with_sign(std::uint32_t magnitude, float value) {
  if constexpr (F == StateFormat::f32) return float_bits(value);
  return magnitude | (float_bits(value) & 0x80000000u);
}

/// Codes that stand on top, packed.
template <int Top>
__device__ auto pack(const std::uint32_t (&code)[kVector]) {
  if constexpr (Top == 0) {
    Packed<4> p;
#pragma unroll
    for (int i = 0; i < kVector; ++i) p.word[i] = code[i];
    return p;
  } else if constexpr (Top == 16) {
    Packed<2> p;
#pragma unroll
    for (int i = 0; i < kVector; i += 2) p.word[i / 2] = __byte_perm(code[i], code[i + 1], 0x7632);
    return p;
  } else {
    Packed<1> p;
#pragma unroll
    for (int i = 0; i < kVector; i += 4) {
      p.word[i / 4] = __byte_perm(__byte_perm(code[i], code[i + 1], 0x0073),
                                  __byte_perm(code[i + 2], code[i + 3], 0x0073), 0x5410);
    }
    return p;
  }
}

/// The halves of split codes: E4M3 weight and remainder.
__device__ inline void halve_split(const Packed<2>& split, Packed<1>& weight,
                                   Packed<1>& remainder) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    // Rounding to the upper byte cannot pass the sign: the magnitude is at most kMaxSplit.
    const std::uint32_t low = split.word[2 * i], high = split.word[2 * i + 1];
    remainder.word[i] = __byte_perm(low, high, 0x6420);
    weight.word[i] = __byte_perm(low + 0x00800080u, high + 0x00800080u, 0x7531);
  }
}

/// The compute weight of stored masters. `ratio` is master_scale_inv * weight_scale, 2^-7 or 2^-8:
/// in half precision the product is exact or so small that its E4M3 code is a zero.
__device__ inline Packed<1> e4m3_weight(const Packed<2>& master, __half2 ratio) {
  Packed<1> weight;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    std::uint32_t pair[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      pair[k] = __nv_cvt_halfraw2_to_fp8x2(__hmul2(half2_of(master.word[2 * i + k]), ratio),
                                           __NV_SATFINITE, __NV_E4M3);
    }
    weight.word[i] = __byte_perm(pair[0], pair[1], 0x5410);
  }
  return weight;
}
/// The codes of values times a power of two.
__device__ inline Packed<1> e4m3_of(const float (&x)[kVector], float factor) {
  Packed<1> codes;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    std::uint32_t pair[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const float* two = x + 4 * i + 2 * k;
      pair[k] =
          __nv_cvt_float2_to_fp8x2({two[0] * factor, two[1] * factor}, __NV_SATFINITE, __NV_E4M3);
    }
    codes.word[i] = __byte_perm(pair[0], pair[1], 0x5410);
  }
  return codes;
}
__device__ inline Packed<2> bf16_weight(const Packed<4>& master) {
  Packed<2> weight;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    weight.word[i] = bit_cast<std::uint32_t>(static_cast<__nv_bfloat162_raw>(
        __floats2bfloat162_rn(bits_float(master.word[2 * i]), bits_float(master.word[2 * i + 1]))));
  }
  return weight;
}

/// Scales of the block of 128 that 16 threads hold, of both moments at once: 8 of the threads see
/// to m, the others to v. All threads of the warp must call it.
struct BlockScales {
  float m, v;  ///< to encode
  float inv;   ///< to decode: of m in threads 0 to 7 of the 16, of v in the others
};

/// block_scale without a branch for the usual amax.
__device__ inline BlockScale fast_block_scale(float amax) {
  if (!(amax >= FastMath::kSmallestNumerator && amax <= 0x1p60f)) return block_scale(amax);
  constexpr float kMax = E4M3Format::kMax, kInverse = 1.0f / E4M3Format::kMax;
  FastMath math;
  const float q = amax * kInverse;
  return {rounded_down(math.quotient(kMax, amax), amax),
          fma_of(fma_of(-kMax, q, amax), kInverse, q)};
}

__device__ inline BlockScales renew_blocks(const AdamwValues (&values)[kVector]) {
  float m_amax = 0.0f, v_amax = 0.0f;
#pragma unroll
  for (const AdamwValues& x : values) {
    m_amax = fmaxf(m_amax, fabsf(x.m));
    v_amax = fmaxf(v_amax, x.second);
  }
  constexpr unsigned kAll = 0xFFFFFFFFu;
  constexpr int kHalf = kBlockThreads / 2;
  const bool is_m = threadIdx.x % kBlockThreads < kHalf;
  const float other = __shfl_xor_sync(kAll, is_m ? v_amax : m_amax, kHalf);
  float amax = fmaxf(is_m ? m_amax : v_amax, other);
#pragma unroll
  for (int lane = kHalf / 2; lane > 0; lane /= 2) {
    amax = fmaxf(amax, __shfl_xor_sync(kAll, amax, lane));
  }
  const BlockScale mine = fast_block_scale(amax);
  const float theirs = __shfl_xor_sync(kAll, mine.scale, kHalf);
  return {is_m ? mine.scale : theirs, is_m ? theirs : mine.scale, mine.inv};
}

}  // namespace octet::detail::cuda
