// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <span>
#include <utility>
#include <vector>

#include "octet/runtime/context.hpp"

namespace octet {

/// Owned bytes on a context's device. Move-only; given back to the allocator they came from.
class Buffer {
 public:
  Buffer() = default;
  /// Uninitialised. Throws octet::Error naming the byte count when the allocator has no more.
  Buffer(const Context& ctx, std::size_t bytes);
  ~Buffer();
  Buffer(Buffer&& other) noexcept { swap(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    Buffer taken(std::move(other));
    swap(taken);
    return *this;
  }

  void* data() const { return data_; }
  std::size_t bytes() const { return bytes_; }
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void swap(Buffer& other) noexcept {
    std::swap(state_, other.state_);
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
  }
  std::shared_ptr<detail::ContextState> state_;
  void* data_ = nullptr;
  std::size_t bytes_ = 0;
};

/// Owned tensor. Move-only.
class Tensor {
 public:
  Tensor() = default;
  /// Uninitialised memory on the context's device.
  Tensor(const Context& ctx, DType dtype, Shape shape);
  /// Over memory of the caller's, which must stay valid; bytes() is 0.
  static Tensor over(const TensorView& memory) {
    Tensor tensor;
    tensor.view_ = memory;
    return tensor;
  }

  const TensorView& view() const { return view_; }
  operator const TensorView&() const { return view_; }
  template <class T>
  T* as() const {
    return view_.as<T>();
  }
  std::size_t bytes() const { return buffer_.bytes(); }

 private:
  Buffer buffer_;
  TensorView view_;
};

/// An FP8 (or other) tensor with its scale, both owned. The scale starts at 1, amax at 0.
class ScaledTensor {
 public:
  ScaledTensor() = default;
  ScaledTensor(const Context& ctx, DType dtype, Shape shape);
  ScaledView view() const { return {data_.view(), scale_.as<TensorScale>()}; }
  operator ScaledView() const { return view(); }

 private:
  Tensor data_;
  Buffer scale_;
};

/// Copies bytes between host and the context's device or within either, in stream order. Host
/// memory must stay valid until the stream got there; pageable host memory may make CUDA wait.
void copy_bytes(const Context& ctx, void* to, const void* from, std::size_t bytes);
/// Sets every byte to zero, in stream order.
void zero_bytes(const Context& ctx, void* data, std::size_t bytes);
/// Copies device memory to the host and waits for it.
void read_bytes_sync(const Context& ctx, void* to, const void* from, std::size_t bytes);

template <class T>
std::vector<T> read_sync(const Context& ctx, const void* from, std::size_t count) {
  std::vector<T> values(count);
  read_bytes_sync(ctx, values.data(), from, count * sizeof(T));
  return values;
}

/// Device memory filled from host values; waits for the copy, so for set-up only.
template <class T>
Buffer upload_sync(const Context& ctx, std::span<const T> values) {
  Buffer buffer(ctx, values.size_bytes());
  copy_bytes(ctx, buffer.data(), values.data(), values.size_bytes());
  ctx.synchronize();
  return buffer;
}

/// One value in device memory that a call returned; it may not be computed yet.
template <class T>
class DeviceValue {
 public:
  DeviceValue(const Context& ctx, const T* value) : ctx_(ctx), value_(value) {}
  const T* device_pointer() const { return value_; }
  /// Waits for the stream and returns the value.
  T read_sync() const {
    T value;
    read_bytes_sync(ctx_, &value, value_, sizeof(T));
    return value;
  }

 private:
  Context ctx_;
  const T* value_;
};

}  // namespace octet
