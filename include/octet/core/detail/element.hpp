// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "octet/core/dtype.hpp"
#include "octet/core/float16.hpp"
#include "octet/core/fp8.hpp"

namespace octet::detail {

/// What a dtype stores and how it converts: the compile-time face of DType.
template <DType D>
struct Element;

template <>
struct Element<DType::f32> {
  using Storage = float;
  static constexpr DType kDType = DType::f32;
  static constexpr float kMax = 3.4028234663852886e38f;
  OCTET_HD static constexpr float decode(float x) { return x; }
  OCTET_HD static constexpr float encode(float x) { return x; }
};

template <>
struct Element<DType::bf16> {
  using Storage = std::uint16_t;
  static constexpr DType kDType = DType::bf16;
  static constexpr float kMax = 3.3895313892515355e38f;
  OCTET_HD static constexpr float decode(std::uint16_t x) { return decode_bf16(x); }
  OCTET_HD static constexpr std::uint16_t encode(float x) { return encode_bf16(x); }
};

template <>
struct Element<DType::f16> {
  using Storage = std::uint16_t;
  static constexpr DType kDType = DType::f16;
  static constexpr float kMax = 65504.0f;
  OCTET_HD static constexpr float decode(std::uint16_t x) { return decode_f16(x); }
  OCTET_HD static constexpr std::uint16_t encode(float x) { return encode_f16(x); }
};

template <>
struct Element<DType::e4m3> {
  using Storage = std::uint8_t;
  static constexpr DType kDType = DType::e4m3;
  static constexpr float kMax = E4M3Format::kMax;
  OCTET_HD static constexpr float decode(std::uint8_t x) { return decode_e4m3(x); }
  OCTET_HD static constexpr std::uint8_t encode(float x) { return encode_e4m3(x); }
};

template <>
struct Element<DType::e5m2> {
  using Storage = std::uint8_t;
  static constexpr DType kDType = DType::e5m2;
  static constexpr float kMax = E5M2Format::kMax;
  OCTET_HD static constexpr float decode(std::uint8_t x) { return decode_e5m2(x); }
  OCTET_HD static constexpr std::uint8_t encode(float x) { return encode_e5m2(x); }
};

/// Largest finite value of a dtype.
OCTET_HD constexpr float max_of(DType dtype) {
  switch (dtype) {
    case DType::f32: return Element<DType::f32>::kMax;
    case DType::bf16: return Element<DType::bf16>::kMax;
    case DType::f16: return Element<DType::f16>::kMax;
    case DType::e4m3: return Element<DType::e4m3>::kMax;
    case DType::e5m2: return Element<DType::e5m2>::kMax;
  }
  return 0.0f;
}

/// Calls f(Element<D>{}) for the run-time dtype: resolved once, outside every loop.
template <class F>
OCTET_HD decltype(auto) for_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::bf16: return f(Element<DType::bf16>{});
    case DType::f16: return f(Element<DType::f16>{});
    case DType::e4m3: return f(Element<DType::e4m3>{});
    case DType::e5m2: return f(Element<DType::e5m2>{});
    case DType::f32: break;
  }
  return f(Element<DType::f32>{});
}

/// One element read from or written to untyped memory; for uniform run-time formats.
OCTET_HD inline float load_element(const void* data, DType dtype, std::int64_t i) {
  switch (dtype) {
    case DType::bf16: return decode_bf16(static_cast<const std::uint16_t*>(data)[i]);
    case DType::f16: return decode_f16(static_cast<const std::uint16_t*>(data)[i]);
    case DType::e4m3: return decode_e4m3(static_cast<const std::uint8_t*>(data)[i]);
    case DType::e5m2: return decode_e5m2(static_cast<const std::uint8_t*>(data)[i]);
    case DType::f32: break;
  }
  return static_cast<const float*>(data)[i];
}

OCTET_HD inline void store_element(void* data, DType dtype, std::int64_t i, float value) {
  switch (dtype) {
    case DType::bf16: static_cast<std::uint16_t*>(data)[i] = encode_bf16(value); return;
    case DType::f16: static_cast<std::uint16_t*>(data)[i] = encode_f16(value); return;
    case DType::e4m3: static_cast<std::uint8_t*>(data)[i] = encode_e4m3(value); return;
    case DType::e5m2: static_cast<std::uint8_t*>(data)[i] = encode_e5m2(value); return;
    case DType::f32: break;
  }
  static_cast<float*>(data)[i] = value;
}

}  // namespace octet::detail
