// SPDX-License-Identifier: Apache-2.0
// The mean over ranks of 16 bytes of elements, in registers: mean_math.hpp with the conversions of
// the hardware, which have the bits of the library's.
#pragma once

#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include "cuda/device/pack.cuh"
#include "octet/ops/detail/mean_math.hpp"

namespace octet::detail::cuda {

/// One 16-byte pack as the terms of a sum.
template <class In>
__device__ void terms_of(const uint4& codes, float inv,
                         MeanSum<In::kDType> (&terms)[Pack16<typename In::Storage>::kCount]) {
  if constexpr (In::kDType == DType::e4m3) {
    const std::uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
    for (int i = 0; i < 16; i += 2) {
      const auto pair = static_cast<__nv_fp8x2_storage_t>(words[i / 4] >> (8 * (i % 4)));
      const float2 x = __half22float2(__half2(__nv_cvt_fp8x2_to_halfraw2(pair, __NV_E4M3)));
      terms[i] = x.x * inv;
      terms[i + 1] = x.y * inv;
    }
  } else {
    const auto pack = bit_cast<Pack16<typename In::Storage>>(codes);
#pragma unroll
    for (int i = 0; i < Pack16<typename In::Storage>::kCount; ++i) {
      terms[i] = mean_term<In::kDType>(pack.values[i], inv);
    }
  }
}

template <class In, class Out>
struct PackMean {
  static constexpr int kCount = Pack16<typename In::Storage>::kCount;
  /// 16-byte packs of the output.
  static constexpr int kOutPacks = kCount / Pack16<typename Out::Storage>::kCount;
  MeanSum<In::kDType> sums[kCount];

  __device__ void add(int rank, const uint4& codes, float inv) {
    MeanSum<In::kDType> terms[kCount];
    terms_of<In>(codes, inv, terms);
#pragma unroll
    for (int i = 0; i < kCount; ++i) sums[i] = rank == 0 ? terms[i] : sums[i] + terms[i];
  }
  __device__ void round(int ranks, float scale, uint4 (&packs)[kOutPacks]) const {
    constexpr int kEach = kCount / kOutPacks;
    if constexpr (Out::kDType == DType::e4m3) {
      float x[16];
#pragma unroll
      for (int i = 0; i < 16; ++i) x[i] = mean_of(sums[i], ranks) * scale;
      std::uint32_t words[4] = {};
#pragma unroll
      for (int i = 0; i < 16; i += 2) {
        const std::uint32_t pair =
            __nv_cvt_float2_to_fp8x2(make_float2(x[i], x[i + 1]), __NV_SATFINITE, __NV_E4M3);
        words[i / 4] |= pair << (8 * (i % 4));
      }
      packs[0] = make_uint4(words[0], words[1], words[2], words[3]);
    } else {
#pragma unroll
      for (int k = 0; k < kOutPacks; ++k) {
        Pack16<typename Out::Storage> out;
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
          out.values[i] = mean_code<Out::kDType>(mean_of(sums[k * kEach + i], ranks), scale);
        }
        packs[k] = bit_cast<uint4>(out);
      }
    }
  }
};

}  // namespace octet::detail::cuda
