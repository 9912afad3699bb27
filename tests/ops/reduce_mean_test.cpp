// SPDX-License-Identifier: Apache-2.0
// The op below the collectives, fed by hand: staging blocks, pieces, scales.
#include "octet/ops/reduce_mean.hpp"

#include <functional>
#include <limits>

#include "support/catch.hpp"
#include "support/compare.hpp"
#include "support/errors.hpp"
#include "support/guarded.hpp"
#include "support/mean_reference.hpp"
#include "support/random.hpp"

namespace octet::test {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kMaxFloat = std::numeric_limits<float>::max();

std::size_t at(std::int64_t i) { return static_cast<std::size_t>(i); }

struct Outcome {
  std::vector<std::uint8_t> bytes;
  std::vector<TensorScale> scales;
  std::uint32_t nonfinite = 0;
  bool intact = true;
};

std::vector<TensorScale> scales_of(const std::vector<Contribution>& ranks) {
  std::vector<TensorScale> scales;
  for (const Contribution& rank : ranks) scales.push_back(rank.scale);
  return scales;
}

// One tensor, one piece: rank `rank` computes the mean of all elements. `shift` elements of
// misalignment are put before its own contribution and the staged ones.
Outcome mean_of_all(const Context& ctx, DType dtype, DType out,
                    const std::vector<Contribution>& ranks, int rank, std::size_t shift,
                    bool in_place) {
  const std::size_t element = size_of(dtype);
  const std::size_t bytes = ranks[0].bytes.size();
  const std::size_t count = bytes / element;
  const std::size_t stride = (shift * element + bytes + 15) / 16 * 16;
  // Block `rank` is not to be read: NaN in every dtype.
  std::vector<std::uint8_t> staged(stride * ranks.size(), 0xFF);
  for (std::size_t r = 0; r < ranks.size(); ++r) {
    if (r == at(rank)) continue;
    std::copy(ranks[r].bytes.begin(), ranks[r].bytes.end(),
              staged.begin() + static_cast<std::ptrdiff_t>(r * stride + shift * element));
  }
  const Buffer staging = upload(ctx, staged);
  const Guarded own(ctx, bytes + shift * element);
  const Guarded apart(ctx, count * size_of(out));
  auto* own_data = static_cast<std::uint8_t*>(own.data()) + shift * element;
  write(ctx, own_data, ranks[at(rank)].bytes);

  MeanPiece piece;
  piece.count = static_cast<std::int64_t>(count);
  piece.own = own_data;
  piece.staged = static_cast<std::int64_t>(shift * element);
  piece.out = in_place ? own_data : apart.data();
  const Buffer pieces = upload(ctx, std::vector<MeanPiece>{piece});
  const Buffer scales = upload(ctx, scales_of(ranks));
  const Buffer common = upload(ctx, std::vector<TensorScale>(1));
  const Buffer flag = upload(ctx, std::vector<std::uint32_t>{0});
  MeanArgs args;
  args.pieces = pieces.as<MeanPiece>();
  args.piece_count = 1;
  args.ranks = static_cast<int>(ranks.size());
  args.rank = rank;
  args.staging = staging.data();
  args.stride = static_cast<std::int64_t>(stride);
  args.dtype = dtype;
  args.out_dtype = out;
  args.scales = scales.as<TensorScale>();
  args.mean_scales = common.as<TensorScale>();
  args.tensor_count = 1;
  args.nonfinite = flag.as<std::uint32_t>();
  mean_scales(ctx, args);
  reduce_mean(ctx, args);

  Outcome outcome;
  outcome.bytes = download<std::uint8_t>(ctx, piece.out, count * size_of(out));
  outcome.scales = download<TensorScale>(ctx, common.data(), 1);
  outcome.nonfinite = download_one<std::uint32_t>(ctx, flag.data());
  outcome.intact = own.intact() && apart.intact();
  return outcome;
}

// The common scale and the flag for one tensor.
Outcome scales_for(const Context& ctx, DType dtype, DType out,
                   const std::vector<TensorScale>& ranks) {
  const Buffer scales = upload(ctx, ranks);
  const Buffer common = upload(ctx, std::vector<TensorScale>{{2.0f, 0.5f, 77.0f}});
  const Buffer flag = upload(ctx, std::vector<std::uint32_t>{0});
  MeanArgs args;
  args.ranks = static_cast<int>(ranks.size());
  args.dtype = dtype;
  args.out_dtype = out;
  args.scales = scales.as<TensorScale>();
  args.mean_scales = common.as<TensorScale>();
  args.tensor_count = 1;
  args.nonfinite = flag.as<std::uint32_t>();
  mean_scales(ctx, args);
  Outcome outcome;
  outcome.scales = download<TensorScale>(ctx, common.data(), 1);
  outcome.nonfinite = download_one<std::uint32_t>(ctx, flag.data());
  return outcome;
}

void check_scale(const TensorScale& actual, const TensorScale& expected) {
  CHECK(bits_of(actual.scale) == bits_of(expected.scale));
  CHECK(bits_of(actual.scale_inv) == bits_of(expected.scale_inv));
  CHECK(bits_of(actual.amax) == bits_of(expected.amax));
}

std::vector<std::uint8_t> bytes_of(const std::vector<float>& values) {
  std::vector<std::uint8_t> bytes(values.size() * sizeof(float));
  std::memcpy(bytes.data(), values.data(), bytes.size());
  return bytes;
}

std::vector<Contribution> random_contributions(DType dtype, std::size_t count, int ranks) {
  std::vector<Contribution> contributions;
  for (int r = 0; r < ranks; ++r) {
    const auto seed = static_cast<std::uint32_t>(1000 * ranks + r);
    contributions.push_back(contribute(dtype, wide_values(count, seed, -20 - r, 3 * r)));
  }
  return contributions;
}

}  // namespace

