// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <atomic>
#include <filesystem>
#include <optional>
#include <thread>

#include "checkpoint/host_buffer.hpp"
#include "checkpoint/save.hpp"
#include "octet/checkpoint/checkpoint.hpp"

namespace octet {
namespace {

// On a CPU the state is where it can be written from; from a device it comes in pieces.
void write_from_device(Save& save) {
  const Context& ctx = save.state.ctx;
  if (ctx.device().type == DeviceType::cpu) {
    return write_rank_file(save, [](const SavePart& part, std::size_t offset, std::size_t) {
      return static_cast<const std::byte*>(part.data) + offset;
    });
  }
  const Buffer piece = host_buffer(ctx, kCopyBytes);
  const SavePart* holds = nullptr;
  std::size_t from = 0, to = 0;
  write_rank_file(save, [&](const SavePart& part, std::size_t offset, std::size_t bytes) {
    if (holds != &part || offset + bytes > to) {
      holds = &part;
      from = offset;
      to = std::min<std::size_t>(offset + kCopyBytes, part.tensor.bytes);
      read_bytes_sync(ctx, piece.data(), static_cast<const std::byte*>(part.data) + from,
                      to - from);
    }
    return piece.as<std::byte>() + (offset - from);
  });
}

}  // namespace

struct CheckpointWriter::Impl {
  Impl(Engine& e, Communicator& c, std::string d) : engine(e), comm(c), directory(std::move(d)) {}

  /// Enqueues the copies.
  void take_snapshot() {
    const Context& ctx = save->state.ctx;
    const std::size_t bytes = save->part_bytes();
    if (snapshot.bytes() < bytes) {
      snapshot = Buffer();  // not both at a time
      snapshot = host_buffer(ctx, bytes);
    }
    auto* next = snapshot.as<std::byte>();
    for (SavePart& part : save->parts) {
      if (part.tensor.bytes > 0) copy_bytes(ctx, next, part.data, part.tensor.bytes);
      part.data = next;  // from here on
      next += part.tensor.bytes;
    }
  }

  void write() {
    problem = problem_of([this] {
      write_rank_file(*save, [](const SavePart& part, std::size_t offset, std::size_t) {
        return static_cast<const std::byte*>(part.data) + offset;
      });
    });
    writing = false;
  }

  Engine& engine;
  Communicator& comm;
  std::string directory;
  Buffer snapshot;           ///< host memory
  std::optional<Save> save;  ///< the one that was started and not finished
  std::string problem;       ///< what writing it failed with
  std::atomic<bool> writing{false};
  std::thread thread;
};

CheckpointWriter::CheckpointWriter(Engine& engine, Communicator& comm, std::string directory)
    : impl_(std::make_unique<Impl>(engine, comm, std::move(directory))) {}

CheckpointWriter::~CheckpointWriter() {
  if (impl_->thread.joinable()) impl_->thread.join();
  if (!impl_->save.has_value()) return;
  std::error_code ignored;
  std::filesystem::remove(impl_->save->path(), ignored);
}

void CheckpointWriter::start(const SaveOptions& options) {
  Impl& w = *impl_;
  finish();
  try {
    set_up_together_sync(w.comm, [&] {
      w.save.emplace(describe_save(w.engine, w.comm, w.directory, options));
      w.take_snapshot();
      open_save(*w.save, w.comm);  // looks into the directory while the copies are under way
      w.save->state.ctx.synchronize();
    });
  } catch (...) {
    w.save.reset();
    throw;
  }
  w.writing = true;
  w.problem.clear();
  const std::string problem = problem_of([&w] { w.thread = std::thread([&w] { w.write(); }); });
  if (w.thread.joinable()) return;
  w.problem = problem;  // finish() tells all ranks
  w.writing = false;
}

bool CheckpointWriter::is_writing() const { return impl_->writing; }

std::optional<CheckpointInfo> CheckpointWriter::finish() {
  Impl& w = *impl_;
  if (!w.save.has_value()) return std::nullopt;
  if (w.thread.joinable()) w.thread.join();
  Save save = std::move(*w.save);
  w.save.reset();
  return commit(save, w.comm, w.problem);
}

CheckpointInfo save_checkpoint(Engine& engine, Communicator& comm, const std::string& directory,
                               const SaveOptions& options) {
  std::optional<Save> save;
  set_up_together_sync(comm, [&] {
    save.emplace(describe_save(engine, comm, directory, options));
    open_save(*save, comm);
  });
  const std::string problem = problem_of([&] { write_from_device(*save); });
  return commit(*save, comm, problem);
}

}  // namespace octet
