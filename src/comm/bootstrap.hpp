// SPDX-License-Identifier: Apache-2.0
// The carriers of broadcast_from_root; arguments are checked, the size is at least 2.
#pragma once

#include "octet/comm/bootstrap.hpp"

namespace octet::detail {

std::vector<std::byte> broadcast_by_tcp(const Launch& launch, std::span<const std::byte> bytes,
                                        std::chrono::milliseconds deadline);
std::vector<std::byte> broadcast_by_file(const Launch& launch, std::span<const std::byte> bytes,
                                         const std::string& path,
                                         std::chrono::milliseconds deadline);

constexpr std::size_t kMaxJobBytes = 256;

/// "\"a\"", or "without a job id".
inline std::string quoted_job(const std::string& job) {
  return job.empty() ? "without a job id" : "\"" + job + "\"";
}

}  // namespace octet::detail
