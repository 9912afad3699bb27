// SPDX-License-Identifier: Apache-2.0
// Files as text and as JSON.
#pragma once

#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "scales.hpp"
#include "statistics.hpp"

namespace inspect {

struct TensorReport {
  octet::FileTensor tensor;
  std::optional<Scales> scales;
  std::optional<Statistics> statistics;
};

/// Reads all of a file. Throws octet::Error naming it.
std::vector<TensorReport> inspect(const octet::SafetensorsReader& file);

/// A table under the name of the file and its metadata.
std::string to_text(const octet::SafetensorsReader& file, const std::vector<TensorReport>& list);

/// {"file", "bytes" of its data, "metadata", "tensors": [{"name", "dtype", "shape", "bytes"}, and
/// where they are known "scale": {"count", "min", "max", "tensor" that they are, but for one factor
/// of a checkpoint; only that where it says nothing, and then no "amax"}, "amax" (null for NaN),
/// "share": {"zeros", "saturated" (of FP8), "subnormal", "non_finite"} of all elements].
nlohmann::ordered_json to_json(const octet::SafetensorsReader& file,
                               const std::vector<TensorReport>& list);

}  // namespace inspect
