// SPDX-License-Identifier: Apache-2.0
// Casts with a scale that is given, what they find out by the way (amax, counters, sums of
// columns), and the shapes and addresses at which devices change from wide accesses to narrow ones.
#include <cstring>
#include <sstream>

#include "octet/ops/quantize.hpp"
#include "support/adamw_stored.hpp"
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

constexpr DType kInputs[] = {DType::f32, DType::bf16, DType::f16};
constexpr DType kOutputs[] = {DType::e4m3, DType::e5m2};

struct Case {
  DType in = DType::f32, out = DType::e4m3;
  Shape shape = {};
  bool row_major = true, transposed = false, sums = false, counts = false;
  Scaling scaling = Scaling::current;
  TensorScale scale = {};
  std::int64_t offset = 0;  ///< elements before the first in every buffer
};

struct Result {
  Codes codes, transposed;
  std::vector<float> sums;
  TensorScale scale;
  CastCounters counters;
  std::uint32_t flag = 0;
};

/// What a cast leaves. Checks that it wrote nothing else.
Result run(const Context& ctx, const Case& c, const std::vector<float>& values) {
  const auto offset = static_cast<std::size_t>(c.offset);
  std::vector<float> moved(offset, 0.0f);
  moved.insert(moved.end(), values.begin(), values.end());
  const Buffer in = upload(ctx, encode_values(c.in, moved).bytes);
  const std::int64_t rows = c.shape[0], columns = c.shape.rank() == 2 ? c.shape[1] : 0;
  const Shape turned{columns, padded_rows(rows)}, summed{column_sum_rows(rows), columns};
  const Guarded out(ctx, offset + values.size());
  const Guarded transposed(ctx, offset + static_cast<std::size_t>(turned.numel()));
  const Guarded sums(ctx, static_cast<std::size_t>(summed.numel()) * sizeof(float));
  const Buffer scale = upload<TensorScale>(ctx, {c.scale});
  const Buffer counters = upload<CastCounters>(ctx, {{1000, 2000}});
  const Buffer flag = upload<std::uint32_t>(ctx, {0});
  const auto shifted = [&](TensorView view) {
    view.data =
        static_cast<char*>(view.data) + c.offset * static_cast<std::int64_t>(size_of(view.dtype));
    return view;
  };
  QuantizeArgs args;
  args.in = shifted(view_of(ctx, in, c.in, c.shape));
  args.out = {shifted(out.view(c.out, c.shape)), scale.as<TensorScale>()};
  if (!c.row_major) args.out.data.data = nullptr;
  if (c.transposed) args.transposed = shifted(transposed.view(c.out, turned));
  if (c.sums) args.column_sums = sums.view(DType::f32, summed);
  if (c.counts) args.counters = counters.as<CastCounters>();
  args.nonfinite = flag.as<std::uint32_t>();
  args.scaling = c.scaling;
  quantize(ctx, args);
  Result result;
  const auto written = [offset](const Guarded& guarded) {
    CHECK(guarded.intact());
    const Codes all = guarded.values<std::uint8_t>();
    CHECK(Codes(all.begin(), all.begin() + static_cast<std::ptrdiff_t>(offset)) ==
          Codes(offset, Guarded::kFill));
    return Codes(all.begin() + static_cast<std::ptrdiff_t>(offset), all.end());
  };
  result.codes = written(out);
  result.transposed = written(transposed);
  result.sums = sums.values<float>();
  CHECK(sums.intact());
  result.scale = download_one<TensorScale>(ctx, scale.data());
  result.counters = download_one<CastCounters>(ctx, counters.data());
  result.flag = download_one<std::uint32_t>(ctx, flag.data());
  return result;
}

/// Codes of decoded values times a scale, from the table of the format.
Codes expected_codes(const Doubles& values, DType dtype, float scale) {
  Codes codes;
  for (double value : values) {
    const float scaled = static_cast<float>(value) * scale;
    codes.push_back(static_cast<std::uint8_t>(table_of(dtype).encode(static_cast<double>(scaled))));
  }
  return codes;
}

std::string describe(const Context& ctx, const Case& c) {
  std::ostringstream text;
  text << to_string(ctx.device()) << ", " << name_of(c.in) << " -> " << name_of(c.out) << " "
       << to_string(c.shape) << ", row-major " << c.row_major << ", transposed " << c.transposed
       << ", sums " << c.sums << ", given " << (c.scaling == Scaling::given) << ", offset "
       << c.offset;
  return text.str();
}

