// SPDX-License-Identifier: Apache-2.0
// How far the mean gradient is off on every path, beside emulations of what others do: NCCL's FP8
// ring, which rounds at every hop, with three kinds of headroom, and a BF16 ring. Prints the table
// of docs/numerics.md.
#include <array>
#include <cstdio>

#include "octet/comm/collectives.hpp"
#include "octet/core/detail/scaling_math.hpp"
#include "octet/ops/quantize.hpp"
#include "support/catch.hpp"
#include "support/mean_ranks.hpp"
#include "support/random.hpp"
#include "support/ranks.hpp"
#include "support/sum_ranks.hpp"

namespace octet::test {
namespace {

using Gradients = std::vector<std::vector<float>>;  // [rank][element]
constexpr double kPi = 3.14159265358979323846;

// Normal values, two for every two draws (Box and Muller). Their tails decide where the largest
// value lies, so the sum of uniform ones in support/random.hpp is no substitute.
std::vector<float> true_normals(std::size_t count, std::uint32_t seed) {
  Draws draws(seed);
  std::vector<float> values;
  while (values.size() < count) {
    const double radius = std::sqrt(-2.0 * std::log((draws() + 1.0) * 0x1p-32));
    const double angle = 2.0 * kPi * (draws() * 0x1p-32);
    values.push_back(static_cast<float>(radius * std::cos(angle)));
    values.push_back(static_cast<float>(radius * std::sin(angle)));
  }
  values.resize(count);
  return values;
}

// A magnitude of its own for every element (log-normal, sigma 1), equal on all ranks, times a
// normal value of which the share rho of the variance is common to all ranks.
Gradients correlated_gradients(int ranks, std::size_t count, double rho) {
  const auto magnitudes = true_normals(count, 1000);
  const auto common = true_normals(count, 1001);
  Gradients gradients;
  for (int r = 0; r < ranks; ++r) {
    auto values = true_normals(count, static_cast<std::uint32_t>(r));
    for (std::size_t i = 0; i < count; ++i) {
      const double mixed = std::sqrt(rho) * common[i] + std::sqrt(1 - rho) * values[i];
      values[i] = static_cast<float>(std::exp(magnitudes[i]) * mixed);
    }
    gradients.push_back(std::move(values));
  }
  return gradients;
}

// Relative to the exact means: root of the mean square, in per cent.
double error_percent(const Gradients& gradients, const std::vector<float>& means) {
  double error = 0, norm = 0;
  for (std::size_t i = 0; i < means.size(); ++i) {
    double exact = 0;
    for (const auto& rank : gradients) exact += rank[i];
    exact /= static_cast<double>(gradients.size());
    error += (means[i] - exact) * (means[i] - exact);
    norm += exact * exact;
  }
  return 100 * std::sqrt(error / norm);
}

float largest_of(const Gradients& gradients) {
  float largest = 0;
  for (const auto& rank : gradients) {
    for (float value : rank) largest = std::max(largest, std::abs(value));
  }
  return largest;
}

struct RingResult {
  std::vector<float> means;
  double saturated_ppm = 0;
};

// NCCL's FP8 ring: every hop adds in half precision and rounds to E4M3 at once, saturating. All
// ranks cast with the scale of the largest value of all of them times `headroom`.
RingResult fp8_ring(const Gradients& gradients, double headroom) {
  const float common = detail::power_of_two_scale(largest_of(gradients), 448.0f);
  const float scale = static_cast<float>(common * headroom);
  const double to_mean = 1.0 / (static_cast<double>(scale) * static_cast<double>(gradients.size()));
  const std::size_t count = gradients[0].size();
  RingResult result;
  std::int64_t saturated = 0;
  for (std::size_t i = 0; i < count; ++i) {
    std::uint8_t sum = encode_e4m3(gradients[0][i] * scale);
    for (std::size_t r = 1; r < gradients.size(); ++r) {
      const float term = decode_e4m3(encode_e4m3(gradients[r][i] * scale));
      sum = encode_e4m3(decode_f16(encode_f16(decode_e4m3(sum) + term)));
    }
    saturated += (sum & 0x7F) == 0x7E ? 1 : 0;
    result.means.push_back(static_cast<float>(decode_e4m3(sum) * to_mean));
  }
  result.saturated_ppm = 1e6 * static_cast<double>(saturated) / static_cast<double>(count);
  return result;
}

std::vector<float> bf16_ring(const Gradients& gradients) {
  const auto rounded = [](float x) { return decode_bf16(encode_bf16(x)); };
  std::vector<float> means;
  for (std::size_t i = 0; i < gradients[0].size(); ++i) {
    float sum = rounded(gradients[0][i]);
    for (std::size_t r = 1; r < gradients.size(); ++r) {
      sum = rounded(sum + rounded(gradients[r][i]));
    }
    means.push_back(sum / static_cast<float>(gradients.size()));
  }
  return means;
}

// One rank's gradient as quantize() stores it.
Contribution cast(const Context& ctx, const std::vector<float>& values) {
  const Buffer in = upload(ctx, values);
  const Buffer out(ctx, values.size());
  const Buffer scale = upload(ctx, std::vector<TensorScale>(1));
  const Shape shape = {static_cast<std::int64_t>(values.size())};
  QuantizeArgs args;
  args.in = view_of(ctx, in, DType::f32, shape);
  args.out = {view_of(ctx, out, DType::e4m3, shape), scale.as<TensorScale>()};
  quantize(ctx, args);
  return {download<std::uint8_t>(ctx, out.data(), values.size()),
          download_one<TensorScale>(ctx, scale.data())};
}

// The library's own paths, over ranks as threads. Every rank owns one run of elements.
std::vector<float> library_means(const Gradients& gradients, MeanReducer::Path path) {
  const int n = static_cast<int>(gradients.size());
  MeanCase bucket;
  for (const auto& rank : gradients) bucket.gradients.push_back({cast(Context::cpu(), rank)});
  const std::int64_t chunk = (bucket.numel(0) + n - 1) / n;
  bucket.owners = deal(bucket, chunk, [](int k) { return k; });
  std::vector<MeanResult> results(gradients.size());
  run_ranks(n, [&](Communicator& comm) {
    results[static_cast<std::size_t>(comm.rank())] = reduce_on_rank(comm, bucket, path);
  });
  std::vector<float> means;
  if (path == MeanReducer::Path::two_shot) {
    for (std::uint8_t code : results[0].gradients[0]) {
      means.push_back(decode_e4m3(code) * results[0].scales[0].scale_inv);
    }
  } else {
    for (const MeanResult& result : results) {
      means.insert(means.end(), result.shards[0].begin(), result.shards[0].end());
    }
  }
  return means;
}

std::vector<float> summed_means(const Gradients& gradients) {
  SumCase bucket;
  for (const auto& rank : gradients) bucket.gradients.push_back({cast(Context::cpu(), rank)});
  SumResult result;
  run_ranks(bucket.ranks(), [&](Communicator& comm) {
    SumResult own = sum_on_rank(comm, bucket);
    if (comm.rank() == 0) result = std::move(own);
  });
  std::vector<float> means;
  for (std::uint8_t code : result.means[0].bytes) {
    means.push_back(decode_e4m3(code) * result.means[0].scale.scale_inv);
  }
  return means;
}

constexpr std::array<int, 3> kRanks = {2, 8, 64};
constexpr std::array<double, 3> kRhos = {0.0, 0.1, 0.9};
enum Row { ring_none, ring_sqrt, ring_full, nccl_sum, two_shot, sharded, bf16, kRows };
constexpr const char* kNames[kRows] = {"FP8 ring, no headroom",
                                       "FP8 ring, headroom 1/sqrt(N)",
                                       "FP8 ring, headroom 1/N",
                                       "`nccl_sum` (this ring, mu = 1)",
                                       "`two_shot`",
                                       "`sharded`",
                                       "BF16 ring"};
struct Table {
  double error[kRows][kRhos.size()][kRanks.size()];
  double saturated_ppm[2][kRhos.size()][kRanks.size()];  // of the first two rows
};

void measure(Table& table, std::size_t rho, std::size_t n) {
  const int ranks = kRanks[n];
  const auto gradients = correlated_gradients(ranks, ranks == 64 ? 50000 : 200000, kRhos[rho]);
  const auto set = [&](Row row, const std::vector<float>& means) {
    table.error[row][rho][n] = error_percent(gradients, means);
  };
  const RingResult none = fp8_ring(gradients, 1.0);
  const RingResult root = fp8_ring(gradients, 1.0 / std::sqrt(static_cast<double>(ranks)));
  table.saturated_ppm[0][rho][n] = none.saturated_ppm;
  table.saturated_ppm[1][rho][n] = root.saturated_ppm;
  set(ring_none, none.means);
  set(ring_sqrt, root.means);
  set(ring_full, fp8_ring(gradients, 1.0 / ranks).means);
  set(nccl_sum, summed_means(gradients));
  set(two_shot, library_means(gradients, MeanReducer::Path::two_shot));
  set(sharded, library_means(gradients, MeanReducer::Path::sharded));
  set(bf16, bf16_ring(gradients));
}

const Table& measured() {
  static const Table table = [] {
    Table measured{};
    for (std::size_t rho = 0; rho < kRhos.size(); ++rho) {
      for (std::size_t n = 0; n < kRanks.size(); ++n) measure(measured, rho, n);
    }
    return measured;
  }();
  return table;
}

// An emulation of the same schemes with other random numbers, rounded to two digits.
constexpr double kExpected[kRows][kRhos.size()][kRanks.size()] = {
    {{4.0, 8.2, 33}, {3.8, 8.5, 27}, {3.9, 21, 70}},
    {{3.9, 6.5, 16}, {3.9, 5.9, 17}, {3.7, 7.6, 53}},
    {{3.9, 6.5, 16}, {3.8, 5.8, 17}, {3.7, 5.1, 53}},
    {{3.9, 6.5, 16}, {3.8, 5.8, 17}, {3.7, 5.1, 53}},
    {{3.9, 3.7, 3.8}, {3.8, 3.4, 2.9}, {3.7, 2.9, 2.6}},
    {{2.6, 2.7, 2.6}, {2.5, 2.0, 1.0}, {1.9, 1.0, 0.4}},
    {{0.25, 0.4, 1.0}, {0.24, 0.4, 0.8}, {0.2, 0.3, 0.8}}};

void print(const Table& table) {
  std::printf("| relative RMS error, %%, N = 2 / 8 / 64 | rho 0 | rho 0.1 | rho 0.9 |\n");
  std::printf("|---|---|---|---|\n");
  for (int row = 0; row < kRows; ++row) {
    std::printf("| %s |", kNames[row]);
    for (const auto& e : table.error[row]) std::printf(" %.2g / %.2g / %.2g |", e[0], e[1], e[2]);
    std::printf("\n");
  }
  for (int row = 0; row < 2; ++row) {
    std::printf("%s, saturated ppm:", kNames[row]);
    for (const auto& s : table.saturated_ppm[row]) {
      std::printf("  %.0f / %.0f / %.0f", s[0], s[1], s[2]);
    }
    std::printf("\n");
  }
}

}  // namespace

TEST_CASE("errors of the mean gradient are those of the table") {
  print(measured());
  for (int row = 0; row < kRows; ++row) {
    // How much saturates without full headroom hangs on where in its binade the largest value lies:
    // up to twice the range is left above it.
    const double factor = row == ring_none || row == ring_sqrt ? 2.0 : 1.2;
    for (std::size_t rho = 0; rho < kRhos.size(); ++rho) {
      for (std::size_t n = 0; n < kRanks.size(); ++n) {
        const double error = measured().error[row][rho][n];
        const double expected = kExpected[row][rho][n];
        CAPTURE(kNames[row], kRhos[rho], kRanks[n], error, expected);
        CHECK(error < factor * expected);
        CHECK(error > expected / factor);
      }
    }
  }
}

TEST_CASE("one rounding is closest, and closer than a BF16 ring where ranks agree") {
  const Table& table = measured();
  for (std::size_t rho = 0; rho < kRhos.size(); ++rho) {
    for (std::size_t n = 0; n < kRanks.size(); ++n) {
      const auto error = [&](Row row) { return table.error[row][rho][n]; };
      CAPTURE(kRhos[rho], kRanks[n]);
      CHECK(error(sharded) < error(two_shot));
      for (Row ring : {ring_none, ring_sqrt, ring_full, nccl_sum}) {
        CHECK(error(two_shot) < 1.01 * error(ring));
      }
    }
  }
  CHECK(table.error[sharded][2][2] < 0.6 * table.error[bf16][2][2]);  // rho 0.9, 64 ranks
}

TEST_CASE("a ring without headroom saturates, more so the more ranks agree") {
  const auto& ppm = measured().saturated_ppm;
  CHECK(ppm[0][2][2] > 20000);
  CHECK(ppm[0][2][2] > ppm[0][2][1]);
  CHECK(ppm[0][2][1] > ppm[0][2][0]);
  CHECK(ppm[1][2][1] > 30);
}

}  // namespace octet::test
