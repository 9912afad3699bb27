// SPDX-License-Identifier: Apache-2.0
// For which tensors the update on CUDA has fast code: what a step takes, and the reason that is
// given where it takes the general code.
#include "octet/ops/adamw_rows.hpp"
#include "support/adamw_model.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"

namespace octet::test {
namespace {

const StateFormats kO2Transposed = {WeightFormat::e4m3_and_transpose, StateFormat::f16,
                                    StateFormat::e4m3, StateFormat::f16};
const StateFormats kO2Tiles = {WeightFormat::e4m3_tile, StateFormat::f16, StateFormat::e4m3,
                               StateFormat::f16};
const StateFormats kMixed = {WeightFormat::e4m3, StateFormat::f16, StateFormat::bf16,
                             StateFormat::f16};

/// The row that a tensor took in one step with normal gradients of this size.
std::uint32_t row_taken(AdamwModel& model, const Shape& shape, float size = 0.1f) {
  const auto count = static_cast<std::size_t>(shape.numel());
  model.initialise(0, normal_values(count, 77, 0.02f));
  model.set_gradient(0, normal_values(count, 5, size));
  model.step(1e-3f);
  REQUIRE(model.scalars().step == 1);
  return model.tensor_step(0).row;
}

}  // namespace

TEST_CASE("every row is there once and takes the tensors of its formats on CUDA") {
  const Shape shape = {128, 256};
  for (const Context& ctx : test_contexts()) {
    std::uint32_t number = 0;
    for (const AdamwRow& row : kAdamwRows) {
      INFO(describe(row.formats, row.gradient) << " on " << to_string(ctx.device()));
      CHECK(adamw_row_of(row.gradient, row.formats) == ++number);
      AdamwModel model(ctx, {.weight_decay = 0.1f, .seed = 3},
                       {{.shape = shape, .formats = row.formats, .gradient = row.gradient}});
      CHECK(model.optimizer().general_code_reason(0) == "");
      const bool is_cuda = ctx.device().type == DeviceType::cuda;
      CHECK(row_taken(model, shape) == (is_cuda ? number : 0));
    }
  }
}

TEST_CASE("a tensor that takes the general code has a reason that names what is in the way") {
  struct Case {
    AdamWConfig config;
    ParamCase param;
    const char* reason;  ///< part of it; empty: a row
  };
  const AdamWConfig nearest{.weight_decay = 0.1f, .stochastic_rounding = false};
  const AdamWConfig l2{.weight_decay = 0.1f, .decoupled_weight_decay = false};
  const Case cases[] = {
      {{}, {.shape = {16, 8}, .formats = kMixed, .gradient = DType::e4m3}, "m bf16"},
      {{}, {.shape = {16, 8}, .formats = kO2, .gradient = DType::bf16}, "gradient bf16"},
      {nearest, {.shape = {16, 8}, .formats = kO2, .gradient = DType::e4m3}, "stochastic_rounding"},
      {l2,
       {.shape = {16, 8}, .formats = kO2, .gradient = DType::e4m3, .weight_decay = 0.1f},
       "decoupled_weight_decay"},
      {l2, {.shape = {16, 8}, .formats = kO2, .gradient = DType::e4m3, .weight_decay = 0.0f}, ""},
      {{}, {.shape = {132, 128}, .formats = kO2Transposed, .gradient = DType::e4m3}, "132 rows"},
      {{}, {.shape = {120, 128}, .formats = kO2Transposed, .gradient = DType::e4m3}, "120 rows"},
      {{}, {.shape = {128, 200}, .formats = kO2Transposed, .gradient = DType::e4m3}, "200 columns"},
      {{}, {.shape = {136, 256}, .formats = kO2Transposed, .gradient = DType::e4m3}, ""},
      {{}, {.shape = {100, 128}, .formats = kO2Tiles, .gradient = DType::e4m3}, "100 rows"},
      {{}, {.shape = {129, 129}, .formats = kO2Tiles, .gradient = DType::e4m3}, "129 columns"},
      {{}, {.shape = {129, 256}, .formats = kO2Tiles, .gradient = DType::e4m3}, ""},
      {{.eps = 1e-15f}, {.shape = {16, 8}, .formats = kO2, .gradient = DType::e4m3}, "eps"},
      {{.eps = 1e-12f}, {.shape = {16, 8}, .formats = kO2, .gradient = DType::e4m3}, ""}};
  for (const Context& ctx : test_contexts()) {
    for (const Case& c : cases) {
      AdamwModel model(ctx, c.config, {c.param});
      const std::string reason = model.optimizer().general_code_reason(0);
      INFO(reason << "; on " << to_string(ctx.device()));
      CHECK(reason.empty() == (*c.reason == 0));
      CHECK(reason.find(c.reason) != std::string::npos);
      const bool is_fast = ctx.device().type == DeviceType::cuda && reason.empty();
      CHECK((row_taken(model, c.param.shape) != 0) == is_fast);
    }
  }
}

TEST_CASE("a buffer that is not aligned to 16 bytes is a reason") {
  alignas(16) std::byte memory[64] = {};
  AdamwTensor tensor;
  tensor.formats = kO2;
  tensor.gradient_dtype = DType::e4m3;
  tensor.gradient = tensor.master = tensor.m = tensor.v = tensor.weight = memory + 16;
  CHECK(reason_for_general_code(tensor, {}, {}) == "");
  const auto reason_with = [&tensor, &memory](auto member) {
    AdamwTensor off = tensor;
    off.*member = memory + 8;
    return reason_for_general_code(off, {}, {});
  };
  CHECK(reason_with(&AdamwTensor::gradient).find("16 bytes") != std::string::npos);
  for (auto member : {&AdamwTensor::master, &AdamwTensor::m, &AdamwTensor::v, &AdamwTensor::weight,
                      &AdamwTensor::weight_transposed}) {
    CHECK(reason_with(member).find("16 bytes") != std::string::npos);
  }
}

TEST_CASE("a step with scales near the ends of FP32's range takes the general code") {
  const Shape shape = {128, 256};
  for (const Context& ctx : test_contexts()) {
    for (const StateFormats& formats : {kO2, kO2Transposed, kO2Tiles}) {
      AdamwModel model(ctx, {.seed = 3},
                       {{.shape = shape, .formats = formats, .gradient = DType::e4m3}});
      CHECK(model.optimizer().general_code_reason(0) == "");
      CHECK(row_taken(model, shape, 1e-30f) == 0);
    }
  }
}

}  // namespace octet::test
