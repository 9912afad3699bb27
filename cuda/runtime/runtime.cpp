// SPDX-License-Identifier: Apache-2.0
#include "cuda/runtime/runtime.hpp"

#include <cuda.h>

#include <chrono>
#include <thread>

#include "cuda/check.hpp"

namespace octet::detail::cuda {
namespace {

// The kernels read and write memory with instructions from this generation on.
constexpr int kMinimumCapability = 80;

int index_of(void* device_index) {
  return static_cast<int>(reinterpret_cast<std::intptr_t>(device_index));
}

// The runtime does not know it; the driver is loaded, so its library need not be linked.
CUdeviceptr begin_of_allocation(const void* data) {
  static const auto get_attribute = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
    OCTET_CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuPointerGetAttribute", &entry, 12000,
                                                      cudaEnableDefault, &result));
    require(result == cudaDriverEntryPointSuccess, "the driver has no cuPointerGetAttribute");
    return reinterpret_cast<decltype(&cuPointerGetAttribute)>(entry);
  }();
  CUdeviceptr begin = 0;
  const CUresult status =
      get_attribute(&begin, CU_POINTER_ATTRIBUTE_RANGE_START_ADDR,
                    static_cast<CUdeviceptr>(reinterpret_cast<std::uintptr_t>(data)));
  return status == CUDA_SUCCESS ? begin : 0;
}

}  // namespace

void* allocate(std::size_t bytes, CUstream_st*, void* device_index) {
  OCTET_CUDA_CHECK(cudaSetDevice(index_of(device_index)));
  void* data = nullptr;
  const cudaError_t status = cudaMalloc(&data, bytes);
  if (status == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    return nullptr;  // the caller's message names the bytes
  }
  OCTET_CUDA_CHECK(status);
  return data;
}

// Part of destructors: waits for the work that may still use the memory and must not throw.
void deallocate(void* data, std::size_t, CUstream_st*, void* device_index) {
  cudaSetDevice(index_of(device_index));
  cudaFree(data);
}

void copy(const Context& ctx, void* to, const void* from, std::size_t bytes) {
  set_device(ctx);
  OCTET_CUDA_CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, ctx.stream()));
}

void zero(const Context& ctx, void* data, std::size_t bytes) {
  set_device(ctx);
  OCTET_CUDA_CHECK(cudaMemsetAsync(data, 0, bytes, ctx.stream()));
}

void synchronize(const Context& ctx) {
  set_device(ctx);
  OCTET_CUDA_CHECK(cudaStreamSynchronize(ctx.stream()));
}

void* event_create(const Context& ctx) {
  set_device(ctx);
  cudaEvent_t event = nullptr;
  OCTET_CUDA_CHECK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
  return event;
}

void event_destroy(const Context&, void* event) {
  cudaEventDestroy(static_cast<cudaEvent_t>(event));
}

void event_record(const Context& ctx, void* event) {
  set_device(ctx);
  OCTET_CUDA_CHECK(cudaEventRecord(static_cast<cudaEvent_t>(event), ctx.stream()));
}

void event_wait(const Context& ctx, void* event) {
  set_device(ctx);
  OCTET_CUDA_CHECK(cudaStreamWaitEvent(ctx.stream(), static_cast<cudaEvent_t>(event), 0));
}

// Of any thread, so another may be capturing a graph meanwhile, which forbids such questions unless
// this thread says that it takes no part. The thread may wait for long: it sleeps.
void event_synchronize(const Context& ctx, void* event) {
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  OCTET_CUDA_CHECK(cudaThreadExchangeStreamCaptureMode(&mode));
  set_device(ctx);
  cudaError_t status = cudaErrorNotReady;
  while ((status = cudaEventQuery(static_cast<cudaEvent_t>(event))) == cudaErrorNotReady) {
    std::this_thread::sleep_for(std::chrono::microseconds(100));
  }
  cudaThreadExchangeStreamCaptureMode(&mode);
  if (cudaPeekAtLastError() == cudaErrorNotReady) cudaGetLastError();
  check_cuda(status, "cudaEventQuery", __FILE_NAME__, __LINE__);
}

// The legacy default stream cannot be captured, and asking about it while another stream is would
// break that capture.
std::uint64_t capture(const Context& ctx) {
  if (ctx.stream() == nullptr || ctx.stream() == cudaStreamLegacy) return 0;
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  OCTET_CUDA_CHECK(cudaStreamGetCaptureInfo(ctx.stream(), &status, &id));
  return status == cudaStreamCaptureStatusNone ? 0 : id;
}

void* allocate_pinned(std::size_t bytes, CUstream_st*, void* device_index) {
  OCTET_CUDA_CHECK(cudaSetDevice(index_of(device_index)));
  void* data = nullptr;
  const cudaError_t status =
      cudaHostAlloc(&data, bytes, cudaHostAllocMapped | cudaHostAllocPortable);
  if (status == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    fail("out of pinned host memory for cuda:", index_of(device_index), ": ", bytes,
         " bytes were asked for");
  }
  OCTET_CUDA_CHECK(status);
  // With unified addressing, which every 64-bit platform has, kernels use the host's address.
  void* on_device = nullptr;
  const cudaError_t mapped = cudaHostGetDevicePointer(&on_device, data, 0);
  if (mapped == cudaSuccess && on_device == data) return data;
  cudaFreeHost(data);
  OCTET_CUDA_CHECK(mapped);
  fail("cuda:", index_of(device_index), " reaches pinned host memory at another address only");
}

// Like deallocate(): the stream may be gone already, so all of the device's work is waited for.
void deallocate_pinned(void* data, std::size_t, CUstream_st*, void* device_index) {
  cudaSetDevice(index_of(device_index));
  cudaDeviceSynchronize();
  cudaFreeHost(data);
}

void* allocate_mapped(const Context& ctx, std::size_t bytes, void** on_device) {
  set_device(ctx);
  void* data = nullptr;
  OCTET_CUDA_CHECK(cudaHostAlloc(&data, bytes, cudaHostAllocMapped | cudaHostAllocPortable));
  OCTET_CUDA_CHECK(cudaHostGetDevicePointer(on_device, data, 0));
  return data;
}

void deallocate_mapped(const Context& ctx, void* data) {
  cudaSetDevice(ctx.device().index);
  cudaFreeHost(data);
}

bool is_one_allocation(const Context& ctx, const void* a, const void* b) {
  set_device(ctx);
  const CUdeviceptr begin = begin_of_allocation(a);
  return begin != 0 && begin == begin_of_allocation(b);
}

int device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  cudaGetLastError();  // no driver or no device: none can be used
  return 0;
}

void check_device(int index) {
  const int count = device_count();
  require(index >= 0 && index < count, "CUDA device ", index, " is asked for; this machine has ",
          count);
  const int capability = compute_capability(index);
  require(capability >= kMinimumCapability, "CUDA device ", index, " has compute capability ",
          capability / 10, ".", capability % 10, "; 8.0 or newer is needed");
}

int compute_capability(int index) {
  int major = 0;
  int minor = 0;
  OCTET_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index));
  OCTET_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index));
  return 10 * major + minor;
}

std::string device_name(int index) {
  cudaDeviceProp properties{};
  OCTET_CUDA_CHECK(cudaGetDeviceProperties(&properties, index));
  return properties.name;
}

}  // namespace octet::detail::cuda