TEST_CASE("means are exact to the bit in every dtype, aligned or not, in place or not") {
  for (const Context& ctx : test_contexts()) {
    for (DType dtype : {DType::e4m3, DType::bf16, DType::f32}) {
      for (int ranks : {1, 2, 3, 4, 5, 8}) {
        for (std::size_t count : {1u, 2u, 3u, 15u, 16u, 17u, 127u, 129u, 2049u, 16385u}) {
          const auto contributions = random_contributions(dtype, count, ranks);
          const auto means = reference_means(dtype, contributions);
          const float bound = reference_bound(dtype, contributions);
          const int rank = static_cast<int>(count) % ranks;
          const std::size_t shift = count % 3;
          CAPTURE(to_string(ctx.device()), name_of(dtype), ranks, count);

          const Outcome wide =
              mean_of_all(ctx, dtype, DType::f32, contributions, rank, shift, false);
          CHECK(first_difference(wide.bytes, bytes_of(means)) == "");
          check_scale(wide.scales[0], reference_mean_scale(DType::f32, bound));
          CHECK(wide.intact);
          CHECK(wide.nonfinite == 0);

          const TensorScale scale = reference_mean_scale(dtype, bound);
          const auto rounded = reference_rounded(dtype, means, scale.scale);
          for (bool in_place : {false, true}) {
            const Outcome own =
                mean_of_all(ctx, dtype, dtype, contributions, rank, shift, in_place);
            CHECK(first_difference(own.bytes, rounded) == "");
            check_scale(own.scales[0], scale);
            CHECK(own.intact);
          }
        }
      }
    }
  }
}

TEST_CASE("every pair of E4M3 codes has its exact mean") {
  // 256 x 256 elements: rank 0 holds the column, rank 1 the row, with scales 2^3 apart.
  std::vector<Contribution> pair(2);
  for (int i = 0; i < 256 * 256; ++i) {
    pair[0].bytes.push_back(static_cast<std::uint8_t>(i % 256));
    pair[1].bytes.push_back(static_cast<std::uint8_t>(i / 256));
  }
  pair[0].scale = {0.25f, 4.0f, 112.0f};
  pair[1].scale = {2.0f, 0.5f, 896.0f};
  for (const Context& ctx : test_contexts()) {
    const Outcome outcome = mean_of_all(ctx, DType::e4m3, DType::f32, pair, 1, 0, false);
    std::vector<float> means(256 * 256);
    std::memcpy(means.data(), outcome.bytes.data(), outcome.bytes.size());
    int wrong = 0;
    for (std::size_t i = 0; i < means.size(); ++i) {
      const double a = table_of(DType::e4m3).decode(pair[0].bytes[i]) * 0.25;
      const double b = table_of(DType::e4m3).decode(pair[1].bytes[i]) * 2.0;
      const double exact = (a + b) / 2;
      const bool right = std::isnan(exact) ? bits_of(means[i]) == 0x7FC00000u
                                           : static_cast<double>(means[i]) == exact;
      wrong += right ? 0 : 1;
    }
    CHECK(wrong == 0);
    CHECK(outcome.scales[0].amax == 504.0f);
  }
}

