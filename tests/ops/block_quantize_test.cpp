// SPDX-License-Identifier: Apache-2.0
// Casts with scales of blocks, by their definition, in every shape and for every kind of value.
#include "octet/ops/block_quantize.hpp"

#include <limits>

#include "support/block_cast_run.hpp"

namespace octet::test {
namespace {

/// Values whose magnitudes differ from block to block and within one.
std::vector<float> block_values(const Shape& shape, std::uint32_t seed) {
  return wide_values(static_cast<std::size_t>(shape.numel()), seed, -14, 12);
}

void check_by_definition(const Context& ctx, const BlockCase& c, const std::vector<float>& values) {
  INFO(describe(ctx, c));
  check_equal(run_blocks(ctx, c, values), expected_blocks(c, values));
}

std::uint8_t scale_byte(const Blocks& blocks, const ScalePlaces& places, std::int64_t row,
                        std::int64_t column) {
  return blocks.scales[places.of(row, column)];
}

}  // namespace

TEST_CASE("block casts follow their definition in every shape") {
  constexpr std::int64_t kSizes[] = {0, 1, 8, 15, 16, 17, 31, 32, 33, 127, 128, 129};
  for (const Context& ctx : test_contexts()) {
    std::uint32_t seed = 0;
    for (std::int64_t rows : kSizes) {
      for (std::int64_t columns : kSizes) {
        for (const BlockKind& kind : kKinds) {
          const std::uint32_t n = seed++;
          BlockCase c{.in = kInputs[n % 3],
                      .out = kOutputs[n / 3 % 2],
                      .shape = {rows, columns},
                      .kind = kind,
                      .padded = n % 5 == 0,
                      .sums = n % 2 == 0,
                      .counts = n % 7 != 0,
                      .flags = n % 11 != 0};
          if (n % 5 != 1) c.amax = n % 13 == 0 ? 1e9f : 0.0f;
          check_by_definition(ctx, c, block_values(c.shape, n));
        }
      }
    }
  }
}

TEST_CASE("block casts follow their definition for every format and set of outputs") {
  for (const Context& ctx : test_contexts()) {
    for (const BlockKind& kind : kKinds) {
      for (DType in : kInputs) {
        for (DType out : kOutputs) {
          const Shape shape{140, 264};
          const std::vector<float> values = block_values(shape, 11);
          for (int what = 0; what < 4; ++what) {
            check_by_definition(ctx,
                                {.in = in,
                                 .out = out,
                                 .shape = shape,
                                 .kind = kind,
                                 .row_major = what != 1,
                                 .transposed = what != 0,
                                 .padded = what == 2,
                                 .sums = what < 2,
                                 .counts = what != 2,
                                 .flags = what == 2,
                                 .amax = 0.0f},
                                values);
          }
        }
      }
    }
  }
}

TEST_CASE("block casts of a prime number of rows or columns follow their definition") {
  for (const Context& ctx : test_contexts()) {
    for (const Shape& shape : {Shape{5743, 33}, Shape{33, 5743}}) {
      for (const BlockKind& kind : kKinds) {
        for (DType in : kInputs) {
          const DType out = in == DType::bf16 ? DType::e5m2 : DType::e4m3;
          check_by_definition(ctx,
                              {.in = in,
                               .out = out,
                               .shape = shape,
                               .kind = kind,
                               .padded = in == DType::f32,
                               .sums = true,
                               .counts = true,
                               .amax = 0.0f},
                              block_values(shape, 11));
        }
      }
    }
  }
}

TEST_CASE("block casts at every address have the CPU's bits") {
  for (const Context& ctx : test_contexts()) {
    const bool is_cpu = ctx.device().type == DeviceType::cpu;
    for (const BlockKind& kind : kKinds) {
      for (DType in : kInputs) {
        for (const Shape& shape : {Shape{128, 256}, Shape{257, 136}, Shape{130, 33}}) {
          BlockCase c{.in = in, .shape = shape, .kind = kind, .counts = true, .amax = 0.0f};
          const std::vector<float> values = block_values(shape, 12);
          const BlockResult expected = run_blocks(Context::cpu(), c, values);
          for (std::int64_t offset : {0, 1, 4, 8}) {
            if (is_cpu && offset != 1) continue;  // one kind of access
            c.offset = offset;
            INFO(describe(ctx, c));
            check_equal(run_blocks(ctx, c, values), expected);
          }
        }
      }
    }
  }
}

TEST_CASE("a device's block casts of a large matrix have the CPU's bits") {
  if (cuda_device_count() == 0) {
    WARN("skipped: no CUDA device");
    return;
  }
  const Shape shape{3000, 4104};
  const std::vector<float> values = block_values(shape, 13);
  for (const BlockKind& kind : kKinds) {
    for (DType in : kInputs) {
      const BlockCase c{
          .in = in, .shape = shape, .kind = kind, .sums = true, .counts = true, .amax = 0.0f};
      INFO(describe(Context::cuda(0, nullptr), c));
      check_equal(run_blocks(Context::cuda(0, nullptr), c, values),
                  run_blocks(Context::cpu(), c, values));
    }
  }
}

TEST_CASE("zeros, subnormals, ties, infinities and NaN keep to their blocks") {
  const float inf = std::numeric_limits<float>::infinity();
  // Each fills a part of a block, the rest are ordinary values.
  const std::vector<std::vector<float>> kinds = {
      {0.0f, -0.0f, 0.0f},
      {inf, 1.0f, -2.0f},
      {-inf, 1e30f, 1e-30f},
      {NAN, 1.0f, 448.0f},
      {-NAN, inf, 0.0f},
      {1e-45f, -1e-45f, 0.0f},
      {std::ldexp(1.0f, -127), std::ldexp(1.0f, -149), -std::ldexp(3.0f, -130)},
      {448.0f, std::ldexp(1.0f, -10), std::ldexp(3.0f, -10)},
      {448.0f, next_up(std::ldexp(1.0f, -10)), 17.0f},
      {256.0f, 19.0f, 21.0f},
      {next_up(448.0f), 464.0f, next_up(464.0f)},
      {57344.0f, std::ldexp(1.0f, -17), 61440.0f},
      {3.4e38f, -3e38f, 1e38f},
      {std::ldexp(1.0f, -126), std::ldexp(448.0f, -127), next_up(std::ldexp(448.0f, -127))}};
  for (const Context& ctx : test_contexts()) {
    for (const BlockKind& kind : kKinds) {
      for (DType in : kInputs) {
        for (DType out : kOutputs) {
          for (bool alone : {false, true}) {  // with nothing else in the block, or with others
            const auto count = static_cast<std::int64_t>(kinds.size());
            const Shape shape{count * 40, 144};
            std::vector<float> values(static_cast<std::size_t>(shape.numel()), 0.0f);
            if (!alone) values = normal_values(values.size(), 14, 0.01f);
            for (std::size_t i = 0; i < kinds.size(); ++i) {
              for (std::size_t j = 0; j < 3; ++j) values[(i * 40 + j) * 144 + 37] = kinds[i][j];
              for (std::size_t j = 0; j < 3; ++j) values[i * 40 * 144 + 96 + j] = kinds[i][j];
            }
            check_by_definition(ctx,
                                {.in = in,
                                 .out = out,
                                 .shape = shape,
                                 .kind = kind,
                                 .padded = true,
                                 .counts = true,
                                 .amax = 0.0f},
                                values);
          }
        }
      }
    }
  }
}

TEST_CASE(
    "a block that is not finite is stored as documented, and its neighbours are not touched") {
  const float inf = std::numeric_limits<float>::infinity();
  for (const Context& ctx : test_contexts()) {
    for (const BlockKind& kind : kKinds) {
      for (float bad : {NAN, inf}) {
        std::vector<float> values(std::size_t{256} * 256, 3.0f);
        values[130 * 256 + 140] = bad;
        const BlockCase c{.shape = {256, 256}, .kind = kind};
        INFO(describe(ctx, c) << ", " << bad);
        const BlockResult r = run_blocks(ctx, c, values);
        CHECK(r.flag == 1);
        const ScalePlaces places{kind, 256, 256};
        const bool is_mx = kind.granularity == Granularity::mx;
        const std::uint8_t code = r.out.codes[130 * 256 + 140];
        const std::uint8_t beside = r.out.codes[130 * 256 + 141];
        if (is_mx) {
          CHECK(scale_byte(r.out, places, 130, 140) == (std::isnan(bad) ? 255 : 254));
          CHECK(beside == (std::isnan(bad) ? 0x7F : 0x00));
        } else {
          CHECK(scale_value(kind, &r.out.scales[places.of(130, 140)]) == 1.0);
          CHECK(beside == 0x44);  // 3 with a scale of 1
        }
        CHECK(code == (std::isnan(bad) ? 0x7F : 0x7E));
        // 3 = 384 / 128: in a block of its own.
        for (std::int64_t at : {std::int64_t{0}, std::int64_t{127}, std::int64_t{255}}) {
          CHECK(scale_value(kind, &r.out.scales[places.of(at, 5)]) == 1.0 / 128);
          CHECK(r.out.codes[static_cast<std::size_t>(at * 256 + 5)] == 0x7C);
        }
        values[130 * 256 + 140] = 3.0f;
        CHECK(run_blocks(ctx, c, values).flag == 0);
      }
    }
  }
}

TEST_CASE("the amax of block casts is the largest magnitude wherever it is, and only rises") {
  const Shape shape{140, 264};
  for (const Context& ctx : test_contexts()) {
    for (const BlockKind& kind : kKinds) {
      for (DType in : kInputs) {
        for (int what = 0; what < 3; ++what) {
          BlockCase c{.in = in,
                      .shape = shape,
                      .kind = kind,
                      .row_major = what != 1,
                      .transposed = what != 0,
                      .flags = false,
                      .amax = 0.0f};
          const std::vector<float> zeros(140 * 264, 0.0f), ones(140 * 264, -1.0f);
          CHECK(bits_of(run_blocks(ctx, c, zeros).amax) == 0);
          for (std::size_t row : {0, 5, 127, 128, 139}) {
            for (std::size_t column : {0, 127, 133, 263}) {
              std::vector<float> values = ones;
              values[row * 264 + column] = row % 2 == 0 ? 7.0f : -7.0f;
              c.amax = 0.0f;
              INFO(describe(ctx, c) << ", at " << row << ", " << column);
              CHECK(run_blocks(ctx, c, values).amax == 7.0f);
            }
          }
          std::vector<float> values = ones;
          values[139 * 264 + 263] = 7.0f;
          for (float before : {6.5f, 7.0f, 7.5f, INFINITY}) {
            c.amax = before;
            INFO(describe(ctx, c));
            CHECK(run_blocks(ctx, c, values).amax == std::max(before, 7.0f));
          }
        }
      }
    }
  }
}

TEST_CASE("NaN and infinity stay in the amax of block casts") {
  const Shape shape{140, 264};
  for (const Context& ctx : test_contexts()) {
    for (const BlockKind& kind : kKinds) {
      for (DType in : kInputs) {
        for (bool row_major : {true, false}) {
          BlockCase c{.in = in,
                      .shape = shape,
                      .kind = kind,
                      .row_major = row_major,
                      .transposed = !row_major,
                      .flags = false,
                      .amax = 3.0f};
          std::vector<float> infinite = normal_values(140 * 264, 21), broken;
          infinite[130 * 264 + 9] = -INFINITY;
          broken = infinite;
          broken[77] = -NAN;
          INFO(describe(ctx, c));
          CHECK(run_blocks(ctx, c, infinite).amax == INFINITY);
          const float nan = run_blocks(ctx, c, broken).amax;
          CHECK(std::isnan(nan));
          CHECK(bits_of(nan) == bits_of(run_blocks(Context::cpu(), c, broken).amax));
          c.amax = nan;
          CHECK(bits_of(run_blocks(ctx, c, infinite).amax) == bits_of(nan));
        }
      }
    }
  }
}

TEST_CASE("several block casts record the largest magnitude of all") {
  for (const Context& ctx : test_contexts()) {
    for (const BlockKind& kind : kKinds) {
      const Buffer in = upload<float>(ctx, {2.0f, -5.0f, 3.0f}), codes(ctx, 16);
      const Buffer scales(ctx, ScalePlaces{kind, 1, 1}.bytes()), amax = upload<float>(ctx, {0.0f});
      for (int i = 0; i < 3; ++i) {
        block_quantize(ctx, {.in = {in.as<float>() + i, DType::f32, {1, 1}, ctx.device()},
                             .out = {{codes.data(), DType::e4m3, {1, 1}, ctx.device()},
                                     kind.granularity,
                                     kind.layout,
                                     scales.data()},
                             .amax = amax.as<float>()});
      }
      INFO(to_string(kind) << " on " << octet::to_string(ctx.device()));
      CHECK(download_one<float>(ctx, amax.data()) == 5.0f);
    }
  }
}

TEST_CASE("padding of a transposed copy is zero beside a NaN") {
  for (const Context& ctx : test_contexts()) {
    for (const BlockKind& kind : kKinds) {
      std::vector<float> values(std::size_t{33} * 40, 1.0f);
      values[32 * 40 + 7] = NAN;  // its block of the transposed copy is 1 element and 15 of padding
      const BlockCase c{.shape = {33, 40}, .kind = kind};
      INFO(describe(ctx, c));
      const Blocks turned = run_blocks(ctx, c, values).transposed;
      for (std::size_t row = 0; row < 40; ++row) {
        for (std::size_t column = 33; column < 48; ++column) {
          CHECK(turned.codes[row * 48 + column] == 0);
        }
      }
      CHECK(turned.codes[7 * 48 + 32] == 0x7F);
    }
  }
}

TEST_CASE("the transposed copy has blocks of its own, but for tiles") {
  const Shape shape{256, 384};
  const std::vector<float> values = block_values(shape, 15);
  for (const Context& ctx : test_contexts()) {
    for (const BlockKind& kind : kKinds) {
      const BlockCase c{.in = DType::bf16, .shape = shape, .kind = kind};
      INFO(describe(ctx, c));
      const BlockResult r = run_blocks(ctx, c, values);
      const bool same = r.transposed.codes == transpose_of(r.out.codes, shape);
      CHECK(same == (kind.granularity == Granularity::tile));
      if (!same) continue;
      const ScalePlaces across{kind, 256, 384}, down{kind, 384, 256};
      for (std::int64_t row = 0; row < 256; row += 128) {
        for (std::int64_t column = 0; column < 384; column += 128) {
          CHECK(scale_value(kind, &r.out.scales[across.of(row, column)]) ==
                scale_value(kind, &r.transposed.scales[down.of(column, row)]));
        }
      }
    }
  }
}

TEST_CASE(
    "power-of-two scales of blocks are exact at the largest code, one ulp above they double") {
  for (const Context& ctx : test_contexts()) {
    for (BlockKind kind : {BlockKind{Granularity::row_block}, BlockKind{Granularity::tile}}) {
      for (DType out : kOutputs) {
        const auto top = static_cast<float>(table_of(out).max());
        for (int k : {-134, -126, -100, -1, 0, 1, 60, 100, 111}) {
          const float amax = std::ldexp(top, k);
          const BlockCase c{.out = out, .shape = {1, 2}, .kind = kind};
          INFO(describe(ctx, c) << ", k " << k);
          const auto scale_of = [&](float x) {
            const BlockResult r = run_blocks(ctx, c, {x, 0.0f});
            return scale_value(kind, r.out.scales.data());
          };
          // Scale and inverse stay normal.
          CHECK(scale_of(amax) == std::ldexp(1.0, std::max(k, -126)));
          CHECK(scale_of(next_up(amax)) == std::ldexp(1.0, std::max(k + 1, -126)));
        }
      }
    }
  }
}

}  // namespace octet::test
