// SPDX-License-Identifier: Apache-2.0
#include "octet/ops/quantize.hpp"

#include <limits>
#include <string>

#include "support/catch.hpp"
#include "support/compare.hpp"
#include "support/devices.hpp"
#include "support/errors.hpp"
#include "support/guarded.hpp"
#include "support/random.hpp"
#include "support/reference.hpp"

namespace octet::test {
namespace {

using Codes = std::vector<std::uint8_t>;

/// Values as a device tensor of `dtype`; `values` become what the tensor really holds.
Buffer upload_as(const Context& ctx, DType dtype, std::vector<float>& values) {
  if (dtype == DType::f32) return upload(ctx, values);
  std::vector<std::uint16_t> codes(values.size());
  for (std::size_t i = 0; i < values.size(); ++i) {
    const FormatTable& table = table_of(dtype);
    codes[i] = static_cast<std::uint16_t>(table.encode(static_cast<double>(values[i])));
    values[i] = static_cast<float>(table.decode(codes[i]));
  }
  return upload(ctx, codes);
}

struct Reference {
  Codes codes;
  TensorScale scale;
  bool finite = true;
};

/// The cast by its definition; `old` is the scale before.
Reference reference_cast(const std::vector<float>& values, DType dtype, const TensorScale& old) {
  Reference result{{}, old, true};
  std::uint32_t amax = 0;
  for (float value : values) amax = std::max(amax, bits_of(value) & 0x7FFFFFFFu);
  result.scale.amax = float_from_bits(amax);
  result.finite = std::isfinite(result.scale.amax);
  const FormatTable& table = table_of(dtype);
  if (result.finite) {
    const double scale =
        reference_scale(static_cast<double>(result.scale.amax), static_cast<double>(table.max()));
    result.scale.scale = static_cast<float>(scale);
    result.scale.scale_inv = static_cast<float>(1 / scale);
  }
  for (float value : values) {
    const float scaled = value * result.scale.scale;  // a power of two: exact but for underflow
    result.codes.push_back(static_cast<std::uint8_t>(table.encode(static_cast<double>(scaled))));
  }
  return result;
}

Codes reference_transpose(const Codes& codes, std::int64_t rows, std::int64_t columns) {
  const std::int64_t padded = padded_rows(rows);
  Codes result(static_cast<std::size_t>(columns * padded), 0);
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t c = 0; c < columns; ++c) {
      result[static_cast<std::size_t>(c * padded + r)] =
          codes[static_cast<std::size_t>(r * columns + c)];
    }
  }
  return result;
}

void check_scale(const TensorScale& actual, const TensorScale& expected) {
  CHECK(bits_of(actual.scale) == bits_of(expected.scale));
  CHECK(bits_of(actual.scale_inv) == bits_of(expected.scale_inv));
  if (std::isnan(expected.amax)) {
    CHECK(std::isnan(actual.amax));
  } else {
    CHECK(bits_of(actual.amax) == bits_of(expected.amax));
  }
}

struct Case {
  DType in = DType::f32;
  DType out = DType::e4m3;
  bool row_major = true;
  bool transposed = false;
};

