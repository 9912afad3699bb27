// SPDX-License-Identifier: Apache-2.0
// What cuBLASLt itself computes, with no other backend to stand in for it: scales of every
// granularity, what comes after the sum, and the same bits on every stream.
#include <cuda_runtime_api.h>

#include <array>
#include <map>

#include "gemm/cases.hpp"
#include "support/catch.hpp"
#include "support/compare.hpp"

using namespace octet;
using namespace octet::test;

namespace {

/// A registry that asks cuBLASLt alone.
class Vendor {
 public:
  explicit Vendor(const Context& ctx) : ctx_(ctx), gemms_(ctx) { gemms_.force("cublaslt"); }
  bool takes(const GemmProblem& p) const { return gemms_.choose(p).backend != nullptr; }
  Result run(const Case& c) {
    ctx_.reserve_workspace(gemms_.choose(c.p).support.workspace_bytes);
    return run_case(ctx_, c, [&](const GemmArgs& args) { gemms_.run(c.p, args); });
  }
  GemmRegistry& gemms() { return gemms_; }

 private:
  Context ctx_;
  GemmRegistry gemms_;
};

double vendor_error(const GemmProblem& p) {
  return std::max(vendor_activation_error(p.activation), vendor_accumulate_error(p));
}

/// Everything that can come after a sum of FP8 operands, with scales of the tensor or of blocks.
std::vector<GemmProblem> problems(std::int64_t m, std::int64_t n, std::int64_t k) {
  std::vector<GemmProblem> list;
  for (DType d : {DType::f32, DType::bf16, DType::f16, DType::e4m3, DType::e5m2}) {
    for (bool blocks : {false, true}) {
      for (DType bias : {DType::bf16, DType::f32}) {
        for (int bits = 0; bits < 24; ++bits) {
          GemmProblem p{.m = m, .n = n, .k = k, .d = d, .bias_type = bias};
          if (blocks) p.a_scales = Granularity::row_block, p.b_scales = Granularity::tile;
          p.bias = (bits & 1) != 0, p.accumulate = (bits & 2) != 0;
          if ((bits & 4) != 0) p.ldd = n + 16;
          p.activation = static_cast<Activation>(bits / 8);
          p.aux = p.activation == Activation::dgelu ||
                  (p.activation == Activation::gelu && bias == DType::bf16);
          if (p.accumulate && d != DType::f32 && d != DType::bf16) continue;
          if (!p.bias && bias == DType::f32) continue;
          list.push_back(p);
        }
      }
    }
  }
  return list;
}

bool is_missing() {
  if (cuda_device_count() > 0) return false;
  WARN("skipped: no CUDA device");
  return true;
}

}  // namespace

TEST_CASE("cuBLASLt: every pair of scales that it takes, whole numbers: exact") {
  if (is_missing()) return;
  Vendor vendor(Context::cuda(0, nullptr));
  std::map<Granularity, int> ran;
  for (const auto& [m, n, k] : {std::array<std::int64_t, 3>{16, 16, 16},
                                {48, 80, 272},
                                {144, 128, 128},
                                {128, 144, 400},
                                {17, 24, 144},
                                {16, 8, 48}}) {
    for (Granularity a : kGranularities) {
      for (Granularity b : kGranularities) {
        for (DType d : {DType::f32, DType::bf16}) {
          for (bool accumulate : {false, true}) {
            const GemmProblem p{.m = m,
                                .n = n,
                                .k = k,
                                .b = d == DType::f32 ? DType::e4m3 : DType::e5m2,
                                .d = d,
                                .lda = accumulate ? k + 32 : 0,
                                .ldb = accumulate ? k + 16 : 0,
                                .a_scales = a,
                                .b_scales = b,
                                .accumulate = accumulate};
            if (!vendor.takes(p)) continue;
            ++ran[a];
            const Case c = make_case(p);
            REQUIRE(mistake(c, vendor.run(c), vendor_accumulate_error(p)) == "");
          }
        }
      }
    }
  }
  if (ran.empty()) {
    WARN("skipped: the device has no FP8 products");
    return;
  }
  CHECK(ran[Granularity::tensor] == 6 * 4);
  // Of one architecture these, of another those.
  CHECK((ran.count(Granularity::row_block) > 0) == (ran.count(Granularity::tile) > 0));
  CHECK((ran.count(Granularity::row_block) > 0) == (ran.count(Granularity::row) > 0));
}

