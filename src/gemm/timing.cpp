// SPDX-License-Identifier: Apache-2.0
#include "gemm/timing.hpp"

#include <algorithm>
#include <chrono>
#include <limits>
#include <random>

#include "octet/gemm/detail/strides.hpp"

namespace octet::detail {
namespace {

constexpr std::size_t kFinalists = 12;
constexpr int kRounds = 5;
/// Seconds after which no more calls are tried.
constexpr double kMostSeconds = 1.5;
/// Seconds of one timing: long beside what starting and waiting cost.
constexpr double kShort = 2e-4, kLong = 1.5e-3;
constexpr int kMostRuns = 200;
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
  std::vector<std::size_t> order(count);
  for (std::size_t i = 0; i < count; ++i) order[i] = i;
  std::stable_sort(order.begin(), order.end(),
                   [&](std::size_t a, std::size_t b) { return seconds[a] < seconds[b]; });
  require(any, error);
  order.resize(std::min(count, kFinalists));
  if (std::find(order.begin(), order.end(), 0u) == order.end()) order.push_back(0);
  std::vector<double> best(count, kNever);
  for (int round = 0; round < kRounds; ++round) {
    for (std::size_t i : order) {
      if (seconds[i] == kNever) continue;
      const double time = time_of(ctx, runs_for(kLong, seconds[i]), [&] { run(i); });
      best[i] = std::min(best[i], time);
    }
  }
  const std::size_t winner = *std::min_element(
      order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return best[a] < best[b]; });
  return {winner, best[winner] * 1e6};
}

}  // namespace octet::detail
