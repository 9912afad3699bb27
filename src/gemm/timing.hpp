// SPDX-License-Identifier: Apache-2.0
// Times the ways to run a GEMM problem on operands made up for it.
#pragma once

#include <functional>

#include "octet/core/detail/element.hpp"
#include "octet/gemm/gemm.hpp"
#include "octet/runtime/tensor.hpp"

namespace octet::detail {

/// Memory with operands of a problem that are bell-shaped like those of a training, so that the
/// multipliers switch, and a GPU at its power limit clocks, about as with real ones. Real ones also
/// have outliers, and rows that differ in size: their times can differ a little.
class MadeUpOperands {
 public:
  MadeUpOperands(const Context& ctx, const GemmProblem& problem);
  const GemmArgs& args() const { return args_; }

 private:
  Buffer a_, b_, d_, aux_, scales_, bias_;
  GemmArgs args_;
};

/// Index of the fastest of `count` calls and its time: all are timed briefly, for at most a second
/// and a half together, then the best few and the first longer and in turn, so that a clock that
/// changes meets all of them. Calls that throw are left out. Throws octet::Error, the last one, if
/// all do. Waits for the context's stream.
struct Fastest {
  std::size_t index = 0;
  double microseconds = 0.0;
};
Fastest find_fastest(const Context& ctx, std::size_t count,
                     const std::function<void(std::size_t)>& run);

}  // namespace octet::detail
