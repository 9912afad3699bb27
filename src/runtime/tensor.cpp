// SPDX-License-Identifier: Apache-2.0
#include "octet/runtime/tensor.hpp"

#include "backend.hpp"

namespace octet {

Buffer::Buffer(const Context& ctx, std::size_t bytes)
    : state_(ctx.state()), data_(ctx.state()->allocate(bytes)), bytes_(bytes) {}

Buffer::~Buffer() {
  if (state_ != nullptr) state_->deallocate(data_, bytes_);
}

Tensor::Tensor(const Context& ctx, DType dtype, Shape shape)
    : buffer_(ctx, static_cast<std::size_t>(shape.numel()) * size_of(dtype)),
      view_{buffer_.data(), dtype, shape, ctx.device()} {}

ScaledTensor::ScaledTensor(const Context& ctx, DType dtype, Shape shape)
    : data_(ctx, dtype, shape), scale_(ctx, sizeof(TensorScale)) {
  const TensorScale one;
  copy_bytes(ctx, scale_.data(), &one, sizeof(one));
  ctx.synchronize();  // `one` lives on this stack
}

void copy_bytes(const Context& ctx, void* to, const void* from, std::size_t bytes) {
  if (bytes != 0) detail::backend_of(ctx).copy(ctx, to, from, bytes);
}

void zero_bytes(const Context& ctx, void* data, std::size_t bytes) {
  if (bytes != 0) detail::backend_of(ctx).zero(ctx, data, bytes);
}

void read_bytes_sync(const Context& ctx, void* to, const void* from, std::size_t bytes) {
  copy_bytes(ctx, to, from, bytes);
  ctx.synchronize();
}

}  // namespace octet
