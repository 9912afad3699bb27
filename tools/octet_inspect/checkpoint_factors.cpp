// SPDX-License-Identifier: Apache-2.0
#include "checkpoint_factors.hpp"

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <vector>

#include "octet/core/error.hpp"
#include "octet/core/tensor_view.hpp"

namespace inspect {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

std::string metadata_of(const octet::SafetensorsReader& file, const char* key) {
  const auto found = file.metadata().find(key);
  return found == file.metadata().end() ? std::string() : found->second;
}

/// TensorScales [kind of state, parameter], the factor of each.
std::vector<float> read_factors(const octet::SafetensorsReader& file, const std::string& name) {
  const octet::FileTensor& tensor = file.at(name);
  octet::require(tensor.dtype == "F32" && tensor.bytes % (4 * sizeof(octet::TensorScale)) == 0,
                 file.path(), ": ", name, " is not what a checkpoint has");
  std::vector<octet::TensorScale> scales(tensor.bytes / sizeof(octet::TensorScale));
  file.read(tensor, 0, tensor.bytes, scales.data());
  std::vector<float> factors;
  for (const octet::TensorScale& scale : scales) factors.push_back(scale.scale_inv);
  return factors;
}

/// Whether an array of this format has one factor.
bool is_scaled(const std::string& format) {
  return format == "e4m3" || format == "e4m3_and_transpose" || format == "f16";
}

std::map<std::string, float> read_map(const octet::SafetensorsReader& file, const json& content) {
  const fs::path folder = fs::path(file.path()).parent_path();
  const json& place = content.at("scales");
  const std::string name = content.at("files").at(place.at("file").get<std::size_t>()).at("name");
  octet::require(fs::path(name).filename() == name, name, " leads out of the folder");
  const octet::SafetensorsReader holder((folder / name).string());
  octet::require(metadata_of(holder, "id") == metadata_of(file, "id"), name, " is another save's");
  const std::vector<float> factors = read_factors(holder, place.at("tensor"));
  const json& params = content.at("params");
  const std::size_t count = params.size();
  const std::map<std::string, std::size_t> kinds = {
      {"weight", 0}, {"master", 1}, {"m", 2}, {"v", 3}};
  std::map<std::string, float> result;
  for (std::size_t p = 0; p < count; ++p) {
    for (const json& array : params[p].at("arrays")) {
      const auto kind = kinds.find(array.at("name"));
      if (kind == kinds.end() || !is_scaled(array.at("format"))) continue;
      for (const json& range : array.at("ranges")) {
        if (std::to_string(range.at("file").get<int>()) != metadata_of(file, "rank")) continue;
        result.emplace(range.at("tensor"), factors.at(kind->second * count + p));
      }
    }
  }
  return result;
}

}  // namespace

std::map<std::string, float> checkpoint_factors(const octet::SafetensorsReader& file) {
  if (metadata_of(file, "format") != "octet checkpoint") return {};
  std::string step = metadata_of(file, "step");
  step.insert(0, step.size() < 8 ? 8 - step.size() : 0, '0');
  if (step.find_first_not_of("0123456789") != step.npos) return {};
  const fs::path path = fs::path(file.path()).parent_path() / ("octet-" + step + ".json");
  std::error_code ignored;
  if (!fs::is_regular_file(path, ignored)) return {};  // a pipe would be waited for
  std::ifstream index(path);
  try {
    const json content = json::parse(index).at("content");
    if (content.at("id") != metadata_of(file, "id")) return {};
    return read_map(file, content);
  } catch (const std::exception&) {
    return {};
  }
}

}  // namespace inspect
