// SPDX-License-Identifier: Apache-2.0
// Whether an index is that of an engine. All throw octet::Error naming the index and the field.
#pragma once

#include <string>
#include <vector>

#include "checkpoint/index.hpp"
#include "octet/checkpoint/checkpoint.hpp"
#include "octet/engine/state.hpp"

namespace octet {

/// Parameters with their shapes, formats and hyper-parameters; modes, seed and the formats of
/// gradients. Ranges are unions of
/// entries afterwards.
void require_match(const std::string& path, const Index& index, const EngineState& state,
                   bool change_hyper_parameters);

/// Null when there is none.
const IndexExtra* find_extra(const Index& index, const std::string& name);
/// The buffers of the options are there with their lengths, and unless leave_extras no others.
void require_extras(const std::string& path, const Index& index, const LoadOptions& options);

std::string shown_shape(const std::vector<std::int64_t>& shape);

}  // namespace octet
