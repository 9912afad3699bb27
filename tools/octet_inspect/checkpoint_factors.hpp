// SPDX-License-Identifier: Apache-2.0
// Factors of whole tensors of octet's checkpoints, which lie in one tensor of one rank's file.
#pragma once

#include <map>
#include <string>

#include "octet/checkpoint/safetensors.hpp"

namespace inspect {

/// For a rank's file of a checkpoint, the factor that decodes each tensor that has a single one, by
/// the index and the files beside it. Empty for other files, and where those are not there or are
/// another save's: tensors are then listed as stored.
std::map<std::string, float> checkpoint_factors(const octet::SafetensorsReader& file);

}  // namespace inspect
