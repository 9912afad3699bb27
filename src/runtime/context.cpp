// SPDX-License-Identifier: Apache-2.0
#include "octet/runtime/context.hpp"

#include <algorithm>
#include <new>

#include "backend.hpp"

namespace octet {
namespace detail {

void* ContextState::allocate(std::size_t bytes) {
  if (bytes == 0) return nullptr;
  void* data = nullptr;
  try {
    data = allocator.allocate(bytes, stream, allocator.user);
  } catch (const std::bad_alloc&) {  // reported below, like a null pointer
  }
  require(data != nullptr, "out of memory on ", to_string(device), ": ", bytes,
          " bytes were asked for and ", use.current, " are in use by this context");
  use.current += bytes;
  use.peak = std::max(use.peak, use.current);
  return data;
}

void ContextState::deallocate(void* data, std::size_t bytes) noexcept {
  if (data == nullptr) return;
  use.current -= bytes;
  allocator.deallocate(data, bytes, stream, allocator.user);
}

ContextState::~ContextState() { deallocate(workspace, workspace_bytes); }

}  // namespace detail

namespace {

// The index travels as the user pointer: the library's own allocators need nothing else.
void* user_of(Device device) {
  return reinterpret_cast<void*>(static_cast<std::intptr_t>(device.index));
}

std::shared_ptr<detail::ContextState> make_state(Device device, CUstream_st* stream,
                                                 const detail::Backend& backend,
                                                 const Allocator& allocator) {
  require((allocator.allocate == nullptr) == (allocator.deallocate == nullptr),
          "an Allocator has one of allocate and deallocate; set both or neither");
  auto state = std::make_shared<detail::ContextState>();
  state->device = device;
  state->stream = stream;
  state->backend = &backend;
  state->allocator = allocator;
  if (allocator.allocate == nullptr) {
    state->allocator = {backend.allocate, backend.deallocate, user_of(device)};
  }
  return state;
}

// Throws, beginning with `what`, unless this machine has the device.
const detail::Backend& backend_for(Device device, const char* what) {
  if (device.type == DeviceType::cpu) return detail::cpu_backend();
  const detail::CudaPart& cuda = detail::cuda_part();
  require(cuda.backend != nullptr, what, "(", device.index,
          "): this build of octet has no CUDA; configure it with OCTET_CUDA=ON");
  cuda.check_device(device.index);
  return *cuda.backend;
}

}  // namespace

Context Context::cpu(Allocator allocator) {
  return Context(make_state({DeviceType::cpu, 0}, nullptr, detail::cpu_backend(), allocator));
}

Context Context::cuda(int device, CUstream_st* stream, Allocator allocator) {
  const Device at{DeviceType::cuda, device};
  return Context(make_state(at, stream, backend_for(at, "Context::cuda"), allocator));
}

Context Context::with_allocator(const Allocator& allocator) const {
  return Context(make_state(device(), stream(), *state_->backend, allocator));
}

Device Context::device() const { return state_->device; }
CUstream_st* Context::stream() const { return state_->stream; }
MemoryUse Context::memory_use() const { return state_->use; }
void Context::reset_peak() { state_->use.peak = state_->use.current; }
void Context::synchronize() const { state_->backend->synchronize(*this); }

void Context::set_shares_device(bool shares) { state_->shares_device = shares; }
bool Context::shares_device() const { return state_->shares_device; }

void Context::reserve_workspace(std::size_t bytes) {
  if (bytes <= state_->workspace_bytes) return;
  require(state_->open_scopes == 0, "the workspace cannot grow to ", bytes,
          " bytes while a WorkspaceScope is open");
  void* grown = state_->allocate(bytes);
  state_->deallocate(state_->workspace, state_->workspace_bytes);
  state_->workspace = grown;
  state_->workspace_bytes = bytes;
}

std::size_t Context::workspace_bytes() const { return state_->workspace_bytes; }

WorkspaceScope::WorkspaceScope(const Context& ctx)
    : ctx_(ctx), start_(ctx.state()->workspace_used) {
  ++ctx_.state()->open_scopes;
}

WorkspaceScope::~WorkspaceScope() {
  --ctx_.state()->open_scopes;
  ctx_.state()->workspace_used = start_;
}

void* WorkspaceScope::take(std::size_t bytes) {
  detail::ContextState& state = *ctx_.state();
  const std::size_t size = padded(bytes);
  require(state.workspace_used + size <= state.workspace_bytes, "the workspace has ",
          state.workspace_bytes, " bytes, of which ", state.workspace_used, " are taken; ", size,
          " more were asked for: reserve_workspace() must be called with the sum during set-up");
  void* data = static_cast<char*>(state.workspace) + state.workspace_used;
  state.workspace_used += size;
  return data;
}

TensorView WorkspaceScope::take(DType dtype, Shape shape) {
  const std::size_t bytes = static_cast<std::size_t>(shape.numel()) * size_of(dtype);
  return {take(bytes), dtype, shape, ctx_.device()};
}

Allocator pinned_host_allocator(Device device) {
  const detail::Backend& backend = backend_for(device, "pinned_host_allocator");
  return {backend.allocate_pinned, backend.deallocate_pinned, user_of(device)};
}

int cuda_device_count() {
  const detail::CudaPart& cuda = detail::cuda_part();
  return cuda.backend == nullptr ? 0 : cuda.device_count();
}

Event::Event(const Context& ctx) : ctx_(ctx), event_(ctx.state()->backend->event_create(ctx)) {}
Event::~Event() { ctx_.state()->backend->event_destroy(ctx_, event_); }
void Event::record() { ctx_.state()->backend->event_record(ctx_, event_); }
void Event::make_wait(const Context& ctx) const { ctx.state()->backend->event_wait(ctx, event_); }
void Event::synchronize() const { ctx_.state()->backend->event_synchronize(ctx_, event_); }

}  // namespace octet
