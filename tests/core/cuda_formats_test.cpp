// SPDX-License-Identifier: Apache-2.0
// The conversions against the CUDA toolkit's own, on the host. Built only where the toolkit is.
#include <random>
#include <sstream>
#include <string>

// The toolkit's headers do not compile without warnings under this project's settings.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wconversion"
#pragma GCC diagnostic ignored "-Wshadow"
#pragma GCC diagnostic ignored "-Wsign-conversion"
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#pragma GCC diagnostic pop

#include "octet/core/float16.hpp"
#include "octet/core/fp8.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"
#include "support/reference.hpp"

namespace octet::test {
namespace {

constexpr int kRandomPatterns = 3000000;

std::uint32_t ours(DType dtype, float x) {
  switch (dtype) {
    case DType::e4m3: return encode_e4m3(x);
    case DType::e5m2: return encode_e5m2(x);
    case DType::f16: return encode_f16(x);
    default: return encode_bf16(x);
  }
}

std::uint32_t theirs(DType dtype, float x) {
  switch (dtype) {
    case DType::e4m3: return __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3);
    case DType::e5m2: return __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E5M2);
    case DType::f16: return __half_as_ushort(__float2half_rn(x));
    default: return __bfloat16_as_ushort(__float2bfloat16_rn(x));
  }
}

std::string difference(DType dtype, float x) {
  if (ours(dtype, x) == theirs(dtype, x)) return {};
  std::ostringstream text;
  text << name_of(dtype) << " of " << std::hexfloat << x << ": 0x" << std::hex << ours(dtype, x)
       << ", the toolkit says 0x" << theirs(dtype, x);
  return text.str();
}

}  // namespace

TEST_CASE("conversions equal the CUDA toolkit's on ties and their neighbours") {
  for (DType dtype : {DType::e4m3, DType::e5m2, DType::f16, DType::bf16}) {
    const std::vector<double>& values = table_of(dtype).values();
    std::string error;
    for (std::size_t i = 0; i + 1 < values.size() && error.empty(); ++i) {
      const float middle = static_cast<float>((values[i] + values[i + 1]) / 2);
      for (float x : {middle, next_down(middle), next_up(middle)}) {
        if (error.empty()) error = difference(dtype, x);
        if (error.empty()) error = difference(dtype, -x);
      }
    }
    REQUIRE(error == "");
  }
}

TEST_CASE("conversions equal the CUDA toolkit's on special values") {
  for (DType dtype : {DType::e4m3, DType::e5m2, DType::f16, DType::bf16}) {
    for (float x : {0.0f, -0.0f, INFINITY, -INFINITY, NAN, -NAN, 464.0f, 480.0f, 61440.0f, 65520.0f,
                    3.4028235e38f, 1e-45f, -1e-45f}) {
      CHECK(difference(dtype, x) == "");
    }
  }
}

TEST_CASE("conversions equal the CUDA toolkit's on random bit patterns") {
  for (DType dtype : {DType::e4m3, DType::e5m2, DType::f16, DType::bf16}) {
    Draws engine(2026);
    std::string error;
    for (int i = 0; i < kRandomPatterns && error.empty(); ++i) {
      const std::uint32_t bits = engine();
      // Every second pattern is moved into the binades of the small formats.
      const std::uint32_t dense = (bits & 0x807FFFFFu) | ((100u + (bits >> 23) % 48u) << 23);
      error = difference(dtype, float_from_bits(i % 2 == 0 ? bits : dense));
    }
    REQUIRE(error == "");
  }
}

TEST_CASE("decoding equals the CUDA toolkit's") {
  int errors = 0;
  for (unsigned code = 0; code < 65536; ++code) {
    const auto narrow = static_cast<std::uint8_t>(code);
    const auto wide = static_cast<std::uint16_t>(code);
    const auto same = [](float a, float b) {
      return (std::isnan(a) && std::isnan(b)) || bits_of(a) == bits_of(b);
    };
    const auto from_fp8 = [narrow](__nv_fp8_interpretation_t format) {
      return __half2float(__half(__nv_cvt_fp8_to_halfraw(narrow, format)));
    };
    errors += !same(decode_e4m3(narrow), from_fp8(__NV_E4M3));
    errors += !same(decode_e5m2(narrow), from_fp8(__NV_E5M2));
    errors += !same(decode_f16(wide), __half2float(__ushort_as_half(wide)));
    errors += !same(decode_bf16(wide), __bfloat162float(__ushort_as_bfloat16(wide)));
  }
  REQUIRE(errors == 0);
}

}  // namespace octet::test
