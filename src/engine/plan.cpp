// SPDX-License-Identifier: Apache-2.0
#include "octet/engine/plan.hpp"

#include <numeric>
#include <sstream>

namespace octet {

void Plan::count(const std::string& what, bool fp8_managed, bool state, std::uint64_t predicted,
                 std::uint64_t measured, bool host) {
  for (MemoryRow& row : memory) {
    if (row.what == what && row.fp8_managed == fp8_managed) {
      row.predicted += predicted;
      row.measured += measured;
      return;
    }
  }
  memory.push_back({what, fp8_managed, state, predicted, measured, host});
}

namespace {

std::uint64_t sum_of_states(const Plan& plan, bool host, bool fp8_managed_only, bool measured) {
  std::uint64_t bytes = 0;
  for (const MemoryRow& row : plan.memory) {
    if (!row.state || row.host != host || (fp8_managed_only && !row.fp8_managed)) continue;
    bytes += measured ? row.measured : row.predicted;
  }
  return bytes;
}

}  // namespace

std::uint64_t Plan::state_bytes(bool fp8_managed_only, bool measured) const {
  return sum_of_states(*this, false, fp8_managed_only, measured);
}

std::uint64_t Plan::host_state_bytes(bool fp8_managed_only, bool measured) const {
  return sum_of_states(*this, true, fp8_managed_only, measured);
}

std::string Plan::to_markdown() const {
  std::ostringstream out;
  out << "| plan | |\n|---|---|\n"
      << "| level | " << name_of(level) << " |\n| sharding | " << name_of(sharding) << " |\n"
      << "| ranks | " << ranks << " over " << transport << " |\n"
      << "| parameters | " << parameters << ", of which " << fp8_parameters
      << " are FP8-managed |\n"
      << "| FP8-managed formats | weight " << name_of(formats.state.weight) << ", gradient "
      << name_of(formats.gradient) << ", master " << name_of(formats.state.master) << ", m "
      << name_of(formats.state.m) << ", v " << name_of(formats.state.v) << " |\n"
      << "| reduced gradient | " << name_of(reduced_gradient) << " |\n"
      << "| other formats | f32 throughout |\n"
      << "| reduction | " << reduction << ", " << buckets << " buckets |\n"
      << "| schedule | " << schedule << " |\n"
      << "| micro-batches | " << accumulation << " |\n"
      << "| weights | " << weight_gather << " |\n"
      << "| optimizer | " << optimizer << " |\n"
      << "| wire bytes per step | " << wire_bytes_per_step << " |\n";
  if (!unit_gather_bytes.empty()) {
    const auto all =
        std::accumulate(unit_gather_bytes.begin(), unit_gather_bytes.end(), std::uint64_t{0});
    out << "| wire bytes of gathering all " << unit_gather_bytes.size() << " units once | " << all
        << " |\n";
  }
  for (const std::string& note : notes) out << "| note | " << note << " |\n";
  out << "\n| memory | FP8-managed | model state | planned bytes | measured bytes |\n"
      << "|---|---|---|---:|---:|\n";
  for (const MemoryRow& row : memory) {
    out << "| " << row.what << " | " << (row.fp8_managed ? "yes" : "no") << " | "
        << (row.state ? "yes" : "no") << " | " << row.predicted << " | " << row.measured << " |\n";
  }
  return out.str();
}

}  // namespace octet
