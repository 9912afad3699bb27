// SPDX-License-Identifier: Apache-2.0
// Scales of blocks: the rule of E8M0, layouts, decoding, and what is refused.
#include "octet/core/detail/block_scaling.hpp"

#include <limits>

#include "octet/ops/block_quantize.hpp"
#include "support/block_cast_run.hpp"
#include "support/errors.hpp"

namespace octet::test {
namespace {

constexpr BlockKind kCompact{Granularity::mx, MxLayout::compact};

/// E8M0 bytes of many amaxes, one block for each, from a device.
Codes bytes_of_amaxes(const Context& ctx, DType out, const std::vector<float>& amaxes) {
  std::vector<float> values(amaxes.size() * 32, 0.0f);
  for (std::size_t i = 0; i < amaxes.size(); ++i) values[32 * i + i % 32] = amaxes[i];
  const BlockCase c{.out = out,
                    .shape = {static_cast<std::int64_t>(amaxes.size()), 32},
                    .kind = kCompact,
                    .transposed = false};
  return run_blocks(ctx, c, values).out.scales;
}

Blocks cast_of(const Context& ctx, const BlockCase& c, std::uint32_t seed) {
  return run_blocks(ctx, c, wide_values(static_cast<std::size_t>(c.shape.numel()), seed, -20, 20))
      .out;
}

BlockScaledView view_of_blocks(const Context& ctx, const Buffer& codes, const Buffer& scales,
                               DType dtype, const Shape& shape, const BlockKind& kind) {
  return {.data = view_of(ctx, codes, dtype, shape),
          .granularity = kind.granularity,
          .mx_layout = kind.layout,
          .scales = scales.data()};
}

}  // namespace

TEST_CASE("E8M0 bytes are the smallest power of two that is enough, for every exponent") {
  std::vector<float> amaxes;
  Draws draws(21);
  for (std::uint32_t exponent = 0; exponent < 255; ++exponent) {
    std::vector<std::uint32_t> mantissas = {0,         1,         2,         0x3FFFFFu,
                                            0x400000u, 0x400001u, 0x5FFFFFu, 0x600000u,
                                            0x600001u, 0x7FFFFEu, 0x7FFFFFu};
    for (int i = 0; i < 40; ++i) mantissas.push_back(draws() & 0x7FFFFFu);
    for (std::uint32_t mantissa : mantissas) {
      amaxes.push_back(float_from_bits(exponent << 23 | mantissa));
    }
  }
  for (const Context& ctx : test_contexts()) {
    for (DType out : kOutputs) {
      Codes expected;
      for (float amax : amaxes) expected.push_back(reference_e8m0(amax, out));
      INFO(to_string(ctx.device()) << " " << name_of(out));
      CHECK(first_difference(bytes_of_amaxes(ctx, out, amaxes), expected) == "");
    }
  }
}

TEST_CASE("E8M0 bytes at known amaxes") {
  const float inf = std::numeric_limits<float>::infinity();
  for (const Context& ctx : test_contexts()) {
    for (DType out : kOutputs) {
      const auto top = static_cast<float>(table_of(out).max());
      const int largest = out == DType::e4m3 ? 119 : 112;  // of k with top * 2^k finite
      std::vector<float> amaxes;
      Codes expected;
      for (int k = -127; k <= largest; ++k) {
        amaxes.push_back(std::ldexp(top, k));
        expected.push_back(static_cast<std::uint8_t>(k + 127));
        amaxes.push_back(std::ldexp(top * 1.01f, k));
        expected.push_back(static_cast<std::uint8_t>(k + 128));
      }
      for (float zero : {0.0f, -0.0f, 1e-45f, std::ldexp(top, -128)}) {
        amaxes.push_back(zero);
        expected.push_back(0);
      }
      for (float nan : {NAN, -NAN}) {
        amaxes.push_back(nan);
        expected.push_back(255);
      }
      for (float infinity : {inf, -inf}) {
        amaxes.push_back(infinity);
        expected.push_back(254);
      }
      CHECK(first_difference(bytes_of_amaxes(ctx, out, amaxes), expected) == "");
    }
  }
}

TEST_CASE("mx saturates nothing finite, but for one ulp beside the smallest scale") {
  for (const Context& ctx : test_contexts()) {
    for (DType out : kOutputs) {
      const auto top = static_cast<float>(table_of(out).max());
      BlockCase c{.out = out, .shape = {1, 2}, .kind = kCompact, .transposed = false};
      c.counts = true;
      for (int k = -127; k <= 111; ++k) {
        const BlockResult r = run_blocks(ctx, c, {next_up(std::ldexp(top, k)), 0.0f});
        INFO(describe(ctx, c) << ", k " << k);
        // The product with 1/448 is a subnormal there, and its last place is coarser than an ulp.
        const bool keeps = k == -127;
        CHECK(r.out.scales[0] == (keeps ? 0 : k + 128));
        CHECK(r.counters.saturated == (keeps ? 1001 : 1000));
        const std::uint32_t largest = table_of(out).max_code();
        CHECK(r.out.codes[0] == (keeps ? largest : table_of(out).encode(table_of(out).max() / 2)));
      }
    }
  }
}

TEST_CASE("E8M0 decodes to powers of two, byte 0 to a subnormal, byte 255 to NaN") {
  for (int byte = 0; byte < 255; ++byte) {
    const auto code = static_cast<std::uint8_t>(byte);
    CHECK(static_cast<double>(detail::decode_e8m0(code)) == std::ldexp(1.0, byte - 127));
    CHECK(static_cast<double>(detail::inverse_e8m0(code)) == std::ldexp(1.0, 127 - byte));
    CHECK(detail::encode_e8m0(detail::decode_e8m0(code)) == code);
  }
  CHECK(bits_of(detail::decode_e8m0(0)) == 0x00400000u);
  CHECK(std::isnan(detail::decode_e8m0(255)));
  CHECK(std::isnan(detail::inverse_e8m0(255)));
}

TEST_CASE("gemm_ready scales lie by the formula, with zeros in between") {
  for (const Shape& shape :
       {Shape{1, 1}, Shape{33, 40}, Shape{128, 128}, Shape{129, 260}, Shape{300, 97}}) {
    for (const Context& ctx : test_contexts()) {
      BlockCase c{.shape = shape, .kind = kCompact, .transposed = false};
      const Codes compact = cast_of(ctx, c, 22).scales;
      c.kind.layout = MxLayout::gemm_ready;
      const std::int64_t across = (shape[1] + 31) / 32, tiles = (shape[1] + 127) / 128;
      Codes expected(static_cast<std::size_t>((shape[0] + 127) / 128 * tiles * 512), 0);
      for (std::int64_t r = 0; r < shape[0]; ++r) {
        for (std::int64_t b = 0; b < across; ++b) {
          expected[static_cast<std::size_t>((r / 128 * tiles + b / 4) * 512 + r % 32 * 16 +
                                            r % 128 / 32 * 4 + b % 4)] =
              compact[static_cast<std::size_t>(r * across + b)];
        }
      }
      INFO(describe(ctx, c));
      CHECK(first_difference(cast_of(ctx, c, 22).scales, expected) == "");
      const Buffer from = upload(ctx, compact);
      const Guarded to(ctx, expected.size());
      make_gemm_ready(ctx, from.data(), shape[0], shape[1], to.data());
      CHECK(first_difference(to.values<std::uint8_t>(), expected) == "");
      CHECK(to.intact());
    }
  }
}

TEST_CASE("scale_bytes are those of the definition") {
  for (std::int64_t rows : {0, 1, 16, 17, 128, 129, 5743}) {
    for (std::int64_t columns : {0, 1, 32, 33, 128, 129, 513}) {
      for (const BlockKind& kind : kKinds) {
        CHECK(static_cast<std::size_t>(scale_bytes(kind.granularity, rows, columns, kind.layout)) ==
              ScalePlaces{kind, rows, columns}.bytes());
      }
      CHECK(scale_bytes(Granularity::tensor, rows, columns) == 4);
      CHECK(scale_bytes(Granularity::row, rows, columns) == 4 * rows);
    }
  }
}

TEST_CASE("block_dequantize multiplies every code by the scale of its block and rounds once") {
  for (const Context& ctx : test_contexts()) {
    for (const Shape& shape : {Shape{1, 1}, Shape{130, 264}, Shape{17, 129}, Shape{0, 5}}) {
      for (const BlockKind& kind : kKinds) {
        for (DType dtype : kOutputs) {
          BlockCase c{.out = dtype, .shape = shape, .kind = kind, .transposed = false};
          Blocks blocks = cast_of(ctx, c, 23);
          if (shape.numel() > 100) {
            for (std::size_t i = 0; i < 256; ++i) {  // every code
              blocks.codes[i] = static_cast<std::uint8_t>(i);
            }
            if (kind.granularity == Granularity::mx) {
              for (std::size_t i = 0; i < 16; ++i) {  // and the scales that no cast of these makes
                blocks.scales[i] = static_cast<std::uint8_t>(i % 2 == 0 ? 0 : 240 + i);
              }
            }
          }
          const Buffer codes = upload(ctx, blocks.codes), scales = upload(ctx, blocks.scales);
          const BlockScaledView in = view_of_blocks(ctx, codes, scales, dtype, shape, kind);
          const ScalePlaces places{kind, shape[0], shape[1]};
          for (DType wide : kInputs) {
            INFO(describe(ctx, c) << " -> " << name_of(wide));
            const auto count = static_cast<std::size_t>(shape.numel());
            const Guarded out(ctx, count * size_of(wide));
            block_dequantize(ctx, in, out.view(wide, shape));
            CHECK(out.intact());
            const Codes bytes = out.values<std::uint8_t>();
            int wrong = 0;
            for (std::size_t i = 0; i < count; ++i) {
              const auto at = static_cast<std::int64_t>(i);
              const double value =
                  table_of(dtype).decode(blocks.codes[i]) *
                  scale_value(kind, &blocks.scales[places.of(at / shape[1], at % shape[1])]);
              double got = 0;
              double expected = static_cast<double>(static_cast<float>(value));
              if (wide == DType::f32) {
                float stored = 0;
                std::memcpy(&stored, &bytes[4 * i], 4);
                got = static_cast<double>(stored);
              } else {
                std::uint16_t stored = 0;
                std::memcpy(&stored, &bytes[2 * i], 2);
                got = table_of(wide).decode(stored);
                expected = table_of(wide).round(value);
              }
              const bool equal = std::isnan(expected) ? std::isnan(got) : got == expected;
              wrong += equal ? 0 : 1;
            }
            CHECK(wrong == 0);
            // Where it is not the CPU, NaN and signs of zero by their bits too.
            const Guarded on_cpu(Context::cpu(), count * size_of(wide));
            const Buffer cpu_codes = upload(Context::cpu(), blocks.codes),
                         cpu_scales = upload(Context::cpu(), blocks.scales);
            block_dequantize(
                Context::cpu(),
                view_of_blocks(Context::cpu(), cpu_codes, cpu_scales, dtype, shape, kind),
                on_cpu.view(wide, shape));
            CHECK(first_difference(bytes, on_cpu.values<std::uint8_t>()) == "");
          }
        }
      }
    }
  }
}

TEST_CASE("what a block cast stores is near what it was given") {
  for (const Context& ctx : test_contexts()) {
    for (const BlockKind& kind : kKinds) {
      const Shape shape{64, 256};
      const BlockCase c{.shape = shape, .kind = kind, .transposed = false};
      const std::vector<float> values =
          normal_values(static_cast<std::size_t>(shape.numel()), 24, 1e-6f);
      const Blocks blocks = run_blocks(ctx, c, values).out;
      const Buffer codes = upload(ctx, blocks.codes), scales = upload(ctx, blocks.scales);
      const Guarded out(ctx, values.size() * sizeof(float));
      block_dequantize(ctx, view_of_blocks(ctx, codes, scales, DType::e4m3, shape, kind),
                       out.view(DType::f32, shape));
      const std::vector<float> decoded = out.values<float>();
      int far = 0;
      for (std::size_t i = 0; i < values.size(); ++i) {
        // Half a code of three bits, or of the smallest numbers that a scale of about 1e-8 has.
        far += std::abs(decoded[i] - values[i]) > std::abs(values[i]) / 16 + 2e-11f;
      }
      INFO(describe(ctx, c));
      CHECK(far == 0);
    }
  }
}

TEST_CASE("what does not fit a block cast is refused by name") {
  for (const Context& ctx : test_contexts()) {
    const Buffer memory(ctx, 1 << 16);
    zero_bytes(ctx, memory.data(), memory.bytes());
    const auto view = [&](std::int64_t at, DType dtype, const Shape& shape) {
      return TensorView{memory.as<char>() + at, dtype, shape, ctx.device()};
    };
    const auto error_with = [&](auto change) {
      BlockQuantizeArgs args;
      args.in = view(0, DType::f32, {20, 40});  // 3200 bytes
      args.out = {.data = view(4096, DType::e4m3, {20, 40}), .scales = memory.as<char>() + 8192};
      args.transposed = {.data = view(12288, DType::e4m3, {40, 32}),
                         .scales = memory.as<char>() + 16384};
      args.column_sums = view(20480, DType::f32, {1, 40});
      change(args);
      return error_of([&] { block_quantize(ctx, args); });
    };
    const auto lacks = [&](auto change, std::initializer_list<std::string> words) {
      return missing(error_with(change), words);
    };
    using Args = BlockQuantizeArgs;
    CHECK(error_with([](Args&) {}) == "no error");
    CHECK(error_with([&](Args& a) { a.out.data.shape = {32, 40}; }) == "no error");
    CHECK(error_with([](Args& a) { a.out = {}; }) == "no error");
    CHECK(error_with([](Args& a) { a.transposed = {}; }) == "no error");
    CHECK(lacks([](Args& a) { a.out = a.transposed = {}; }, {"neither"}) == "");
    CHECK(lacks([](Args& a) { a.in.dtype = DType::e4m3; }, {"the input", "e4m3", "bf16"}) == "");
    CHECK(lacks([](Args& a) { a.in.shape = {800}; }, {"the input", "[800]", "matrix"}) == "");
    CHECK(lacks([](Args& a) { a.in.data = nullptr; }, {"the input", "null"}) == "");
    CHECK(lacks([](Args& a) { a.in.device = {DeviceType::cuda, 7}; }, {"cuda:7"}) == "");
    CHECK(lacks([](Args& a) { a.out.data.dtype = DType::f16; }, {"the output", "f16", "e5m2"}) ==
          "");
    CHECK(lacks(
              [](Args& a) {
                a.out.data.shape = {31, 40};
              },
              {"[31, 40]", "[20, 40]", "[32, 40]"}) == "");
    CHECK(lacks([](Args& a) { a.out.scales = nullptr; }, {"the output has no scales", "128"}) ==
          "");
    CHECK(lacks([](Args& a) { a.out.scales = static_cast<char*>(a.out.scales) + 4; },
                {"the scales of the output", "16"}) == "");
    for (Granularity granularity : {Granularity::tensor, Granularity::row}) {
      CHECK(lacks([&](Args& a) { a.out.granularity = granularity; },
                  {std::string(name_of(granularity)), "row_block, tile, mx"}) == "");
    }
    CHECK(lacks([](Args& a) { a.out.granularity = static_cast<Granularity>(9); }, {"is 9"}) == "");
    CHECK(lacks([](Args& a) { a.out.mx_layout = static_cast<MxLayout>(5); }, {"is 5"}) == "");
    CHECK(lacks(
              [](Args& a) {
                a.transposed.data.shape = {40, 20};
              },
              {"[40, 20]", "[40, 32]"}) == "");
    CHECK(lacks([](Args& a) { a.transposed.granularity = Granularity::tile; },
                {"tile", "row_block"}) == "");
    CHECK(lacks([](Args& a) { a.transposed.data.dtype = DType::e5m2; }, {"e5m2", "e4m3"}) == "");
    CHECK(lacks([](Args& a) { a.column_sums.shape = {2, 40}; }, {"[2, 40]", "[1, 40]"}) == "");
    CHECK(lacks(
              [&](Args& a) {
                a.out.data = view(3199, DType::e4m3, {20, 40});
              },
              {"the output (800 bytes", "the input (3200 bytes"}) == "");
    CHECK(lacks([&](Args& a) { a.out.scales = memory.as<char>() + 4096 + 784; },
                {"the output's scales (128 bytes", "the output (800 bytes"}) == "");
    CHECK(lacks([&](Args& a) { a.transposed.scales = a.out.scales; },
                {"the transposed output's scales", "the output's scales"}) == "");
    CHECK(lacks([&](Args& a) { a.transposed.data.data = memory.as<char>() + 4880; },
                {"the transposed output (1280", "the output (800"}) == "");
    CHECK(lacks([&](Args& a) { a.column_sums.data = a.transposed.data.data; },
                {"column_sums", "the transposed output"}) == "");
    const auto amax_at = [&](std::int64_t at) {
      return error_with(
          [&](Args& a) { a.amax = reinterpret_cast<float*>(memory.as<char>() + at); });
    };
    CHECK(amax_at(3200) == "no error");
    CHECK(missing(amax_at(3202), {"amax is at", "aligned to 4"}) == "");
    CHECK(missing(amax_at(3196), {"amax (4 bytes", "the input (3200"}) == "");
    CHECK(missing(amax_at(4096), {"amax", "the output (800"}) == "");
    CHECK(missing(amax_at(8192), {"amax", "the output's scales"}) == "");
    CHECK(missing(amax_at(12288), {"amax", "the transposed output (1280"}) == "");
    CHECK(missing(amax_at(16384), {"amax", "the transposed output's scales"}) == "");
    CHECK(missing(amax_at(20480 + 156), {"amax", "column_sums"}) == "");
    ctx.synchronize();
  }
}

TEST_CASE("what the other functions of block scales refuse") {
  for (const Context& ctx : test_contexts()) {
    const Buffer memory(ctx, 1 << 14);
    zero_bytes(ctx, memory.data(), memory.bytes());
    char* base = memory.as<char>();
    const BlockScaledView in{.data = {base, DType::e4m3, {4, 8}, ctx.device()},
                             .scales = base + 1024};
    const TensorView out{base + 4096, DType::f32, {4, 8}, ctx.device()};
    const auto dequantize_with = [&](auto change) {
      BlockScaledView changed_in = in;
      TensorView changed_out = out;
      change(changed_in, changed_out);
      return error_of([&] { block_dequantize(ctx, changed_in, changed_out); });
    };
    using In = BlockScaledView;
    using Out = TensorView;
    CHECK(dequantize_with([](In&, Out&) {}) == "no error");
    CHECK(missing(dequantize_with([](In&, Out& o) { o.dtype = DType::e5m2; }), {"e5m2", "f32"}) ==
          "");
    CHECK(missing(dequantize_with([](In& i, Out&) { i.data.dtype = DType::f32; }), {"f32"}) == "");
    CHECK(missing(dequantize_with([](In&, Out& o) {
                    o.shape = {4, 9};
                  }),
                  {"[4, 9]", "[4, 8]"}) == "");
    CHECK(missing(dequantize_with([](In& i, Out&) { i.granularity = Granularity::row; }),
                  {"row", "tile"}) == "");
    CHECK(missing(dequantize_with([&](In&, Out& o) { o.data = base + 1040; }),
                  {"the output", "the input's scales"}) == "");
    auto* scale = reinterpret_cast<TensorScale*>(base + 8192);
    CHECK(error_of([&] { broadcast_scale(ctx, scale, in); }) == "no error");
    CHECK(missing(error_of([&] { broadcast_scale(ctx, nullptr, in); }), {"scale"}) == "");
    CHECK(missing(error_of([&] {
                    broadcast_scale(ctx, reinterpret_cast<TensorScale*>(base + 1024), in);
                  }),
                  {"the scale", "apart"}) == "");
    const auto ready_error = [&](const void* from, std::int64_t rows, void* to) {
      return error_of([&] { make_gemm_ready(ctx, from, rows, 64, to); });
    };
    CHECK(ready_error(base + 1, 4, base + 1024) == "no error");
    CHECK(ready_error(nullptr, 0, nullptr) == "no error");
    CHECK(missing(ready_error(base, -1, base), {"-1"}) == "");
    CHECK(missing(ready_error(nullptr, 4, base), {"compact"}) == "");
    CHECK(missing(ready_error(base, 4, nullptr), {"gemm_ready"}) == "");
    CHECK(missing(ready_error(base, 4, base + 1032), {"aligned", "16"}) == "");
    CHECK(missing(ready_error(base + 1030, 4, base + 1024), {"apart"}) == "");
    ctx.synchronize();
  }
}

TEST_CASE("transposed tiles are those of a cast of the transpose") {
  const BlockKind kind{Granularity::tile};
  for (const Context& ctx : test_contexts()) {
    for (const Shape& shape : {Shape{1, 1}, Shape{130, 264}, Shape{17, 33}, Shape{128, 512},
                               Shape{5, 700}, Shape{1000, 128}, Shape{16, 16}}) {
      for (DType dtype : {DType::e4m3, DType::e5m2}) {
        const BlockCase c{.out = dtype, .shape = shape, .kind = kind};
        INFO(describe(ctx, c));
        const BlockResult r =
            run_blocks(ctx, c, wide_values(static_cast<std::size_t>(shape.numel()), 31, -20, 20));
        const Buffer codes = upload(ctx, r.out.codes), scales = upload(ctx, r.out.scales);
        const Shape turned{shape[1], rounded_up(shape[0], 16)};
        const Guarded out(ctx, r.transposed.codes.size()),
            out_scales(ctx, r.transposed.scales.size());
        transpose_tiles(ctx, view_of_blocks(ctx, codes, scales, dtype, shape, kind),
                        {.data = out.view(dtype, turned),
                         .granularity = Granularity::tile,
                         .scales = out_scales.data()});
        CHECK(first_difference(out.values<std::uint8_t>(), r.transposed.codes) == "");
        CHECK(first_difference(out_scales.values<std::uint8_t>(), r.transposed.scales) == "");
        CHECK(out.intact());
        CHECK(out_scales.intact());
      }
    }
  }
}

TEST_CASE("what transpose_tiles refuses") {
  for (const Context& ctx : test_contexts()) {
    const Buffer memory(ctx, 1 << 13);
    zero_bytes(ctx, memory.data(), memory.bytes());
    char* base = memory.as<char>();
    const auto error_with = [&](auto change) {
      BlockScaledView in{.data = {base, DType::e4m3, {4, 8}, ctx.device()},
                         .granularity = Granularity::tile,
                         .scales = base + 1024};
      BlockScaledView out = in;
      out.data.data = base + 2048, out.data.shape = {8, 16}, out.scales = base + 4096;
      change(in, out);
      return error_of([&] { transpose_tiles(ctx, in, out); });
    };
    using View = BlockScaledView;
    CHECK(error_with([](View&, View&) {}) == "no error");
    CHECK(missing(error_with([](View& in, View&) { in.granularity = Granularity::row_block; }),
                  {"row_block", "tile"}) == "");
    CHECK(missing(error_with([](View&, View& out) { out.granularity = Granularity::mx; }),
                  {"mx", "tile"}) == "");
    CHECK(missing(error_with([](View&, View& out) { out.scales = nullptr; }),
                  {"the output", "no scales"}) == "");
    CHECK(missing(error_with([](View&, View& out) { out.data.dtype = DType::e5m2; }),
                  {"e4m3", "e5m2"}) == "");
    CHECK(missing(error_with([](View&, View& out) { out.data.shape = {8, 4}; }), {"[8, 4]"}) == "");
    CHECK(missing(error_with([&](View&, View& out) { out.scales = base + 1024; }),
                  {"the output's scales", "the input's scales"}) == "");
    ctx.synchronize();
  }
}

TEST_CASE("broadcast_scale fills the scales of all blocks, and zeros the padding") {
  for (const Context& ctx : test_contexts()) {
    for (const Shape& shape : {Shape{1, 1}, Shape{130, 264}, Shape{17, 33}, Shape{128, 512}}) {
      for (const BlockKind& kind : kKinds) {
        for (int k : {-126, -3, 0, 5, 126}) {
          const auto scale_inv = std::ldexp(1.0f, k);
          const Buffer scale = upload<TensorScale>(ctx, {{scale_inv, 1 / scale_inv, 3.0f}});
          const ScalePlaces places{kind, shape[0], shape[1]};
          const Guarded scales(ctx, places.bytes());
          BlockScaledView out;
          out.data = {nullptr, DType::e4m3, shape, ctx.device()};
          out.granularity = kind.granularity;
          out.mx_layout = kind.layout;
          out.scales = scales.data();
          broadcast_scale(ctx, scale.as<TensorScale>(), out);
          Codes expected(places.bytes(), 0);
          for (std::int64_t r = 0; r < shape[0]; ++r) {
            for (std::int64_t column = 0; column < shape[1]; ++column) {
              std::uint8_t* at = &expected[places.of(r, column)];
              if (kind.granularity == Granularity::mx) {
                *at = static_cast<std::uint8_t>(k + 127);
              } else {
                std::memcpy(at, &scale_inv, sizeof(scale_inv));
              }
            }
          }
          INFO(to_string(ctx.device()) << ", " << to_string(kind) << ", " << to_string(shape));
          CHECK(first_difference(scales.values<std::uint8_t>(), expected) == "");
          CHECK(scales.intact());
        }
      }
    }
  }
}

}  // namespace octet::test
