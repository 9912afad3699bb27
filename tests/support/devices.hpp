// SPDX-License-Identifier: Apache-2.0
// The devices a case runs on, and moving values between them and the host.
#pragma once

#include <cstring>
#include <span>
#include <string>
#include <vector>

#include "octet/runtime/context.hpp"
#include "octet/runtime/tensor.hpp"

namespace octet::test {

/// The CPU always; CUDA device 0 on the default stream where there is one.
inline std::vector<Context> test_contexts() {
  std::vector<Context> contexts = {Context::cpu()};
  if (cuda_device_count() > 0) contexts.push_back(Context::cuda(0, nullptr));
  return contexts;
}

/// Device memory with the values of a host vector.
template <class T>
Buffer upload(const Context& ctx, const std::vector<T>& values) {
  return upload_sync<T>(ctx, std::span<const T>(values));
}

template <class T>
std::vector<T> download(const Context& ctx, const void* data, std::size_t count) {
  return count == 0 ? std::vector<T>() : read_sync<T>(ctx, data, count);
}

template <class T>
T download_one(const Context& ctx, const void* data) {
  return download<T>(ctx, data, 1).front();
}

inline std::vector<std::uint8_t> download_bytes(const Context& ctx, const TensorView& view) {
  return download<std::uint8_t>(ctx, view.data, view.empty() ? 0 : view.bytes());
}

/// Overwrites device memory with host values and waits.
template <class T>
void write(const Context& ctx, void* to, const std::vector<T>& values) {
  copy_bytes(ctx, to, values.data(), values.size() * sizeof(T));
  ctx.synchronize();
}

template <class T>
void write_one(const Context& ctx, void* to, const T& value) {
  copy_bytes(ctx, to, &value, sizeof(T));
  ctx.synchronize();
}

/// A view of a buffer on the context's device.
inline TensorView view_of(const Context& ctx, const Buffer& buffer, DType dtype, Shape shape) {
  return {buffer.data(), dtype, shape, ctx.device()};
}

}  // namespace octet::test
