// SPDX-License-Identifier: Apache-2.0
#include "octet/runtime/tensor.hpp"

#include <cstdint>
#include <cstdlib>
#include <new>
#include <numeric>

#include "octet/ops/quantize.hpp"
#include "support/catch.hpp"
#include "support/compare.hpp"
#include "support/devices.hpp"
#include "support/errors.hpp"

namespace octet::test {
namespace {

/// A caller's allocator that counts, with a limit.
struct Pool {
  std::size_t held = 0;
  int allocations = 0;
  int live = 0;
  std::size_t limit = std::size_t{1} << 30;
  bool throws = false;

  static void* allocate(std::size_t bytes, CUstream_st*, void* user) {
    Pool& pool = *static_cast<Pool*>(user);
    if (pool.held + bytes > pool.limit) {
      if (pool.throws) throw std::bad_alloc();
      return nullptr;
    }
    pool.held += bytes;
    ++pool.allocations;
    ++pool.live;
    return std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  }
  static void deallocate(void* data, std::size_t bytes, CUstream_st*, void* user) {
    Pool& pool = *static_cast<Pool*>(user);
    pool.held -= bytes;
    --pool.live;
    std::free(data);
  }
  Allocator allocator() { return {&Pool::allocate, &Pool::deallocate, this}; }
};

bool is_aligned(const void* data) { return reinterpret_cast<std::uintptr_t>(data) % 256 == 0; }

}  // namespace

TEST_CASE("a context counts what it holds and the most it held") {
  for (const Context& ctx : test_contexts()) {
    const std::size_t before = ctx.memory_use().current;
    {
      const Tensor a(ctx, DType::f32, {1000});
      const Context copy = ctx;
      const Tensor b(copy, DType::e4m3, {3, 5});
      CHECK(ctx.memory_use().current == before + 4000 + 15);
      CHECK(is_aligned(a.view().data));
      CHECK(is_aligned(b.view().data));
      CHECK(a.bytes() == 4000);
      CHECK(b.view().shape == Shape{3, 5});
      CHECK(b.view().device == ctx.device());
    }
    CHECK(ctx.memory_use().current == before);
    CHECK(ctx.memory_use().peak >= before + 4015);
    Context again = ctx;
    again.reset_peak();
    CHECK(ctx.memory_use().peak == before);
  }
}

TEST_CASE("the caller's allocator gives all memory and gets all of it back") {
  Pool pool;
  {
    Context ctx = Context::cpu(pool.allocator());
    Buffer outliving;
    {
      const Tensor tensor(ctx, DType::f16, {7, 9});
      CHECK(pool.held == 126);
      outliving = Buffer(ctx, 33);
      const ScaledTensor scaled(ctx, DType::e4m3, {10});
      CHECK(pool.live >= 3);
      ctx.reserve_workspace(1000);
      CHECK(pool.held >= 126 + 33 + 10 + 1000);
    }
    CHECK(ctx.memory_use().current == pool.held);
  }
  CHECK(pool.live == 0);
  CHECK(pool.held == 0);
}

TEST_CASE("a tensor may outlive the context it came from") {
  Pool pool;
  {
    Tensor kept;
    {
      const Context ctx = Context::cpu(pool.allocator());
      kept = Tensor(ctx, DType::f32, {4});
    }
    kept.as<float>()[3] = 1.0f;
    CHECK(pool.live == 1);
  }
  CHECK(pool.live == 0);
}

TEST_CASE("memory that is not there is an error with the byte count") {
  for (bool throws : {false, true}) {
    Pool pool;
    pool.limit = 100;
    pool.throws = throws;
    const Context ctx = Context::cpu(pool.allocator());
    CHECK(missing(error_of([&] { Buffer(ctx, 12345); }), {"12345"}) == "");
    CHECK(ctx.memory_use().current == 0);
    CHECK(Buffer(ctx, 100).bytes() == 100);
  }
}

TEST_CASE("buffers move") {
  for (const Context& ctx : test_contexts()) {
    Buffer a = upload<float>(ctx, {1, 2, 3});
    void* const data = a.data();
    Buffer b(std::move(a));
    CHECK(b.data() == data);
    a = Buffer(ctx, 8);
    b = std::move(a);
    CHECK(b.bytes() == 8);
    CHECK(b.data() != data);
  }
}

TEST_CASE("copies, zeros and reads") {
  for (const Context& ctx : test_contexts()) {
    std::vector<int> values(1001);
    std::iota(values.begin(), values.end(), 1);
    const Buffer buffer = upload(ctx, values);
    CHECK(first_difference(read_sync<int>(ctx, buffer.data(), 1001), values) == "");
    const Buffer other(ctx, buffer.bytes());
    copy_bytes(ctx, other.data(), buffer.data(), buffer.bytes());
    zero_bytes(ctx, buffer.as<int>() + 1, 999 * sizeof(int));
    CHECK(first_difference(read_sync<int>(ctx, other.data(), 1001), values) == "");
    std::vector<int> zeroed(1001, 0);
    zeroed.front() = 1;
    zeroed.back() = 1001;
    CHECK(first_difference(read_sync<int>(ctx, buffer.data(), 1001), zeroed) == "");
    copy_bytes(ctx, nullptr, nullptr, 0);
    CHECK(DeviceValue<int>(ctx, other.as<int>() + 5).read_sync() == 6);
  }
}

TEST_CASE("pinned host memory is reached by the device and by the host") {
  for (const Context& ctx : test_contexts()) {
    const Context host = ctx.with_allocator(pinned_host_allocator(ctx.device()));
    CHECK(host.device() == ctx.device());
    CHECK(host.stream() == ctx.stream());
    const std::size_t before = ctx.memory_use().current;
    {
      const Buffer codes(host, 1000), values(host, 1000 * sizeof(float));
      CHECK(host.memory_use().current == 5000);
      CHECK(ctx.memory_use().current == before);
      CHECK(is_aligned(codes.data()));
      zero_bytes(host, codes.data(), codes.bytes());
      host.synchronize();
      for (std::size_t i = 0; i < 1000; ++i) {
        REQUIRE(codes.as<std::uint8_t>()[i] == 0);
        codes.as<std::uint8_t>()[i] = 0x38;  // 1 in E4M3
      }
      // A kernel of the other context reads what the host wrote, and the host what that wrote.
      convert(ctx, {view_of(ctx, codes, DType::e4m3, {1000}), nullptr},
              view_of(ctx, values, DType::f32, {1000}));
      ctx.synchronize();
      const std::vector<float> ones(1000, 1.0f);
      CHECK(first_difference(std::vector<float>(values.as<float>(), values.as<float>() + 1000),
                             ones) == "");
      CHECK(first_difference(read_sync<float>(ctx, values.data(), 1000), ones) == "");
    }
    CHECK(host.memory_use().current == 0);
    CHECK(missing(error_of([&] { Buffer(host, std::size_t{1} << 60); }), {"1152921504606846976"}) ==
          "");
    CHECK(host.memory_use().current == 0);
  }
}

TEST_CASE("pinned memory for a device that does not exist is refused by number") {
  const int beyond = cuda_device_count() + 90;
  CHECK(missing(error_of([&] {
                  pinned_host_allocator({DeviceType::cuda, beyond});
                }),
                {std::to_string(beyond)}) == "");
}

TEST_CASE("an empty tensor is a tensor") {
  for (const Context& ctx : test_contexts()) {
    const Tensor empty(ctx, DType::f32, {0, 5});
    CHECK(empty.bytes() == 0);
    CHECK(empty.view().numel() == 0);
  }
}

TEST_CASE("a scaled tensor starts with scale 1 and amax 0") {
  for (const Context& ctx : test_contexts()) {
    const ScaledTensor tensor(ctx, DType::e5m2, {4});
    const auto scale = download_one<TensorScale>(ctx, tensor.view().scale);
    CHECK(scale.scale == 1.0f);
    CHECK(scale.scale_inv == 1.0f);
    CHECK(scale.amax == 0.0f);
    CHECK(tensor.view().data.dtype == DType::e5m2);
  }
}

TEST_CASE("workspace is taken in nested scopes") {
  for (Context ctx : test_contexts()) {
    ctx.reserve_workspace(2048);
    REQUIRE(ctx.workspace_bytes() >= 2048);
    CHECK(WorkspaceScope::padded(1) == 256);
    CHECK(WorkspaceScope::padded(256) == 256);
    CHECK(WorkspaceScope::padded(0) == 0);
    void* first = nullptr;
    {
      WorkspaceScope outer(ctx);
      first = outer.take(100);
      void* second = nullptr;
      {
        WorkspaceScope inner(ctx);
        second = inner.take(200);
        CHECK(is_aligned(first));
        CHECK(is_aligned(second));
        CHECK(second != first);
      }
      WorkspaceScope later(ctx);
      CHECK(later.take(200) == second);
      const TensorView view = later.take(DType::bf16, {3, 4});
      CHECK(view.shape == Shape{3, 4});
      CHECK(view.device == ctx.device());
      CHECK(missing(error_of([&] { later.take(ctx.workspace_bytes() + 1); }),
                    {std::to_string(ctx.workspace_bytes())}) == "");
      CHECK(error_of([&] { ctx.reserve_workspace(1 << 20); }) != "no error");
    }
    WorkspaceScope again(ctx);
    CHECK(again.take(100) == first);
  }
}

TEST_CASE("workspace never shrinks") {
  for (Context ctx : test_contexts()) {
    ctx.reserve_workspace(4096);
    ctx.reserve_workspace(16);
    CHECK(ctx.workspace_bytes() >= 4096);
  }
}

TEST_CASE("a CUDA device that does not exist is refused by number") {
  const int beyond = cuda_device_count() + 90;
  const std::string error = error_of([&] { Context::cuda(beyond, nullptr); });
  CHECK(error != "no error");
  if (cuda_device_count() > 0) CHECK(missing(error, {std::to_string(beyond)}) == "");
}

TEST_CASE("events order work between contexts") {
  for (const Context& ctx : test_contexts()) {
    Event event(ctx);
    const Buffer buffer = upload<int>(ctx, {7});
    event.record();
    event.make_wait(ctx);
    CHECK(download_one<int>(ctx, buffer.data()) == 7);
  }
}

}  // namespace octet::test