void check_cast(const Context& ctx, const Case& what, std::vector<float> values, Shape shape) {
  INFO(to_string(ctx.device()) << ", " << name_of(what.in) << " -> " << name_of(what.out) << " "
                               << to_string(shape) << ", row-major " << what.row_major
                               << ", transposed " << what.transposed);
  const Buffer in = upload_as(ctx, what.in, values);
  const TensorScale old{0.25f, 4.0f, 3.0f};
  const Reference expected = reference_cast(values, what.out, old);
  const Guarded out(ctx, values.size());
  const Guarded scale(ctx, sizeof(TensorScale));
  const Guarded flag(ctx, sizeof(std::uint32_t));
  write_one(ctx, scale.data(), old);
  write_one(ctx, flag.data(), std::uint32_t{0});
  const std::int64_t rows = shape.rank() == 2 ? shape[0] : 0;
  const std::int64_t columns = shape.rank() == 2 ? shape[1] : 0;
  const Shape transposed_shape = {columns, padded_rows(rows)};
  const Guarded transposed(ctx, static_cast<std::size_t>(transposed_shape.numel()));

  QuantizeArgs args;
  args.in = view_of(ctx, in, what.in, shape);
  args.out = {out.view(what.out, shape), static_cast<TensorScale*>(scale.data())};
  if (!what.row_major) args.out.data.data = nullptr;
  if (what.transposed) args.transposed = transposed.view(what.out, transposed_shape);
  args.nonfinite = static_cast<std::uint32_t*>(flag.data());
  quantize(ctx, args);

  const Codes untouched(values.size(), Guarded::kFill);
  CHECK(first_difference(out.values<std::uint8_t>(), what.row_major ? expected.codes : untouched) ==
        "");
  if (what.transposed) {
    CHECK(first_difference(transposed.values<std::uint8_t>(),
                           reference_transpose(expected.codes, rows, columns)) == "");
  }
  check_scale(scale.values<TensorScale>().front(), expected.scale);
  CHECK(flag.values<std::uint32_t>().front() == (expected.finite ? 0u : 1u));
  CHECK(out.intact());
  CHECK(scale.intact());
  CHECK(flag.intact());
  CHECK(transposed.intact());
}

constexpr DType kInputs[] = {DType::f32, DType::bf16, DType::f16};
constexpr DType kOutputs[] = {DType::e4m3, DType::e5m2};

}  // namespace

TEST_CASE("casts of every size and dtype equal the definition") {
  for (const Context& ctx : test_contexts()) {
    for (DType in : kInputs) {
      for (DType out : kOutputs) {
        for (std::int64_t n : {1, 2, 3, 7, 127, 128, 129, 1021, 16384, 70001}) {
          const auto count = static_cast<std::size_t>(n);
          check_cast(ctx, {in, out}, wide_values(count, 1, -20, 8), {n});
        }
        check_cast(ctx, {in, out}, {}, {0});
        check_cast(ctx, {in, out}, {}, {0, 7});
        check_cast(ctx, {in, out}, normal_values(105, 2), {3, 5, 7});
      }
    }
  }
}

TEST_CASE("casts with a transposed copy, padded with zeros") {
  const std::int64_t sizes[][2] = {{1, 1},   {1, 129}, {129, 1}, {15, 17},   {16, 16},
                                   {17, 15}, {31, 33}, {64, 32}, {127, 128}, {129, 131},
                                   {0, 5},   {5, 0},   {257, 67}};
  for (const Context& ctx : test_contexts()) {
    for (const auto& size : sizes) {
      const auto count = static_cast<std::size_t>(size[0] * size[1]);
      for (DType in : kInputs) {
        const std::vector<float> values = normal_values(count, 3);
        check_cast(ctx, {in, DType::e4m3, true, true}, values, {size[0], size[1]});
        check_cast(ctx, {in, DType::e5m2, false, true}, values, {size[0], size[1]});
      }
    }
  }
}

TEST_CASE("casts of zeros, extremes and tiny tensors") {
  const float most = std::numeric_limits<float>::max();
  const float least = std::numeric_limits<float>::denorm_min();
  const std::vector<std::vector<float>> lists = {
      std::vector<float>(300, 0.0f),
      {-0.0f, 0.0f, -0.0f},
      {least, -least, 0.0f},
      {3 * least, 2 * least, least},
      {1e-38f, -5e-39f, 1e-45f, 0.0f},
      {1.3166e-36f, 1.3e-36f, -1.6852e-34f},
      {most, -most, 1.0f, 0.0f, 1e30f},
      {448.0f, next_up(448.0f), 447.0f, 464.0f},
      {next_up(448.0f), 1.0f, 0.5f, -1.75f},
      {57344.0f, 61440.0f, -1e-3f},
      {1.0f, 17.0f, 19.0f, 21.0f, std::ldexp(3.0f, -10), std::ldexp(1.0f, -10)},
  };
  for (const Context& ctx : test_contexts()) {
    for (DType out : kOutputs) {
      for (const std::vector<float>& values : lists) {
        const auto n = static_cast<std::int64_t>(values.size());
        check_cast(ctx, {DType::f32, out}, values, {n});
        check_cast(ctx, {DType::f32, out, true, true}, values, {n, 1});
      }
    }
  }
}

