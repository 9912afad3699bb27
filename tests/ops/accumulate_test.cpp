// SPDX-License-Identifier: Apache-2.0
// Sums over micro-batches against plain loops on the tables of the formats.
#include "octet/ops/accumulate.hpp"

#include <limits>

#include "octet/ops/quantize.hpp"
#include "support/catch.hpp"
#include "support/compare.hpp"
#include "support/devices.hpp"
#include "support/errors.hpp"
#include "support/guarded.hpp"
#include "support/mean_reference.hpp"
#include "support/random.hpp"

namespace octet::test {
namespace {

constexpr DType kWide[] = {DType::f32, DType::bf16, DType::f16};
constexpr DType kSums[] = {DType::f32, DType::bf16, DType::e4m3};
constexpr std::int64_t kSizes[] = {1, 2, 7, 8, 9, 127, 128, 2049, 65537, 104729};

/// Values as a dtype stores them: the bytes, and what they decode to.
struct Stored {
  std::vector<std::uint8_t> bytes;
  std::vector<float> values;
};

Stored store(DType dtype, const std::vector<float>& values, double scale = 1.0) {
  Stored s{std::vector<std::uint8_t>(values.size() * size_of(dtype)), values};
  for (std::size_t i = 0; i < values.size(); ++i) {
    std::uint8_t* to = s.bytes.data() + i * size_of(dtype);
    reference_encode(dtype, static_cast<double>(values[i]) * scale, to);
    if (dtype == DType::f32) continue;
    std::uint32_t code = 0;
    std::memcpy(&code, to, size_of(dtype));
    s.values[i] = static_cast<float>(table_of(dtype).decode(code) / scale);
  }
  return s;
}

float float_sum(float a, float b) {
  return static_cast<float>(static_cast<double>(a) + static_cast<double>(b));
}

/// The sum after one call, by the definition.
struct Expected {
  std::vector<std::uint8_t> bytes;
  TensorScale scale;
};

Expected expected_sum(DType dtype, const Stored& sum, const Stored& in) {
  std::vector<float> sums(sum.values.size());
  double amax = 0;
  for (std::size_t i = 0; i < sums.size(); ++i) {
    sums[i] = float_sum(sum.values[i], in.values[i]);
    amax = std::max(amax, std::abs(static_cast<double>(sums[i])));
  }
  const double scale = dtype == DType::e4m3 ? reference_scale(amax, 448.0) : 1.0;
  return {store(dtype, sums, scale).bytes,
          {static_cast<float>(1.0 / scale), static_cast<float>(scale), static_cast<float>(amax)}};
}

struct Result {
  std::vector<std::uint8_t> bytes;
  TensorScale scale;
  std::uint32_t nonfinite = 0;
};

/// Runs on a device, with guards around the sum; `offset` elements keep both from being aligned.
Result run(const Context& ctx, DType sum_dtype, const std::vector<std::uint8_t>& sum,
           const TensorScale& scale, DType in_dtype, const std::vector<std::uint8_t>& in,
           std::size_t offset = 0) {
  const std::size_t shift_in = offset * size_of(in_dtype), shift = offset * size_of(sum_dtype);
  const auto count = static_cast<std::int64_t>(in.size() / size_of(in_dtype));
  const Buffer input(ctx, in.size() + shift_in + 1);
  const Guarded output(ctx, sum.size() + shift);
  const Buffer scales = upload(ctx, std::vector<TensorScale>{scale});
  const Buffer flag = upload(ctx, std::vector<std::uint32_t>{0});
  write(ctx, input.as<char>() + shift_in, in);
  write(ctx, static_cast<char*>(output.data()) + shift, sum);
  const bool fp8 = is_fp8(sum_dtype);
  accumulate(ctx,
             {.in = {input.as<char>() + shift_in, in_dtype, {count}, ctx.device()},
              .sum = {{static_cast<char*>(output.data()) + shift, sum_dtype, {count}, ctx.device()},
                      fp8 ? scales.as<TensorScale>() : nullptr},
              .nonfinite = flag.as<std::uint32_t>()});
  Result result;
  const auto all = output.values<std::uint8_t>();
  result.bytes.assign(all.begin() + static_cast<std::ptrdiff_t>(shift), all.end());
  result.scale = download_one<TensorScale>(ctx, scales.data());
  result.nonfinite = download_one<std::uint32_t>(ctx, flag.data());
  REQUIRE(output.intact());
  return result;
}

}  // namespace

TEST_CASE("a sum is decoded, added in FP32 and rounded once") {
  for (const Context& ctx : test_contexts()) {
    for (DType sum_dtype : kSums) {
      for (DType in_dtype : kWide) {
        for (std::int64_t size : kSizes) {
          for (std::size_t offset : {std::size_t{0}, std::size_t{1}}) {
            const auto count = static_cast<std::size_t>(size);
            const auto seed = static_cast<std::uint32_t>(size);
            // The new values are much larger or smaller than the old ones.
            const float sigma = size % 2 == 0 ? 0.001f : 10.0f;
            const Stored in = store(in_dtype, normal_values(count, seed, sigma));
            const double scale = sum_dtype == DType::e4m3 ? 64.0 : 1.0;
            const Stored sum = store(sum_dtype, normal_values(count, seed + 1, 0.7f), scale);
            const TensorScale before{static_cast<float>(1.0 / scale), static_cast<float>(scale),
                                     123.0f};
            const Result result =
                run(ctx, sum_dtype, sum.bytes, before, in_dtype, in.bytes, offset);
            const Expected expected = expected_sum(sum_dtype, sum, in);
            CAPTURE(to_string(ctx.device()), name_of(sum_dtype), name_of(in_dtype), size, offset);
            REQUIRE(first_difference(result.bytes, expected.bytes) == "");
            CHECK(result.nonfinite == 0);
            const TensorScale& left = sum_dtype == DType::e4m3 ? expected.scale : before;
            CHECK(std::memcmp(&result.scale, &left, 3 * sizeof(float)) == 0);
          }
        }
      }
    }
  }
}

TEST_CASE("an e4m3 sum takes the amax of the sum, not of its parts") {
  for (const Context& ctx : test_contexts()) {
    // 1 + 2^-20 of what was there cancels all but a little.
    const Stored sum = store(DType::e4m3, {1.0f, -0.5f, 0.25f}, 256.0);
    const Stored in = store(DType::f32, {-1.0f + 0x1p-20f, 0.5f, -0.25f});
    const Result result =
        run(ctx, DType::e4m3, sum.bytes, {0x1p-8f, 256.0f, 1.0f}, DType::f32, in.bytes);
    CHECK(result.scale.amax == 0x1p-20f);
    CHECK(result.scale.scale == 0x1p28f);
    CHECK(result.bytes == store(DType::e4m3, {0x1p-20f, 0.0f, 0.0f}, 0x1p28).bytes);
    // All of it cancelled: scale 1, as with any amax of 0.
    const Stored all = store(DType::f32, {-1.0f, 0.5f, -0.25f});
    const Result zero =
        run(ctx, DType::e4m3, sum.bytes, {0x1p-8f, 256.0f, 1.0f}, DType::f32, all.bytes);
    CHECK(zero.scale.amax == 0.0f);
    CHECK(zero.scale.scale == 1.0f);
    CHECK(zero.bytes == std::vector<std::uint8_t>{0, 0, 0});
  }
}

TEST_CASE("what is not finite stays visible, with one bit pattern on every device") {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  constexpr float kMax = std::numeric_limits<float>::max();
  const std::vector<std::vector<float>> cases = {
      {NAN, 1.0f}, {-NAN, 1.0f}, {kInf, 1.0f}, {-kInf, 1.0f}};
  for (const Context& ctx : test_contexts()) {
    for (const std::vector<float>& values : cases) {
      CAPTURE(to_string(ctx.device()), values[0]);
      const Stored in = store(DType::f32, values);
      const TensorScale before{0x1p-4f, 16.0f, 2.0f};
      const Stored fp8 = store(DType::e4m3, {2.0f, 0.5f}, 16.0);
      const Result result = run(ctx, DType::e4m3, fp8.bytes, before, DType::f32, in.bytes);
      CHECK(result.nonfinite == 1);
      CHECK(result.scale.scale == 16.0f);
      CHECK(result.scale.scale_inv == 0x1p-4f);
      CHECK_FALSE(std::isfinite(result.scale.amax));
      CHECK((result.bytes[0] & 0x7F) == (std::isnan(values[0]) ? 0x7F : 0x7E));
      CHECK(result.bytes[1] == store(DType::e4m3, {1.5f}, 16.0).bytes[0]);

      const Stored wide = store(DType::f32, {2.0f, 0.5f});
      const Result kept = run(ctx, DType::f32, wide.bytes, {}, DType::f32, in.bytes);
      std::vector<float> sums(2);
      std::memcpy(sums.data(), kept.bytes.data(), 8);
      CHECK(kept.nonfinite == 0);
      if (std::isnan(values[0])) {
        CHECK(bits_of(sums[0]) == 0x7FFFFFFFu);
      } else {
        CHECK(sums[0] == values[0]);
      }
      CHECK(sums[1] == 1.5f);
    }
    // Finite parts whose sum is not, and opposite infinities.
    const Stored in = store(DType::f32, {kMax, -kInf});
    const Stored sum = store(DType::f32, {kMax, kInf});
    const Result result = run(ctx, DType::f32, sum.bytes, {}, DType::f32, in.bytes);
    std::vector<float> sums(2);
    std::memcpy(sums.data(), result.bytes.data(), 8);
    CHECK(sums[0] == kInf);
    CHECK(bits_of(sums[1]) == 0x7FFFFFFFu);
  }
}

TEST_CASE("an empty sum is left alone, and what does not fit is refused by name") {
  const Context ctx = Context::cpu();
  const Tensor f32(ctx, DType::f32, {4}), other(ctx, DType::f32, {5}), f16(ctx, DType::f16, {4});
  const Tensor e5m2(ctx, DType::e5m2, {4}), none(ctx, DType::f32, {0});
  const ScaledTensor e4m3(ctx, DType::e4m3, {4});
  const auto error = [&](const TensorView& in, const ScaledView& sum) {
    return error_of([&] { accumulate(ctx, {.in = in, .sum = sum}); });
  };
  CHECK(error(none, {none.view(), nullptr}) == "no error");
  CHECK(missing(error(f32, {other.view(), nullptr}), {"shape", "[5]", "[4]"}) == "");
  CHECK(missing(error(f32, {f16.view(), nullptr}), {"sum", "f16", "e4m3"}) == "");
  CHECK(missing(error(e5m2, {f32.view(), nullptr}), {"input", "e5m2"}) == "");
  CHECK(missing(error(f32, {e4m3.view().data, nullptr}), {"e4m3", "without a scale"}) == "");
  CHECK(missing(error(f16, {f32.view(), e4m3.view().scale}), {"f32", "scale"}) == "");
  CHECK(missing(error(f32, {f32.view(), nullptr}), {"overlaps"}) == "");
  TensorView elsewhere = f16.view();
  elsewhere.device = {DeviceType::cuda, 5};
  CHECK(missing(error(elsewhere, {f32.view(), nullptr}), {"input", "cuda:5"}) == "");
}

}  // namespace octet::test
