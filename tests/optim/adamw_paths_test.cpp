// SPDX-License-Identifier: Apache-2.0
// A device may have fast code for some formats (kAdamwRows) and general code for the others, for
// buffers that are not aligned, unusual scales and the rest of a segment. The bits must not tell
// which ran, nor on which device.
#include <functional>

#include "octet/optim/adamw.hpp"
#include "support/adamw_model.hpp"
#include "support/catch.hpp"
#include "support/compare.hpp"
#include "support/random.hpp"

namespace octet::test {
namespace {

const StateFormats kO2Transposed = {WeightFormat::e4m3_and_transpose, StateFormat::f16,
                                    StateFormat::e4m3, StateFormat::f16};

/// Those of kAdamwRows, the smallest states with every weight, and mixtures.
struct Row {
  std::string name;
  StateFormats formats;
  DType gradient;
};
using S = StateFormat;
std::vector<Row> all_rows() {
  std::vector<Row> rows = {
      {"small with a transpose", kSmallTransposed, DType::bf16},
      {"blocks alone", kBlocksAlone, DType::bf16},
      {"blocks of m", {.m = S::e4m3_block, .v = S::f16}, DType::e4m3},
      {"blocks of v", {WeightFormat::bf16, S::f16, S::bf16, S::sqrt_e4m3_block}, DType::f32},
      {"mixed", {WeightFormat::e4m3, S::f32, S::bf16, S::f16}, DType::f32},
      {"rows of a weight in blocks", {WeightFormat::e4m3_row_block, S::f16}, DType::f32},
      {"blocks everywhere",
       {WeightFormat::e4m3_tile_and_transpose, S::f16, S::e4m3_block, S::sqrt_e4m3_block},
       DType::e4m3}};
  for (const AdamwRow& row : kAdamwRows) {
    rows.push_back({describe(row.formats, row.gradient), row.formats, row.gradient});
  }
  return rows;
}

// Around a vector, a block of 128, a round of all threads and a segment; a prime; one element.
const std::vector<Shape> kVectors = {{1},     {7},     {8},     {9},     {127},
                                     {128},   {129},   {2047},  {2048},  {2049},
                                     {16383}, {16384}, {16385}, {40009}, {113664}};
// Two panels of three tiles and a short one; one tile; tiles and a short panel; two panels of one
// tile. Without tiles: rows or columns that are no whole number of vectors or tiles, primes, a row,
// a column.
const std::vector<Shape> kMatrices = {{296, 384}, {128, 128}, {136, 256}, {256, 128}, {300, 128},
                                      {128, 200}, {17, 61},   {1, 16385}, {129, 1},   {1, 1}};

const std::vector<Shape>& shapes_of(const StateFormats& formats) {
  return needs_matrix(formats.weight) ? kMatrices : kVectors;
}

/// Gradients from a count and a seed.
using Gradients = std::function<std::vector<float>(std::size_t, std::uint32_t)>;

Gradients normal_gradients(float size) {
  return [size](std::size_t count, std::uint32_t seed) { return normal_values(count, seed, size); };
}

/// Fast code that a tensor should take but does not would pass every comparison.
void check_row_taken(const Context& ctx, const AdamW& optimizer, int i, const Row& row) {
  const bool is_fast =
      ctx.device().type == DeviceType::cuda && optimizer.general_code_reason(i).empty();
  CHECK(download_one<AdamwTensorStep>(ctx, optimizer.tensor_step(i)).row ==
        (is_fast ? adamw_row_of(row.gradient, row.formats) : 0));
}

/// Everything stored after three steps over all shapes at once, every gradient and weight starting
/// `offset` elements into its buffer. Not the amax of the gradients but `known` of it is given.
/// `usual`: no scale is near the ends of FP32's range.
std::vector<std::uint8_t> bytes_after(const Context& ctx, const Row& row, std::int64_t offset,
                                      const Gradients& values_of, float known, bool usual) {
  const std::vector<Shape>& shapes = shapes_of(row.formats);
  std::vector<Tensor> weights, transposed, gradients;
  const Buffer scales = upload(ctx, std::vector<TensorScale>(shapes.size()));
  std::vector<AdamWParam> params;
  const auto shifted = [&](const Tensor& tensor, const Shape& shape) {
    char* data = static_cast<char*>(tensor.view().data);
    const auto bytes = static_cast<std::int64_t>(size_of(tensor.view().dtype));
    return TensorView{data + offset * bytes, tensor.view().dtype, shape, ctx.device()};
  };
  for (const Shape& shape : shapes) {
    const WeightFormat weight = row.formats.weight;
    const std::int64_t count = shape.numel();
    weights.emplace_back(ctx, dtype_of(weight), Shape{count + offset});
    transposed.emplace_back(ctx, DType::e4m3, Shape{count + offset});
    gradients.emplace_back(ctx, row.gradient, Shape{count + offset});
    Encoded g = encode_values(row.gradient, values_of(static_cast<std::size_t>(count),
                                                      static_cast<std::uint32_t>(count)));
    g.scale.amax *= known;
    AdamWParam param;
    param.name = to_string(shape);
    param.shape = shape;
    param.formats = row.formats;
    if (weight != WeightFormat::none) param.weight = shifted(weights.back(), shape);
    if (is_transposed(weight)) {
      param.weight_transposed = shifted(transposed.back(), {shape[1], shape[0]});
    }
    param.gradient = shifted(gradients.back(), shape);
    param.gradient_scale = scales.as<TensorScale>() + params.size();
    write(ctx, param.gradient.data, g.bytes);
    write_one(ctx, param.gradient_scale, g.scale);
    params.push_back(param);
  }
  AdamW optimizer(ctx, {.weight_decay = 0.1f, .seed = 3}, params);
  for (std::size_t i = 0; i < params.size(); ++i) {
    const auto count = static_cast<std::size_t>(params[i].shape.numel());
    const Buffer values = upload(ctx, normal_values(count, 77, 0.02f));
    optimizer.initialise(static_cast<int>(i), view_of(ctx, values, DType::f32, params[i].shape));
    ctx.synchronize();
  }
  for (int t = 0; t < 3; ++t) optimizer.step({.lr = 1e-3f});
  REQUIRE(download_one<AdamwScalars>(ctx, optimizer.scalars()).step == 3);
  std::vector<std::uint8_t> all;
  for (std::size_t i = 0; i < params.size(); ++i) {
    const int p = static_cast<int>(i);
    if (usual) check_row_taken(ctx, optimizer, p, row);
    const auto append = [&all](const std::vector<std::uint8_t>& bytes) {
      all.insert(all.end(), bytes.begin(), bytes.end());
    };
    append(download_bytes(ctx, params[i].weight));
    append(download_bytes(ctx, params[i].weight_transposed));
    append(block_scale_bytes(ctx, optimizer, p, row.formats.weight));
    for (const StateView& view : {optimizer.master(p), optimizer.m(p), optimizer.v(p)}) {
      append(download_state(ctx, view));
    }
  }
  const auto stored = bytes_of(download<TensorScale>(
      ctx, optimizer.scales(), static_cast<std::size_t>(optimizer.scale_count())));
  all.insert(all.end(), stored.begin(), stored.end());
  return all;
}

/// The bits of the CPU on every device.
void check_devices(const Row& row, const Gradients& values_of, float known = 1.0f) {
  const auto expected = bytes_after(Context::cpu(), row, 0, values_of, known, false);
  for (const Context& ctx : test_contexts()) {
    INFO(row.name << " on " << to_string(ctx.device()));
    CHECK(first_difference(bytes_after(ctx, row, 0, values_of, known, false), expected) == "");
  }
}

}  // namespace

TEST_CASE("the update's bits depend neither on alignment nor on the device") {
  const Gradients values_of = normal_gradients(0.1f);
  for (const Row& row : all_rows()) {
    const auto expected = bytes_after(Context::cpu(), row, 0, values_of, 1.0f, true);
    for (const Context& ctx : test_contexts()) {
      for (std::int64_t offset : {0, 1, 4, 16}) {
        INFO(row.name << " on " << to_string(ctx.device()) << ", offset " << offset);
        const auto bytes = bytes_after(ctx, row, offset, values_of, 1.0f, true);
        CHECK(first_difference(bytes, expected) == "");
      }
    }
  }
}

TEST_CASE("fast code gives way to the general at the ends of the range, bit for bit") {
  for (const Row& row : all_rows()) {
    for (float size : {1e-30f, 1e-18f, 1e-12f, 1e-6f, 1e4f, 1e12f}) {
      INFO("gradients of " << size);
      check_devices(row, normal_gradients(size));
    }
  }
}

TEST_CASE("gradients of every magnitude in one tensor give equal bits on all devices") {
  for (const Row& row : all_rows()) {
    // All that a v in FP32 tells from 0; what an E4M3 gradient holds.
    for (int low : {-75, -20}) {
      INFO("gradients from 2^" << low << " on");
      check_devices(row, [low](std::size_t count, std::uint32_t seed) {
        return wide_values(count, seed, low, 0);
      });
    }
  }
}

TEST_CASE("a v that underflows its format is stored as the smallest code") {
  constexpr std::size_t kCount = 128 * 256;
  for (const Context& ctx : test_contexts()) {
    for (const StateFormats& formats : {kO2, kO2Transposed, kSmall}) {
      INFO(describe(formats) << " on " << to_string(ctx.device()));
      AdamwModel model(ctx, {.seed = 3}, {{.shape = {128, 256}, .formats = formats}});
      model.initialise(0, normal_values(kCount, 77, 0.02f));
      const std::vector<float> g = wide_values(kCount, 5, -75, 0);
      model.set_gradient(0, g);
      model.step(1e-3f);
      const Stored v = model.v(0);
      std::size_t smallest = 0, wrong = 0;
      for (std::size_t i = 0; i < kCount; ++i) {
        const bool positive = (1.0f - 0.95f) * (g[i] * g[i]) > 0.0f;
        smallest += v.codes[i] == 1 ? 1 : 0;
        wrong += (v.codes[i] > 0) != positive ? 1 : 0;
      }
      CHECK(smallest > kCount / 8);
      CHECK(wrong == 0);
    }
  }
}

TEST_CASE("with an amax that is too small states saturate, to equal bits on all devices") {
  for (const Row& row : all_rows()) {
    for (float known : {0x1p-3f, 0x1p-12f}) {
      INFO(known << " of the amax");
      check_devices(row, normal_gradients(0.1f), known);
    }
  }
}

TEST_CASE("a state beyond its bound is stored as the largest code, not as a NaN") {
  constexpr std::size_t kCount = 128 * 256;
  for (const Context& ctx : test_contexts()) {
    for (DType gradient : kGradientFormats) {
      for (const StateFormats& formats : {kO2, kO2Transposed}) {
        INFO(describe(formats, gradient) << " on " << to_string(ctx.device()));
        AdamwModel model(ctx, {.seed = 3},
                         {{.shape = {128, 256}, .formats = formats, .gradient = gradient}});
        model.initialise(0, normal_values(kCount, 77, 0.02f));
        model.set_gradient(0, normal_values(kCount, 5, 0.1f));
        TensorScale* scale = model.gradient_view(0).scale;
        TensorScale wrong = download_one<TensorScale>(ctx, scale);
        wrong.amax *= 0x1p-12f;
        write_one(ctx, scale, wrong);
        model.step(1e-3f);
        const auto largest = [](const Stored& stored, std::uint32_t sign) {
          std::uint32_t code = 0;
          for (std::uint32_t each : stored.codes) code = std::max(code, each & ~sign);
          return code;
        };
        CHECK(largest(model.m(0), 0x80u) == 0x7Eu);
        CHECK(largest(model.v(0), 0x8000u) == 0x7BFFu);
        CHECK(largest(model.master(0), 0x8000u) <= 0x7BFFu);
        CHECK(largest(model.weight(0), 0x80u) <= 0x7Eu);
      }
    }
  }
}

}  // namespace octet::test
