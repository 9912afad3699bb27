// SPDX-License-Identifier: Apache-2.0
// One rank's part in a test of SumReducer, and what it should leave behind by plain loops on the
// independent format tables.
#pragma once

#include <cstring>
#include <string>
#include <vector>

#include "octet/comm/sum_reducer.hpp"
#include "support/compare.hpp"
#include "support/guarded.hpp"
#include "support/mean_reference.hpp"

namespace octet::test {

/// gradients[rank][tensor], e4m3, with mu = 2^(mu_exponent / 1000).
struct SumCase {
  std::vector<std::vector<Contribution>> gradients;
  std::int32_t mu_exponent = 0;

  int ranks() const { return static_cast<int>(gradients.size()); }
  std::size_t tensors() const { return gradients[0].size(); }
};

struct SumResult {
  std::vector<Contribution> means;  ///< [tensor]
  std::vector<std::uint64_t> saturated;
  std::uint32_t nonfinite = 0;
  bool intact = true;
  std::int32_t mu_exponent = 0;  ///< after its update
  std::uint64_t planned = 0;
  WireBytes wire;
};

/// Runs the sum of a bucket on this rank, `runs` times from the same input, and updates mu once.
inline SumResult sum_on_rank(Communicator& comm, const SumCase& bucket, int runs = 1) {
  const Context& ctx = comm.context();
  const auto& own = bucket.gradients[static_cast<std::size_t>(comm.rank())];
  std::vector<Guarded> memory;
  std::vector<TensorView> views;
  std::vector<TensorScale> own_scales;
  for (const Contribution& gradient : own) {
    memory.emplace_back(ctx, gradient.bytes.size());
    views.push_back(
        memory.back().view(DType::e4m3, {static_cast<std::int64_t>(gradient.bytes.size())}));
    own_scales.push_back(gradient.scale);
  }
  const Buffer scales = upload(ctx, own_scales);
  const Buffer flag = upload(ctx, std::vector<std::uint32_t>{0});
  AutoScale mu(ctx, comm.size());
  mu.set_exponent_sync(bucket.mu_exponent);
  SumReducer reducer(comm, views, scales.as<TensorScale>(), &mu);
  const WireBytes before = comm.wire_bytes();
  for (int i = 0; i < runs; ++i) {
    for (std::size_t t = 0; t < own.size(); ++t) write(ctx, memory[t].data(), own[t].bytes);
    write(ctx, scales.data(), own_scales);
    reducer.run(flag.as<std::uint32_t>());
  }
  mu.update();

  SumResult result;
  result.planned = reducer.payload_bytes();
  result.wire = {comm.wire_bytes().payload - before.payload,
                 comm.wire_bytes().metadata - before.metadata};
  result.mu_exponent = mu.exponent_sync();
  result.saturated = download<std::uint64_t>(ctx, reducer.saturated(), own.size());
  result.nonfinite = download_one<std::uint32_t>(ctx, flag.data());
  const auto means = download<TensorScale>(ctx, scales.data(), own.size());
  for (std::size_t t = 0; t < own.size(); ++t) {
    result.means.push_back({memory[t].values<std::uint8_t>(), means[t]});
    result.intact = result.intact && memory[t].intact();
  }
  return result;
}

/// The smallest k with 2^k >= ranks.
inline int reference_headroom(int ranks) {
  return static_cast<int>(std::ceil(std::log2(static_cast<double>(ranks))));
}

/// Tensor t of a finite bucket: the codes of the sum in rank order, their scale with amax, and how
/// many are at the maximum.
struct ReferenceSum {
  Contribution means;
  std::uint64_t saturated = 0;
};
inline ReferenceSum reference_sum(const SumCase& bucket, std::size_t t) {
  const FormatTable& table = table_of(DType::e4m3);
  const int headroom = reference_headroom(bucket.ranks());
  double smallest = 0;
  for (const auto& rank : bucket.gradients) {
    const TensorScale& own = rank[t].scale;
    if (own.amax != 0 && (smallest == 0 || own.scale < smallest)) smallest = own.scale;
  }
  const int power = std::min(static_cast<int>(std::floor(bucket.mu_exponent / 1000.0)), headroom);
  // So that scale and scale_inv are normal for any number of ranks.
  const double p =
      std::min(std::ldexp(smallest, power - headroom), std::ldexp(1.0, 126 - headroom));
  ReferenceSum result;
  Contribution& means = result.means;
  means.bytes.assign(bucket.gradients[0][t].bytes.size(), 0);
  double largest = 0;
  for (std::size_t i = 0; i < means.bytes.size(); ++i) {
    std::uint32_t sum = 0;
    for (std::size_t r = 0; r < bucket.gradients.size(); ++r) {
      const Contribution& own = bucket.gradients[r][t];
      const std::uint32_t term = table.encode(table.decode(own.bytes[i]) * own.scale.scale_inv * p);
      sum = r == 0 ? term : table.encode(table.decode(sum) + table.decode(term));
    }
    means.bytes[i] = static_cast<std::uint8_t>(sum);
    result.saturated += (sum & 0x7F) == table.max_code() ? 1 : 0;
    largest = std::max(largest, std::abs(table.decode(sum)));
  }
  means.scale = TensorScale{};
  if (smallest != 0) {
    means.scale.scale = static_cast<float>(p * bucket.ranks());
    means.scale.scale_inv = static_cast<float>(1.0 / (p * bucket.ranks()));
  }
  means.scale.amax = static_cast<float>(largest) * means.scale.scale_inv;
  return result;
}

/// Empty, or what is wrong with a rank's result of a finite bucket after so many runs.
inline std::string wrong_in(const SumCase& bucket, const SumResult& result, int runs = 1) {
  if (!result.intact) return "bytes outside the outputs were written";
  if (result.nonfinite != 0) return "the flag is raised";
  for (std::size_t t = 0; t < bucket.tensors(); ++t) {
    const std::string where = "tensor " + std::to_string(t) + ": ";
    const ReferenceSum expected = reference_sum(bucket, t);
    const std::string difference = first_difference(result.means[t].bytes, expected.means.bytes);
    if (!difference.empty()) return where + difference;
    const TensorScale& scale = result.means[t].scale;
    if (std::memcmp(&scale, &expected.means.scale, sizeof(scale)) != 0) return where + "its scale";
    const auto saturated = expected.saturated * static_cast<std::uint64_t>(runs);
    if (result.saturated[t] != saturated) return where + "saturated";
  }
  return {};
}

}  // namespace octet::test
