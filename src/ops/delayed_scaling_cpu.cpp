// SPDX-License-Identifier: Apache-2.0
#include "octet/ops/detail/delayed_math.hpp"
#include "ops/cpu_ops.hpp"

namespace octet::detail::cpu {

void delayed_update(const Context&, const DelayedArgs& args) {
  for (std::int64_t i = 0; i < args.tensor_count; ++i) {
    const DelayedTensor& t = args.tensors[i];
    if (is_recorded(t.scale->amax)) {
      float others = 0.0f;
      for (std::uint32_t h = 0; h < static_cast<std::uint32_t>(args.config.amax_history_len); ++h) {
        if (h != *t.next && t.history[h] > others) others = t.history[h];
      }
      record_amax(t, args.config, others);
    }
    t.scale->amax = 0.0f;
  }
}

}  // namespace octet::detail::cpu
