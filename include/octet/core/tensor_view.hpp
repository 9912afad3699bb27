// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <iosfwd>
#include <string>

#include "octet/core/dtype.hpp"
#include "octet/core/error.hpp"

namespace octet {

enum class DeviceType : std::uint8_t { cpu, cuda };

struct Device {
  DeviceType type = DeviceType::cpu;
  int index = 0;
  bool operator==(const Device&) const = default;
};

/// "cpu" or "cuda:0".
std::string to_string(Device device);
std::ostream& operator<<(std::ostream& out, Device device);

/// Up to four dimensions, row-major. Counts are 64-bit.
class Shape {
 public:
  static constexpr int kMaxRank = 4;

  Shape() = default;
  Shape(std::initializer_list<std::int64_t> dims) {
    require(dims.size() <= static_cast<std::size_t>(kMaxRank), "a shape has ", dims.size(),
            " dimensions; at most ", kMaxRank, " are allowed");
    for (std::int64_t dim : dims) {
      require(dim >= 0, "a dimension of a shape is ", dim, "; it must not be negative");
      dims_[static_cast<std::size_t>(rank_++)] = dim;
    }
  }

  int rank() const { return rank_; }
  std::int64_t operator[](int i) const { return dims_[static_cast<std::size_t>(i)]; }
  std::int64_t numel() const {
    std::int64_t count = 1;
    for (int i = 0; i < rank_; ++i) count *= dims_[static_cast<std::size_t>(i)];
    return count;
  }
  /// Product of all dimensions but the first: the length of one row of panels and shards.
  std::int64_t row_numel() const {
    std::int64_t count = 1;
    for (int i = 1; i < rank_; ++i) count *= dims_[static_cast<std::size_t>(i)];
    return count;
  }
  bool operator==(const Shape&) const = default;

 private:
  std::array<std::int64_t, kMaxRank> dims_{};
  int rank_ = 0;
};

/// "[768, 3072]".
std::string to_string(const Shape& shape);
std::ostream& operator<<(std::ostream& out, const Shape& shape);

/// Contiguous row-major memory with a type; owns nothing.
struct TensorView {
  void* data = nullptr;
  DType dtype = DType::f32;
  Shape shape = {};
  Device device = {};

  std::int64_t numel() const { return shape.numel(); }
  std::size_t bytes() const { return static_cast<std::size_t>(numel()) * size_of(dtype); }
  bool empty() const { return data == nullptr; }
  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

/// Scale of one tensor, in device memory: stored = saturate(value * scale),
/// value = stored * scale_inv. Scales are powers of two, so scale * scale_inv is exactly 1.
/// scale_inv comes first, aligned to 16 bytes: cuBLASLt reads it there and takes no other
/// alignment.
struct alignas(16) TensorScale {
  float scale_inv = 1.0f;
  float scale = 1.0f;
  /// Largest magnitude of the tensor: of the input for a cast, of the decoded stored values for
  /// weights and optimizer states.
  float amax = 0.0f;
  /// Keeps the bytes of a scale a function of its values.
  float padding = 0.0f;
};

/// A tensor and its scale; scale is null where the dtype needs none (f32, bf16).
struct ScaledView {
  TensorView data = {};
  TensorScale* scale = nullptr;
};

}  // namespace octet
