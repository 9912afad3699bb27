// SPDX-License-Identifier: Apache-2.0
#include "gemm/matrices.hpp"
#include "octet/gemm/gemm.hpp"
#include "support/catch.hpp"
#include "support/compare.hpp"
#include "support/errors.hpp"

#ifdef _OPENMP
#include <omp.h>
#endif

using namespace octet;
using namespace octet::test;

namespace {

const DType kOperands[] = {DType::f32, DType::bf16, DType::f16, DType::e4m3, DType::e5m2};
const DType kOutputs[] = {DType::f32, DType::bf16};

Bytes run_reference(const std::string& kernel, const GemmProblem& p, const Matrix& a,
                    const Matrix& b) {
  const Context ctx = Context::cpu();
  const auto backend = make_reference_gemm(kernel);
  return multiply(ctx, p, a, b, [&](const GemmArgs& args) { backend->run(ctx, p, args); });
}

struct Size {
  std::int64_t m, n, k;
};

/// Every size at every place, beside others that are neither round nor large.
std::vector<Size> sizes() {
  std::vector<Size> list;
  for (std::int64_t s :
       {1, 2, 3, 4, 5, 11, 12, 13, 15, 16, 17, 31, 32, 33, 71, 73, 127, 128, 129, 257}) {
    list.push_back({s, 17, 33});
    list.push_back({6, s, 33});
    list.push_back({5, 7, s});
    list.push_back({s, s, 9});
  }
  list.push_back({1, 1, 1});
  list.push_back({257, 129, 131});
  return list;
}

}  // namespace

TEST_CASE("reference GEMM: exact for small integers in every dtype and layout") {
  const std::int64_t m = 29, n = 37, k = 133;
  for (DType a_type : kOperands) {
    for (DType b_type : kOperands) {
      for (int layout = 0; layout < 4; ++layout) {
        const Matrix a = integer_matrix(a_type, (layout & 1) != 0, 0.125f, m, k, 1);
        const Matrix b = integer_matrix(b_type, (layout & 2) != 0, 32.0f, n, k, 2);
        for (DType d : kOutputs) {
          const GemmProblem p = problem_of(m, n, k, a, b, d);
          INFO(to_string(p));
          CHECK(first_difference(run_reference("", p, a, b), exact_product(p, a, b)) == "");
        }
      }
    }
  }
}

TEST_CASE("reference GEMM: every kernel adds in the promised order") {
  const DType a_type = GENERATE(DType::f32, DType::e4m3);
  const DType b_type = GENERATE(DType::bf16, DType::e5m2);
  const int layout = GENERATE(0, 3);
  const DType d = a_type == DType::f32 ? DType::f32 : DType::bf16;
  for (const Size& s : sizes()) {
    const Matrix a = normal_matrix(a_type, (layout & 1) != 0, 0.25f, s.m, s.k, 3);
    const Matrix b = normal_matrix(b_type, (layout & 2) != 0, 0.5f, s.n, s.k, 4);
    const GemmProblem p = problem_of(s.m, s.n, s.k, a, b, d);
    const Bytes expected = ordered_product(p, a, b);
    for (const std::string& kernel : reference_gemm_kernels()) {
      INFO(to_string(p) << " kernel " << kernel);
      REQUIRE(first_difference(run_reference(kernel, p, a, b), expected) == "");
    }
  }
}

TEST_CASE("reference GEMM: more columns and a deeper k than are packed at a time") {
  const std::int64_t m = 7, n = 301, k = 4100;
  for (bool transposed : {false, true}) {
    const Matrix a = normal_matrix(DType::e4m3, transposed, 0.5f, m, k, 5);
    const Matrix b = normal_matrix(DType::f32, transposed, 1.0f, n, k, 6);
    const GemmProblem p = problem_of(m, n, k, a, b, DType::f32);
    CHECK(first_difference(run_reference("", p, a, b), ordered_product(p, a, b)) == "");
  }
}

