// SPDX-License-Identifier: Apache-2.0
// What casts refuse alike.
#pragma once

#include <initializer_list>

#include "octet/core/block_scales.hpp"
#include "octet/runtime/context.hpp"
#include "overlap.hpp"

namespace octet::detail {

/// Any of the types that are not FP8: f32, bf16, f16.
inline bool is_wide(DType dtype) { return !is_fp8(dtype); }

inline void check_device(const Context& ctx, const TensorView& view, const char* op,
                         const char* what) {
  require(view.device == ctx.device(), op, ": ", what, " is on ", view.device,
          " but the context is on ", ctx.device());
  require(view.data != nullptr || view.numel() == 0, op, ": ", what, " of shape ", view.shape,
          " has a null pointer");
}

inline void check_wide(DType dtype, const char* op, const char* what) {
  require(is_wide(dtype), op, ": ", what, " is ", name_of(dtype), "; allowed are f32, bf16, f16");
}

/// Memory that a cast reads or writes, under the name that errors give it.
struct NamedBytes {
  const char* name;
  const void* data;
  std::size_t bytes;
};

inline void check_apart(const char* op, const NamedBytes& a, const NamedBytes& b) {
  if (a.data == nullptr || b.data == nullptr || a.bytes == 0 || b.bytes == 0) return;
  require(!overlap(a.data, a.bytes, b.data, b.bytes), op, ": ", a.name, " (", a.bytes, " bytes at ",
          a.data, ") overlaps ", b.name, " (", b.bytes, " bytes at ", b.data,
          "); they must be apart");
}

/// Two outputs, or an output and what is read, must not share a byte.
inline void check_apart(const char* op, std::initializer_list<NamedBytes> all) {
  for (const NamedBytes& a : all) {
    for (const NamedBytes& b : all) {
      if (&b == &a) break;
      check_apart(op, a, b);
    }
  }
}
/// The same where what is read may share bytes with what else is read.
inline void check_apart(const char* op, std::initializer_list<NamedBytes> written,
                        std::initializer_list<NamedBytes> read) {
  check_apart(op, written);
  for (const NamedBytes& out : written) {
    for (const NamedBytes& in : read) check_apart(op, out, in);
  }
}

inline NamedBytes named(const char* name, const TensorView& view) {
  return {name, view.data, view.empty() ? 0 : view.bytes()};
}

inline std::size_t scale_bytes_of(const BlockScaledView& view) {
  const Shape& shape = view.data.shape;
  return static_cast<std::size_t>(
      scale_bytes(view.granularity, shape[0], shape[1], view.mx_layout));
}
inline NamedBytes scales_of(const char* name, const BlockScaledView& view) {
  return {name, view.scales, view.data.empty() ? 0 : scale_bytes_of(view)};
}

/// QuantizeArgs::column_sums.
inline void check_column_sums(const Context& ctx, const TensorView& in, const TensorView& sums,
                              std::int64_t sum_rows, const char* op) {
  if (sums.empty()) return;
  check_device(ctx, sums, op, "column_sums");
  require(in.shape.rank() == 2, op, ": column_sums need a matrix, not shape ", in.shape);
  const Shape expected{sum_rows, in.shape[1]};
  require(sums.dtype == DType::f32 && sums.shape == expected, op, ": column_sums are ",
          name_of(sums.dtype), " ", sums.shape, "; they must be f32 ", expected);
}

}  // namespace octet::detail