TEST_CASE("equal contributions give exactly themselves, for any number of ranks") {
  for (const Context& ctx : test_contexts()) {
    for (DType dtype : {DType::e4m3, DType::bf16, DType::f32}) {
      // The top binade of E4M3 included: 300 and -448 are stored as 288 and -448.
      auto values = normal_values(1000, 5);
      values.insert(values.end(), {300.0f, -448.0f, 0.0f, -0.0f, 1e-30f});
      const Contribution one = contribute(dtype, values);
      for (int ranks : {1, 2, 3, 5, 6, 7, 8, 17, 32, 64}) {
        const std::vector<Contribution> equal(at(ranks), one);
        CAPTURE(to_string(ctx.device()), name_of(dtype), ranks);
        const Outcome own = mean_of_all(ctx, dtype, dtype, equal, ranks - 1, 0, true);
        CHECK(first_difference(own.bytes, one.bytes) == "");
        const Outcome wide = mean_of_all(ctx, dtype, DType::f32, equal, 0, 0, false);
        std::vector<float> decoded(values.size());
        for (std::size_t i = 0; i < decoded.size(); ++i) {
          decoded[i] = reference_decode(dtype, one.bytes, i) * one.scale.scale_inv;
        }
        CHECK(first_difference(wide.bytes, bytes_of(decoded)) == "");
        CHECK(wide.scales[0].amax == 448.0f);
      }
    }
  }
}

TEST_CASE("A bounds every mean, in f32 too") {
  // Seven ranks whose FP32 sum of equal amaxes would round below the amax itself.
  for (const Context& ctx : test_contexts()) {
    int beyond = 0;
    for (std::uint32_t seed = 0; seed < 200; ++seed) {
      const float value = std::abs(normal_values(1, seed)[0]);
      const std::vector<TensorScale> ranks(7, {1.0f, 1.0f, value});
      const Outcome outcome = scales_for(ctx, DType::f32, DType::f32, ranks);
      beyond += outcome.scales[0].amax != value ? 1 : 0;
    }
    CHECK(beyond == 0);
  }
}

TEST_CASE("amaxes far apart, tiny and huge") {
  for (const Context& ctx : test_contexts()) {
    const auto from_amax = [](float amax) {
      const auto scale = static_cast<float>(reference_scale(amax, 448.0));
      return TensorScale{1.0f / scale, scale, amax};
    };
    const auto check = [&](const std::vector<float>& amaxes) {
      std::vector<Contribution> ranks;
      for (float amax : amaxes) ranks.push_back({{}, from_amax(amax)});
      const float bound = reference_bound(DType::e4m3, ranks);
      const Outcome outcome = scales_for(ctx, DType::e4m3, DType::e4m3, scales_of(ranks));
      CAPTURE(to_string(ctx.device()), amaxes);
      check_scale(outcome.scales[0], reference_mean_scale(DType::e4m3, bound));
      CHECK(outcome.scales[0].scale * outcome.scales[0].scale_inv == 1.0f);
      CHECK(outcome.nonfinite == 0);
    };
    check({1.0f, std::ldexp(1.0f, 20)});
    check({std::ldexp(1.3f, -20), 0.0f, 1.7f});
    check({0.0f, 0.0f, 0.0f});
    check({1e-38f, 1e-45f});
    check({1e-45f, 0.0f});
    check({1.6e38f, 1.6e38f});
  }
}

