// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <functional>
#include <optional>

#include "octet/comm/communicator.hpp"
#include "support/errors.hpp"

namespace octet::test {

/// The CommError that a call throws, if any.
inline std::optional<CommError> comm_error_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const CommError& error) {
    return error;
  }
  return std::nullopt;
}

/// The smallest collective that has a name.
inline void gather_nothing(Communicator& comm, const CollectiveName& name) {
  const CollectiveScope scope(comm, name);
  comm.all_gather(nullptr, nullptr, 0);
}

/// Empty, or what is wrong: what an error of rank `rank` must say, in its text and in its fields.
inline std::string wrong_in(const std::optional<CommError>& error, int rank,
                            const CollectiveName& name, std::uint64_t number,
                            const std::vector<int>& ranks, const std::string& reason) {
  if (!error.has_value()) return "no error";
  const CommError::Where& where = error->where();
  if (where.rank != rank) return "rank " + std::to_string(where.rank);
  if (where.op != name.op) return "op " + where.op;
  if (where.bucket != name.bucket) return "bucket " + std::to_string(where.bucket);
  if (where.collective != number) return "collective " + std::to_string(where.collective);
  if (where.ranks != ranks) return to_string_of_ranks(where.ranks);
  return missing(error->what(), {to_string(name), "collective " + std::to_string(number),
                                 "on rank " + std::to_string(rank) + " of ", reason});
}

}  // namespace octet::test
