// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>

#include "backend.hpp"

namespace octet::detail::cuda {

void* allocate(std::size_t bytes, CUstream_st* stream, void* device_index);
void deallocate(void* data, std::size_t bytes, CUstream_st* stream, void* device_index);
void copy(const Context& ctx, void* to, const void* from, std::size_t bytes);
void zero(const Context& ctx, void* data, std::size_t bytes);
void synchronize(const Context& ctx);
void* event_create(const Context& ctx);
void event_destroy(const Context& ctx, void* event);
void event_record(const Context& ctx, void* event);
void event_wait(const Context& ctx, void* event);
void event_synchronize(const Context& ctx, void* event);
std::uint64_t capture(const Context& ctx);
void* allocate_pinned(std::size_t bytes, CUstream_st* stream, void* device_index);
void deallocate_pinned(void* data, std::size_t bytes, CUstream_st* stream, void* device_index);
void* allocate_mapped(const Context& ctx, std::size_t bytes, void** on_device);
void deallocate_mapped(const Context& ctx, void* data);
bool is_one_allocation(const Context& ctx, const void* a, const void* b);
int device_count();
void check_device(int index);
int compute_capability(int index);
std::string device_name(int index);

}  // namespace octet::detail::cuda
