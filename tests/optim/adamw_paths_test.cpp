// SPDX-License-Identifier: Apache-2.0
// A device may have several paths to the same update: with vectors where the buffers are aligned,
// element by element where they are not, and another for the rest of a segment. The bits must not
// tell which one ran, nor which device.
#include "octet/optim/adamw.hpp"
#include "support/adamw_model.hpp"
#include "support/catch.hpp"
#include "support/compare.hpp"
#include "support/random.hpp"

namespace octet::test {
namespace {

/// The formats of the levels, the smallest states with every weight, and a mixture.
struct Row {
  const char* name;
  StateFormats formats;
  DType gradient;
};
using S = StateFormat;
const Row kRows[] = {
    {"O0", kO0, DType::bf16},
    {"O1", kO1, DType::e4m3},
    {"O2", kO2, DType::e4m3},
    {"small", kSmall, DType::e4m3},
    {"small with a transpose", kSmallTransposed, DType::bf16},
    {"blocks alone", kBlocksAlone, DType::bf16},
    {"blocks of m", {.m = S::e4m3_block, .v = S::f16}, DType::e4m3},
    {"blocks of v", {WeightFormat::bf16, S::f16, S::bf16, S::sqrt_e4m3_block}, DType::f32},
    {"mixed", {WeightFormat::e4m3, S::f32, S::bf16, S::f16}, DType::f32}};

// Around a vector, a block of 128, a round of all threads and a segment; a prime; one element; as a
// matrix 296 x 384, two panels of three tiles and a short one.
const std::int64_t kSizes[] = {1,    7,    8,     9,     127,   128,   129,   2047,
                               2048, 2049, 16383, 16384, 16385, 40009, 113664};

/// A vector, or a matrix as near to a square as the count has it.
Shape shape_of(const StateFormats& formats, std::int64_t count) {
  if (formats.weight != WeightFormat::e4m3_and_transpose) return {count};
  std::int64_t rows = 1;
  for (std::int64_t n = 1; n * n <= count; ++n) rows = count % n == 0 ? n : rows;
  return {rows, count / rows};
}

/// Everything stored after three steps over all sizes at once, every gradient and weight starting
/// `offset` elements into its buffer, with gradients of this size.
std::vector<std::uint8_t> bytes_after(const Context& ctx, const Row& row, std::int64_t offset,
                                      float size) {
  std::vector<Tensor> weights, transposed, gradients;
  const Buffer scales = upload(ctx, std::vector<TensorScale>(std::size(kSizes)));
  std::vector<AdamWParam> params;
  const auto shifted = [&](const Tensor& tensor, const Shape& shape) {
    char* data = static_cast<char*>(tensor.view().data);
    const auto bytes = static_cast<std::int64_t>(size_of(tensor.view().dtype));
    return TensorView{data + offset * bytes, tensor.view().dtype, shape, ctx.device()};
  };
  for (std::int64_t count : kSizes) {
    const WeightFormat weight = row.formats.weight;
    const Shape shape = shape_of(row.formats, count);
    weights.emplace_back(ctx, dtype_of(weight), Shape{count + offset});
    transposed.emplace_back(ctx, DType::e4m3, Shape{count + offset});
    gradients.emplace_back(ctx, row.gradient, Shape{count + offset});
    const Encoded g = encode_values(
        row.gradient,
        normal_values(static_cast<std::size_t>(count), static_cast<std::uint32_t>(count), size));
    AdamWParam param;
    param.name = std::to_string(count);
    param.shape = shape;
    param.formats = row.formats;
    if (weight != WeightFormat::none) param.weight = shifted(weights.back(), shape);
    if (weight == WeightFormat::e4m3_and_transpose) {
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
    const Buffer values =
        upload(ctx, normal_values(static_cast<std::size_t>(kSizes[i]), 77, 0.02f));
    optimizer.initialise(static_cast<int>(i), view_of(ctx, values, DType::f32, params[i].shape));
    ctx.synchronize();
  }
  for (int t = 0; t < 3; ++t) optimizer.step({.lr = 1e-3f});
  REQUIRE(download_one<AdamwScalars>(ctx, optimizer.scalars()).step == 3);
  std::vector<std::uint8_t> all;
  for (std::size_t i = 0; i < params.size(); ++i) {
    const int p = static_cast<int>(i);
    const auto append = [&all](const std::vector<std::uint8_t>& bytes) {
      all.insert(all.end(), bytes.begin(), bytes.end());
    };
    append(download_bytes(ctx, params[i].weight));
    append(download_bytes(ctx, params[i].weight_transposed));
    for (const StateView& view : {optimizer.master(p), optimizer.m(p), optimizer.v(p)}) {
      append(download_state(ctx, view));
    }
  }
  const auto stored = bytes_of(download<TensorScale>(
      ctx, optimizer.scales(), static_cast<std::size_t>(optimizer.scale_count())));
  all.insert(all.end(), stored.begin(), stored.end());
  return all;
}

}  // namespace

TEST_CASE("the update's bits depend neither on alignment nor on the device") {
  for (const Row& row : kRows) {
    const auto expected = bytes_after(Context::cpu(), row, 0, 0.1f);
    for (const Context& ctx : test_contexts()) {
      for (std::int64_t offset : {0, 1, 4, 16}) {
        INFO(row.name << " on " << to_string(ctx.device()) << ", offset " << offset);
        CHECK(first_difference(bytes_after(ctx, row, offset, 0.1f), expected) == "");
      }
    }
  }
}

TEST_CASE("paths for the usual give way to the general one at the ends of the range, bit for bit") {
  for (const Row& row : kRows) {
    for (float size : {1e-30f, 1e-18f, 1e-12f, 1e-6f, 1e4f, 1e12f}) {
      const auto expected = bytes_after(Context::cpu(), row, 0, size);
      for (const Context& ctx : test_contexts()) {
        INFO(row.name << " on " << to_string(ctx.device()) << ", gradients of " << size);
        CHECK(first_difference(bytes_after(ctx, row, 0, size), expected) == "");
      }
    }
  }
}

}  // namespace octet::test
