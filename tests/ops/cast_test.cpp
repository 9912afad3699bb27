// SPDX-License-Identifier: Apache-2.0
// Casts with a scale that is given, what they find out by the way, and what they refuse.
#include <limits>

#include "octet/ops/quantize.hpp"
#include "support/cast_run.hpp"
#include "support/errors.hpp"

namespace octet::test {

TEST_CASE("a given scale is used as it is and its amax only rises") {
  for (const Context& ctx : test_contexts()) {
    for (DType in : kInputs) {
      for (DType out : kOutputs) {
        for (float known : {0.0f, 1e9f}) {
          CastCase c{.in = in, .out = out, .shape = {77, 40}, .scaling = Scaling::given};
          c.scale = {0.125f, 8.0f, known};
          const std::vector<float> values = values_for(c.shape, 1);
          const Encoded stored = encode_values(in, values);
          double amax = 0;
          for (double value : stored.decoded) amax = std::max(amax, std::abs(value));
          for (bool transposed : {false, true}) {
            c.transposed = transposed;
            INFO(describe(ctx, c));
            const Codes expected = expected_codes(stored.decoded, out, 8.0f);
            const CastResult r = run_cast(ctx, c, values);
            CHECK(first_difference(r.codes, expected) == "");
            if (transposed) {
              CHECK(first_difference(r.transposed, transpose_of(expected, c.shape)) == "");
              CastCase alone = c;
              alone.row_major = false;
              CHECK(first_difference(run_cast(ctx, alone, values).transposed, r.transposed) == "");
            }
            CHECK(r.scale.scale == 8.0f);
            CHECK(r.scale.scale_inv == 0.125f);
            CHECK(r.scale.amax == std::max(known, static_cast<float>(amax)));
            CHECK(r.flag == 0);
          }
        }
      }
    }
  }
}

TEST_CASE("with a given scale NaN and infinity raise the flag and stay in the amax") {
  for (const Context& ctx : test_contexts()) {
    for (float bad : {NAN, -INFINITY}) {
      for (std::size_t at : {std::size_t{0}, std::size_t{511}, std::size_t{3000}}) {
        std::vector<float> values = normal_values(3001, 2);
        values[at] = bad;
        const CastResult r = run_cast(ctx, {.shape = {3001}, .scaling = Scaling::given}, values);
        INFO(bad << " at " << at << " on " << to_string(ctx.device()));
        CHECK(r.flag == 1);
        CHECK((std::isnan(bad) ? std::isnan(r.scale.amax) : std::isinf(r.scale.amax)));
        CHECK(r.codes[at] == (std::isnan(bad) ? 0x7F : 0xFE));
        CHECK(r.scale.scale == 1.0f);
      }
    }
  }
}

TEST_CASE("an amax that is NaN stays with later casts, their codes are their own") {
  for (const Context& ctx : test_contexts()) {
    CastCase c{.shape = {300}, .scaling = Scaling::given};
    c.scale.amax = NAN;
    const std::vector<float> values = normal_values(300, 9);
    const CastResult r = run_cast(ctx, c, values);
    CHECK(std::isnan(r.scale.amax));
    CHECK(r.flag == 0);
    Doubles wide(values.begin(), values.end());
    CHECK(first_difference(r.codes, expected_codes(wide, DType::e4m3, 1.0f)) == "");
  }
}

TEST_CASE("known values have their known codes under a given scale of 1") {
  struct Known {
    float value;
    std::uint8_t e4m3, e5m2;
  };
  const float inf = std::numeric_limits<float>::infinity();
  const Known known[] = {{464.0f, 0x7E, 0x5F},
                         {next_up(464.0f), 0x7E, 0x5F},
                         {61440.0f, 0x7E, 0x7B},
                         {inf, 0x7E, 0x7B},
                         {-inf, 0xFE, 0xFB},
                         {NAN, 0x7F, 0x7F},
                         {-NAN, 0x7F, 0x7F},
                         {std::ldexp(1.0f, -9), 0x01, 0x18},
                         {std::ldexp(1.0f, -10), 0x00, 0x14},
                         {next_up(std::ldexp(1.0f, -10)), 0x01, 0x14},
                         {std::ldexp(3.0f, -10), 0x02, 0x1A},
                         {17.0f, 0x58, 0x4C},
                         {19.0f, 0x5A, 0x4D},
                         {21.0f, 0x5A, 0x4D},
                         {std::ldexp(1.0f, -16), 0x00, 0x01},
                         {std::ldexp(1.0f, -17), 0x00, 0x00},
                         {-0.0f, 0x80, 0x80}};
  for (const Context& ctx : test_contexts()) {
    std::vector<float> values;
    Codes e4m3, e5m2;
    for (const Known& each : known) {
      values.push_back(each.value);
      e4m3.push_back(each.e4m3);
      e5m2.push_back(each.e5m2);
    }
    const auto count = static_cast<std::int64_t>(values.size());
    for (bool transposed : {false, true}) {
      CastCase c{.shape = {1, count}, .transposed = transposed, .scaling = Scaling::given};
      CHECK(first_difference(run_cast(ctx, c, values).codes, e4m3) == "");
      c.out = DType::e5m2;
      CHECK(first_difference(run_cast(ctx, c, values).codes, e5m2) == "");
    }
  }
}

TEST_CASE("counters add up what a cast cannot keep") {
  for (const Context& ctx : test_contexts()) {
    for (DType out : kOutputs) {
      const double top = table_of(out).max(), least = table_of(out).values()[1];
      const auto value = [](double x) { return static_cast<float>(x); };
      // At the limits: kept, saturated; flushed is half of the smallest code and less.
      std::vector<float> values = {value(top),
                                   next_up(value(top)),
                                   value(-2 * top),
                                   INFINITY,
                                   NAN,
                                   0.0f,
                                   -0.0f,
                                   value(least),
                                   value(least / 2),
                                   value(-least / 4),
                                   next_up(value(least / 2)),
                                   1e-45f};
      for (std::size_t copies : {std::size_t{1}, std::size_t{500}}) {
        std::vector<float> many;
        for (std::size_t i = 0; i < copies; ++i) {
          many.insert(many.end(), values.begin(), values.end());
        }
        const auto n = static_cast<std::int64_t>(many.size());
        for (bool transposed : {false, true}) {
          CastCase c{.out = out, .shape = {n}, .counts = true, .scaling = Scaling::given};
          if (transposed) c.shape = {n / 3, 3};
          c.transposed = transposed;
          INFO(describe(ctx, c));
          const CastResult r = run_cast(ctx, c, many);
          CHECK(r.counters.saturated == 1000 + 3 * copies);
          CHECK(r.counters.flushed == 2000 + 3 * copies);
        }
      }
      // Current scaling saturates nothing that is finite.
      const CastResult r = run_cast(ctx, {.out = out, .shape = {1000}, .counts = true},
                                    wide_values(1000, 3, -40, 20));
      CHECK(r.counters.saturated == 1000);
      CHECK(r.counters.flushed > 2000);
    }
  }
}

TEST_CASE("outputs that overlap the input or one another are refused by name") {
  for (const Context& ctx : test_contexts()) {
    const Buffer memory(ctx, 4096), other(ctx, 4096);
    zero_bytes(ctx, memory.data(), memory.bytes());
    char *base = memory.as<char>(), *apart = other.as<char>();
    const auto view = [&](char* data, DType dtype, const Shape& shape) {
      return TensorView{data, dtype, shape, ctx.device()};
    };
    const auto error_with = [&](auto change) {
      QuantizeArgs args;
      args.in = view(base, DType::f32, {16, 8});  // 512 bytes
      args.out = {view(apart, DType::e4m3, {16, 8}), reinterpret_cast<TensorScale*>(apart + 128)};
      args.transposed = view(apart + 256, DType::e4m3, {8, 16});
      args.column_sums = view(apart + 512, DType::f32, {1, 8});
      change(args);
      return error_of([&] { quantize(ctx, args); });
    };
    CHECK(error_with([](QuantizeArgs&) {}) == "no error");
    CHECK(missing(error_with([&](QuantizeArgs& a) { a.out.data.data = base; }),
                  {"the output (128 bytes", "the input (512 bytes", "apart"}) == "");
    CHECK(missing(error_with([&](QuantizeArgs& a) { a.transposed.data = base + 511; }),
                  {"the transposed output", "the input"}) == "");
    CHECK(missing(error_with([&](QuantizeArgs& a) { a.transposed.data = apart + 16; }),
                  {"the transposed output", "the output"}) == "");
    CHECK(missing(error_with([&](QuantizeArgs& a) { a.column_sums.data = apart + 256; }),
                  {"column_sums", "the transposed output"}) == "");
    CHECK(missing(error_with([&](QuantizeArgs& a) {
                    a.out.scale = reinterpret_cast<TensorScale*>(apart + 112);
                  }),
                  {"the scale (16 bytes", "the output"}) == "");
    CHECK(missing(error_with([](QuantizeArgs& a) { a.scale_copy = a.out.scale; }),
                  {"scale_copy (16 bytes", "the scale"}) == "");
    CHECK(missing(error_with([&](QuantizeArgs& a) { a.scaling = static_cast<Scaling>(7); }),
                  {"scaling is 7", "given"}) == "");
    const TensorView codes = view(base, DType::e4m3, {16, 16});
    CHECK(missing(error_of([&] { transpose(ctx, codes, codes); }), {"the output", "the input"}) ==
          "");
    CHECK(missing(error_of([&] {
                    sum_columns(ctx, view(base, DType::f32, {2, 8}), view(base, DType::f32, {8}));
                  }),
                  {"the output", "the input"}) == "");
    const ScaledView wide{view(base, DType::f32, {16}), nullptr};
    CHECK(missing(error_of([&] { convert(ctx, wide, view(base, DType::bf16, {16})); }),
                  {"convert: the output (32 bytes", "the input (64 bytes"}) == "");
    CHECK(missing(error_of([&] { convert(ctx, wide, view(base + 4, DType::f32, {16})); }),
                  {"the output", "the input"}) == "");
    CHECK(error_of([&] { convert(ctx, wide, wide.data); }) == "no error");
    ctx.synchronize();
  }
}

TEST_CASE("sums of columns that do not fit are refused by name") {
  for (const Context& ctx : test_contexts()) {
    const Buffer in = upload(ctx, std::vector<float>(12, 1.0f));
    const ScaledTensor out(ctx, DType::e4m3, {3, 4});
    const Tensor sums(ctx, DType::f32, {1, 4}), wrong(ctx, DType::f32, {2, 4});
    const auto error_with = [&](const Shape& shape, const TensorView& column_sums) {
      QuantizeArgs args{.in = view_of(ctx, in, DType::f32, shape), .out = out.view()};
      args.out.data.shape = shape;
      args.column_sums = column_sums;
      return error_of([&] { quantize(ctx, args); });
    };
    CHECK(error_with({3, 4}, sums) == "no error");
    CHECK(missing(error_with({3, 4}, wrong), {"column_sums", "[2, 4]", "[1, 4]"}) == "");
    CHECK(missing(error_with({12}, sums), {"column_sums", "[12]"}) == "");
    const Tensor total(ctx, DType::f32, {4}), longer(ctx, DType::f32, {5}),
        narrow(ctx, DType::e4m3, {4});
    CHECK(error_of([&] { sum_columns(ctx, sums, total); }) == "no error");
    CHECK(missing(error_of([&] { sum_columns(ctx, sums, longer); }), {"[5]", "[4]"}) == "");
    CHECK(missing(error_of([&] { sum_columns(ctx, sums, narrow); }), {"e4m3"}) == "");
    CHECK(missing(error_of([&] { sum_columns(ctx, total, total); }), {"matrix"}) == "");
  }
}

}  // namespace octet::test