TEST_CASE("cuBLASLt: D, summands, bias and activations after FP8 products") {
  if (is_missing()) return;
  Vendor vendor(Context::cuda(0, nullptr));
  int ran = 0;
  for (const GemmProblem& p : problems(48, 80, 144)) {
    if (!vendor.takes(p)) continue;
    ++ran;
    const Case c = make_case(p);
    CHECK(mistake(c, vendor.run(c), vendor_error(p)) == "");
  }
  if (ran == 0) WARN("skipped: the device has no FP8 products");
}

TEST_CASE("cuBLASLt: products with scales of blocks are promoted, fast or not") {
  if (is_missing()) return;
  Vendor vendor(Context::cuda(0, nullptr));
  Case c = make_case({.m = 48,
                      .n = 32,
                      .k = 16384,
                      .a_scales = Granularity::row_block,
                      .b_scales = Granularity::tile},
                     Values::normal, 5);
  // Without signs, so that sums grow all the way.
  for (Operand* x : {&c.a, &c.b}) {
    for (std::uint8_t& code : x->stored) code &= 0x7F;
    for (double& value : x->values) value = std::abs(value);
  }
  for (Accumulation how : {Accumulation::promoted, Accumulation::fast}) {
    c.p.accumulation = how;
    if (!vendor.takes(c.p)) {
      WARN("skipped: the device has no FP8 products with scales of blocks");
      return;
    }
    CHECK(mistake(c, vendor.run(c), std::ldexp(1.0, -10)) == "");
  }
}

TEST_CASE("cuBLASLt: deterministic products have the same bits on every stream, beside others") {
  if (is_missing()) return;
  constexpr int kStreams = 3, kRuns = 10;
  for (DType dtype : {DType::e4m3, DType::bf16, DType::f32}) {
    GemmProblem p{.m = 16, .n = 64, .k = 32768, .a = dtype, .b = dtype, .deterministic = true};
    const Case c = make_case(p, Values::normal, 9);
    Vendor first(Context::cuda(0, nullptr));
    if (!first.takes(p)) continue;
    const Bytes expected = first.run(c).d;
    REQUIRE(!expected.empty());
    INFO(to_string(p));
    cudaStream_t streams[kStreams];
    std::vector<std::unique_ptr<Vendor>> vendors;
    std::vector<Buffer> operands, results;
    const Context ctx = Context::cuda(0, nullptr);
    const auto scales = [&](const Operand& x) {
      return upload(ctx, x.scales.empty() ? Bytes(16, 0) : x.scales);
    };
    const Buffer a = upload(ctx, c.a.stored), b = upload(ctx, c.b.stored), a_scales = scales(c.a),
                 b_scales = scales(c.b);
    for (cudaStream_t& stream : streams) {
      REQUIRE(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking) == cudaSuccess);
      vendors.push_back(std::make_unique<Vendor>(Context::cuda(0, stream)));
      results.emplace_back(ctx, expected.size() * kRuns);
    }
    for (std::size_t run = 0; run < kRuns; ++run) {
      for (std::size_t s = 0; s < kStreams; ++s) {
        vendors[s]->gemms().run(p, {.a = a.data(),
                                    .a_scales = is_fp8(dtype) ? a_scales.data() : nullptr,
                                    .b = b.data(),
                                    .b_scales = is_fp8(dtype) ? b_scales.data() : nullptr,
                                    .d = results[s].as<char>() + run * expected.size()});
      }
    }
    for (std::size_t s = 0; s < kStreams; ++s) {
      vendors[s]->gemms().context().synchronize();
      for (std::size_t run = 0; run < kRuns; ++run) {
        const auto d = download<std::uint8_t>(ctx, results[s].as<char>() + run * expected.size(),
                                              expected.size());
        REQUIRE(first_difference(d, expected) == "");
      }
    }
    vendors.clear();
    for (cudaStream_t stream : streams) CHECK(cudaStreamDestroy(stream) == cudaSuccess);
  }
}