TEST_CASE("reference GEMM: one backend serves problems of different sizes in turn") {
  const Context ctx = Context::cpu();
  const auto backend = make_reference_gemm();
  for (std::int64_t s : {100, 3, 260, 40}) {
    const Matrix a = normal_matrix(DType::bf16, false, 1.0f, s, s + 1, 7);
    const Matrix b = normal_matrix(DType::bf16, true, 1.0f, 2 * s, s + 1, 8);
    const GemmProblem p = problem_of(s, 2 * s, s + 1, a, b, DType::f32);
    const Bytes d =
        multiply(ctx, p, a, b, [&](const GemmArgs& args) { backend->run(ctx, p, args); });
    CHECK(first_difference(d, ordered_product(p, a, b)) == "");
  }
}

TEST_CASE("reference GEMM: within the error bound of its order of summation") {
  for (DType type : kOperands) {
    for (DType d : kOutputs) {
      const std::int64_t m = 20, n = 40, k = 1000;
      const Matrix a = normal_matrix(type, false, 0.5f, m, k, 9);
      const Matrix b = normal_matrix(type, false, 2.0f, n, k, 10);
      const GemmProblem p = problem_of(m, n, k, a, b, d);
      const double roundings = 128 + 8;  // within a block, and over the blocks
      CHECK(beyond_bound(p, a, b, run_reference("", p, a, b), roundings * std::ldexp(1.0, -24)) ==
            "");
    }
  }
}

#ifdef _OPENMP
TEST_CASE("reference GEMM: the number of threads cannot be seen") {
  const int before = omp_get_max_threads();
  for (const Size& s : {Size{150, 130, 140}, Size{1, 600, 600}, Size{5, 300, 400}}) {
    const Matrix a = normal_matrix(DType::e4m3, false, 0.5f, s.m, s.k, 11);
    const Matrix b = normal_matrix(DType::e4m3, false, 0.5f, s.n, s.k, 12);
    const GemmProblem p = problem_of(s.m, s.n, s.k, a, b, DType::f32);
    const Bytes expected = ordered_product(p, a, b);
    for (int threads : {1, 2, 3, 5}) {
      omp_set_num_threads(threads);
      INFO(to_string(p) << " threads " << threads);
      CHECK(first_difference(run_reference("", p, a, b), expected) == "");
    }
  }
  omp_set_num_threads(before);
}
#endif

TEST_CASE("reference GEMM: NaN and infinity reach D, and only the elements they touch") {
  const std::int64_t m = 14, n = 35, k = 130;
  std::vector<float> values = normal_values(static_cast<std::size_t>(m * k), 13);
  values[static_cast<std::size_t>(2 * k + 5)] = NAN;
  values[static_cast<std::size_t>(3 * k + 129)] = INFINITY;
  const Matrix a = make_matrix(DType::f32, false, 1.0f, m, k, values);
  std::vector<float> factors(static_cast<std::size_t>(n * k), 1.0f);
  factors[static_cast<std::size_t>(4 * k + 129)] = 0.0f;  // infinity times zero
  const Matrix b = make_matrix(DType::f32, false, 1.0f, n, k, factors);
  const GemmProblem p = problem_of(m, n, k, a, b, DType::f32);
  const Bytes d = run_reference("", p, a, b);
  for (std::int64_t j = 0; j < n; ++j) {
    CHECK(std::isnan(decode_at(d, p.d, 2 * n + j)));
    CHECK(std::isnan(decode_at(d, p.d, 3 * n + j)) == (j == 4));
    CHECK(std::isinf(decode_at(d, p.d, 3 * n + j)) == (j != 4));
    CHECK(std::isfinite(decode_at(d, p.d, 4 * n + j)));
  }
  for (const std::string& kernel : reference_gemm_kernels()) {
    CHECK(first_difference(run_reference(kernel, p, a, b), d) == "");
  }
}