TEST_CASE("a non-finite amax on any rank raises the flag and leaves a finite scale") {
  const TensorScale plain{0.5f, 2.0f, 100.0f};
  for (const Context& ctx : test_contexts()) {
    for (DType out : {DType::e4m3, DType::f32}) {
      for (float bad : {kNan, -kNan, kInf, -kInf}) {
        for (std::size_t who : {0u, 1u, 2u}) {
          std::vector<TensorScale> ranks(3, plain);
          ranks[who].amax = bad;
          const Outcome outcome = scales_for(ctx, DType::e4m3, out, ranks);
          CAPTURE(to_string(ctx.device()), name_of(out), bad, who);
          CHECK(outcome.nonfinite == 1);
          CHECK(outcome.scales[0].scale == 1.0f);
          CHECK(outcome.scales[0].scale_inv == 1.0f);
          CHECK(std::isnan(outcome.scales[0].amax) == std::isnan(bad));
          CHECK_FALSE(std::isfinite(outcome.scales[0].amax));
        }
      }
    }
    // Finite on every rank, but FP32 cannot hold the sum.
    const std::vector<TensorScale> huge(2, {1.0f, 1.0f, 3e38f});
    CHECK(scales_for(ctx, DType::bf16, DType::bf16, huge).nonfinite == 1);
    // Double can.
    const std::vector<TensorScale> largest(2, {1.0f, 1.0f, kMaxFloat});
    const Outcome outcome = scales_for(ctx, DType::f32, DType::f32, largest);
    CHECK(outcome.nonfinite == 0);
    CHECK(outcome.scales[0].amax == kMaxFloat);
  }
}

TEST_CASE("the flag is never lowered") {
  for (const Context& ctx : test_contexts()) {
    const Buffer scales = upload(ctx, std::vector<TensorScale>(2, {1.0f, 1.0f, 3.0f}));
    const Buffer common = upload(ctx, std::vector<TensorScale>(2));
    const Buffer flag = upload(ctx, std::vector<std::uint32_t>{1});
    MeanArgs args;
    args.scales = scales.as<TensorScale>();
    args.mean_scales = common.as<TensorScale>();
    args.tensor_count = 2;
    args.nonfinite = flag.as<std::uint32_t>();
    mean_scales(ctx, args);
    CHECK(download_one<std::uint32_t>(ctx, flag.data()) == 1);
    CHECK(download<TensorScale>(ctx, common.data(), 2)[1].amax == 3.0f);
  }
}

TEST_CASE("several pieces of several tensors use their own scales; an empty piece does nothing") {
  const std::vector<std::size_t> counts = {5, 0, 700, 33};
  for (const Context& ctx : test_contexts()) {
    std::vector<std::vector<Contribution>> tensors;
    std::vector<std::uint8_t> own, block;
    std::vector<MeanPiece> pieces;
    std::vector<TensorScale> scales(2 * counts.size());
    for (std::size_t t = 0; t < counts.size(); ++t) {
      tensors.push_back(
          {contribute(DType::e4m3, normal_values(counts[t], static_cast<std::uint32_t>(t), 1.0f)),
           contribute(DType::e4m3, normal_values(counts[t], 50, std::ldexp(1.0f, int(t) * 5)))});
      MeanPiece piece;
      piece.tensor = static_cast<std::int32_t>(t);
      piece.count = static_cast<std::int64_t>(counts[t]);
      piece.staged = static_cast<std::int64_t>(own.size());
      pieces.push_back(piece);
      own.insert(own.end(), tensors[t][0].bytes.begin(), tensors[t][0].bytes.end());
      block.insert(block.end(), tensors[t][1].bytes.begin(), tensors[t][1].bytes.end());
      own.resize((own.size() + 15) / 16 * 16);
      block.resize(own.size());
      scales[t] = tensors[t][0].scale;
      scales[counts.size() + t] = tensors[t][1].scale;
    }
    std::vector<std::uint8_t> staged(own.size(), 0xFF);
    staged.insert(staged.end(), block.begin(), block.end());
    const Buffer own_data = upload(ctx, own), staging = upload(ctx, staged);
    const Guarded out(ctx, own.size() * sizeof(float));
    for (MeanPiece& piece : pieces) {
      piece.own = own_data.as<std::uint8_t>() + piece.staged;
      piece.out = static_cast<float*>(out.data()) + piece.staged;
    }
    const Buffer table = upload(ctx, pieces), all_scales = upload(ctx, scales);
    const Buffer common = upload(ctx, std::vector<TensorScale>(counts.size()));
    const Buffer flag = upload(ctx, std::vector<std::uint32_t>{0});
    MeanArgs args;
    args.pieces = table.as<MeanPiece>();
    args.piece_count = static_cast<std::int64_t>(pieces.size());
    args.ranks = 2;
    args.staging = staging.data();
    args.stride = static_cast<std::int64_t>(own.size());
    args.dtype = DType::e4m3;
    args.scales = all_scales.as<TensorScale>();
    args.mean_scales = common.as<TensorScale>();
    args.tensor_count = static_cast<std::int64_t>(counts.size());
    args.nonfinite = flag.as<std::uint32_t>();
    mean_scales(ctx, args);
    reduce_mean(ctx, args);
    for (std::size_t t = 0; t < counts.size(); ++t) {
      CAPTURE(to_string(ctx.device()), t);
      CHECK(first_difference(download<float>(ctx, pieces[t].out, counts[t]),
                             reference_means(DType::e4m3, tensors[t])) == "");
    }
    CHECK(out.intact());
    // The gaps between the pieces are untouched.
    CHECK(out.values<std::uint32_t>()[5] == 0xA5A5A5A5u);
  }
}

