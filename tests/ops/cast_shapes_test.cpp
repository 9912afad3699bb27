// SPDX-License-Identifier: Apache-2.0
// Sums of columns, and the shapes and addresses at which devices change from wide accesses to
// narrow ones.
#include "octet/ops/quantize.hpp"
#include "support/cast_run.hpp"

namespace octet::test {

TEST_CASE("sums of columns are those of the definition, and sum_columns adds them up") {
  const Shape shapes[] = {{1, 1},     {128, 128}, {129, 8},   {127, 130}, {300, 17},
                          {1000, 64}, {16, 1},    {385, 257}, {0, 7}};
  for (const Context& ctx : test_contexts()) {
    for (DType in : kInputs) {
      for (const Shape& shape : shapes) {
        CastCase c{.in = in, .shape = shape, .sums = true};
        INFO(describe(ctx, c));
        const std::vector<float> values =
            normal_values(static_cast<std::size_t>(shape.numel()), 4, 1.0f);
        const Doubles stored = encode_values(in, values).decoded;
        const CastResult r = run_cast(ctx, c, values);
        const auto rows = static_cast<std::size_t>(shape[0]);
        const auto columns = static_cast<std::size_t>(shape[1]);
        int wrong = 0;
        std::vector<double> totals(columns);
        for (std::size_t p = 0; p * 128 < rows; ++p) {
          for (std::size_t column = 0; column < columns; ++column) {
            const float expected =
                lane_sum(stored, columns, 128 * p, std::min(rows, 128 * p + 128), column);
            const float sum = r.sums[p * columns + column];
            wrong += bits_of(sum) != bits_of(expected);
            totals[column] += static_cast<double>(sum);
          }
        }
        CHECK(wrong == 0);
        const Buffer sums = upload(ctx, r.sums);
        const Shape summed{column_sum_rows(shape[0]), shape[1]};
        for (DType dtype : {DType::bf16, DType::f16}) {
          const Guarded narrow(ctx, columns * 2);
          sum_columns(ctx, view_of(ctx, sums, DType::f32, summed), narrow.view(dtype, {shape[1]}));
          std::vector<std::uint16_t> codes;
          for (double total : totals) {
            const auto once = static_cast<double>(static_cast<float>(total));
            codes.push_back(static_cast<std::uint16_t>(table_of(dtype).encode(once)));
          }
          CHECK(first_difference(narrow.values<std::uint16_t>(), codes) == "");
        }
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
    const CastResult r = run_cast(ctx, {.shape = {200, 9}, .sums = true}, values);
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
    const bool is_cpu = ctx.device().type == DeviceType::cpu;
    for (DType in : kInputs) {
      for (DType out : kOutputs) {
        for (const Shape& shape : shapes) {
          const std::vector<float> values = values_for(shape, 5);
          for (Scaling scaling : {Scaling::current, Scaling::given}) {
            for (int what = 0; what < 4; ++what) {
              // The CPU has one kind of access: there only an odd address can make a difference.
              if (is_cpu && (what == 3 || shape.numel() > 50000)) continue;
              CastCase c{.in = in,
                         .out = out,
                         .shape = shape,
                         .row_major = what != 1,
                         .transposed = what == 1 || what == 2,
                         .sums = what >= 2,
                         .counts = what == 2,
                         .scaling = scaling,
                         .scale = {0.25f, 4.0f, 0.0f}};
              const CastResult expected = run_cast(Context::cpu(), c, values);
              for (std::int64_t offset : {0, 1, 4, 8}) {
                if (is_cpu ? offset != 1 : what == 3 && offset != 0) continue;
                c.offset = offset;
                INFO(describe(ctx, c));
                check_equal(run_cast(ctx, c, values), expected);
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
      CastCase c{.in = DType::bf16, .shape = shape, .transposed = true};
      const CastResult r = run_cast(ctx, c, values_for(shape, 6));
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

/// On an H100: into registers, into shared memory too, partly read twice, in two passes (f32).
TEST_CASE("tensors beyond what a device keeps on the chip have the CPU's bits") {
  if (cuda_device_count() == 0) {
    WARN("skipped: no CUDA device");
    return;
  }
  const Context ctx = Context::cuda(0, nullptr);
  for (DType in : {DType::f32, DType::bf16}) {
    for (const Shape& shape :
         {Shape{2048, 2048}, Shape{4000, 2056}, Shape{3001, 4104}, Shape{4400, 4099}}) {
      const std::vector<float> values = values_for(shape, 7);
      for (bool transposed : {false, true}) {
        const CastCase c{.in = in, .shape = shape, .transposed = transposed, .counts = true};
        INFO(describe(ctx, c));
        check_equal(run_cast(ctx, c, values), run_cast(Context::cpu(), c, values));
      }
    }
  }
}

}  // namespace octet::test
