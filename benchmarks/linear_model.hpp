// SPDX-License-Identifier: Apache-2.0
// The contenders of linear_bench: forward and backward of octet::Linear, its three products alone,
// and the same products in BF16 by bare cuBLASLt.
#pragma once

#include <optional>
#include <string>

#include "bare_cublaslt.hpp"
#include "octet/nn/linear.hpp"

namespace bench {

/// y[T, N] = x[T, K] w[N, K]^T and its gradients.
struct LinearShape {
  std::int64_t t = 0, k = 0, n = 0;
  /// dw is a sum of micro-batches in FP32, added to; else BF16, overwritten.
  bool main_grad = false;

  std::string name() const;
  double flops() const { return 6.0 * static_cast<double>(t * k) * static_cast<double>(n); }
};

/// Normally distributed x, dy and w in BF16, and the outputs that all contenders write in turn.
struct LinearTensors {
  LinearTensors(const octet::Context& ctx, const LinearShape& shape);
  octet::Tensor x, dy, w, y, dx, dw;
};

/// An FP8 matrix and its transposed copy with current scaling.
struct Cut {
  Cut(const octet::Context& ctx, const octet::TensorView& in, octet::DType dtype,
      octet::Granularity granularity);
  octet::TensorScale* tensor_scale() const { return row_scales.as<octet::TensorScale>(); }
  bool is_tensor() const { return granularity == octet::Granularity::tensor; }

  octet::Granularity granularity;
  octet::Tensor rows, columns;
  octet::Buffer row_scales, column_scales;  ///< the latter of blocks only
};

/// The operands of a recipe's FP8 products, cast beforehand.
struct Cuts {
  Cuts(const octet::Context& ctx, const LinearTensors& tensors, octet::Fp8Recipe recipe);
  Cut x, dy, w;
};

/// The three FP8 products as Linear asks the registry for them, without any cast.
class Fp8Products {
 public:
  Fp8Products(octet::GemmRegistry& gemms, const LinearShape& shape, const LinearTensors& tensors,
              const Cuts& cuts);
  void run() const;

 private:
  struct Product {
    octet::GemmProblem problem;
    octet::GemmArgs args;
  };
  octet::GemmRegistry& gemms_;
  std::vector<Product> products_;
};

/// The rival: y, dx and dw from BF16 operands as they lie, each with the fastest algorithm that a
/// search finds.
class Bf16Products {
 public:
  Bf16Products(const octet::Context& ctx, const LinearShape& shape, const LinearTensors& tensors);
  /// Returns how many algorithms were timed.
  int search();
  void run() const;

 private:
  BareGemm y_, dx_, dw_;
};

enum class WeightForm : std::uint8_t {
  bf16,  ///< as a trainer with BF16 weights has it: cast in every step, into both orientations
  e4m3   ///< codes and their transposed copy, as AdamW writes them
};

/// A step of training: forward, backward with dx and dw, and with delayed scaling its update.
class LinearStep {
 public:
  /// `codes` is of the weight, with a scale for the whole tensor, for WeightForm::e4m3.
  LinearStep(octet::GemmRegistry& gemms, const LinearShape& shape, const LinearTensors& tensors,
             octet::Fp8Recipe recipe, WeightForm form, const Cut& codes);
  void run();

 private:
  WeightForm form_;
  octet::Linear linear_;
  std::optional<octet::DelayedScaling> scaling_;
  octet::LinearForward forward_;
  octet::LinearBackward backward_;
};

/// Throws octet::Error unless `step` writes what `rival` does but for the rounding to FP8.
void require_agreement(const octet::Context& ctx, const LinearTensors& tensors, LinearStep& step,
                       const Bf16Products& rival);

}  // namespace bench