TEST_CASE("reference GEMM: FP32 subnormals are kept") {
  const Matrix a = make_matrix(DType::f32, false, 1.0f, 1, 1, {std::ldexp(1.0f, -140)});
  const Matrix b = make_matrix(DType::f32, false, 1.0f, 1, 1, {0.5f});
  const GemmProblem p = problem_of(1, 1, 1, a, b, DType::f32);
  for (const std::string& kernel : reference_gemm_kernels()) {
    CHECK(decode_at(run_reference(kernel, p, a, b), DType::f32, 0) == std::ldexp(1.0, -141));
  }
}

TEST_CASE("reference GEMM: kernels by name, and what it says no to") {
  CHECK(reference_gemm_kernels().back() == "portable");
  CHECK(missing(error_of([] { make_reference_gemm("sse"); }), {"\"sse\"", "portable"}) == "");
  const auto backend = make_reference_gemm();
  CHECK(backend->name() == "reference");
  const auto reason = [&](GemmProblem p, GemmDevice device) {
    const GemmSupport support = backend->query(p, device);
    return support.verdict == GemmVerdict::native ? "yes" : support.reason;
  };
  CHECK(reason({.m = 1, .n = 1, .k = 1}, {}) == "yes");
  const auto refuses = [&](const GemmProblem& p, std::initializer_list<std::string> words) {
    CHECK(missing(reason(p, {}), words) == "");
  };
  const GemmProblem p{.m = 4, .n = 8, .k = 16};
  const auto with = [&](auto change) {
    GemmProblem changed = p;
    change(changed);
    return changed;
  };
  refuses(with([](GemmProblem& x) { x.lda = 15; }), {"lda is 15", "16"});
  refuses(with([](GemmProblem& x) { x.lda = -1; }), {"lda is -1", "16"});
  refuses(with([](GemmProblem& x) { x.a_transposed = true, x.lda = 3; }), {"lda is 3", "4"});
  refuses(with([](GemmProblem& x) { x.ldb = 15; }), {"ldb is 15", "16"});
  refuses(with([](GemmProblem& x) { x.b_transposed = true, x.ldb = 7; }), {"ldb is 7", "8"});
  refuses(with([](GemmProblem& x) { x.ldd = 7; }), {"ldd is 7", "8"});
  for (Granularity g :
       {Granularity::row, Granularity::row_block, Granularity::tile, Granularity::mx}) {
    const std::string name(name_of(g));
    refuses(with([&](GemmProblem& x) { x.a_transposed = true, x.a_scales = g; }),
            {"a is transposed with " + name + " scales", "tensor"});
    refuses(with([&](GemmProblem& x) { x.b_transposed = true, x.b_scales = g; }),
            {"b is transposed with " + name + " scales", "tensor"});
    refuses(with([&](GemmProblem& x) { x.b_scales = g, x.b = DType::bf16; }),
            {"b_scales are " + name, "b is bf16", "tensor"});
  }
  for (DType d : {DType::f16, DType::e4m3, DType::e5m2}) {
    refuses(with([&](GemmProblem& x) { x.accumulate = true, x.d = d; }),
            {"accumulate", "d is " + std::string(name_of(d)), "f32 and bf16"});
    CHECK(reason(with([&](GemmProblem& x) { x.d = d; }), {}) == "yes");
  }
  refuses(with([](GemmProblem& x) { x.bias = true, x.bias_type = DType::e4m3; }),
          {"bias_type is e4m3", "f16"});
  refuses(with([](GemmProblem& x) { x.aux = true; }), {"aux is set", "none", "gelu"});
  refuses(with([](GemmProblem& x) { x.activation = Activation::dgelu; }),
          {"dgelu", "aux is not set"});
  refuses(with([](GemmProblem& x) {
            x.activation = Activation::gelu, x.aux = true, x.aux_type = DType::e5m2;
          }),
          {"aux_type is e5m2", "bf16"});
  CHECK(missing(reason({}, {DeviceType::cuda, 90}), {"not a CPU"}) == "");
}
