// SPDX-License-Identifier: Apache-2.0
// What the benchmarks on CUDA report: a time each, as a rate beside that of a copy or as it is,
// with its target; as Markdown and as JSON.
#pragma once

#include <cstdio>
#include <fstream>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "build_info.hpp"
#include "cuda_timing.hpp"
#include "octet/runtime/tensor.hpp"

namespace bench {

/// Throws octet::Error where there is no device.
inline cudaDeviceProp properties_of_device() {
  octet::require(octet::cuda_device_count() > 0, "there is no CUDA device that this build can use");
  cudaDeviceProp properties{};
  check(cudaGetDeviceProperties(&properties, 0), "cudaGetDeviceProperties");
  return properties;
}

/// Device 0 and a stream of its own.
struct Gpu {
  cudaDeviceProp properties = properties_of_device();
  Stream stream;
  octet::Context context = octet::Context::cuda(0, stream.get());
};

constexpr std::size_t kCopyBytes = std::size_t{2} << 30;

/// Times of a device copy of kCopyBytes, the yardstick of everything that moves bytes.
inline std::vector<double> measure_copy(const octet::Context& ctx, int repeats) {
  const octet::Buffer from(ctx, kCopyBytes), to(ctx, kCopyBytes);
  check(cudaMemsetAsync(from.data(), 0x5a, kCopyBytes, ctx.stream()), "cudaMemsetAsync");
  return time_each(ctx, repeats, [&] {
    check(
        cudaMemcpyAsync(to.data(), from.data(), kCopyBytes, cudaMemcpyDeviceToDevice, ctx.stream()),
        "cudaMemcpyAsync");
  });
}

enum class Bound : std::uint8_t { at_least, at_most, below };

struct Result {
  std::string name, metric, unit;
  double value = 0.0;
  std::optional<double> target;
  Bound bound = Bound::at_least;
  double median_ms = 0.0;
  std::optional<double> spread;
  std::optional<std::size_t> bytes = {};
  std::optional<double> flops = {};
  double bytes_per_element = 0.0;  ///< 0: not per element
  std::string note = {};           ///< in words; left out of the JSON where there is none

  double rate() const { return static_cast<double>(bytes.value_or(0)) / (median_ms * 1e9); }
  bool met() const {
    switch (bound) {
      case Bound::at_least: return !target || value >= *target;
      case Bound::at_most: return !target || value <= *target;
      case Bound::below: break;
    }
    return !target || value < *target;
  }
};

inline Result copy_result(const std::vector<double>& times) {
  const Timing timing = timing_of(times);
  Result copy{.name = "copy",
              .metric = "rate",
              .unit = "TB/s",
              .target = {},
              .median_ms = timing.median_ms,
              .spread = timing.spread,
              .bytes = 2 * kCopyBytes};
  copy.value = copy.rate();
  return copy;
}

inline std::string text_of(const char* format, double value) {
  char text[64];
  std::snprintf(text, sizeof text, format, value);
  return text;
}

inline std::string table_row(const Result& r) {
  const std::string unit = r.unit == "1" ? "" : " " + r.unit;
  const char* sign = r.bound == Bound::at_least ? ">= " : r.bound == Bound::at_most ? "<= " : "< ";
  std::string row = "| " + r.name;
  row += " | " + (r.bytes_per_element > 0.0 ? text_of("%.6g", r.bytes_per_element) : "");
  row += " | " + text_of("%.4f", r.median_ms);
  row += " | " + (r.spread ? text_of("%.1f %%", 100.0 * *r.spread) : "");
  row += " | " + (r.bytes ? text_of("%.3f", r.rate()) : "");
  row += " | " + r.metric + " | " + text_of("%.4g", r.value) + unit;
  row += " | " + (r.target ? sign + text_of("%g", *r.target) + unit : "");
  row += std::string(" | ") + (!r.target ? "" : r.met() ? "yes" : "NO") + " |";
  return row;
}

inline nlohmann::ordered_json json_row(const Result& r) {
  using Json = nlohmann::ordered_json;
  Json row = {{"case", r.name},
              {"metric", r.metric},
              {"value", r.value},
              {"unit", r.unit},
              {"target", r.target ? Json(*r.target) : Json()},
              {"met", r.target ? Json(r.met()) : Json()},
              {"median_ms", r.median_ms},
              {"spread", r.spread ? Json(*r.spread) : Json()},
              {"bytes", r.bytes ? Json(*r.bytes) : Json()},
              {"flops", r.flops ? Json(*r.flops) : Json()}};
  if (!r.note.empty()) row["note"] = r.note;
  return row;
}

/// `element` is what bytes are counted per.
inline void print_table(const std::string& element, const std::vector<Result>& results) {
  std::printf(
      "| case | bytes/%s | ms | spread | TB/s | metric | value | target | met |\n"
      "|---|---|---|---|---|---|---|---|---|\n",
      element.c_str());
  for (const Result& r : results) std::puts(table_row(r).c_str());
}

/// `document` says which benchmark, device and options; commit, toolkit and rows join it.
inline void write_json(const std::string& path, nlohmann::ordered_json document,
                       const std::vector<Result>& results) {
  document["commit"] = octet::build_info::kCommit;
  document["cuda"] = octet::build_info::kCuda;
  document["rows"] = nlohmann::ordered_json::array();
  for (const Result& r : results) document["rows"].push_back(json_row(r));
  std::ofstream file(path);
  file << document.dump(2) << '\n';
  file.close();
  octet::require(file.good(), "results cannot be written to ", path);
}

}  // namespace bench