TEST_CASE("max_amax takes the largest magnitude and keeps NaN") {
  const std::vector<TensorScale> gathered = {
      {9.0f, 9.0f, 1.0f}, {9.0f, 9.0f, 5.0f},  {9.0f, 9.0f, kInf}, {9.0f, 9.0f, 0.0f},
      {9.0f, 9.0f, 3.0f}, {9.0f, 9.0f, -6.0f}, {9.0f, 9.0f, kNan}, {9.0f, 9.0f, 0.0f},
      {9.0f, 9.0f, 2.0f}, {9.0f, 9.0f, 4.0f},  {9.0f, 9.0f, 1.0f}, {9.0f, 9.0f, 1e-45f}};
  for (const Context& ctx : test_contexts()) {
    const Buffer from = upload(ctx, gathered);
    const Buffer out = upload(ctx, std::vector<TensorScale>(4, {0.5f, 2.0f, 7.0f}));
    max_amax(ctx, from.as<TensorScale>(), 3, 4, out.as<TensorScale>());
    const auto scales = download<TensorScale>(ctx, out.data(), 4);
    CHECK(scales[0].amax == 3.0f);
    CHECK(scales[1].amax == 6.0f);
    CHECK(std::isnan(scales[2].amax));
    CHECK(scales[3].amax == 1e-45f);
    for (const TensorScale& scale : scales) {
      CHECK(scale.scale == 2.0f);
      CHECK(scale.scale_inv == 0.5f);
    }
  }
}

TEST_CASE("arguments that do not fit are refused by name") {
  const Context ctx = Context::cpu();
  TensorScale scale, common;
  std::uint32_t flag = 0;
  MeanPiece piece;
  MeanArgs good;
  good.pieces = &piece;
  good.piece_count = 1;
  good.scales = &scale;
  good.mean_scales = &common;
  good.tensor_count = 1;
  good.nonfinite = &flag;
  const auto refused = [&](const std::function<void(MeanArgs&)>& spoil) {
    MeanArgs args = good;
    spoil(args);
    return error_of([&] {
      mean_scales(ctx, args);
      reduce_mean(ctx, args);
    });
  };
  CHECK(refused([](MeanArgs&) {}) == "no error");
  CHECK(missing(refused([](MeanArgs& a) { a.ranks = 0; }), {"ranks is 0"}) == "");
  CHECK(missing(refused([](MeanArgs& a) { a.rank = 1; }), {"rank is 1", "[0, 1)"}) == "");
  CHECK(missing(refused([](MeanArgs& a) { a.dtype = DType::e5m2; }), {"e5m2", "bf16"}) == "");
  CHECK(missing(refused([](MeanArgs& a) { a.out_dtype = DType::bf16; }), {"bf16", "f32"}) == "");
  CHECK(missing(refused([](MeanArgs& a) { a.scales = nullptr; }), {"scales", "null"}) == "");
  CHECK(missing(refused([](MeanArgs& a) { a.nonfinite = nullptr; }), {"nonfinite"}) == "");
  CHECK(missing(refused([](MeanArgs& a) { a.pieces = nullptr; }), {"pieces is null"}) == "");
  CHECK(missing(refused([](MeanArgs& a) { a.ranks = 2; }), {"staging is null"}) == "");
  CHECK(missing(refused([](MeanArgs& a) { a.stride = 6; }), {"stride is 6"}) == "");
  CHECK(missing(error_of([&] { max_amax(ctx, &scale, 0, 1, &common); }), {"ranks is 0"}) == "");
  CHECK(missing(error_of([&] { max_amax(ctx, nullptr, 1, 1, &common); }), {"null"}) == "");
}

}  // namespace octet::test
