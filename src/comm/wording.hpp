// SPDX-License-Identifier: Apache-2.0
// What the transports say when ranks do not fit together: one text for all of them.
#pragma once

#include <sstream>
#include <string>
#include <string_view>

#include "octet/comm/communicator.hpp"

namespace octet::detail {

/// `leave` is the end of a communicator, where a transport makes its ranks meet there too.
enum class Collective { exchange, all_gather, leave };

inline const char* name_of(Collective kind) {
  switch (kind) {
    case Collective::exchange: return "exchange";
    case Collective::all_gather: return "all_gather";
    default: return "the end of the group";
  }
}

/// "two_shot of bucket 3 (exchange)".
inline std::string described(const CollectiveName& name, Collective kind) {
  std::string text = to_string(name);
  if (name.op != std::string_view(name_of(kind))) text += std::string(" (") + name_of(kind) + ")";
  return text;
}

inline std::string different_calls(int a, const std::string& of_a, int b, const std::string& of_b) {
  std::ostringstream text;
  text << "rank " << a << " called " << of_a << " while rank " << b << " called " << of_b;
  return text.str();
}

inline std::string different_contributions(int a, std::size_t of_a, int b, std::size_t of_b) {
  std::ostringstream text;
  text << "all_gather: rank " << a << " contributes " << of_a << " bytes but rank " << b << " "
       << of_b;
  return text.str();
}

inline std::string different_lengths(int from, int to, std::size_t part, std::size_t sent,
                                     std::size_t received) {
  std::ostringstream text;
  text << "exchange: part " << part << " from rank " << from << " to rank " << to << " is " << sent
       << " bytes on rank " << from << " but " << received << " on rank " << to;
  return text.str();
}

inline std::string too_many_receives(int from, int to, std::size_t sent) {
  std::ostringstream text;
  text << "exchange: rank " << to << " receives more parts from rank " << from << " than the "
       << sent << " that rank " << from << " sends to it";
  return text.str();
}

inline std::string too_many_sends(int from, int to, std::size_t received) {
  std::ostringstream text;
  text << "exchange: rank " << from << " sends more parts to rank " << to << " than the "
       << received << " that rank " << to << " receives from it";
  return text.str();
}

}  // namespace octet::detail
