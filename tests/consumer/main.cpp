// SPDX-License-Identifier: Apache-2.0
// Trains one matrix towards zero with the library as a package: exit status 0 if that worked.
#include <octet/octet.hpp>

#include <cstdio>
#include <vector>

int main() try {
  octet::Context ctx = octet::Context::cpu();
  const auto comm = octet::make_single(ctx);
  octet::Engine engine(ctx, *comm, {.level = octet::Level::O2});

  const octet::Tensor weight(ctx, octet::DType::f32, {64, 64});
  for (int i = 0; i < 64 * 64; ++i) weight.as<float>()[i] = 1.0f;
  const octet::ParamId id = engine.add({.name = "w", .shape = {64, 64}, .init = weight});
  engine.freeze();

  const octet::Tensor gradient(ctx, octet::DType::f32, {64, 64});
  for (int step = 0; step < 20; ++step) {
    engine.weight_as(id, gradient);  // the gradient of the sum of w^2 / 2
    engine.add_gradient(id, gradient);
    engine.step({.lr = 0.05f});
  }
  engine.weight_as(id, weight);
  const float first = weight.as<float>()[0];
  std::printf("octet %d.%d.%d, %d CUDA devices, w[0] = %g\n", OCTET_VERSION_MAJOR,
              OCTET_VERSION_MINOR, OCTET_VERSION_PATCH, octet::cuda_device_count(),
              static_cast<double>(first));
  return first > -0.5f && first < 0.5f ? 0 : 1;
} catch (const octet::Error& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
