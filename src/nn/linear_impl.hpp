// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <unordered_map>

#include "octet/nn/linear.hpp"
#include "octet/ops/block_quantize.hpp"

namespace octet {

/// A factor of a product as a GEMM takes it.
struct LinearOperand {
  TensorView data = {};
  /// Of FP8 data, see Granularity.
  const void* scales = nullptr;
  Granularity granularity = Granularity::tensor;
  /// Stored [k, rows] instead of [rows, k].
  bool transposed = false;
};

/// How a product is summed, and what is done to the sums before they are stored.
struct LinearEpilogue {
  const void* bias = nullptr;  ///< bf16
  Activation activation = Activation::none;
  void* aux = nullptr;  ///< bf16
  bool accumulate = false;
  Accumulation accumulation = Accumulation::promoted;
};

/// linear_checks.cpp: throws octet::Error naming the field.
void check_linear_config(const LinearConfig& config);

/// linear.cpp calls the casts (linear_casts.cpp) and products (linear_products.cpp) after the
/// checks (linear_checks.cpp).
struct Linear::Impl {
  Impl(GemmRegistry& registry, const LinearConfig& c);

  GemmRegistry& gemms;
  Context ctx;
  LinearConfig config;
  Fp8Format format;  ///< the configuration's or its default

  std::int64_t tokens = -1;                        ///< of the last forward that saved; none yet
  bool x_has_scale = false, dy_has_scale = false;  ///< delayed: of a recorded cast before
  bool rows_kept = false, columns_kept = false;    ///< of the weight, with cache_weight

  Tensor saved_x;                  ///< bf16: [T, K]; fp8: transposed, [K, T padded]
  Buffer saved_x_scales;           ///< of blocks
  Tensor pre_activation;           ///< bf16 [T, N], with gelu
  Tensor kept_rows, kept_columns;  ///< of the weight, with cache_weight
  Buffer kept_row_scales, kept_column_scales;
  Buffer ones;    ///< bf16, which sum the columns of dy where no cast does
  Buffer scales;  ///< TensorScale[kScales]

  /// Scales of whole tensors. They outlive a call because a cast of a tensor that is not finite
  /// keeps the scale before it.
  enum Slot : std::uint8_t {
    kX,        ///< delayed: what the steps have left
    kDy,       ///< of gradients of activations
    kSavedX,   ///< of the saved activation, whatever a step has made of kX since
    kPassedX,  ///< of an activation that is not saved or not recorded
    kWeight,   ///< of a weight that is cast here, or a copy of its scale with cache_weight
    kScales
  };

  bool is_delayed() const { return config.fp8 && config.recipe == Fp8Recipe::delayed; }
  bool has_blocks() const { return config.fp8 && !is_per_tensor(config.recipe); }
  DType operand_dtype() const { return config.fp8 ? DType::e4m3 : DType::bf16; }
  DType dy_dtype() const { return config.fp8 ? gradient_dtype(format) : DType::bf16; }
  Granularity x_granularity() const { return activation_scales(config.recipe); }
  Granularity w_granularity() const { return weight_scales(config.recipe); }
  TensorScale* scale(Slot slot) const { return scales.as<TensorScale>() + slot; }
  /// Rows that a cast writes: with blocks, GEMMs may want a multiple of 16 (see run()).
  std::int64_t cut_rows(std::int64_t rows) const { return has_blocks() ? padded_rows(rows) : rows; }

  // linear_checks.cpp
  void check(const char* what, const TensorView& view, Shape shape,
             std::initializer_list<DType> allowed) const;
  void check_weight(const ScaledView& weight, const BlockScaledView& blocks) const;
  void check_block_weight(const char* what, const BlockScaledView& view, Shape shape) const;
  void check_transposed(const LinearBackward& args) const;
  void check(const LinearForward& args) const;
  void check(const LinearBackward& args, std::int64_t count) const;
  /// Of calls that run: prepare() takes views of any memory.
  void check_memory(const LinearForward& args) const;
  void check_memory(const LinearBackward& args) const;

  // linear_casts.cpp
  void allocate();
  std::size_t forward_bytes() const;
  std::size_t backward_bytes() const;

  struct CutOptions {
    TensorScale* scale = nullptr;  ///< of the whole tensor, by recipes that have one
    TensorScale* scale_copy = nullptr;
    Scaling scaling = Scaling::current;
    CastCounters* counters = nullptr;
    TensorView column_sums = {};
  };
  void cut(const TensorView& in, const BlockScaledView& rows, const BlockScaledView& columns,
           const CutOptions& options) const;
  LinearOperand cast_x(const LinearForward& args, WorkspaceScope& scope);
  BlockScaledView saved_cut(std::int64_t count) const;
  LinearOperand saved() const;
  TensorView gradient_of_pre_activation(const TensorView& dy, WorkspaceScope& scope) const;
  struct Gradient {
    LinearOperand rows, columns;  ///< for dx and for dw
  };
  Gradient cast_dy(const LinearBackward& args, const TensorView& dy, WorkspaceScope& scope);
  void sum_dbias(const LinearBackward& args, const TensorView& sums) const;

  BlockScaledView kept_cut(bool columns) const;
  const TensorScale* weight_scale(const ScaledView& weight) const;
  void cast_weight(const TensorView& weight, const BlockScaledView& rows,
                   const BlockScaledView& columns);
  LinearOperand weight_as_bf16(const ScaledView& weight, WorkspaceScope& scope);
  LinearOperand weight_rows(const LinearForward& args, WorkspaceScope& scope);
  LinearOperand weight_columns(const LinearBackward& args, WorkspaceScope& scope);
  LinearOperand block_weight_columns(const LinearBackward& args, const BlockScaledView& columns);

  // linear_products.cpp
  struct Sizes {
    std::int64_t m, n, k;
  };
  struct Product {
    GemmProblem problem;
    bool can_pad;  ///< A has rows of zeros after its last, up to a multiple of 16
    const char* name = "";
  };
  /// How a product is run: as it is asked for, or by a GEMM of more rows or without the epilogue.
  struct Route {
    bool padded = false;    ///< m rounded up to a multiple of 16, into scratch
    bool stepwise = false;  ///< sums into FP32 scratch, then the epilogue as a step of its own
    std::size_t bytes = 0;  ///< of scratch, that of the GEMM included
  };
  /// Of products that cannot pad, and of those that can.
  std::unordered_map<GemmProblem, Route, GemmProblemHash> routes[2];
  GemmProblem problem_of(const LinearOperand& a, const LinearOperand& b, const Sizes& sizes,
                         DType d, const LinearEpilogue& epilogue) const;
  GemmProblem routed(const GemmProblem& problem, const Route& route) const;
  const Route& route_of(const Product& product);
  Route find_route(const Product& product) const;
  std::vector<Product> products_of(const LinearForward& forward,
                                   const LinearBackward& backward) const;
  void choose_routes();
  void prepare(const LinearForward& forward, const LinearBackward& backward);
  std::string report(const LinearForward& forward, const LinearBackward& backward);
  void reserve(std::size_t product_bytes);
  void run(const Product& product, const GemmArgs& args);
  void multiply(const LinearOperand& a, const LinearOperand& b, std::int64_t k,
                const TensorView& out, const LinearEpilogue& epilogue = {});
  void multiply_dw(const LinearOperand& dy, const ScaledView& dw, bool accumulate,
                   WorkspaceScope& scope);
  void multiply_dbias(const LinearOperand& dy, const TensorView& dbias, bool accumulate);
};

}  // namespace octet
