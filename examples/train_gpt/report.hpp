// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <vector>

#include "trainer.hpp"

namespace train_gpt {

/// The results as a Markdown table; bytes as "measured / planned".
std::string to_markdown(const std::vector<RunResult>& runs);

/// Writes the results as JSON. Throws octet::Error naming the file when it cannot be written.
void write_json(const std::string& path, const std::vector<RunResult>& runs);

}  // namespace train_gpt
