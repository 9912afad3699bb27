// SPDX-License-Identifier: Apache-2.0
#include "ranks.hpp"

#ifdef _OPENMP
#include <omp.h>
#endif

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "octet/comm/nccl.hpp"

namespace train_gpt {
namespace {

using octet::DeviceType;

void share_cores([[maybe_unused]] int ranks) {
#ifdef _OPENMP
  const int cores = static_cast<int>(std::thread::hardware_concurrency());
  omp_set_num_threads(std::max(1, cores / ranks));
#endif
}

/// The device of one rank and a stream of it, which lives for as long as anything that works on it.
class RankDevice {
 public:
  RankDevice(DeviceType type, int index, bool urgent = false)
      : kernels_(type == DeviceType::cuda ? cuda_kernels() : cpu_kernels()),
        index_(index),
        stream_(kernels_.create_stream(index, urgent)) {
    ctx_ = type == DeviceType::cuda ? octet::Context::cuda(index, stream_) : octet::Context::cpu();
  }
  ~RankDevice() {
    ctx_.reset();
    kernels_.destroy_stream(index_, stream_);
  }
  RankDevice(const RankDevice&) = delete;
  RankDevice& operator=(const RankDevice&) = delete;

  octet::Context& context() { return *ctx_; }
  const Kernels& kernels() const { return kernels_; }

 private:
  const Kernels& kernels_;
  int index_;
  CUstream_st* stream_;
  std::optional<octet::Context> ctx_;
};

/// What a rank works on and, with Schedule::overlap, what its communicator works on.
class RankDevices {
 public:
  RankDevices(DeviceType type, int index, octet::Schedule schedule) : own_(type, index) {
    if (schedule == octet::Schedule::overlap) side_.emplace(type, index, true);
  }
  octet::Context& context() { return own_.context(); }
  octet::Context& comm_context() { return side_ ? side_->context() : own_.context(); }
  const Kernels& kernels() const { return own_.kernels(); }

 private:
  RankDevice own_;
  std::optional<RankDevice> side_;
};

class Group {
 public:
  Group(DeviceType device, int count, octet::Schedule schedule)
      : device_(device), count_(count), schedule_(schedule), threads_(count) {
    if (device_ == DeviceType::cuda && count_ > 1) nccl_id_ = octet::make_nccl_id();
  }

  void run_rank(int rank, const std::function<void(const Rank&)>& body) {
    // Outside the try block: the others must not see this rank leave before they know why.
    std::optional<RankDevices> devices;
    std::unique_ptr<octet::Communicator> comm;
    try {
      share_cores(count_);
      devices.emplace(device_, rank, schedule_);
      comm = join(rank, devices->comm_context());
      body({rank, devices->context(), *comm, devices->kernels()});
    } catch (const std::exception& error) {
      end_the_others(rank, error.what());
    }
  }

  void throw_failure() const {
    if (failure_) throw octet::Error(*failure_);
  }

 private:
  std::unique_ptr<octet::Communicator> join(int rank, const octet::Context& ctx) {
    if (count_ == 1) return octet::make_single(ctx);
    if (device_ == DeviceType::cuda) return octet::create_nccl(nccl_id_, rank, count_, ctx);
    return threads_.join(rank, ctx);
  }

  void end_the_others(int rank, const std::string& reason) {
    const std::lock_guard lock(mutex_);
    if (failure_) return;  // this one follows from the first
    failure_ = "rank " + std::to_string(rank) + ": " + reason;
    if (count_ > 1 && device_ == DeviceType::cuda) {
      // The others may wait inside NCCL for this rank, where no thread can reach them.
      std::fprintf(stderr, "\ntrain_gpt: %s\n", failure_->c_str());
      std::_Exit(1);
    }
    threads_.abort("rank " + std::to_string(rank) + " has failed");
  }

  DeviceType device_;
  int count_;
  octet::Schedule schedule_;
  octet::ThreadGroup threads_;
  octet::NcclId nccl_id_{};
  std::mutex mutex_;
  std::optional<std::string> failure_;
};

}  // namespace

struct LaunchedRank::State {
  State(DeviceType type, const octet::Launch& place, octet::Schedule schedule)
      : launch(place),
        devices(type, type == DeviceType::cuda ? place.local_rank : 0, schedule),
        comm(octet::make_communicator(devices.comm_context(), place)) {}

  octet::Launch launch;
  RankDevices devices;
  std::unique_ptr<octet::Communicator> comm;
};

LaunchedRank::LaunchedRank(DeviceType device, const octet::Launch& launch,
                           octet::Schedule schedule) {
  share_cores(launch.local_size);
  state_ = std::make_unique<State>(device, launch, schedule);
}

LaunchedRank::~LaunchedRank() = default;

void LaunchedRank::run(const std::function<void(const Rank&)>& body) {
  const int rank = state_->launch.rank;
  RankDevices& devices = state_->devices;
  devices.context().reset_peak();
  devices.comm_context().reset_peak();
  try {
    body({rank, devices.context(), *state_->comm, devices.kernels()});
  } catch (const std::exception& error) {
    const std::string text = "rank " + std::to_string(rank) + ": " + error.what();
    if (devices.context().device().type == DeviceType::cpu) throw octet::Error(text);
    std::fprintf(stderr, "\ntrain_gpt: %s\n", text.c_str());
    std::_Exit(1);
  }
}

void run_ranks(DeviceType device, int count, octet::Schedule schedule,
               const std::function<void(const Rank&)>& body) {
  Group group(device, count, schedule);
  {
    std::vector<std::jthread> threads;
    for (int rank = 0; rank < count; ++rank) {
      threads.emplace_back([&group, &body, rank] { group.run_rank(rank, body); });
    }
  }
  group.throw_failure();
}

}  // namespace train_gpt
