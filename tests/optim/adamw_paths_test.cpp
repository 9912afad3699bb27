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

/// The formats with a path of their own, and one without.
struct Row {
  const char* name;
  StateFormats formats;
  DType gradient;
};
const Row kRows[] = {{"O0", kO0, DType::bf16},
                     {"O1", kO1, DType::e4m3},
                     {"O2", kO2, DType::e4m3},
                     {"mixed", {DType::e4m3, DType::f32, DType::bf16, DType::f16}, DType::f32}};

// Around a vector, a block of 128, a round of all threads and a segment; a prime; one element.
const std::int64_t kSizes[] = {1,    7,    8,    9,     127,   128,   129,
                               2047, 2048, 2049, 16383, 16384, 16385, 40009};

/// Everything stored after three steps over all sizes at once, every gradient and weight starting
/// `offset` elements into its buffer.
std::vector<std::uint8_t> bytes_after(const Context& ctx, const Row& row, std::int64_t offset) {
  std::vector<Tensor> weights, gradients;
  const Buffer scales = upload(ctx, std::vector<TensorScale>(std::size(kSizes)));
  std::vector<AdamWParam> params;
  const auto shifted = [&](const Tensor& tensor, std::int64_t count) {
    char* data = static_cast<char*>(tensor.view().data);
    const auto bytes = static_cast<std::int64_t>(size_of(tensor.view().dtype));
    return TensorView{data + offset * bytes, tensor.view().dtype, {count}, ctx.device()};
  };
  for (std::int64_t count : kSizes) {
    weights.emplace_back(ctx, row.formats.weight, Shape{count + offset});
    gradients.emplace_back(ctx, row.gradient, Shape{count + offset});
    const Encoded g = encode_values(
        row.gradient,
        normal_values(static_cast<std::size_t>(count), static_cast<std::uint32_t>(count), 0.1f));
    AdamWParam param;
    param.name = std::to_string(count);
    param.shape = {count};
    param.formats = row.formats;
    param.weight = shifted(weights.back(), count);
    param.gradient = shifted(gradients.back(), count);
    param.gradient_scale = scales.as<TensorScale>() + params.size();
    param.weight_decay = 0.1f;
    write(ctx, param.gradient.data, g.bytes);
    write_one(ctx, param.gradient_scale, g.scale);
    params.push_back(param);
  }
  AdamW optimizer(ctx, {.seed = 3}, params);
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
    for (const TensorView& view :
         {params[i].weight, optimizer.master(p).data, optimizer.m(p).data, optimizer.v(p).data}) {
      const auto bytes = download_bytes(ctx, view);
      all.insert(all.end(), bytes.begin(), bytes.end());
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
    const auto expected = bytes_after(Context::cpu(), row, 0);
    for (const Context& ctx : test_contexts()) {
      for (std::int64_t offset : {0, 1, 4, 16}) {
        INFO(row.name << " on " << to_string(ctx.device()) << ", offset " << offset);
        CHECK(first_difference(bytes_after(ctx, row, offset), expected) == "");
      }
    }
  }
}

}  // namespace octet::test
