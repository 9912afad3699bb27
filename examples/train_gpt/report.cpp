// SPDX-License-Identifier: Apache-2.0
#include "report.hpp"

#include <cstdio>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>

#include "build_info.hpp"
#include "octet/core/error.hpp"

namespace train_gpt {
namespace {

std::string number(double value, int digits) {
  char text[64];
  std::snprintf(text, sizeof text, "%.*f", digits, value);
  return text;
}

std::string figure(const Figure& figure) {
  return number(figure.measured, 3) + " / " + number(figure.planned, 3);
}

std::string gemms(const RunResult& run) {
  std::string text = number(run.fp8_gemms_per_step, 0);
  if (run.converted_gemms_per_step > 0.0) {
    text += ", " + number(run.converted_gemms_per_step, 0) + " with conversion";
  }
  return text;
}

const char* name_of(octet::DeviceType device) {
  return device == octet::DeviceType::cuda ? "cuda" : "cpu";
}

nlohmann::ordered_json to_json(const RunResult& run) {
  using Json = nlohmann::ordered_json;
  const bool is_fp8 = run.fp8_gemms_per_step > 0.0;
  const bool is_delayed = is_fp8 && run.fp8.recipe == octet::Fp8Recipe::delayed;
  const octet::DelayedScalingConfig& delayed = run.fp8.delayed;
  const bool is_max = delayed.amax_compute_algo == octet::AmaxComputeAlgo::max;
  return {{"level", run.name},
          {"sharding", octet::name_of(run.sharding)},
          {"ranks", run.ranks},
          {"schedule", octet::name_of(run.schedule)},
          {"clip_grad", run.clip_grad},
          {"micro_batches", run.micro_batches},
          {"device", name_of(run.device)},
          {"parameters", run.parameters},
          {"fp8_recipe", is_fp8 ? Json(octet::name_of(run.fp8.recipe)) : Json()},
          {"fp8_format", is_fp8 ? Json(octet::name_of(run.fp8.format)) : Json()},
          {"amax_history_len", is_delayed ? Json(delayed.amax_history_len) : Json()},
          {"amax_compute_algo", is_delayed ? Json(is_max ? "max" : "most_recent") : Json()},
          {"margin", is_delayed ? Json(delayed.margin) : Json()},
          {"val_loss", run.validation_loss},
          {"losses", run.losses},
          {"state_bytes_per_parameter", run.state_bytes_managed.measured},
          {"state_bytes_per_parameter_all", run.state_bytes_all.measured},
          {"peak_bytes_per_rank", run.peak_bytes},
          {"wire_bytes_per_parameter_per_step", run.wire_bytes.measured},
          {"fp8_gemms_per_step", run.fp8_gemms_per_step},
          {"converted_gemms_per_step", run.converted_gemms_per_step},
          {"step_seconds", run.step_seconds},
          {"skipped_steps", run.skipped_steps}};
}

}  // namespace

std::string to_markdown(const std::vector<RunResult>& runs) {
  std::ostringstream out;
  if (!runs.empty()) {
    const RunResult& run = runs.front();
    out << run.parameters << " parameters, " << run.ranks << (run.ranks == 1 ? " rank" : " ranks")
        << " on " << name_of(run.device) << ", " << run.losses.size() << " steps";
    if (run.micro_batches > 1) out << " of " << run.micro_batches << " micro-batches";
    out << ". Bytes: measured / planned.\n\n";
  }
  out << "| level | sharding | validation loss | state bytes per FP8-managed parameter "
         "| state bytes per parameter | peak MB per rank | wire bytes per parameter and step "
         "| step time | skipped steps | FP8 GEMMs per step |\n"
         "|---|---|---|---|---|---|---|---|---|---|\n";
  for (const RunResult& run : runs) {
    out << "| " << run.name << " | " << octet::name_of(run.sharding) << " | "
        << number(run.validation_loss, 4) << " | " << figure(run.state_bytes_managed) << " | "
        << figure(run.state_bytes_all) << " | "
        << number(static_cast<double>(run.peak_bytes) / 1e6, 2) << " | " << figure(run.wire_bytes)
        << " | " << number(run.step_seconds * 1e3, 2) << " ms | " << run.skipped_steps << " | "
        << gemms(run) << " |\n";
  }
  return out.str();
}

void write_json(const std::string& path, const std::vector<RunResult>& runs) {
  nlohmann::ordered_json list = nlohmann::ordered_json::array();
  for (const RunResult& run : runs) list.push_back(to_json(run));
  const nlohmann::ordered_json document{{"runs", list},
                                        {"commit", octet::build_info::kCommit},
                                        {"compiler", octet::build_info::kCompiler},
                                        {"cuda", octet::build_info::kCuda}};
  std::ofstream file(path);
  file << document.dump(2) << '\n';
  file.close();
  octet::require(file.good(), "results cannot be written to ", path);
}

}  // namespace train_gpt
