// SPDX-License-Identifier: Apache-2.0
#include "linear_model.hpp"

#include <cmath>

#include "octet/ops/block_quantize.hpp"
#include "random_operands.hpp"

namespace bench {
namespace {

using octet::DType;
using octet::Fp8Recipe;
using octet::Granularity;
using octet::TensorView;

octet::LinearConfig config_of(const LinearShape& shape, Fp8Recipe recipe, WeightForm form) {
  // With a BF16 weight the cache is emptied before every step: that makes both copies in one read.
  return {.in_features = shape.k,
          .out_features = shape.n,
          .max_tokens = shape.t,
          .recipe = recipe,
          .weight_dtype = form == WeightForm::bf16 ? DType::bf16 : DType::e4m3,
          .cache_weight = form == WeightForm::bf16};
}

BareProblem bf16_problem(std::int64_t m, std::int64_t n, std::int64_t k) {
  return {.m = m, .n = n, .k = k, .a = CUDA_R_16BF, .b = CUDA_R_16BF};
}

BarePointers pointers_of(const TensorView& a, const TensorView& b, const TensorView& d) {
  return {a.data, b.data, nullptr, nullptr, d.data};
}

octet::Tensor normal_tensor(const octet::Context& ctx, octet::Shape shape, unsigned seed) {
  octet::Tensor tensor(ctx, DType::bf16, shape);
  fill_normal(ctx, tensor, seed);
  return tensor;
}

/// The first elements of a tensor as floats.
std::vector<float> sample(const octet::Context& ctx, const TensorView& tensor) {
  constexpr std::int64_t kMost = 1 << 16;
  TensorView part = tensor;
  part.shape = {std::min(tensor.numel(), kMost)};
  const octet::Tensor wide(ctx, DType::f32, part.shape);
  octet::convert(ctx, {part, nullptr}, wide);
  return octet::read_sync<float>(ctx, wide.view().data, static_cast<std::size_t>(part.numel()));
}

}  // namespace

std::string LinearShape::name() const {
  return std::to_string(t) + "x" + std::to_string(k) + "x" + std::to_string(n) +
         (main_grad ? ", dw added to f32" : "");
}

LinearTensors::LinearTensors(const octet::Context& ctx, const LinearShape& s)
    : x(normal_tensor(ctx, {s.t, s.k}, 1)),
      dy(normal_tensor(ctx, {s.t, s.n}, 2)),
      w(normal_tensor(ctx, {s.n, s.k}, 3)),
      y(ctx, DType::bf16, {s.t, s.n}),
      dx(ctx, DType::bf16, {s.t, s.k}),
      dw(ctx, s.main_grad ? DType::f32 : DType::bf16, {s.n, s.k}) {
  octet::zero_bytes(ctx, dw.view().data, dw.bytes());
}

Cut::Cut(const octet::Context& ctx, const TensorView& in, DType dtype, Granularity g)
    : granularity(g),
      rows(ctx, dtype, in.shape),
      columns(ctx, dtype, {in.shape[1], octet::padded_rows(in.shape[0])}) {
  if (is_tensor()) {
    const octet::TensorScale one{};
    row_scales = octet::upload_sync<octet::TensorScale>(ctx, {&one, 1});
    octet::quantize(ctx, {.in = in, .out = {rows.view(), tensor_scale()}, .transposed = columns});
    return;
  }
  const auto scales_of = [&](const octet::Shape& s) {
    return octet::Buffer(ctx, static_cast<std::size_t>(octet::scale_bytes(g, s[0], s[1])));
  };
  row_scales = scales_of(rows.view().shape);
  column_scales = scales_of(columns.view().shape);
  octet::block_quantize(
      ctx, {.in = in,
            .out = {.data = rows, .granularity = g, .scales = row_scales.data()},
            .transposed = {.data = columns, .granularity = g, .scales = column_scales.data()}});
}

Cuts::Cuts(const octet::Context& ctx, const LinearTensors& tensors, Fp8Recipe recipe)
    : x(ctx, tensors.x, DType::e4m3, octet::activation_scales(recipe)),
      dy(ctx, tensors.dy, octet::gradient_dtype(octet::default_format(recipe)),
         octet::activation_scales(recipe)),
      w(ctx, tensors.w, DType::e4m3, octet::weight_scales(recipe)) {}

Fp8Products::Fp8Products(octet::GemmRegistry& gemms, const LinearShape& s,
                         const LinearTensors& tensors, const Cuts& cuts)
    : gemms_(gemms) {
  const auto add = [&](const Cut& a, const Cut& b, bool a_columns, bool b_columns, std::int64_t k,
                       const octet::Tensor& out) {
    const TensorView& left = a_columns ? a.columns.view() : a.rows.view();
    const TensorView& right = b_columns ? b.columns.view() : b.rows.view();
    const auto leading = [k](const TensorView& view) {
      return view.shape[1] == k ? 0 : view.shape[1];
    };
    const auto scales = [](const Cut& cut, bool is_columns) {
      return is_columns && !cut.is_tensor() ? cut.column_scales.data() : cut.row_scales.data();
    };
    const octet::GemmProblem problem{.m = left.shape[0],
                                     .n = right.shape[0],
                                     .k = k,
                                     .a = left.dtype,
                                     .b = right.dtype,
                                     .d = out.view().dtype,
                                     .lda = leading(left),
                                     .ldb = leading(right),
                                     .a_scales = a.granularity,
                                     .b_scales = b.granularity,
                                     .accumulate = out.view().dtype == DType::f32};
    gemms.prepare(problem);
    products_.push_back({problem,
                         {.a = left.data,
                          .a_scales = scales(a, a_columns),
                          .b = right.data,
                          .b_scales = scales(b, b_columns),
                          .d = out.view().data}});
  };
  add(cuts.x, cuts.w, false, false, s.k, tensors.y);
  add(cuts.dy, cuts.w, false, true, s.n, tensors.dx);
  add(cuts.dy, cuts.x, true, true, octet::padded_rows(s.t), tensors.dw);
}

void Fp8Products::run() const {
  for (const Product& product : products_) gemms_.run(product.problem, product.args);
}

Bf16Products::Bf16Products(const octet::Context& ctx, const LinearShape& s,
                           const LinearTensors& tensors)
    : y_(ctx, bf16_problem(s.t, s.n, s.k), pointers_of(tensors.x, tensors.w, tensors.y)),
      dx_(
          ctx,
          [&] {
            BareProblem p = bf16_problem(s.t, s.k, s.n);
            p.b_transposed = true;
            return p;
          }(),
          pointers_of(tensors.dy, tensors.w, tensors.dx)),
      dw_(
          ctx,
          [&] {
            BareProblem p = bf16_problem(s.n, s.k, s.t);
            p.a_transposed = p.b_transposed = true;
            if (s.main_grad) p.d = CUDA_R_32F, p.accumulate = true;
            return p;
          }(),
          pointers_of(tensors.dy, tensors.x, tensors.dw)) {}

int Bf16Products::search() { return y_.search() + dx_.search() + dw_.search(); }

void Bf16Products::run() const {
  y_.run();
  dx_.run();
  dw_.run();
}

LinearStep::LinearStep(octet::GemmRegistry& gemms, const LinearShape& s,
                       const LinearTensors& tensors, Fp8Recipe recipe, WeightForm form,
                       const Cut& codes)
    : form_(form), linear_(gemms, config_of(s, recipe, form)) {
  const bool has_codes = form == WeightForm::e4m3;
  const octet::ScaledView weight = has_codes ? octet::ScaledView{codes.rows, codes.tensor_scale()}
                                             : octet::ScaledView{tensors.w, nullptr};
  forward_ = {.x = tensors.x, .weight = weight, .y = tensors.y};
  backward_ = {.dy = tensors.dy,
               .weight = weight,
               .dx = tensors.dx,
               .dw = {tensors.dw, nullptr},
               .accumulate = s.main_grad};
  if (has_codes && s.n % 16 == 0) backward_.weight_transposed = codes.columns;
  linear_.prepare(forward_, backward_);
  const auto entries = linear_.delayed_entries();
  if (!entries.empty()) {
    scaling_.emplace(gemms.context(), octet::DelayedScalingConfig{}, entries);
  }
}

void LinearStep::run() {
  if (form_ == WeightForm::bf16) linear_.weight_changed();
  linear_.forward(forward_);
  linear_.backward(backward_);
  if (scaling_) scaling_->update();
}

void require_agreement(const octet::Context& ctx, const LinearTensors& tensors, LinearStep& step,
                       const Bf16Products& rival) {
  constexpr double kMostError = 0.15;  // E5M2 keeps two bits
  const octet::Tensor* const outputs[] = {&tensors.y, &tensors.dx, &tensors.dw};
  const auto results_of = [&](const auto& work) {
    for (const octet::Tensor* out : outputs) octet::zero_bytes(ctx, out->view().data, out->bytes());
    work();
    std::vector<std::vector<float>> results;
    for (const octet::Tensor* out : outputs) results.push_back(sample(ctx, *out));
    return results;
  };
  const auto wanted = results_of([&] { rival.run(); });
  const auto got = results_of([&] { step.run(); });
  for (std::size_t i = 0; i < wanted.size(); ++i) {
    double error = 0.0, norm = 0.0;
    for (std::size_t j = 0; j < wanted[i].size(); ++j) {
      const double exact = static_cast<double>(wanted[i][j]);
      error += std::pow(static_cast<double>(got[i][j]) - exact, 2);
      norm += exact * exact;
    }
    const double relative = std::sqrt(error / norm);
    constexpr const char* kNames[] = {"y", "dx", "dw"};
    octet::require(relative < kMostError, kNames[i], " of Linear differs from that of BF16 by ",
                   100.0 * relative, " %");
  }
}

}  // namespace bench
