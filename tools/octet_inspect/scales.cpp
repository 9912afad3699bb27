// SPDX-License-Identifier: Apache-2.0
#include "scales.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

#include "octet/core/block_scales.hpp"
#include "octet/core/float16.hpp"

namespace inspect {
namespace {

using octet::FileTensor;

constexpr std::int64_t kBlock = 128;

/// Values of a tensor, for dtypes that factors have; nothing for others.
std::optional<std::vector<float>> read_factors(const octet::SafetensorsReader& file,
                                               const FileTensor& tensor) {
  std::vector<float> values(numel_of(tensor));
  const auto read_as = [&](auto code, const auto& decode) {
    std::vector<decltype(code)> codes(values.size());
    file.read(tensor, 0, tensor.bytes, codes.data());
    std::transform(codes.begin(), codes.end(), values.begin(), decode);
    return values;
  };
  if (tensor.dtype == "F32") return read_as(0.0f, [](float value) { return value; });
  if (tensor.dtype == "BF16") return read_as(std::uint16_t{}, octet::decode_bf16);
  if (tensor.dtype == "F16") return read_as(std::uint16_t{}, octet::decode_f16);
  if (tensor.dtype == "F8_E8M0") {  // an exponent; all ones are NaN
    return read_as(std::uint8_t{}, [](std::uint8_t code) {
      return code == 0xFF ? std::numeric_limits<float>::quiet_NaN() : std::ldexp(1.0f, code - 127);
    });
  }
  return std::nullopt;
}

std::int64_t blocks_of(std::int64_t count, std::int64_t size) {
  return size == 0 ? 0 : (count + size - 1) / size;
}

/// The size of blocks that cut `count` into `parts`: all of it, 1 or 128; 0 for anything else.
std::int64_t block_size(std::int64_t count, std::int64_t parts) {
  for (std::int64_t size : {std::max<std::int64_t>(count, 1), std::int64_t{1}, kBlock}) {
    if (blocks_of(count, size) == parts) return size;
  }
  return 0;
}

/// How the factors `scale` of `tensor` lie, but for the values.
std::optional<Scales> named_layout(const FileTensor& tensor, const FileTensor& scale) {
  const auto elements = static_cast<std::int64_t>(numel_of(tensor));
  if (numel_of(scale) == 1) {
    return Scales{.columns = std::max<std::int64_t>(elements, 1),
                  .block_columns = std::max<std::int64_t>(elements, 1)};
  }
  if (tensor.shape.size() != 2) return std::nullopt;
  const std::int64_t rows = tensor.shape[0], columns = tensor.shape[1];
  const bool is_list = scale.shape.size() == 1;  // one of every row
  if (!is_list && scale.shape.size() != 2) return std::nullopt;
  const std::int64_t across = is_list ? 1 : scale.shape[1];
  const Scales scales = {.columns = columns,
                         .block_rows = block_size(rows, scale.shape[0]),
                         .block_columns = block_size(columns, across),
                         .row_stride = across,
                         .column_stride = 1};
  if (scales.block_rows == 0 || scales.block_columns == 0) return std::nullopt;
  if (columns > 1 && numel_of(scale) == numel_of(tensor)) return std::nullopt;  // one of each value
  return scales;
}

/// The same of arrays of octet's checkpoints.
std::optional<Scales> octet_layout(const FileTensor& tensor, const FileTensor& scale,
                                   bool is_weight) {
  const auto elements = static_cast<std::int64_t>(numel_of(tensor));
  const auto count = static_cast<std::int64_t>(numel_of(scale));
  if (!is_weight) {
    if (count != blocks_of(elements, kBlock)) return std::nullopt;
    return Scales{.columns = elements, .block_columns = kBlock, .column_stride = 1};
  }
  if (tensor.shape.size() != 2) return std::nullopt;
  const std::int64_t rows = tensor.shape[0], columns = tensor.shape[1];
  const auto fits = [&](octet::Granularity granularity) {
    return count * 4 == scale_bytes(granularity, rows, columns);
  };
  if (fits(octet::Granularity::tile)) {
    return Scales{.columns = columns,
                  .block_rows = kBlock,
                  .block_columns = kBlock,
                  .row_stride = blocks_of(columns, 4 * kBlock) * 4,
                  .column_stride = 1};
  }
  if (fits(octet::Granularity::row_block)) {
    return Scales{.columns = columns,
                  .block_columns = kBlock,
                  .row_stride = 1,
                  .column_stride = octet::padded_rows(rows)};
  }
  return std::nullopt;
}

/// PARAMETER.ARRAY_blocks and PARAMETER.ARRAY_blocks.BEGIN.
std::string blocks_name(const std::string& name) {
  const std::size_t dot = name.find_last_of('.');
  const bool is_part = dot != std::string::npos && dot + 1 < name.size() &&
                       name.find_first_not_of("0123456789", dot + 1) == std::string::npos;
  return is_part ? name.substr(0, dot) + "_blocks" + name.substr(dot) : name + "_blocks";
}

}  // namespace

Scales::Run Scales::run(std::uint64_t i) const {
  const std::int64_t row = static_cast<std::int64_t>(i) / columns;
  const std::int64_t column = static_cast<std::int64_t>(i) % columns;
  const std::int64_t block = column / block_columns;
  const std::int64_t end = std::min((block + 1) * block_columns, columns);
  const std::int64_t at = row / block_rows * row_stride + block * column_stride;
  return {static_cast<double>(values[static_cast<std::size_t>(at)]),
          static_cast<std::uint64_t>(end - column)};
}

std::optional<Scales> read_scales(const octet::SafetensorsReader& file, const FileTensor& tensor,
                                  const std::map<std::string, float>& factors) {
  if (tensor.bytes == 0) return std::nullopt;  // dimensions beside a 0 may be as large as they like
  if (const auto factor = factors.find(tensor.name); factor != factors.end()) {
    const auto elements = static_cast<std::int64_t>(numel_of(tensor));
    return Scales{.values = {factor->second}, .columns = elements, .block_columns = elements};
  }
  if (tensor.dtype != "F8_E4M3" && tensor.dtype != "F8_E5M2") return std::nullopt;
  const std::string blocks = blocks_name(tensor.name);
  for (const std::string& name : {tensor.name + "_scale_inv", tensor.name + "_scale", blocks}) {
    const FileTensor* scale = file.find(name);
    if (scale == nullptr) continue;
    std::optional<Scales> scales =
        name == blocks ? octet_layout(tensor, *scale, name.find(".weight_blocks") != name.npos)
                       : named_layout(tensor, *scale);
    std::optional<std::vector<float>> values;
    if (scales) values = read_factors(file, *scale);
    if (!values) return Scales{.name = name};
    scales->name = name;
    scales->values = std::move(*values);
    return scales;
  }
  return std::nullopt;
}

}  // namespace inspect