TEST_CASE("a non-finite value keeps the scale, raises the flag and stays visible") {
  for (const Context& ctx : test_contexts()) {
    for (DType in : kInputs) {
      for (DType out : kOutputs) {
        for (float bad : {NAN, -NAN, INFINITY, -INFINITY}) {
          for (std::size_t position : {0u, 127u, 128u, 1000u}) {
            std::vector<float> values = normal_values(1001, 4);
            values[position] = bad;
            check_cast(ctx, {in, out}, values, {1001});
            check_cast(ctx, {in, out, true, true}, values, {77, 13});
          }
          std::vector<float> both = normal_values(500, 5);
          both[3] = INFINITY;
          both[400] = NAN;
          check_cast(ctx, {in, out}, both, {500});
        }
      }
    }
  }
}

TEST_CASE("a flag that stands is not taken down and none is needed") {
  for (const Context& ctx : test_contexts()) {
    const Buffer in = upload<float>(ctx, {1.0f, 2.0f});
    const Buffer flag = upload<std::uint32_t>(ctx, {1});
    const ScaledTensor out(ctx, DType::e4m3, {2});
    QuantizeArgs args{view_of(ctx, in, DType::f32, {2}), out.view(), {}, flag.as<std::uint32_t>()};
    quantize(ctx, args);
    CHECK(download_one<std::uint32_t>(ctx, flag.data()) == 1);
    args.nonfinite = nullptr;
    quantize(ctx, args);
    CHECK(download_one<TensorScale>(ctx, out.view().scale).amax == 2.0f);
  }
}

TEST_CASE("conversion between all dtypes") {
  for (const Context& ctx : test_contexts()) {
    for (DType from : {DType::f32, DType::bf16, DType::f16, DType::e4m3, DType::e5m2}) {
      for (DType to : {DType::f32, DType::bf16, DType::f16}) {
        for (int exponent : {0, -7, 3, -120}) {
          INFO(to_string(ctx.device())
               << ", " << name_of(from) << " -> " << name_of(to) << ", scale_inv 2^" << exponent);
          std::vector<float> values = wide_values(1021, 6, -18, 9);
          Buffer in;
          if (is_fp8(from)) {
            Codes codes;
            for (float& value : values) {
              codes.push_back(
                  static_cast<std::uint8_t>(table_of(from).encode(static_cast<double>(value))));
              value = static_cast<float>(table_of(from).decode(codes.back()));
            }
            in = upload(ctx, codes);
          } else {
            in = upload_as(ctx, from, values);
          }
          const TensorScale scale{std::ldexp(1.0f, exponent), std::ldexp(1.0f, -exponent), 0.0f};
          const Buffer scale_buffer = upload<TensorScale>(ctx, {scale});
          const Guarded out(ctx, values.size() * size_of(to));
          const TensorView out_view = out.view(to, {1021});
          convert(ctx,
                  {view_of(ctx, in, from, {1021}),
                   exponent == 0 ? nullptr : scale_buffer.as<TensorScale>()},
                  out_view);
          if (to == DType::f32) {
            std::vector<float> expected;
            for (float value : values) expected.push_back(value * scale.scale_inv);
            CHECK(first_difference(out.values<float>(), expected) == "");
          } else {
            std::vector<std::uint16_t> expected;
            for (float value : values) {
              expected.push_back(static_cast<std::uint16_t>(
                  table_of(to).encode(static_cast<double>(value * scale.scale_inv))));
            }
            CHECK(first_difference(out.values<std::uint16_t>(), expected) == "");
          }
          CHECK(out.intact());
        }
      }
    }
  }
}

