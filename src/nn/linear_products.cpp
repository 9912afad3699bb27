// SPDX-License-Identifier: Apache-2.0
// The three products of a Linear, and how each is run where no GEMM does it as it is asked for.
#include <algorithm>

#include "linear_impl.hpp"
#include "octet/gemm/epilogue.hpp"

namespace octet {
namespace {

LinearOperand shape_of(DType dtype, Shape shape, Granularity granularity, bool transposed = false) {
  return {{nullptr, dtype, shape, {}}, nullptr, granularity, transposed};
}

/// Whether A has rows of zeros after its last, up to a multiple of 16.
bool can_pad(const LinearOperand& a, std::int64_t m) {
  return !a.transposed && a.data.shape[0] != m && a.data.shape[0] == padded_rows(m);
}

}  // namespace

GemmProblem Linear::Impl::problem_of(const LinearOperand& a, const LinearOperand& b,
                                     const Sizes& sizes, DType d,
                                     const LinearEpilogue& epilogue) const {
  const auto [m, n, k] = sizes;
  // 0 where rows follow each other without a gap, so that equal problems have one plan.
  const auto leading = [](const LinearOperand& operand, std::int64_t row) {
    return operand.data.shape[1] == row ? 0 : operand.data.shape[1];
  };
  return {.m = m,
          .n = n,
          .k = k,
          .a = a.data.dtype,
          .b = b.data.dtype,
          .d = d,
          .a_transposed = a.transposed,
          .b_transposed = b.transposed,
          .lda = leading(a, a.transposed ? m : k),
          .ldb = leading(b, b.transposed ? n : k),
          .a_scales = a.granularity,
          .b_scales = b.granularity,
          .accumulation = epilogue.accumulation,
          .accumulate = epilogue.accumulate,
          .bias = epilogue.bias != nullptr,
          .activation = epilogue.activation,
          .aux = epilogue.aux != nullptr};
}

/// What the GEMM of a route is asked for.
GemmProblem Linear::Impl::routed(const GemmProblem& problem, const Route& route) const {
  GemmProblem inner = problem;
  if (route.padded) inner.m = padded_rows(problem.m);
  if (route.stepwise) {
    inner.d = DType::f32;
    inner.accumulate = inner.bias = inner.aux = false;
    inner.activation = Activation::none;
  }
  return inner;
}

/// The first of these that a backend does without conversions, else the first that one does at all:
/// the problem as it is, one with further rows, one whose epilogue is a step of its own, both.
Linear::Impl::Route Linear::Impl::find_route(const Product& product) const {
  const GemmProblem& problem = product.problem;
  const bool has_epilogue =
      problem.accumulate || problem.bias || problem.activation != Activation::none;
  std::vector<Route> candidates = {{}};
  // The caller's aux and what D holds already have no further rows.
  if (product.can_pad && !problem.aux && !problem.accumulate)
    candidates.push_back({.padded = true});
  if (has_epilogue) candidates.push_back({.stepwise = true});
  if (has_epilogue && product.can_pad) candidates.push_back({.padded = true, .stepwise = true});
  std::string report;
  for (GemmVerdict wanted : {GemmVerdict::native, GemmVerdict::with_conversion}) {
    for (Route route : candidates) {
      const GemmProblem inner = routed(problem, route);
      const GemmRegistry::Choice choice = gemms.choose(inner);
      if (choice.backend != nullptr && choice.support.verdict == wanted) {
        route.bytes = WorkspaceScope::padded(choice.support.workspace_bytes);
        if (route.padded || route.stepwise) {
          const auto count = static_cast<std::size_t>(inner.m * inner.n);
          route.bytes += WorkspaceScope::padded(count * size_of(inner.d));
        }
        return route;
      }
      if (wanted == GemmVerdict::native) report += to_string(inner) + "\n" + choice.report;
    }
  }
  fail("Linear: no backend can run ", problem, "; asked were\n", report);
}

const Linear::Impl::Route& Linear::Impl::route_of(const Product& product) {
  auto& known = routes[product.can_pad ? 1 : 0];
  auto found = known.find(product.problem);
  if (found == known.end()) found = known.emplace(product.problem, find_route(product)).first;
  return found->second;
}

/// The products of two calls, of which shapes, dtypes and what is given at all count.
std::vector<Linear::Impl::Product> Linear::Impl::products_of(const LinearForward& forward,
                                                             const LinearBackward& backward) const {
  const std::int64_t t = forward.x.shape[0], k = config.in_features, n = config.out_features;
  const std::int64_t summed = config.fp8 ? padded_rows(t) : t;
  const Granularity x = x_granularity(), w = w_granularity();
  const DType dtype = operand_dtype();
  std::vector<Product> list;
  const auto add = [&](const char* name, const LinearOperand& a, const LinearOperand& b,
                       const Sizes& sizes, DType d, const LinearEpilogue& epilogue) {
    if (sizes.m == 0 || sizes.n == 0 || sizes.k == 0) return;
    list.push_back({problem_of(a, b, sizes, d, epilogue), can_pad(a, sizes.m), name});
  };
  void* const given = scales.data();  // any pointer that is not null
  add("y", shape_of(dtype, {cut_rows(t), k}, x), shape_of(dtype, {n, k}, w), {t, n, k},
      forward.y.dtype,
      {.bias = config.bias ? given : nullptr,
       .activation = config.gelu ? Activation::gelu : Activation::none,
       .aux = config.gelu && forward.save_for_backward ? given : nullptr,
       .accumulation = config.forward_accumulation});
  if (!backward.dx.empty()) {
    const bool dgelu = !backward.input_pre_activation.empty();
    add("dx", shape_of(dy_dtype(), {cut_rows(t), n}, x),
        config.fp8 ? shape_of(dtype, {k, padded_rows(n)}, w) : shape_of(dtype, {n, k}, w, true),
        {t, k, n}, backward.dx.dtype,
        {.activation = dgelu ? Activation::dgelu : Activation::none,
         .aux = dgelu ? given : nullptr});
  }
  const LinearOperand dy_columns =
      config.fp8 ? shape_of(dy_dtype(), {n, summed}, x) : shape_of(dtype, {t, n}, x, true);
  const LinearEpilogue sum{.accumulate = backward.accumulate};
  if (!backward.dw.data.empty()) {
    const DType d = backward.dw.data.dtype;
    add("dw", dy_columns,
        config.fp8 ? shape_of(dtype, {k, summed}, x) : shape_of(dtype, {t, k}, x, true),
        {n, k, summed}, d == DType::e4m3 ? DType::bf16 : d, sum);
  }
  if (!backward.dbias.empty() && !config.fp8) {
    add("dbias", shape_of(dtype, {1, t}, x), dy_columns, {1, n, t}, backward.dbias.dtype, sum);
  }
  return list;
}

/// Chooses for every product that a call may ask for, and reserves for the one that takes most.
void Linear::Impl::choose_routes() {
  std::size_t bytes = 0;
  const auto view = [&](DType dtype, Shape shape) {
    return TensorView{scales.data(), dtype, shape, ctx.device()};
  };
  // A token count that is odd may take another route.
  for (std::int64_t t : {config.max_tokens, config.max_tokens - 1}) {
    if (t < 1) continue;
    for (DType d : {DType::f32, DType::bf16}) {
      for (bool more : {false, true}) {
        const LinearForward forward{
            .x = view(d, {t, 1}), .y = view(d, {}), .save_for_backward = more};
        LinearBackward backward{.dx = view(d, {}),
                                .dw = {view(d, {}), nullptr},
                                .dbias = view(d, {}),
                                .accumulate = more};
        if (more) backward.input_pre_activation = backward.dx;
        for (const Product& product : products_of(forward, backward)) {
          bytes = std::max(bytes, route_of(product).bytes);
        }
      }
    }
  }
  reserve(bytes);
}

void Linear::Impl::reserve(std::size_t product_bytes) {
  ctx.reserve_workspace(std::max(forward_bytes(), backward_bytes()) + product_bytes);
}

void Linear::Impl::prepare(const LinearForward& forward, const LinearBackward& backward) {
  std::size_t bytes = 0;
  for (const Product& product : products_of(forward, backward)) {
    gemms.prepare(routed(product.problem, route_of(product)));
    // Another backend may have turned out to be the fastest, with scratch of its own.
    routes[product.can_pad ? 1 : 0].erase(product.problem);
    bytes = std::max(bytes, route_of(product).bytes);
  }
  reserve(bytes);
}

std::string Linear::Impl::report(const LinearForward& forward, const LinearBackward& backward) {
  std::string text;
  for (const Product& product : products_of(forward, backward)) {
    const Route& route = route_of(product);
    const GemmProblem inner = routed(product.problem, route);
    const GemmRegistry::Choice choice = gemms.choose(inner);
    require(choice.backend != nullptr, inner, ": no backend can run it\n", choice.report);
    text += std::string(product.name) + ": " + to_string(product.problem) + ", by " +
            choice.backend->name();
    if (route.padded) text += ", with rows of zeros up to a multiple of 16";
    if (route.stepwise) text += ", what follows the sum as a step of its own";
    text += "\n" + choice.report;
  }
  return text;
}

void Linear::Impl::run(const Product& product, const GemmArgs& args) {
  const GemmProblem& problem = product.problem;
  if (problem.m == 0 || problem.n == 0 || problem.k == 0) return gemms.run(problem, args);
  const Route& route = route_of(product);
  if (!route.padded && !route.stepwise) return gemms.run(problem, args);
  WorkspaceScope scope(ctx);
  const GemmProblem inner = routed(problem, route);
  GemmArgs inner_args = args;
  const TensorView scratch = scope.take(inner.d, {inner.m, inner.n});
  inner_args.d = scratch.data;
  if (!inner.bias) inner_args.bias = nullptr;
  if (!inner.aux) inner_args.aux = nullptr;
  gemms.run(inner, inner_args);
  if (route.stepwise) {
    apply_epilogue(ctx, problem, scratch.as<const float>(), args);
  } else {
    const auto count = static_cast<std::size_t>(problem.m * problem.n);
    copy_bytes(ctx, args.d, scratch.data, count * size_of(problem.d));
  }
}

void Linear::Impl::multiply(const LinearOperand& a, const LinearOperand& b, std::int64_t k,
                            const TensorView& out, const LinearEpilogue& epilogue) {
  const Sizes sizes{out.shape[0], out.shape[1], k};
  run({problem_of(a, b, sizes, out.dtype, epilogue), can_pad(a, sizes.m)}, {.a = a.data.data,
                                                                            .a_scales = a.scales,
                                                                            .b = b.data.data,
                                                                            .b_scales = b.scales,
                                                                            .d = out.data,
                                                                            .bias = epilogue.bias,
                                                                            .aux = epilogue.aux});
}

void Linear::Impl::multiply_dw(const LinearOperand& dy, const ScaledView& dw, bool accumulate,
                               WorkspaceScope& scope) {
  const LinearOperand x = saved();
  const std::int64_t summed = config.fp8 ? padded_rows(tokens) : tokens;
  if (dw.data.dtype != DType::e4m3) {
    return multiply(dy, x, summed, dw.data, {.accumulate = accumulate});
  }
  if (dw.data.numel() == 0) return;
  const TensorView product = scope.take(DType::bf16, dw.data.shape);
  multiply(dy, x, summed, product);
  quantize(ctx, {.in = product, .out = dw, .nonfinite = config.nonfinite});
}

/// Sums the columns of dy as a product with ones, where no cast does it on the way.
void Linear::Impl::multiply_dbias(const LinearOperand& dy, const TensorView& dbias,
                                  bool accumulate) {
  TensorView out = dbias;
  out.shape = {1, dbias.shape[0]};
  const TensorView row{ones.data(), DType::bf16, {1, tokens}, ctx.device()};
  multiply({row}, dy, tokens, out, {.accumulate = accumulate});
}

}  // namespace octet