Codes bytes_of_floats(const std::vector<float>& values) {
  Codes bytes(values.size() * sizeof(float));
  if (!values.empty()) std::memcpy(bytes.data(), values.data(), bytes.size());
  return bytes;
}

/// All of a result, NaN amax and sums by their bits.
void check_equal(const Result& a, const Result& b) {
  CHECK(first_difference(a.codes, b.codes) == "");
  CHECK(first_difference(a.transposed, b.transposed) == "");
  CHECK(first_difference(bytes_of_floats(a.sums), bytes_of_floats(b.sums)) == "");
  CHECK(first_difference(bytes_of({a.scale}), bytes_of({b.scale})) == "");
  CHECK(a.counters.saturated == b.counters.saturated);
  CHECK(a.counters.flushed == b.counters.flushed);
  CHECK(a.flag == b.flag);
}

std::vector<float> values_for(const Shape& shape, std::uint32_t seed) {
  return wide_values(static_cast<std::size_t>(shape.numel()), seed, -14, 6);
}

}  // namespace

TEST_CASE("a given scale is used as it is and its amax only rises") {
  for (const Context& ctx : test_contexts()) {
    for (DType in : kInputs) {
      for (DType out : kOutputs) {
        for (float known : {0.0f, 1e9f}) {
          Case c{.in = in, .out = out, .shape = {77, 40}, .scaling = Scaling::given};
          c.scale = {0.125f, 8.0f, known};
          const std::vector<float> values = values_for(c.shape, 1);
          const Encoded stored = encode_values(in, values);
          double amax = 0;
          for (double value : stored.decoded) amax = std::max(amax, std::abs(value));
          for (bool transposed : {false, true}) {
            c.transposed = transposed;
            INFO(describe(ctx, c));
            const Result r = run(ctx, c, values);
            CHECK(first_difference(r.codes, expected_codes(stored.decoded, out, 8.0f)) == "");
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
        const Result r = run(ctx, {.shape = {3001}, .scaling = Scaling::given}, values);
        INFO(bad << " at " << at << " on " << to_string(ctx.device()));
        CHECK(r.flag == 1);
        CHECK((std::isnan(bad) ? std::isnan(r.scale.amax) : std::isinf(r.scale.amax)));
        CHECK(r.codes[at] == (std::isnan(bad) ? 0x7F : 0xFE));
        CHECK(r.scale.scale == 1.0f);
      }
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
          Case c{.out = out, .shape = {n}, .counts = true, .scaling = Scaling::given};
          if (transposed) c.shape = {n / 3, 3};
          c.transposed = transposed;
          INFO(describe(ctx, c));
          const Result r = run(ctx, c, many);
          CHECK(r.counters.saturated == 1000 + 3 * copies);
          CHECK(r.counters.flushed == 2000 + 3 * copies);
        }
      }
      // Current scaling saturates nothing that is finite.
      const Result r =
          run(ctx, {.out = out, .shape = {1000}, .counts = true}, wide_values(1000, 3, -40, 20));
      CHECK(r.counters.saturated == 1000);
      CHECK(r.counters.flushed > 2000);
    }
  }
}

TEST_CASE("sums of columns are those of the definition, and sum_columns adds them up") {
  const Shape shapes[] = {{1, 1},     {128, 128}, {129, 8},   {127, 130}, {300, 17},
                          {1000, 64}, {16, 1},    {385, 257}, {0, 7}};
  for (const Context& ctx : test_contexts()) {
    for (DType in : kInputs) {
      for (const Shape& shape : shapes) {
        Case c{.in = in, .shape = shape, .sums = true};
        INFO(describe(ctx, c));
        const std::vector<float> values =
            normal_values(static_cast<std::size_t>(shape.numel()), 4, 1.0f);
        const Doubles stored = encode_values(in, values).decoded;
        const Result r = run(ctx, c, values);
        const auto rows = static_cast<std::size_t>(shape[0]);
        const auto columns = static_cast<std::size_t>(shape[1]);
        int wrong = 0;
        std::vector<double> totals(columns), sizes(columns);
        for (std::size_t p = 0; p * 128 < rows; ++p) {
          for (std::size_t column = 0; column < columns; ++column) {
            double exact = 0, size = 0;
            for (std::size_t row = 128 * p; row < std::min(rows, 128 * p + 128); ++row) {
              exact += stored[row * columns + column];
              size += std::abs(stored[row * columns + column]);
            }
            const auto sum = static_cast<double>(r.sums[p * columns + column]);
            wrong += std::abs(sum - exact) > 12 * 6e-8 * size;  // 7 + 4 additions
            totals[column] += sum;
          }
        }
        CHECK(wrong == 0);
        const Buffer sums = upload(ctx, r.sums);
        const Shape summed{column_sum_rows(shape[0]), shape[1]};
        const Guarded out(ctx, columns * sizeof(float));
        sum_columns(ctx, view_of(ctx, sums, DType::f32, summed), out.view(DType::f32, {shape[1]}));
        const std::vector<float> total = out.values<float>();
        for (std::size_t i = 0; i < columns; ++i) CHECK(total[i] == static_cast<float>(totals[i]));
        CHECK(out.intact());
      }
    }
  }
}