TEST_CASE("conversion keeps NaN, infinity and zero's sign") {
  for (const Context& ctx : test_contexts()) {
    const Buffer in = upload<float>(ctx, {NAN, INFINITY, -INFINITY, -0.0f, 1e30f});
    const Guarded out(ctx, 10);
    convert(ctx, {view_of(ctx, in, DType::f32, {5}), nullptr}, out.view(DType::f16, {5}));
    const std::vector<std::uint16_t> expected = {0x7FFF, 0x7C00, 0xFC00, 0x8000, 0x7C00};
    CHECK(first_difference(out.values<std::uint16_t>(), expected) == "");
  }
}

TEST_CASE("transposes of FP8 matrices") {
  const std::int64_t sizes[][2] = {{1, 1},    {1, 70},   {70, 1},    {15, 16}, {16, 15},
                                   {17, 129}, {128, 64}, {127, 131}, {0, 3},   {3, 0}};
  for (const Context& ctx : test_contexts()) {
    for (const auto& size : sizes) {
      INFO(to_string(ctx.device()) << " " << size[0] << " x " << size[1]);
      Codes codes(static_cast<std::size_t>(size[0] * size[1]));
      for (std::size_t i = 0; i < codes.size(); ++i) {
        codes[i] = static_cast<std::uint8_t>(i * 131 + i / 251);
      }
      const Buffer in = upload(ctx, codes);
      const Shape out_shape = {size[1], padded_rows(size[0])};
      const Guarded out(ctx, static_cast<std::size_t>(out_shape.numel()));
      transpose(ctx, view_of(ctx, in, DType::e4m3, {size[0], size[1]}),
                out.view(DType::e4m3, out_shape));
      CHECK(first_difference(out.values<std::uint8_t>(),
                             reference_transpose(codes, size[0], size[1])) == "");
      CHECK(out.intact());
    }
  }
}

TEST_CASE("amax is measured without touching the scale") {
  for (const Context& ctx : test_contexts()) {
    for (DType dtype : kInputs) {
      for (std::size_t count :
           {std::size_t{0}, std::size_t{1}, std::size_t{129}, std::size_t{70001}}) {
        INFO(to_string(ctx.device()) << " " << name_of(dtype) << " " << count);
        std::vector<float> values = normal_values(count, 8);
        if (count > 1) values[count - 1] = -77.0f;
        const Buffer in = upload_as(ctx, dtype, values);
        float expected = 0.0f;
        for (float value : values) expected = std::max(expected, std::abs(value));
        const Guarded scale(ctx, sizeof(TensorScale));
        write_one(ctx, scale.data(), TensorScale{0.5f, 2.0f, 1e9f});
        measure_amax(ctx, view_of(ctx, in, dtype, {static_cast<std::int64_t>(count)}),
                     static_cast<TensorScale*>(scale.data()));
        check_scale(scale.values<TensorScale>().front(), {0.5f, 2.0f, expected});
        CHECK(scale.intact());
        if (count < 129) continue;
        for (float bad : {NAN, -INFINITY}) {
          values[77] = bad;
          if (std::isnan(bad)) values[78] = INFINITY;
          const Buffer poisoned = upload_as(ctx, dtype, values);
          measure_amax(ctx, view_of(ctx, poisoned, dtype, {static_cast<std::int64_t>(count)}),
                       static_cast<TensorScale*>(scale.data()));
          check_scale(scale.values<TensorScale>().front(), {0.5f, 2.0f, std::abs(bad)});
          values[78] = 0.0f;
        }
      }
    }
  }
}

