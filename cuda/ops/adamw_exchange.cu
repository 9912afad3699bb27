// SPDX-License-Identifier: Apache-2.0
// The second half of a step that exchanges with other ranks: one kernel that reads a stored
// gradient, one that sums contributions. Both store every copy of the compute weight.
#include "cuda/device/launch.cuh"
#include "cuda/ops/adamw_update.cuh"

namespace octet::detail::cuda {
namespace {

// 96 registers a thread: with the 80 that 12 blocks leave the usual path spills.
constexpr int kExchangeBlocksPerSm = 10;

template <Exchange X>
__global__ void __launch_bounds__(kUpdateThreads, kExchangeBlocksPerSm)
    exchange_kernel(const __grid_constant__ UpdateArgs args) {
  constexpr bool kSums = X == Exchange::means;
  __shared__ alignas(16) char work_bytes[sizeof(ExchangeWork)];
  ExchangeWork& work = *reinterpret_cast<ExchangeWork*>(work_bytes);
  if (!load_exchange_work<kUpdateThreads, X>(args.adamw, work)) return;
  int done = 0;
  find_row([&]<std::size_t I>() {
    constexpr AdamwRow kRow = kAdamwRows[I];
    if constexpr (is_exchanged(kRow.formats)) {
      if (work.step.row != I + 1) return false;
      // A mean is an f32 gradient.
      constexpr AdamwRow kAs{kSums ? DType::f32 : kRow.gradient, kRow.formats};
      done = update_row<kAs, X, kRow.gradient>(args, work);
      return true;
    }
    return false;
  });
  update_rest<X>(args, work, done);
}

}  // namespace

void adamw_exchange(const Context& ctx, const AdamwArgs& args) {
  const UpdateArgs update{args, philox_keys(args.config.seed)};
  const auto kernel = args.sums_contributions ? exchange_kernel<Exchange::means>
                                              : exchange_kernel<Exchange::copies>;
  launch_dependent(ctx, kernel, args.segment_count, kUpdateThreads, update);
}

}  // namespace octet::detail::cuda
