// SPDX-License-Identifier: Apache-2.0
// Casts of a matrix of more than 2^31 elements: every index must have 64 bits. Its last rows, cast
// on the CPU as a matrix of their own, must have the bits that the whole has there.
#include "support/block_cast_run.hpp"
#include "support/errors.hpp"

namespace octet::test {
namespace {

/// A matrix of `first` rows, where blocks of 128 end, and `last` rows that are looked at.
struct Large {
  std::int64_t first, last, columns;
  Shape whole() const { return {first + last, columns}; }
  Shape tail() const { return {last, columns}; }
  /// Of transposed copies.
  std::int64_t pitch() const { return padded_rows(first + last); }
};

/// The matrix repeats these: a prime number, so that a step of 2^k elements, as a lost bit of an
/// index makes it, shows other values.
constexpr std::size_t kPeriod = 1048573;

/// Device memory for a matrix, its copies and what they decode to.
struct Memory {
  Tensor in, out, transposed, sums, wide;
  Memory(const Context& ctx, const Large& m)
      : in(ctx, DType::bf16, m.whole()),
        out(ctx, DType::e4m3, m.whole()),
        transposed(ctx, DType::e4m3, {m.columns, m.pitch()}),
        sums(ctx, DType::f32, {column_sum_rows(m.whole()[0]), m.columns}),
        wide(ctx, DType::bf16, m.whole()) {}
};

/// Fills the matrix; returns the values of its last rows.
std::vector<float> fill(const Context& ctx, const Large& m, const Tensor& in) {
  const std::vector<float> values = wide_values(kPeriod, 31, -14, 12);
  const Buffer block = upload(ctx, encode_values(DType::bf16, values).bytes);
  for (std::size_t begin = 0; begin < in.bytes(); begin += block.bytes()) {
    copy_bytes(ctx, in.as<char>() + begin, block.data(),
               std::min(block.bytes(), in.bytes() - begin));
  }
  ctx.synchronize();  // before the block goes
  std::vector<float> tail;
  for (std::int64_t i = 0; i < m.tail().numel(); ++i) {
    tail.push_back(values[static_cast<std::size_t>(m.first * m.columns + i) % kPeriod]);
  }
  return tail;
}

/// The bytes of the last rows of a matrix of `shape`, from row `first` on.
Codes rows_from(const Context& ctx, const TensorView& view, std::int64_t first) {
  const std::size_t row = view.bytes() / static_cast<std::size_t>(view.shape[0]);
  return download<std::uint8_t>(ctx, view.as<char>() + row * static_cast<std::size_t>(first),
                                row * static_cast<std::size_t>(view.shape[0] - first));
}

/// The same of the columns of a transposed copy.
Codes columns_from(const Context& ctx, const TensorView& view, std::int64_t first) {
  Codes all;
  for (std::int64_t row = 0; row < view.shape[0]; ++row) {
    const Codes part = download<std::uint8_t>(ctx, view.as<char>() + row * view.shape[1] + first,
                                              static_cast<std::size_t>(view.shape[1] - first));
    all.insert(all.end(), part.begin(), part.end());
  }
  return all;
}

/// The scales of the elements from (row, column) on, one after the other.
Codes scales_from(const Codes& scales, const ScalePlaces& places, std::int64_t row,
                  std::int64_t column) {
  Codes list;
  for (std::int64_t r = row; r < places.rows; ++r) {
    for (std::int64_t c = column; c < places.columns; c += 32) {
      const auto at = scales.begin() + static_cast<std::ptrdiff_t>(places.of(r, c));
      list.insert(list.end(), at, at + places.width());
    }
  }
  return list;
}

void check_block_casts(const Context& ctx, const Large& m, const Memory& memory) {
  const std::vector<float> values = fill(ctx, m, memory.in);
  for (const BlockKind& kind : kKinds) {
    const BlockCase tail{.in = DType::bf16, .shape = m.tail(), .kind = kind, .sums = true};
    INFO(to_string(kind) << " on " << octet::to_string(ctx.device()));
    const BlockResult expected = run_blocks(Context::cpu(), tail, values);
    const ScalePlaces places{kind, m.whole()[0], m.columns}, across{kind, m.columns, m.pitch()};
    const Buffer scales(ctx, places.bytes()), turned_scales(ctx, across.bytes());
    const BlockScaledView out{memory.out, kind.granularity, kind.layout, scales.data()};
    block_quantize(ctx, {.in = memory.in,
                         .out = out,
                         .transposed = {memory.transposed, kind.granularity, kind.layout,
                                        turned_scales.data()},
                         .column_sums = memory.sums});
    CHECK(first_difference(rows_from(ctx, memory.out, m.first), expected.out.codes) == "");
    CHECK(first_difference(columns_from(ctx, memory.transposed, m.first),
                           expected.transposed.codes) == "");
    CHECK(first_difference(rows_from(ctx, memory.sums, m.first / 128),
                           bytes_of_floats(expected.sums)) == "");
    const ScalePlaces places_of_tail{kind, m.last, m.columns},
        across_tail{kind, m.columns, padded_rows(m.last)};
    CHECK(first_difference(scales_from(download<std::uint8_t>(ctx, scales.data(), scales.bytes()),
                                       places, m.first, 0),
                           scales_from(expected.out.scales, places_of_tail, 0, 0)) == "");
    CHECK(first_difference(
              scales_from(download<std::uint8_t>(ctx, turned_scales.data(), turned_scales.bytes()),
                          across, 0, m.first),
              scales_from(expected.transposed.scales, across_tail, 0, 0)) == "");

    block_dequantize(ctx, out, memory.wide);
    const Context cpu = Context::cpu();
    const Buffer codes = upload(cpu, expected.out.codes),
                 decodes = upload(cpu, expected.out.scales);
    const Tensor wide(cpu, DType::bf16, m.tail());
    block_dequantize(
        cpu,
        {view_of(cpu, codes, DType::e4m3, m.tail()), kind.granularity, kind.layout, decodes.data()},
        wide);
    CHECK(first_difference(rows_from(ctx, memory.wide, m.first), rows_from(cpu, wide, 0)) == "");
  }
}

void check_tensor_casts(const Context& ctx, const Large& m, const Memory& memory) {
  const std::vector<float> values = fill(ctx, m, memory.in);
  const ScaledTensor scaled(ctx, DType::e4m3, {1});
  TensorScale* const scale = scaled.view().scale;
  for (Scaling scaling : {Scaling::current, Scaling::given}) {
    INFO("given " << (scaling == Scaling::given) << " on " << octet::to_string(ctx.device()));
    quantize(ctx, {.in = memory.in,
                   .out = {memory.out, scale},
                   .transposed = memory.transposed,
                   .scaling = scaling,
                   .column_sums = memory.sums});
    CastCase tail{.in = DType::bf16,
                  .shape = m.tail(),
                  .transposed = true,
                  .sums = true,
                  .scaling = Scaling::given};
    tail.scale = download_one<TensorScale>(ctx, scale);
    const CastResult expected = run_cast(Context::cpu(), tail, values);
    CHECK(first_difference(rows_from(ctx, memory.out, m.first), expected.codes) == "");
    CHECK(first_difference(columns_from(ctx, memory.transposed, m.first), expected.transposed) ==
          "");
    CHECK(first_difference(rows_from(ctx, memory.sums, m.first / 128),
                           bytes_of_floats(expected.sums)) == "");
    zero_bytes(ctx, memory.transposed.view().data, memory.transposed.bytes());
    transpose(ctx, memory.out, memory.transposed);
    CHECK(first_difference(columns_from(ctx, memory.transposed, m.first), expected.transposed) ==
          "");

    convert(ctx, {memory.out, scale}, memory.wide);
    const Context cpu = Context::cpu();
    const Buffer codes = upload(cpu, expected.codes),
                 decodes = upload<TensorScale>(cpu, {tail.scale});
    const Tensor wide(cpu, DType::bf16, m.tail());
    convert(cpu, {view_of(cpu, codes, DType::e4m3, m.tail()), decodes.as<TensorScale>()}, wide);
    CHECK(first_difference(rows_from(ctx, memory.wide, m.first), rows_from(cpu, wide, 0)) == "");
  }
}

}  // namespace

TEST_CASE("the last rows of a matrix have the bits of the whole") {
  for (const Context& ctx : test_contexts()) {
    for (const Large& m : {Large{2816, 37, 392}, Large{2944, 144, 384}}) {
      const Memory memory(ctx, m);
      check_block_casts(ctx, m, memory);
      check_tensor_casts(ctx, m, memory);
    }
  }
}

TEST_CASE("the last rows of a matrix of more than 2^31 elements have the bits of the whole") {
  if (cuda_device_count() == 0) {
    WARN("skipped: no CUDA device");
    return;
  }
  const Context ctx = Context::cuda(0, nullptr);
  constexpr std::int64_t kColumns = 8192;
  const Large m{(std::int64_t{1} << 31) / kColumns, 144, kColumns};
  std::unique_ptr<Memory> memory;
  const std::string error = error_of([&] { memory = std::make_unique<Memory>(ctx, m); });
  if (memory == nullptr) {
    WARN("skipped: " << error);
    return;
  }
  check_block_casts(ctx, m, *memory);
  check_tensor_casts(ctx, m, *memory);
}

}  // namespace octet::test