TEST_CASE("a NaN in a column is in its sum alone") {
  for (const Context& ctx : test_contexts()) {
    std::vector<float> values(std::size_t{200} * 9, 1.0f);
    values[150 * 9 + 4] = NAN;
    const Result r = run(ctx, {.shape = {200, 9}, .sums = true}, values);
    for (std::size_t i = 0; i < 18; ++i) {
      INFO(i << " on " << to_string(ctx.device()));
      CHECK(std::isnan(r.sums[i]) == (i == 13));
      if (i != 13) CHECK(r.sums[i] == (i < 9 ? 128.0f : 72.0f));
    }
  }
}

TEST_CASE("every shape and address gives the CPU's bits") {
  const Shape shapes[] = {{128, 128}, {128, 136}, {136, 128}, {127, 8},   {129, 264},
                          {15, 16},   {16, 15},   {257, 129}, {1, 20000}, {20000, 1},
                          {384, 72},  {3, 5},     {1000, 24}, {640, 1000}};
  for (const Context& ctx : test_contexts()) {
    for (DType in : kInputs) {
      for (DType out : kOutputs) {
        for (const Shape& shape : shapes) {
          const std::vector<float> values = values_for(shape, 5);
          for (Scaling scaling : {Scaling::current, Scaling::given}) {
            for (std::int64_t offset : {0, 1, 4, 8}) {
              if (ctx.device().type == DeviceType::cpu && offset > 1)
                continue;  // one kind of access
              for (int what = 0; what < 4; ++what) {
                Case c{.in = in,
                       .out = out,
                       .shape = shape,
                       .row_major = what != 1,
                       .transposed = what == 1 || what == 2,
                       .sums = what >= 2,
                       .counts = what == 2,
                       .scaling = scaling,
                       .scale = {0.25f, 4.0f, 0.0f},
                       .offset = offset};
                if (what == 3 && offset != 0) continue;
                INFO(describe(ctx, c));
                check_equal(run(ctx, c, values), run(Context::cpu(), c, values));
              }
            }
          }
        }
      }
    }
  }
}

TEST_CASE("the transposed copy holds the codes of the row-major one and zeros") {
  for (const Context& ctx : test_contexts()) {
    for (const Shape& shape : {Shape{130, 264}, Shape{257, 40}, Shape{1, 300}}) {
      Case c{.in = DType::bf16, .shape = shape, .transposed = true};
      const Result r = run(ctx, c, values_for(shape, 6));
      int wrong = 0;
      const std::int64_t pitch = padded_rows(shape[0]);
      for (std::int64_t column = 0; column < shape[1]; ++column) {
        for (std::int64_t row = 0; row < pitch; ++row) {
          const auto code = r.transposed[static_cast<std::size_t>(column * pitch + row)];
          wrong +=
              code !=
              (row < shape[0] ? r.codes[static_cast<std::size_t>(row * shape[1] + column)] : 0);
        }
      }
      CHECK(wrong == 0);
    }
  }
}

TEST_CASE("tensors beyond what a device keeps in registers have the CPU's bits") {
  if (cuda_device_count() == 0) {
    WARN("skipped: no CUDA device");
    return;
  }
  const Context ctx = Context::cuda(0, nullptr);
  for (DType in : {DType::f32, DType::bf16}) {
    for (const Shape& shape : {Shape{2048, 2048}, Shape{4000, 2056}}) {
      const std::vector<float> values = values_for(shape, 7);
      for (bool transposed : {false, true}) {
        const Case c{.in = in, .shape = shape, .transposed = transposed, .counts = true};
        INFO(describe(ctx, c));
        check_equal(run(ctx, c, values), run(Context::cpu(), c, values));
      }
    }
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
