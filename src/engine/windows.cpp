// SPDX-License-Identifier: Apache-2.0
// What ranks reach of one another's memory: the gradients with their scales and, of an optimizer
// that is cut over them, the weights, which owners write everywhere. Kernels of two ranks never
// work on the same bytes at the same time: a gradient is read between the all-gather of the scales
// (or the first meeting in a kernel) and the all-gather of the optimizer's scales (or the second);
// weights are written between the all-gather of the flag, before which all ranks have ended their
// backward pass, and that of the optimizer's scales, before which no rank goes on.
#include <exception>

#include "engine/engine_impl.hpp"

namespace octet {
namespace {

// The products of the backward pass want the multiprocessors.
constexpr int kBlocksBesideBackward = 32;

std::size_t padded(std::size_t bytes) { return WorkspaceScope::padded(bytes); }

}  // namespace

// Memory goes in the order of the stream that it came from, a window in that of the communicator's.
// What the other one has been given comes first: a forward pass that reads weights in the window,
// say, or the collectives of a step that failed before its end.
Engine::Impl::~Impl() {
  try {
    streams.fork();
    streams.join();
  } catch (const std::exception&) {  // the device has failed; freeing memory will not wait for it
  }
}

// One after the other, as they are taken.
std::vector<std::size_t> Engine::Impl::window_parts() const {
  std::vector<std::size_t> parts = {params.size() * sizeof(TensorScale)};
  if (shards_gradients()) {
    const SlotLayout layout = slot_layout();
    parts.insert(parts.end(), static_cast<std::size_t>(layout.count), layout.bytes);
  }
  for (const Param& p : params) {
    const auto numel = static_cast<std::size_t>(p.spec.shape.numel());
    const WeightFormat weight = without_transpose(p.formats.state.weight);
    if (!shards_gradients()) parts.push_back(numel * size_of(p.formats.gradient));
    if (!sharded() || shards_weights()) continue;
    parts.push_back(numel * size_of(dtype_of(weight)));
    if (has_block_scales(weight)) parts.push_back(weight_scale_bytes(weight, p.spec.shape));
  }
  return parts;
}

void Engine::Impl::make_window() {
  const bool by_default = ctx.device().type == DeviceType::cuda && comm.name() == "nccl";
  if (comm.size() == 1 || !config.windows.value_or(by_default)) return;
  std::size_t content = 0, bytes = 0;
  for (std::size_t part : window_parts()) {
    content += part;
    bytes += padded(part);
  }
  const std::size_t before = memory_in_use();
  WindowOffer offer = comm.make_window(bytes);
  window_refusal = offer.refusal;
  require(offer.window != nullptr || !config.windows.value_or(false),
          "EngineConfig::windows is true, but there can be none: ", window_refusal);
  if (offer.window == nullptr) return;
  window = std::move(offer.window);
  if (overlaps()) window->limit_blocks(kBlocksBesideBackward);
  // The content is counted as what it is.
  plan.count("communication", true, false, window->memory_bytes() - content,
             memory_in_use() - before - content);
}

void* Engine::Impl::take_from_window(std::size_t bytes) {
  void* part = static_cast<std::byte*>(window->data()) + window_next;
  window_next += padded(bytes);
  window_taken += bytes;
  require(window_next <= window->bytes(), "Engine: the window has ", window->bytes(),
          " bytes, fewer than its parts");
  return part;
}

std::vector<WeightCopy> Engine::Impl::weight_copies(const Param& p) const {
  std::vector<WeightCopy> copies;
  if (window == nullptr || p.weight.view().empty()) return copies;
  for (int r = 0; r < comm.size(); ++r) {
    if (r == comm.rank()) continue;
    copies.push_back({window->on_rank(r, p.weight.as<std::byte>()),
                      p.weight_blocks != nullptr ? window->on_rank(r, p.weight_blocks) : nullptr});
  }
  return copies;
}

std::string Engine::Impl::describe_memory() const {
  if (window != nullptr)
    return "ranks reach one another's memory: gradients" +
           std::string(sharded() && !shards_weights() ? " and weights" : "") + " lie in a window";
  if (!window_refusal.empty()) return "send/receive, because there is no window: " + window_refusal;
  return config.windows.has_value() ? "send/receive, because EngineConfig::windows is false"
                                    : "send/receive: windows are the default with NCCL only";
}

}  // namespace octet
