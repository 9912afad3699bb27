// SPDX-License-Identifier: Apache-2.0
// Every combination of formats and gradients at sizes around the units of work, all in one
// optimizer: equal bits on CPU and CUDA.
#include <memory>

#include "octet/optim/adamw.hpp"
#include "support/adamw_blocks.hpp"
#include "support/adamw_formats.hpp"
#include "support/catch.hpp"
#include "support/compare.hpp"
#include "support/devices.hpp"
#include "support/random.hpp"

namespace octet::test {
namespace {

constexpr int kSteps = 2;
constexpr std::int64_t kSizes[] = {0, 1, 127, 128, 129, 16383, 20011};

struct Combination {
  StateFormats formats;
  DType gradient;
};

/// A matrix of `count` elements, with as many rows up to 127 as divide it.
Shape matrix_of(std::int64_t count) {
  std::int64_t rows = 127;
  while (count % rows != 0) --rows;
  return {rows, count / rows};
}

/// Every `stride`-th combination.
std::vector<Combination> combinations(std::size_t stride) {
  std::vector<Combination> list;
  std::size_t i = 0;
  for (const StateFormats& formats : all_formats()) {
    for (DType gradient : kGradientFormats) {
      if (i++ % stride == 0) list.push_back({formats, gradient});
    }
  }
  return list;
}

/// Gradients of one dtype and size, shared by all combinations.
struct Gradient {
  DType dtype;
  std::int64_t count;
  ScaledTensor tensor;
};

/// An optimizer over all sizes of the combinations.
class Optimizer {
 public:
  Optimizer(const Context& ctx, const std::vector<Combination>& list) : ctx_(ctx) {
    for (DType dtype : kGradientFormats) {
      for (std::int64_t count : kSizes) {
        gradients_.push_back({dtype, count, ScaledTensor(ctx, dtype, {count})});
      }
    }
    std::vector<AdamWParam> params;
    for (const Combination& each : list) {
      for (std::int64_t count : kSizes) params.push_back(param_of(each, count));
    }
    optimizer_ = std::make_unique<AdamW>(ctx, AdamWConfig{.weight_decay = 0.1f, .seed = 3}, params);
    initialise(params);
  }

  void step(int t) {
    for (const Gradient& gradient : gradients_) {
      const Encoded g =
          encode_values(gradient.dtype, normal_values(static_cast<std::size_t>(gradient.count),
                                                      static_cast<std::uint32_t>(t), 0.1f));
      write(ctx_, gradient.tensor.view().data.data, g.bytes);
      write_one(ctx_, gradient.tensor.view().scale, g.scale);
    }
    const bool clips = t == kSteps;
    if (clips) optimizer_->measure();
    optimizer_->step({.lr = 1e-3f, .max_norm = clips ? 1.0f : 0.0f});
    REQUIRE(download_one<AdamwScalars>(ctx_, optimizer_->scalars()).step == t);
  }

  /// Everything stored of parameter i.
  std::vector<std::uint8_t> bytes(std::size_t i) const {
    const int p = static_cast<int>(i);
    std::vector<std::uint8_t> all = download_bytes(ctx_, weights_[i].view());
    const auto append = [&all](const std::vector<std::uint8_t>& part) {
      all.insert(all.end(), part.begin(), part.end());
    };
    append(download_bytes(ctx_, transposed_[i].view()));
    append(block_scale_bytes(ctx_, *optimizer_, p, formats_[i].weight));
    for (const StateView& view : {optimizer_->master(p), optimizer_->m(p), optimizer_->v(p)}) {
      append(download_state(ctx_, view));
    }
    return all;
  }
  std::vector<std::uint8_t> scale_bytes() const {
    return bytes_of(download<TensorScale>(ctx_, optimizer_->scales(),
                                          static_cast<std::size_t>(optimizer_->scale_count())));
  }

 private:
  AdamWParam param_of(const Combination& what, std::int64_t count) {
    const WeightFormat weight = what.formats.weight;
    const bool is_matrix = needs_matrix(weight);
    const Shape matrix = matrix_of(count);
    AdamWParam param;
    param.name = describe(what.formats, what.gradient);
    param.shape = is_matrix ? matrix : Shape{count};
    param.formats = what.formats;
    formats_.push_back(what.formats);
    weights_.push_back(weight == WeightFormat::none ? Tensor()
                                                    : Tensor(ctx_, dtype_of(weight), param.shape));
    transposed_.push_back(is_transposed(weight) ? Tensor(ctx_, DType::e4m3, {matrix[1], matrix[0]})
                                                : Tensor());
    param.weight = weights_.back().view();
    param.weight_transposed = transposed_.back().view();
    for (const Gradient& gradient : gradients_) {
      if (gradient.dtype != what.gradient || gradient.count != count) continue;
      param.gradient = gradient.tensor.view().data;
      param.gradient.shape = param.shape;
      param.gradient_scale = gradient.tensor.view().scale;
    }
    return param;
  }

  void initialise(const std::vector<AdamWParam>& params) {
    std::vector<Buffer> values;
    for (std::int64_t count : kSizes) {
      values.push_back(upload(ctx_, normal_values(static_cast<std::size_t>(count), 77, 0.02f)));
    }
    for (std::size_t i = 0; i < params.size(); ++i) {
      optimizer_->initialise(static_cast<int>(i), view_of(ctx_, values[i % std::size(kSizes)],
                                                          DType::f32, params[i].shape));
    }
    ctx_.synchronize();
  }

  Context ctx_;
  std::vector<Gradient> gradients_;
  std::vector<Tensor> weights_, transposed_;
  std::vector<StateFormats> formats_;
  std::unique_ptr<AdamW> optimizer_;
};

/// Two runs, a step at a time.
void compare(const Context& a, const Context& b, const std::vector<Combination>& list) {
  Optimizer actual(a, list), expected(b, list);
  for (int t = 1; t <= kSteps; ++t) {
    actual.step(t);
    expected.step(t);
    CHECK(first_difference(actual.scale_bytes(), expected.scale_bytes()) == "");
    for (std::size_t i = 0; i < list.size() * std::size(kSizes); ++i) {
      const Combination& what = list[i / std::size(kSizes)];
      const std::string difference = first_difference(actual.bytes(i), expected.bytes(i));
      if (difference.empty()) continue;
      INFO(describe(what.formats, what.gradient)
           << ", " << kSizes[i % std::size(kSizes)] << " elements, step " << t);
      CHECK(difference == "");
    }
  }
}

}  // namespace

TEST_CASE("some combinations give the same bits in every run") {
  compare(Context::cpu(), Context::cpu(), combinations(11));
}

TEST_CASE("every combination of formats and gradients gives the CPU's bits on CUDA") {
  if (cuda_device_count() == 0) {
    WARN("skipped: no CUDA device");
    return;
  }
  compare(Context::cuda(0, nullptr), Context::cpu(), combinations(1));
}

}  // namespace octet::test
