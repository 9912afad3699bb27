// SPDX-License-Identifier: Apache-2.0
// A library that writes down when every kernel and copy of a program ran, by CUPTI, without a
// change to the program:
//   CUDA_INJECTION64_PATH=$PWD/libkernel_trace.so KERNEL_TRACE=trace.txt program ...
// A line each: device, stream, begin and end in nanoseconds, name. benchmarks/overlap.py reads it.
#include <cupti.h>

#include <cstdio>
#include <cstdlib>
#include <mutex>

namespace {

constexpr std::size_t kBufferBytes = std::size_t{8} << 20;
constexpr std::size_t kAlignment = 8;

std::mutex mutex;  // CUPTI hands buffers back from threads of its own
std::FILE* file = nullptr;

void write_record(const CUpti_Activity* record) {
  if (record->kind == CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL) {
    const auto* kernel = reinterpret_cast<const CUpti_ActivityKernel10*>(record);
    std::fprintf(file, "%u %u %llu %llu %s\n", kernel->deviceId, kernel->streamId,
                 static_cast<unsigned long long>(kernel->start),
                 static_cast<unsigned long long>(kernel->end), kernel->name);
  } else if (record->kind == CUPTI_ACTIVITY_KIND_MEMCPY) {
    const auto* copy = reinterpret_cast<const CUpti_ActivityMemcpy6*>(record);
    std::fprintf(file, "%u %u %llu %llu copy\n", copy->deviceId, copy->streamId,
                 static_cast<unsigned long long>(copy->start),
                 static_cast<unsigned long long>(copy->end));
  }
}

void give_buffer(std::uint8_t** buffer, std::size_t* bytes, std::size_t* max_records) {
  *buffer = static_cast<std::uint8_t*>(std::aligned_alloc(kAlignment, kBufferBytes));
  *bytes = kBufferBytes;
  *max_records = 0;
}

void take_buffer(CUcontext, std::uint32_t, std::uint8_t* buffer, std::size_t, std::size_t valid) {
  const std::lock_guard lock(mutex);
  CUpti_Activity* record = nullptr;
  while (file != nullptr && cuptiActivityGetNextRecord(buffer, valid, &record) == CUPTI_SUCCESS) {
    write_record(record);
  }
  std::free(buffer);
}

void finish() {
  cuptiActivityFlushAll(CUPTI_ACTIVITY_FLAG_FLUSH_FORCED);
  const std::lock_guard lock(mutex);
  std::fclose(file);
  file = nullptr;
}

}  // namespace

/// CUDA calls this when it starts.
extern "C" int InitializeInjection() {
  const char* path = std::getenv("KERNEL_TRACE");
  file = std::fopen(path != nullptr ? path : "kernel_trace.txt", "w");
  if (file == nullptr) return 0;
  const bool ok = cuptiActivityRegisterCallbacks(give_buffer, take_buffer) == CUPTI_SUCCESS &&
                  cuptiActivityEnable(CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL) == CUPTI_SUCCESS &&
                  cuptiActivityEnable(CUPTI_ACTIVITY_KIND_MEMCPY) == CUPTI_SUCCESS;
  if (!ok) std::fprintf(stderr, "kernel_trace: CUPTI cannot trace this program\n");
  std::atexit(finish);
  return 1;
}