TEST_CASE("what does not fit is refused by name before anything changes") {
  for (const Context& ctx : test_contexts()) {
    const Buffer in = upload(ctx, std::vector<float>(12, 1.0f));
    const ScaledTensor out(ctx, DType::e4m3, {3, 4});
    const Tensor transposed(ctx, DType::e4m3, {4, 16});
    const QuantizeArgs good{view_of(ctx, in, DType::f32, {3, 4}), out.view(), transposed.view(),
                            nullptr};
    const auto error_with = [&](auto change) {
      QuantizeArgs args = good;
      change(args);
      return error_of([&] { quantize(ctx, args); });
    };
    CHECK(missing(error_with([](QuantizeArgs& a) { a.in.dtype = DType::e4m3; }), {"e4m3"}) == "");
    CHECK(missing(error_with([](QuantizeArgs& a) { a.out.data.dtype = DType::f16; }), {"f16"}) ==
          "");
    CHECK(missing(error_with([](QuantizeArgs& a) {
                    a.out.data.shape = {4, 3};
                  }),
                  {"[3, 4]", "[4, 3]"}) == "");
    CHECK(missing(error_with([](QuantizeArgs& a) { a.out.scale = nullptr; }), {"scale"}) == "");
    CHECK(missing(error_with([](QuantizeArgs& a) {
                    a.transposed.shape = {4, 3};
                  }),
                  {"[4, 3]", "[4, 16]"}) == "");
    CHECK(missing(error_with([](QuantizeArgs& a) { a.transposed.dtype = DType::e5m2; }),
                  {"e5m2"}) == "");
    CHECK(missing(error_with([](QuantizeArgs& a) {
                    a.in.shape = {12};
                    a.out.data.shape = {12};
                  }),
                  {"[12]"}) == "");
    CHECK(missing(error_with([](QuantizeArgs& a) {
                    a.in.device = {DeviceType::cuda, 7};
                  }),
                  {"cuda:7"}) == "");
    CHECK(error_with([](QuantizeArgs& a) { a.in.data = nullptr; }) != "no error");
    const auto scale = download_one<TensorScale>(ctx, out.view().scale);
    CHECK(scale.amax == 0.0f);
    CHECK(error_with([](QuantizeArgs&) {}) == "no error");
  }
}

TEST_CASE("conversions and transposes that do not fit are refused by name") {
  for (const Context& ctx : test_contexts()) {
    const Tensor wide(ctx, DType::f32, {3, 4});
    const Tensor other(ctx, DType::f32, {4, 3});
    const Tensor narrow(ctx, DType::e4m3, {3, 4});
    const Tensor turned(ctx, DType::e4m3, {4, 16});
    const Tensor turned_other(ctx, DType::e5m2, {4, 16});
    CHECK(missing(error_of([&] {
                    convert(ctx, {wide, nullptr}, other);
                  }),
                  {"[3, 4]", "[4, 3]"}) == "");
    CHECK(missing(error_of([&] { convert(ctx, {wide, nullptr}, narrow); }), {"e4m3"}) == "");
    CHECK(missing(error_of([&] { transpose(ctx, wide, turned); }), {"f32"}) == "");
    CHECK(missing(error_of([&] { transpose(ctx, narrow, narrow); }), {"[4, 16]", "[3, 4]"}) == "");
    CHECK(error_of([&] { transpose(ctx, narrow, turned_other); }) != "no error");
    CHECK(error_of([&] { transpose(ctx, narrow, turned); }) == "no error");
    const Buffer scale(ctx, sizeof(TensorScale));
    CHECK(missing(error_of([&] { measure_amax(ctx, narrow, scale.as<TensorScale>()); }),
                  {"e4m3"}) == "");
    CHECK(missing(error_of([&] { measure_amax(ctx, wide, nullptr); }), {"scale"}) == "");
  }
}

}  // namespace octet::test
