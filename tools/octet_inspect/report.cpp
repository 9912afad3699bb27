// SPDX-License-Identifier: Apache-2.0
#include "report.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <string_view>
#include <utility>

#include "checkpoint_factors.hpp"

namespace inspect {
namespace {

constexpr std::size_t kColumns = 9;
using Row = std::array<std::string, kColumns>;
/// The first three are text.
constexpr std::size_t kFirstNumber = 3;

std::string number(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%.6g", value);
  return text;
}

double share(std::uint64_t part, const Statistics& s) {
  return s.elements == 0 ? 0 : static_cast<double>(part) / static_cast<double>(s.elements);
}

std::string percent(std::uint64_t part, const Statistics& s) {
  char text[32];
  std::snprintf(text, sizeof text, "%.3g%%", 100 * share(part, s));
  return text;
}

/// Names come from a file: nothing that a terminal would act on. Those above 0x7F are the two bytes
/// C2 80 to C2 9F in UTF-8.
std::string printable(std::string_view text) {
  std::string shown;
  for (std::size_t i = 0; i < text.size(); ++i) {
    const auto c = static_cast<unsigned char>(text[i]);
    const auto next = i + 1 < text.size() ? static_cast<unsigned char>(text[i + 1]) : 0;
    const bool is_high_control = c == 0xC2 && next >= 0x80 && next < 0xA0;
    shown += c < 0x20 || c == 0x7F || is_high_control ? '?' : text[i];
    i += is_high_control;
  }
  return shown;
}

/// Least and largest; both NaN where one is.
std::pair<float, float> range_of(const std::vector<float>& values) {
  for (float value : values) {
    if (std::isnan(value)) return {value, value};
  }
  const auto [low, high] = std::minmax_element(values.begin(), values.end());
  return {*low, *high};
}

std::string shape_text(const octet::FileTensor& tensor) {
  std::string text;
  for (std::int64_t dim : tensor.shape) text += (text.empty() ? "" : ", ") + std::to_string(dim);
  return "[" + text + "]";
}

std::string scale_text(const Scales& scales) {
  if (scales.values.empty()) return "?";
  const auto [low, high] = range_of(scales.values);
  const std::string least = number(double{low}), most = number(double{high});
  return scales.values.size() == 1 ? least : least + " to " + most;
}

Row row_of(const TensorReport& report) {
  Row row;
  row.fill("-");
  row[0] = printable(report.tensor.name);
  row[1] = report.tensor.dtype;
  row[2] = shape_text(report.tensor);
  if (report.scales) row[3] = scale_text(*report.scales);
  if (!report.statistics) return row;
  const Statistics& s = *report.statistics;
  if (s.has_amax) row[4] = number(s.amax);
  row[5] = percent(s.zeros, s);
  if (s.has_saturation) row[6] = percent(s.saturated, s);
  row[7] = percent(s.subnormal, s);
  row[8] = percent(s.non_finite, s);
  return row;
}

std::uint64_t bytes_of(const octet::SafetensorsReader& file) {
  return file.tensors().empty() ? 0 : file.tensors().back().begin + file.tensors().back().bytes;
}

}  // namespace

std::vector<TensorReport> inspect(const octet::SafetensorsReader& file) {
  std::vector<TensorReport> list;
  const std::map<std::string, float> factors = checkpoint_factors(file);
  for (const octet::FileTensor& tensor : file.tensors()) {
    std::optional<Scales> scales = read_scales(file, tensor, factors);
    std::optional<Statistics> statistics = measure(file, tensor, scales);
    list.push_back({tensor, std::move(scales), statistics});
  }
  return list;
}

std::string to_text(const octet::SafetensorsReader& file, const std::vector<TensorReport>& list) {
  std::vector<Row> rows = {{"tensor", "dtype", "shape", "scale", "amax", "zeros", "saturated",
                            "subnormal", "not finite"}};
  for (const TensorReport& report : list) rows.push_back(row_of(report));
  std::array<std::size_t, kColumns> widths = {};
  for (const Row& row : rows) {
    for (std::size_t i = 0; i < kColumns; ++i) widths[i] = std::max(widths[i], row[i].size());
  }
  std::string text = file.path() + ": " + std::to_string(list.size()) + " tensors, " +
                     std::to_string(bytes_of(file)) + " bytes\n";
  for (const auto& [key, value] : file.metadata()) {
    text += "  " + printable(key) + " = " + printable(value) + "\n";
  }
  for (const Row& row : rows) {
    std::string line;
    for (std::size_t i = 0; i < kColumns; ++i) {
      const std::string space(widths[i] - row[i].size(), ' ');
      line += (i == 0 ? "" : "  ") + (i < kFirstNumber ? row[i] + space : space + row[i]);
    }
    text += line.substr(0, line.find_last_not_of(' ') + 1) + "\n";
  }
  return text;
}

nlohmann::ordered_json to_json(const octet::SafetensorsReader& file,
                               const std::vector<TensorReport>& list) {
  nlohmann::ordered_json tensors = nlohmann::ordered_json::array();
  for (const TensorReport& report : list) {
    nlohmann::ordered_json entry = {{"name", report.tensor.name},
                                    {"dtype", report.tensor.dtype},
                                    {"shape", report.tensor.shape},
                                    {"bytes", report.tensor.bytes}};
    if (report.scales) {
      const std::vector<float>& values = report.scales->values;
      if (!values.empty()) {
        const auto [low, high] = range_of(values);
        entry["scale"] = {{"count", values.size()}, {"min", low}, {"max", high}};
      }
      if (!report.scales->name.empty()) entry["scale"]["tensor"] = report.scales->name;
    }
    if (report.statistics) {
      const Statistics& s = *report.statistics;
      if (s.has_amax) entry["amax"] = s.amax;
      entry["share"]["zeros"] = share(s.zeros, s);
      if (s.has_saturation) entry["share"]["saturated"] = share(s.saturated, s);
      entry["share"]["subnormal"] = share(s.subnormal, s);
      entry["share"]["non_finite"] = share(s.non_finite, s);
    }
    tensors.push_back(std::move(entry));
  }
  return {{"file", file.path()},
          {"bytes", bytes_of(file)},
          {"metadata", file.metadata()},
          {"tensors", std::move(tensors)}};
}

}  // namespace inspect
