// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <atomic>
#include <filesystem>
#include <optional>
#include <thread>
#include <utility>

#include "backend.hpp"
#include "checkpoint/host_buffer.hpp"
#include "checkpoint/save.hpp"
#include "octet/checkpoint/checkpoint.hpp"

namespace octet {
namespace {

// On a CPU the state is where it can be written from; from a device it comes in pieces.
void write_from_device(Save& save) {
  const Context& ctx = save.state.ctx;
  const auto scalars = read_sync<AdamwScalars>(ctx, save.state.scalars, 1).front();
  if (ctx.device().type == DeviceType::cpu) {
    return write_rank_file(save, scalars, [](const SavePart& part, std::size_t offset, auto) {
      return static_cast<const std::byte*>(part.data) + offset;
    });
  }
  const Buffer piece = host_buffer(ctx, kCopyBytes);
  const SavePart* holds = nullptr;
  std::size_t from = 0, to = 0;
  write_rank_file(save, scalars, [&](const SavePart& part, std::size_t offset, std::size_t bytes) {
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

  void describe(const SaveOptions& options) {
    save.emplace(describe_save(engine, comm, directory, options));
    save->id = first_id.value() + saves;
  }

  /// Enqueues the copies: the scalars, then the parts.
  void take_snapshot() {
    const Context& ctx = save->state.ctx;
    require(
        detail::backend_of(ctx).capture(ctx) == 0,
        "CheckpointWriter::start: the engine's stream is being captured; a save is no part of a "
        "graph");
    const std::size_t bytes = kPartsBegin + save->part_bytes();
    if (snapshot.bytes() < bytes) {
      snapshot = Buffer();  // not both at a time
      snapshot = host_buffer(ctx, bytes);
    }
    if (!copied.has_value()) copied.emplace(ctx);
    copy_bytes(ctx, snapshot.data(), save->state.scalars, sizeof(AdamwScalars));
    std::byte* next = snapshot.as<std::byte>() + kPartsBegin;
    for (SavePart& part : save->parts) {
      if (part.tensor.bytes > 0) copy_bytes(ctx, next, part.data, part.tensor.bytes);
      part.data = next;  // from here on
      next += part.tensor.bytes;
    }
    copied->record();
  }

  void write() {
    problem = problem_of([this] {
      copied->synchronize();
      write_rank_file(*save, *snapshot.as<const AdamwScalars>(),
                      [](const SavePart& part, std::size_t offset, std::size_t) {
                        return static_cast<const std::byte*>(part.data) + offset;
                      });
    });
    writing = false;
  }

  /// Of the snapshot; the bytes before are the scalars'.
  static constexpr std::size_t kPartsBegin = 256;
  static_assert(sizeof(AdamwScalars) <= kPartsBegin);

  Engine& engine;
  Communicator& comm;
  std::string directory;
  std::optional<std::uint64_t> first_id;  ///< once the directory is open; later saves count on
  std::uint64_t saves = 0;                ///< started before
  Buffer snapshot;                        ///< host memory
  std::optional<Event> copied;
  bool started = false;      ///< and not finished: all below is of that save
  std::optional<Save> save;  ///< nothing where it could not be described
  std::string problem;       ///< what it failed with on this rank
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
  if (!w.first_id.has_value()) {
    std::uint64_t id = 0;
    set_up_together_sync(w.comm, [&] { id = open_directory(w.directory, w.comm); });
    w.first_id = id;
  }
  w.started = true;
  const std::string problem = problem_of([&] {
    w.describe(options);
    w.take_snapshot();
    w.writing = true;
    w.thread = std::thread([&w] { w.write(); });
  });
  ++w.saves;
  if (w.thread.joinable()) return;
  w.problem = problem;  // finish() tells all ranks
  w.writing = false;
}

bool CheckpointWriter::is_writing() const { return impl_->writing; }

std::optional<CheckpointInfo> CheckpointWriter::finish() {
  Impl& w = *impl_;
  if (!std::exchange(w.started, false)) return std::nullopt;
  if (w.thread.joinable()) w.thread.join();
  std::optional<Save> save = std::exchange(w.save, std::nullopt);
  try {
    if (!save.has_value()) set_up_together_sync(w.comm, [&] { fail(w.problem); });
    return commit(*save, w.comm, w.problem);
  } catch (const SetUpError&) {  // on every rank: the next start() sweeps what is left
    w.first_id.reset();
    w.saves = 0;
    throw;
  }
}

CheckpointInfo save_checkpoint(Engine& engine, Communicator& comm, const std::string& directory,
                               const SaveOptions& options) {
  std::optional<Save> save;
  set_up_together_sync(comm, [&] {
    save.emplace(describe_save(engine, comm, directory, options));
    save->id = open_directory(directory, comm);
  });
  const std::string problem = problem_of([&] { write_from_device(*save); });
  return commit(*save, comm, problem);
}

}  // namespace octet
