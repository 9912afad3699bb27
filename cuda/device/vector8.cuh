// SPDX-License-Identifier: Apache-2.0
// Eight consecutive elements of any dtype in the registers of a thread: wide accesses, and the
// conversions of the hardware where they have the bits of the library's.
#pragma once

#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include "octet/core/detail/element.hpp"

namespace octet::detail::cuda {

/// The codes of eight elements in the order of memory.
template <class E>
struct alignas(sizeof(typename E::Storage) == 1 ? 8 : 16) Vector8 {
  std::uint32_t word[2 * sizeof(typename E::Storage)];
};

/// `left` of the eight exist; the others become 0. Not aligned: element by element.
template <class E>
__device__ Vector8<E> load8(const typename E::Storage* from, std::int64_t left, bool aligned) {
  if (aligned && left >= 8) return *reinterpret_cast<const Vector8<E>*>(from);
  using Storage = typename E::Storage;
  constexpr int kInWord = 4 / sizeof(Storage);
  Vector8<E> v{};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (i >= left) continue;
    std::uint32_t code = 0;
    if constexpr (sizeof(Storage) == 4) {
      code = __float_as_uint(from[i]);
    } else {
      code = from[i];
    }
    v.word[i / kInWord] |= code << (32 / kInWord * (i % kInWord));
  }
  return v;
}

template <class E>
__device__ void store8(typename E::Storage* to, const Vector8<E>& v, std::int64_t left,
                       bool aligned) {
  if (aligned && left >= 8) {
    *reinterpret_cast<Vector8<E>*>(to) = v;
    return;
  }
  using Storage = typename E::Storage;
  constexpr int kInWord = 4 / sizeof(Storage);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (i >= left) continue;
    const std::uint32_t code = v.word[i / kInWord] >> (32 / kInWord * (i % kInWord));
    if constexpr (sizeof(Storage) == 4) {
      to[i] = __uint_as_float(code);
    } else {
      to[i] = static_cast<Storage>(code);
    }
  }
}

template <class E>
constexpr bool kIsFp8 = E::kDType == DType::e4m3 || E::kDType == DType::e5m2;

template <class E>
__device__ void decode8(const Vector8<E>& v, float (&x)[8]) {
  if constexpr (E::kDType == DType::f32) {
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = bits_float(v.word[i]);
  } else if constexpr (E::kDType == DType::bf16) {
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
      x[i] = bits_float(v.word[i / 2] << 16);
      x[i + 1] = bits_float(v.word[i / 2] & 0xFFFF0000u);
    }
  } else if constexpr (E::kDType == DType::f16) {
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
      const float2 pair = __half22float2(__half2(bit_cast<__half2_raw>(v.word[i / 2])));
      x[i] = pair.x;
      x[i + 1] = pair.y;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {  // one NaN, as decode_f16 has it
      if (isnan(x[i])) x[i] = bits_float((float_bits(x[i]) & 0x80000000u) | 0x7FC00000u);
    }
  } else {
    constexpr int kInWord = 4 / sizeof(typename E::Storage);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const std::uint32_t code = v.word[i / kInWord] >> (32 / kInWord * (i % kInWord));
      x[i] = E::decode(static_cast<typename E::Storage>(code));
    }
  }
}

template <class E>
__device__ Vector8<E> encode8(const float (&x)[8]) {
  Vector8<E> v{};
  if constexpr (kIsFp8<E>) {
    constexpr auto kKind = E::kDType == DType::e4m3 ? __NV_E4M3 : __NV_E5M2;
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
      const std::uint32_t pair =
          __nv_cvt_float2_to_fp8x2(make_float2(x[i], x[i + 1]), __NV_SATFINITE, kKind);
      v.word[i / 4] |= pair << (8 * (i % 4));
    }
  } else if constexpr (E::kDType == DType::f32) {
#pragma unroll
    for (int i = 0; i < 8; ++i) v.word[i] = float_bits(x[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
      v.word[i / 2] = E::encode(x[i]) | static_cast<std::uint32_t>(E::encode(x[i + 1])) << 16;
    }
  }
  return v;
}

}  // namespace octet::detail::cuda
