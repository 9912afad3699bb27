// SPDX-License-Identifier: Apache-2.0
#include "octet/gemm/epilogue.hpp"

#include "backend.hpp"
#include "gemm/problem_rules.hpp"

namespace octet {

void apply_epilogue(const Context& ctx, const GemmProblem& problem, const float* sums,
                    const GemmArgs& args) {
  const std::string unknown = detail::enumeration_refusal(problem);
  require(unknown.empty(), "apply_epilogue: ", unknown);
  const std::string refusal = detail::epilogue_refusal(problem);
  require(refusal.empty(), problem, ": ", refusal);
  require(problem.m >= 0 && problem.n >= 0, problem, ": m and n must not be negative");
  if (problem.m == 0 || problem.n == 0) return;
  require(args.d != nullptr, problem, ": d is null");
  require(!problem.bias || args.bias != nullptr, problem, ": bias is null");
  require(!problem.aux || args.aux != nullptr, problem, ": aux is null");
  require(!is_fp8(problem.d) || args.d_scale != nullptr, problem, ": d_scale is null");
  require(is_fp8(problem.d) || (args.d_scale == nullptr && args.d_amax == nullptr), problem,
          ": d_scale or d_amax is given, but d is not FP8");
  detail::backend_of(ctx).epilogue(ctx, problem, sums, args);
}

}  // namespace octet
