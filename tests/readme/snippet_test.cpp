// SPDX-License-Identifier: Apache-2.0
// The code of the README's first screen: compiled as it stands there, and it must learn.
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "octet/octet.hpp"
#include "support/catch.hpp"

namespace octet::test {
namespace {

constexpr std::int64_t d = 64;
constexpr std::int64_t tokens = 48;

Tensor random_tensor(const Context& ctx, Shape shape, float deviation, unsigned seed) {
  Tensor tensor(ctx, DType::f32, shape);
  std::mt19937 engine(seed);
  std::normal_distribution<float> normal(0.0f, deviation);
  for (std::int64_t i = 0; i < shape.numel(); ++i) tensor.as<float>()[i] = normal(engine);
  return tensor;
}

TEST_CASE("the README's snippet trains a matrix in FP8") {
  const float lr = 0.01f;
  const int steps = 60;
  Context host = Context::cpu();
  const Tensor initial = random_tensor(host, {3 * d, d}, 0.1f, 1);
  const Tensor x = random_tensor(host, {tokens, d}, 1.0f, 2);
  const Tensor target = random_tensor(host, {tokens, 3 * d}, 1.0f, 3);
  const Tensor y(host, DType::f32, {tokens, 3 * d});
  const Tensor dy(host, DType::f32, {tokens, 3 * d});
  const Tensor dx(host, DType::f32, {tokens, d});
  const Tensor dw(host, DType::f32, {3 * d, d});

  // The mean square of y - target goes into `losses`, its gradient into dy.
  std::vector<double> losses;
  const auto loss_gradient = [&](const Tensor& output) -> const Tensor& {
    const std::int64_t count = output.view().numel();
    double sum = 0.0;
    for (std::int64_t i = 0; i < count; ++i) {
      const float difference = output.as<float>()[i] - target.as<float>()[i];
      dy.as<float>()[i] = 2.0f * difference / static_cast<float>(count);
      sum += static_cast<double>(difference) * static_cast<double>(difference);
    }
    losses.push_back(sum / static_cast<double>(count));
    return dy;
  };

  // snippet begin
  octet::Context ctx = octet::Context::cpu();  // or Context::cuda(device, stream)
  auto comm = octet::make_single(ctx);         // or thread ranks, or adopt_nccl(my_comm, ctx)
  octet::Engine engine(ctx, *comm, {.level = octet::Level::O2, .adamw = {.weight_decay = 0.1f}});
  octet::ParamId qkv = engine.add({.name = "h.0.qkv", .shape = {3 * d, d}, .init = initial});
  engine.freeze();  // allocates; engine.plan() says what will run, in which formats
  octet::GemmRegistry gemms(ctx);
  octet::Linear linear(gemms, {.in_features = d, .out_features = 3 * d, .max_tokens = tokens});
  for (int step = 0; step < steps; ++step) {
    // y = x w^T: the weight is FP8, so is the product
    linear.forward({.x = x, .weight = engine.weight(qkv), .y = y});
    linear.backward({.dy = loss_gradient(y), .weight = engine.weight(qkv), .dx = dx, .dw = {dw}});
    engine.add_gradient(qkv, dw);               // float in, stored as FP8
    engine.step({.lr = lr, .max_norm = 1.0f});  // reduce over ranks, clip, update, gather
  }
  // snippet end

  CHECK(std::isfinite(losses.back()));
  CHECK(losses.back() < 0.5 * losses.front());
  CHECK(gemms.counts().fp8 == 3 * steps);
  CHECK(engine.plan().fp8_parameters == 3 * d * d);
}

}  // namespace
}  // namespace octet::test
