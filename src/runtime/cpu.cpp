// SPDX-License-Identifier: Apache-2.0
#include "runtime/cpu.hpp"

#include <cstring>
#include <new>

namespace octet::detail::cpu {
namespace {
constexpr std::align_val_t kAlignment{256};
}

void* allocate(std::size_t bytes, CUstream_st*, void*) {
  return ::operator new(bytes, kAlignment, std::nothrow);
}

void deallocate(void* data, std::size_t, CUstream_st*, void*) {
  ::operator delete(data, kAlignment);
}

void copy(const Context&, void* to, const void* from, std::size_t bytes) {
  std::memmove(to, from, bytes);
}

void zero(const Context&, void* data, std::size_t bytes) { std::memset(data, 0, bytes); }

// Every call is done when it returns: there is nothing to wait for.
void synchronize(const Context&) {}
void* event_create(const Context&) { return nullptr; }
void event_destroy(const Context&, void*) {}
void event_record(const Context&, void*) {}
void event_wait(const Context&, void*) {}
void event_synchronize(const Context&, void*) {}
std::uint64_t capture(const Context&) { return 0; }

void* allocate_mapped(const Context&, std::size_t bytes, void** on_device) {
  *on_device = ::operator new(bytes);
  return *on_device;
}
void deallocate_mapped(const Context&, void* data) { ::operator delete(data); }

// Copies on a CPU go by addresses alone.
bool is_one_allocation(const Context&, const void*, const void*) { return true; }

}  // namespace octet::detail::cpu
