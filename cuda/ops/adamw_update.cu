// SPDX-License-Identifier: Apache-2.0
// The second half of a step that exchanges nothing: one kernel for every combination of formats.
#include "cuda/device/launch.cuh"
#include "cuda/ops/adamw_update.cuh"
#include "cuda/ops/cuda_ops.hpp"

namespace octet::detail::cuda {
namespace {

__global__ void __launch_bounds__(kUpdateThreads, kUpdateBlocksPerSm)
    update_kernel(const __grid_constant__ UpdateArgs args) {
  __shared__ alignas(16) char work_bytes[sizeof(Work)];
  Work& work = *reinterpret_cast<Work*>(work_bytes);
  if (!load_work<kUpdateThreads>(args.adamw, work)) return;
  int done = 0;
  find_row([&]<std::size_t I>() {
    if (work.step.row != I + 1) return false;
    done = update_row<kAdamwRows[I], Exchange::nothing>(args, work);
    return true;
  });
  update_rest<Exchange::nothing>(args, work, done);
}

}  // namespace

void adamw_update(const Context& ctx, const AdamwArgs& args) {
  set_device(ctx);
  if (args.exchanges != nullptr) {
    adamw_exchange(ctx, args);
    return;
  }
  const UpdateArgs update{args, philox_keys(args.config.seed)};
  launch_dependent(ctx, update_kernel, args.segment_count, kUpdateThreads, update);
}

}  // namespace octet::detail::cuda
