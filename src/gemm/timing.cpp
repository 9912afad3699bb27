// SPDX-License-Identifier: Apache-2.0
#include "gemm/timing.hpp"

#include <algorithm>
#include <chrono>
#include <limits>
#include <random>

#include "octet/gemm/detail/strides.hpp"

namespace octet::detail {
namespace {

/// Seconds after which no more calls are tried, or no further round is run.
constexpr double kMostSeconds = 1.5;
/// Seconds of a first timing: long beside what starting and waiting cost.
constexpr double kShort = 6e-4;
constexpr int kMostRuns = 200;
/// The fastest so far run in turn, so that a clock that changes meets all. The last ones run as
/// long as a trainer would have them: what is ahead on a cool device can lose on one at its power
/// limit.
struct Heat {
  std::size_t runners;
  int rounds;
  double seconds;  ///< of a runner in a round
};
constexpr Heat kHeats[] = {{16, 3, 1.5e-3}, {5, 7, 6e-3}};
/// Of made-up values: fills E4M3 as a cast does that scales the largest to the end of the range.
constexpr float kSigma = 64.0f;

std::size_t matrix_bytes(std::int64_t rows, std::int64_t stride, DType dtype) {
  return static_cast<std::size_t>(rows * stride) * size_of(dtype);
}

/// A prime number of bell-shaped values, again and again, so that no two rows are the same.
void fill(const Context& ctx, const Buffer& buffer, DType dtype, unsigned seed) {
  const std::size_t count = std::min<std::size_t>(buffer.bytes() / size_of(dtype), 65521);
  std::vector<std::uint8_t> bytes(count * size_of(dtype));
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.0f, kSigma);
  for (std::size_t i = 0; i < count; ++i) {
    store_element(bytes.data(), dtype, static_cast<std::int64_t>(i), normal(random));
  }
  auto* to = buffer.as<char>();
  std::size_t filled = std::min(bytes.size(), buffer.bytes());
  copy_bytes(ctx, to, bytes.data(), filled);
  ctx.synchronize();
  while (filled < buffer.bytes()) {
    const std::size_t more = std::min(filled, buffer.bytes() - filled);
    copy_bytes(ctx, to + filled, to, more);
    filled += more;
  }
}

/// Scales of 1 / kSigma in whichever type; twice as many for two operands.
Buffer make_scales(const Context& ctx, const GemmProblem& p) {
  const auto bytes = static_cast<std::size_t>(
      std::max(scale_bytes(p.a_scales, p.m, p.k), scale_bytes(p.b_scales, p.n, p.k)));
  const std::size_t words = std::max<std::size_t>(bytes / 4, 4) + 4;
  const bool is_mx = p.a_scales == Granularity::mx || p.b_scales == Granularity::mx;
  const std::vector<std::uint32_t> scales(words, is_mx ? 0x79797979u : float_bits(1.0f / kSigma));
  return upload_sync<std::uint32_t>(ctx, scales);
}

using Clock = std::chrono::steady_clock;
double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

double time_of(const Context& ctx, int runs, const std::function<void()>& run) {
  ctx.synchronize();
  const Clock::time_point start = Clock::now();
  for (int i = 0; i < runs; ++i) run();
  ctx.synchronize();
  return seconds_since(start) / runs;
}

int runs_for(double seconds, double one) {
  return static_cast<int>(std::clamp(seconds / std::max(one, 1e-9), 1.0, double{kMostRuns}));
}

/// Sets the seconds of all runners to the median of their rounds.
void run_heat(const Context& ctx, const Heat& heat, const std::vector<std::size_t>& runners,
              const std::function<void(std::size_t)>& run, std::vector<double>& seconds) {
  std::vector<std::vector<double>> times(runners.size());
  const Clock::time_point start = Clock::now();
  for (int round = 0; round < heat.rounds; ++round) {
    if (round > 0 && seconds_since(start) > kMostSeconds) break;
    for (std::size_t r = 0; r < runners.size(); ++r) {
      const std::size_t i = runners[r];
      times[r].push_back(time_of(ctx, runs_for(heat.seconds, seconds[i]), [&] { run(i); }));
    }
  }
  for (std::size_t r = 0; r < runners.size(); ++r) {
    std::sort(times[r].begin(), times[r].end());
    seconds[runners[r]] = times[r][times[r].size() / 2];
  }
}

}  // namespace

MadeUpOperands::MadeUpOperands(const Context& ctx, const GemmProblem& p)
    : a_(ctx, matrix_bytes(p.a_transposed ? p.k : p.m, row_stride_a(p), p.a)),
      b_(ctx, matrix_bytes(p.b_transposed ? p.k : p.n, row_stride_b(p), p.b)),
      d_(ctx, matrix_bytes(p.m, row_stride_d(p), p.d)),
      aux_(ctx, p.aux ? matrix_bytes(p.m, p.n, p.aux_type) : 0),
      scales_(make_scales(ctx, p)),
      bias_(ctx, p.bias ? matrix_bytes(1, p.n, p.bias_type) : 0) {
  fill(ctx, a_, p.a, 1);
  fill(ctx, b_, p.b, 2);
  zero_bytes(ctx, d_.data(), d_.bytes());
  if (p.aux) fill(ctx, aux_, p.aux_type, 3);
  if (p.bias) fill(ctx, bias_, p.bias_type, 4);
  args_.a = a_.data();
  args_.b = b_.data();
  if (is_fp8(p.a)) args_.a_scales = scales_.data();
  if (is_fp8(p.b)) args_.b_scales = scales_.data();
  args_.d = d_.data();
  if (p.bias) args_.bias = bias_.data();
  if (p.aux) args_.aux = aux_.data();
  if (is_fp8(p.d)) args_.d_scale = scales_.as<float>();
}

Fastest find_fastest(const Context& ctx, std::size_t count,
                     const std::function<void(std::size_t)>& run) {
  constexpr double kNever = std::numeric_limits<double>::infinity();
  std::vector<double> seconds(count, kNever);
  std::string error = "there is none";
  const Clock::time_point start = Clock::now();
  bool any = false;
  for (std::size_t i = 0; i < count && !(any && seconds_since(start) > kMostSeconds); ++i) {
    try {
      const double once = time_of(ctx, 1, [&] { run(i); });  // loads code, too
      seconds[i] = time_of(ctx, runs_for(kShort, once), [&] { run(i); });
      any = true;
    } catch (const Error& thrown) {
      error = thrown.what();
    }
  }
  require(any, error);
  std::vector<std::size_t> order(count);
  for (std::size_t i = 0; i < count; ++i) order[i] = i;
  const auto faster = [&](std::size_t a, std::size_t b) { return seconds[a] < seconds[b]; };
  for (const Heat& heat : kHeats) {
    std::stable_sort(order.begin(), order.end(), faster);
    order.resize(std::min(order.size(), heat.runners));
    // What the backend itself takes for fastest always runs.
    if (std::find(order.begin(), order.end(), 0u) == order.end()) order.push_back(0);
    std::erase_if(order, [&](std::size_t i) { return seconds[i] == kNever; });
    run_heat(ctx, heat, order, run, seconds);
  }
  const std::size_t winner = *std::min_element(order.begin(), order.end(), faster);
  return {winner, seconds[winner] * 1e6};
}

}  // namespace octet::detail
