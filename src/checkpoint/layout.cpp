// SPDX-License-Identifier: Apache-2.0
#include "checkpoint/layout.hpp"

#include <algorithm>
#include <charconv>
#include <filesystem>

namespace octet {
namespace {

constexpr std::string_view kPrefix = "octet-";
constexpr std::size_t kIdDigits = 16;

std::string padded(std::int64_t value, std::size_t width) {
  const std::string digits = std::to_string(value);
  return std::string(digits.size() < width ? width - digits.size() : 0, '0') + digits;
}

std::string dtype_of_format(std::string_view format) {
  if (format == "f32") return "F32";
  if (format == "bf16") return "BF16";
  if (format == "f16") return "F16";
  if (format == "split") return "I8";
  return "F8_E4M3";
}

/// The digits at the start of `name`, which are taken off.
std::string_view take_digits(std::string_view& name) {
  const std::size_t count = std::min(name.find_first_not_of("0123456789"), name.size());
  const std::string_view digits = name.substr(0, count);
  name.remove_prefix(count);
  return digits;
}

}  // namespace

std::string index_name(std::int64_t step) {
  return std::string(kPrefix) + padded(step, 8) + ".json";
}

std::string rank_file_name(std::int64_t step, const std::string& id, int rank, int ranks) {
  return std::string(kPrefix) + padded(step, 8) + "-" + id + "-rank-" + padded(rank, 5) + "-of-" +
         padded(ranks, 5) + ".safetensors";
}

std::optional<std::int64_t> step_of_index(std::string_view name) {
  if (!name.starts_with(kPrefix)) return std::nullopt;
  std::string_view rest = name.substr(kPrefix.size());
  const std::string_view digits = take_digits(rest);
  std::int64_t step = 0;
  const auto [stop, error] = std::from_chars(digits.data(), digits.data() + digits.size(), step);
  if (error != std::errc{} || name != index_name(step)) return std::nullopt;
  return step;
}

bool is_checkpoint_file(std::string_view name) {
  const bool is_temporary = name.ends_with(".tmp");
  if (is_temporary) name.remove_suffix(4);
  if (step_of_index(name)) return is_temporary;  // a whole one is more than a file
  const auto skip = [&](std::string_view text) {
    const bool is_there = name.starts_with(text);
    if (is_there) name.remove_prefix(text.size());
    return is_there;
  };
  if (!skip(kPrefix) || take_digits(name).empty() || !skip("-") || name.size() < kIdDigits) {
    return false;
  }
  if (name.substr(0, kIdDigits).find_first_not_of("0123456789abcdef") != name.npos) return false;
  name.remove_prefix(kIdDigits);
  return skip("-rank-") && !take_digits(name).empty() && skip("-of-") &&
         !take_digits(name).empty() && name == ".safetensors";
}

std::map<std::string, std::string> header_metadata(std::int64_t step, const std::string& id,
                                                   int rank, int ranks) {
  return {{"format", "octet checkpoint"},
          {"id", id},
          {"step", std::to_string(step)},
          {"rank", std::to_string(rank)},
          {"ranks", std::to_string(ranks)}};
}

std::string path_in(const std::string& directory, const std::string& name) {
  return (std::filesystem::path(directory) / name).string();
}

FileTensor range_tensor(const ParamState& param, const StateArray& array, std::int64_t begin,
                        std::int64_t count) {
  FileTensor tensor;
  tensor.name = param.name + "." + std::string(array.name);
  if (count != param.shape.numel()) tensor.name += "." + std::to_string(begin);
  tensor.dtype = dtype_of_format(array.format);
  tensor.bytes = array.bytes(count);
  const std::int64_t row = param.shape.row_numel();
  if (array.name.ends_with("_blocks")) {
    tensor.shape = {static_cast<std::int64_t>(tensor.bytes / sizeof(float))};
  } else if (row > 0 && begin % row == 0 && count % row == 0) {
    tensor.shape = {count / row};
    for (int i = 1; i < param.shape.rank(); ++i) tensor.shape.push_back(param.shape[i]);
  } else {
    tensor.shape = {count};
  }
  return tensor;
}

FileTensor scales_tensor(std::int64_t scale_count) {
  return {.name = "scales",
          .dtype = "F32",
          .shape = {4, scale_count / 4, 4},
          .bytes = static_cast<std::uint64_t>(scale_count) * sizeof(TensorScale)};
}

FileTensor extra_tensor(const std::string& name, std::uint64_t bytes) {
  return {.name = name + ".extra",
          .dtype = "U8",
          .shape = {static_cast<std::int64_t>(bytes)},
          .bytes = bytes};
}

}  // namespace octet
