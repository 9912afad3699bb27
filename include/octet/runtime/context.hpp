// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "octet/core/tensor_view.hpp"
#include "octet/runtime/allocator.hpp"

namespace octet {

namespace detail {
struct Backend;
struct ContextState;
}  // namespace detail

/// Device, stream, allocator and workspace of one rank. A handle: copies share the same state,
/// which lives until the last copy and the last Tensor made from it are gone. One thread at a time.
/// The stream is the caller's. It is synchronised by synchronize(), by functions named *_sync and
/// by set-up that uploads tables or frees memory (constructors, Engine::freeze()), never by a call
/// of the hot path.
class Context {
 public:
  /// The calling thread and its OpenMP team do the work, before each call returns.
  static Context cpu(Allocator allocator = {});

  /// Work is enqueued on `stream` (a cudaStream_t) of CUDA device `device`.
  /// Throws if the library was built without CUDA or there is no such device.
  static Context cuda(int device, CUstream_st* stream, Allocator allocator = {});

  /// The same device and stream with another allocator; the account of memory and the workspace
  /// are its own.
  Context with_allocator(const Allocator& allocator) const;

  Device device() const;
  CUstream_st* stream() const;
  MemoryUse memory_use() const;
  /// Makes the current use the new peak.
  void reset_peak();
  /// Waits until everything enqueued so far is done; throws what an earlier kernel failed with.
  void synchronize() const;

  /// Says that kernels of other streams, collectives say, run beside this context's work. Casts
  /// with current scaling then read their input twice: the launch that reads it once is a
  /// cooperative one, which would wait until those kernels leave the whole device. Same bits.
  /// Nothing on a CPU.
  void set_shares_device(bool shares);
  bool shares_device() const;

  /// Grows the workspace to at least `bytes`; for set-up, not for the hot path, and before a CUDA
  /// graph is captured, because growing moves it. Throws while a
  /// WorkspaceScope is open.
  void reserve_workspace(std::size_t bytes);
  std::size_t workspace_bytes() const;

  const std::shared_ptr<detail::ContextState>& state() const { return state_; }

 private:
  explicit Context(std::shared_ptr<detail::ContextState> state) : state_(std::move(state)) {}
  std::shared_ptr<detail::ContextState> state_;
};

/// Scratch memory from the context's workspace, given back at the end of the scope. Scopes nest.
/// Reuse needs no synchronisation because everything runs in the order of one stream.
class WorkspaceScope {
 public:
  explicit WorkspaceScope(const Context& ctx);
  ~WorkspaceScope();
  WorkspaceScope(const WorkspaceScope&) = delete;
  WorkspaceScope& operator=(const WorkspaceScope&) = delete;

  /// `bytes` bytes aligned to 256. Throws if the workspace that was reserved is too small.
  void* take(std::size_t bytes);
  TensorView take(DType dtype, Shape shape);
  /// What take() of these bytes uses up: for adding up a reservation.
  static std::size_t padded(std::size_t bytes) { return (bytes + 255) / 256 * 256; }

 private:
  Context ctx_;
  std::size_t start_;
};

/// Page-locked host memory for a Context of this device: kernels of every device and the host reach
/// it at the same address, across the link; on a CPU ordinary memory. Its pages are the host's and
/// are taken at once. Allocating takes about a millisecond and waits for the device, as does
/// freeing: for set-up. Throws octet::Error without such a device, and, when memory is asked for
/// and there is none, one that names the byte count.
Allocator pinned_host_allocator(Device device);

/// Number of CUDA devices this build can use: 0 without CUDA, without a driver or without a GPU.
int cuda_device_count();

/// A point in the context's stream that other streams can wait for. On a CPU every call is done
/// when it returns, and an event is nothing.
class Event {
 public:
  explicit Event(const Context& ctx);
  ~Event();
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  /// Marks everything enqueued on the context's stream so far.
  void record();
  /// Makes `ctx`'s stream wait for the last record(); the host does not wait.
  void make_wait(const Context& ctx) const;
  /// The calling thread, which may be any, sleeps until the last record() is reached. Throws
  /// octet::Error when work before it has failed.
  void synchronize() const;

 private:
  Context ctx_;
  void* event_ = nullptr;
};

}  // namespace octet
