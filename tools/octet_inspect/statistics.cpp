// SPDX-License-Identifier: Apache-2.0
// Magnitudes of all formats are in the order of their codes without the sign, so that counting
// takes integers alone, and of a run with one scale only the largest code is decoded.
#include "statistics.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <vector>

#include "octet/core/float16.hpp"
#include "octet/core/fp8.hpp"

namespace inspect {
namespace {

/// Codes of a format without the sign: from `normal` on they are normal, from `special` on NaN or
/// infinity, and what lies below `special` is the largest.
template <class Code>
struct Format {
  Code normal, special;
  double (*decode)(Code);
};

template <class Code>
struct Run {
  std::uint64_t zeros = 0, below_normal = 0, largest = 0, special = 0;
  Code max = 0;
};

template <class Code>
Run<Code> count(const Format<Code>& format, const Code* codes, std::uint64_t elements) {
  constexpr Code kMagnitude = static_cast<Code>(~Code{0}) >> 1;
  const Code largest = static_cast<Code>(format.special - 1);
  Run<Code> run;
  for (std::uint64_t i = 0; i < elements; ++i) {
    const Code code = codes[i] & kMagnitude;
    run.zeros += code == 0;
    run.below_normal += code < format.normal;
    run.largest += code == largest;
    run.special += code >= format.special;
    if (code < format.special) run.max = std::max(run.max, code);
  }
  return run;
}

template <class Code>
Statistics measure_as(const Format<Code>& format, const octet::SafetensorsReader& file,
                      const octet::FileTensor& tensor, const std::optional<Scales>& scales,
                      std::size_t piece_bytes) {
  Statistics result;
  result.elements = tensor.bytes / sizeof(Code);
  result.has_saturation = sizeof(Code) == 1;
  const bool has_factors = scales && !scales->values.empty();
  result.has_amax = !scales || has_factors;
  const std::uint64_t piece = std::max<std::uint64_t>(piece_bytes / sizeof(Code), 1);
  std::vector<Code> codes(std::min(piece, result.elements));
  for (std::uint64_t at = 0; at < result.elements; at += piece) {
    const std::uint64_t here = std::min(piece, result.elements - at);
    file.read(tensor, at * sizeof(Code), here * sizeof(Code), codes.data());
    for (std::uint64_t i = 0; i < here;) {
      const Scales::Run same = has_factors ? scales->run(at + i) : Scales::Run{1.0, here - i};
      const std::uint64_t elements = std::min(same.elements, here - i);
      const Run<Code> run = count(format, codes.data() + i, elements);
      result.zeros += run.zeros;
      result.subnormal += run.below_normal - run.zeros;
      result.saturated += result.has_saturation ? run.largest : 0;
      result.non_finite += run.special;
      const double amax = format.decode(run.max) * std::abs(same.factor);
      if (amax > result.amax || std::isnan(amax)) result.amax = amax;  // a NaN stays
      i += elements;
    }
  }
  return result;
}

}  // namespace

std::optional<Statistics> measure(const octet::SafetensorsReader& file,
                                  const octet::FileTensor& tensor,
                                  const std::optional<Scales>& scales, std::size_t piece_bytes) {
  const auto as = [&](const auto& format) {
    return measure_as(format, file, tensor, scales, piece_bytes);
  };
  using U8 = std::uint8_t;
  using U16 = std::uint16_t;
  if (tensor.dtype == "F8_E4M3") {
    return as(Format<U8>{0x08, 0x7F, [](U8 code) { return double{octet::decode_e4m3(code)}; }});
  }
  if (tensor.dtype == "F8_E5M2") {
    return as(Format<U8>{0x04, 0x7C, [](U8 code) { return double{octet::decode_e5m2(code)}; }});
  }
  if (tensor.dtype == "F16") {
    return as(
        Format<U16>{0x0400, 0x7C00, [](U16 code) { return double{octet::decode_f16(code)}; }});
  }
  if (tensor.dtype == "BF16") {
    return as(
        Format<U16>{0x0080, 0x7F80, [](U16 code) { return double{octet::decode_bf16(code)}; }});
  }
  if (tensor.dtype == "F32") {
    return as(Format<std::uint32_t>{0x00800000, 0x7F800000, [](std::uint32_t code) {
                                      return double{std::bit_cast<float>(code)};
                                    }});
  }
  if (tensor.dtype == "F64") {
    return as(Format<std::uint64_t>{0x0010000000000000, 0x7FF0000000000000, [](std::uint64_t code) {
                                      return std::bit_cast<double>(code);
                                    }});
  }
  return std::nullopt;
}

}  // namespace inspect
