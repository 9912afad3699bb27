// SPDX-License-Identifier: Apache-2.0
// The only place that asks which compiler is at work: a formula marked OCTET_HD is one text for the
// CPU loop and the CUDA kernel.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define OCTET_HD __host__ __device__
#else
#define OCTET_HD
#endif

#ifdef __CUDA_ARCH__
#define OCTET_UNROLL _Pragma("unroll")
#else
#define OCTET_UNROLL
#endif

namespace octet::detail {

template <class To, class From>
OCTET_HD constexpr To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  return __builtin_bit_cast(To, from);
}

OCTET_HD constexpr std::uint32_t float_bits(float x) { return bit_cast<std::uint32_t>(x); }
OCTET_HD constexpr float bits_float(std::uint32_t bits) { return bit_cast<float>(bits); }
OCTET_HD constexpr float abs_of(float x) { return bits_float(float_bits(x) & 0x7FFFFFFFu); }

/// Bits of |x|. As unsigned integers they are ordered like the magnitudes, and NaN beats infinity,
/// so a maximum over them never loses a NaN.
OCTET_HD constexpr std::uint32_t magnitude_bits(float x) { return float_bits(x) & 0x7FFFFFFFu; }
OCTET_HD constexpr bool is_finite_bits(std::uint32_t magnitude) { return magnitude < 0x7F800000u; }

/// Fused multiply-add with one rounding. The library is built without contraction, so this is the
/// only way an fma comes into being and CPU and CUDA agree on where it stands.
OCTET_HD inline float fma_of(float a, float b, float c) { return ::fmaf(a, b, c); }

/// Both halves of a product of 32-bit numbers.
struct WideProduct {
  std::uint32_t low, high;
};
OCTET_HD inline WideProduct wide_product(std::uint32_t a, std::uint32_t b) {
#ifdef __CUDA_ARCH__
  // A product of 64-bit operands would come with an addition for the upper halves, which are zero.
  WideProduct p;
  asm("{\n.reg .u64 t;\nmul.wide.u32 t, %2, %3;\nmov.b64 {%0, %1}, t;\n}"
      : "=r"(p.low), "=r"(p.high)
      : "r"(a), "r"(b));
  return p;
#else
  const std::uint64_t p = static_cast<std::uint64_t>(a) * b;
  return {static_cast<std::uint32_t>(p), static_cast<std::uint32_t>(p >> 32)};
#endif
}

/// x within +-limit. x and limit must not be NaN; limit must be positive.
OCTET_HD inline float clamped(float x, float limit) {
#ifdef __CUDA_ARCH__
  return ::fmaxf(::fminf(x, limit), -limit);
#else
  return x > limit ? limit : x < -limit ? -limit : x;
#endif
}

}  // namespace octet::detail
