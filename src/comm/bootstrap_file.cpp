// SPDX-License-Identifier: Apache-2.0
// The rendezvous by files in a folder that all ranks see. Every other rank writes a request with a
// random number of its own; rank 0 answers each with that number and the bytes; a rank that has its
// answer takes its request away, which tells rank 0 that it is through. What an earlier run left
// has other numbers: rank 0 removes old requests when it comes (their owners, if they live, write
// them again), and nobody takes an answer to another number. Files appear whole, by renaming.
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <optional>
#include <random>
#include <thread>

#include "comm/bootstrap.hpp"
#include "comm/bytes.hpp"
#include "octet/core/error.hpp"

namespace octet::detail {
namespace {

using Clock = std::chrono::steady_clock;
namespace fs = std::filesystem;

constexpr std::uint64_t kMagic = 0x656c6966746f6331u;  // of a rendezvous file
constexpr std::uint64_t kVersion = 1;
constexpr auto kPause = std::chrono::milliseconds(20);
constexpr std::uint64_t kMaxRank = 1 << 20;
enum Status : std::uint64_t { kRequest = 0, kBytes = 1, kRefused = 2 };

/// What every file holds.
struct Note {
  std::uint64_t status = kRequest;
  std::uint64_t size = 0;
  std::uint64_t rank = 0;
  std::uint64_t nonce = 0;
  std::string job = {};
  std::string text = {};
};
constexpr std::size_t kMaxFileBytes = 64 + kMaxJobBytes + kMaxRendezvousBytes;

std::uint64_t random_nonce() {
  std::random_device device;
  const auto time = static_cast<std::uint64_t>(Clock::now().time_since_epoch().count());
  const std::uint64_t drawn = (static_cast<std::uint64_t>(device()) << 32) | device();
  return drawn ^ time ^ (static_cast<std::uint64_t>(getpid()) << 40);
}

void write_whole(const fs::path& path, const Note& note, const fs::path& temporary) {
  Writer writer;
  for (std::uint64_t value : {kMagic, kVersion, note.status, note.size, note.rank, note.nonce}) {
    writer.number(value);
  }
  writer.text(note.job);
  writer.text(note.text);
  const int fd = open(temporary.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
  const auto& bytes = writer.bytes();
  const bool written =
      fd >= 0 && write(fd, bytes.data(), bytes.size()) == static_cast<ssize_t>(bytes.size()) &&
      fsync(fd) == 0;
  const int error = errno;
  if (fd >= 0) close(fd);
  std::error_code status;
  if (written) fs::rename(temporary, path, status);
  if (written && !status) return;
  std::error_code ignored;
  fs::remove(temporary, ignored);
  throw CommError("rendezvous: " + path.string() + " cannot be written: " +
                  (written ? status.message() : std::string(std::strerror(error))));
}

/// Nothing if there is no such file, or if it is not octet's.
std::optional<Note> read_note(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return std::nullopt;
  std::vector<char> data(kMaxFileBytes + 1);
  file.read(data.data(), static_cast<std::streamsize>(data.size()));
  data.resize(static_cast<std::size_t>(file.gcount()));
  Reader reader(std::as_bytes(std::span(data)));
  if (reader.number() != kMagic || reader.number() != kVersion) return std::nullopt;
  Note note;
  note.status = reader.number();
  note.size = reader.number();
  note.rank = reader.number();
  note.nonce = reader.number();
  note.job = reader.text(kMaxJobBytes);
  note.text = reader.text(kMaxRendezvousBytes);
  if (!reader.good()) return std::nullopt;
  return note;
}

void remove_file(const fs::path& path) {
  std::error_code ignored;
  fs::remove(path, ignored);
}

/// The names of a job's files; another job id gives other names.
class Files {
 public:
  Files(const std::string& path, const std::string& job) : base_(path) {
    if (job.empty()) return;
    std::uint64_t hash = 14695981039346656037u;  // FNV-1a: an id may hold what a name may not
    for (char c : job) hash = (hash ^ static_cast<unsigned char>(c)) * 1099511628211u;
    base_ += "." + std::to_string(hash);
  }
  fs::path root() const { return base_ + ".root"; }
  fs::path request(int rank) const { return base_ + ".request." + std::to_string(rank); }
  fs::path answer(int rank) const { return base_ + ".answer." + std::to_string(rank); }
  fs::path temporary(std::uint64_t nonce) const { return base_ + ".new." + std::to_string(nonce); }

  /// Removes all requests and answers, those of a run with more ranks too.
  void remove_old() const {
    for (const std::string kind : {".request.", ".answer."}) {
      for (const fs::path& path : all_of(kind)) remove_file(path);
    }
  }

  std::vector<fs::path> requests() const { return all_of(".request."); }

 private:
  std::vector<fs::path> all_of(const std::string& kind) const {
    const fs::path base(base_);
    const fs::path folder = base.has_parent_path() ? base.parent_path() : fs::path(".");
    std::error_code ignored;
    std::vector<fs::path> found;
    for (const auto& entry : fs::directory_iterator(folder, ignored)) {
      if (entry.path().filename().string().starts_with(base.filename().string() + kind)) {
        found.push_back(entry.path());
      }
    }
    return found;
  }

  std::string base_;
};

/// One of the other ranks.
std::vector<std::byte> ask_root(const Launch& launch, const std::string& path,
                                std::chrono::milliseconds deadline) {
  const Files files(path, launch.job);
  const fs::path request = files.request(launch.rank), answer = files.answer(launch.rank);
  const std::string who =
      "rendezvous of rank " + std::to_string(launch.rank) + " by " + path + ": ";
  Note own;
  own.size = static_cast<std::uint64_t>(launch.size);
  own.rank = static_cast<std::uint64_t>(launch.rank);
  own.nonce = random_nonce();
  own.job = launch.job;
  const auto until = Clock::now() + deadline;
  bool asked = false;
  for (;; std::this_thread::sleep_for(kPause)) {
    const auto reply = read_note(answer);
    if (reply && reply->nonce == own.nonce && reply->job == own.job) {
      remove_file(answer);
      remove_file(request);
      if (reply->status != kBytes) throw CommError(who + reply->text);
      const auto bytes = std::as_bytes(std::span(reply->text));
      return {bytes.begin(), bytes.end()};
    }
    const auto standing = read_note(request);
    if (asked && standing && standing->nonce != own.nonce) {
      throw CommError(who + "two processes are rank " + std::to_string(launch.rank) +
                      ", of one job or of two that use the same path");
    }
    if (Clock::now() >= until) {
      remove_file(request);
      throw CommError(who + "rank 0 gave no answer within " + std::to_string(deadline.count()) +
                      " ms");
    }
    if (!standing || standing->nonce != own.nonce)
      write_whole(request, own, files.temporary(own.nonce));
    asked = true;
  }
}

class Root {
 public:
  Root(const Launch& launch, const std::string& path, std::chrono::milliseconds deadline)
      : launch_(launch), path_(path), files_(path, launch.job), deadline_(deadline) {
    own_.size = static_cast<std::uint64_t>(launch.size);
    own_.nonce = random_nonce();
    own_.job = launch.job;
    write_whole(files_.root(), own_, files_.temporary(own_.nonce));
    files_.remove_old();
    guests_.resize(static_cast<std::size_t>(launch.size));
  }

  void serve(std::span<const std::byte> bytes) {
    const auto until = Clock::now() + deadline_;
    for (;; std::this_thread::sleep_for(kPause)) {
      check_alone();
      check_sizes();
      bool all_here = true;
      for (int rank = 1; rank < launch_.size; ++rank) all_here = look_for(rank) && all_here;
      if (all_here && answer_all(bytes)) break;
      if (Clock::now() >= until) fail_all(too_late());
    }
    remove_file(files_.root());
  }

 private:
  struct Guest {
    std::uint64_t nonce = 0;     ///< of the request that stands; 0: none
    std::uint64_t answered = 0;  ///< of the request that was answered last
    bool done = false;           ///< has taken its answer
  };

  void check_alone() const {
    const auto standing = read_note(files_.root());
    if (standing && standing->nonce == own_.nonce) return;
    throw CommError("rendezvous on rank 0 by " + path_ +
                    ": another rank 0 uses this path; give the jobs ids or paths of their own");
  }

  /// Whether a rank has asked.
  bool look_for(int rank) {
    Guest& guest = guests_[static_cast<std::size_t>(rank)];
    const auto request = read_note(files_.request(rank));
    if (request) guest.nonce = request->nonce;
    guest.done = !request && guest.answered != 0;
    return guest.nonce != 0;
  }

  /// A rank of a job of another size, which may be one that this job does not have.
  void check_sizes() {
    for (const fs::path& path : files_.requests()) {
      const auto request = read_note(path);
      if (!request || request->size == own_.size || request->rank > kMaxRank) continue;
      const std::string problem = "rank " + std::to_string(request->rank) +
                                  " says that the size is " + std::to_string(request->size) +
                                  ", but rank 0 says " + std::to_string(launch_.size);
      const int rank = static_cast<int>(request->rank);
      if (rank >= launch_.size) guests_.resize(static_cast<std::size_t>(rank) + 1);
      fail_all(problem);
    }
  }

  void answer(int rank, Status status, std::string text) {
    Guest& guest = guests_[static_cast<std::size_t>(rank)];
    if (guest.nonce == 0 || guest.nonce == guest.answered) return;
    Note note = own_;
    note.status = status;
    note.rank = static_cast<std::uint64_t>(rank);
    note.nonce = guest.nonce;
    note.text = std::move(text);
    write_whole(files_.answer(rank), note, files_.temporary(own_.nonce));
    guest.answered = guest.nonce;
  }

  /// Whether all ranks have taken their answers.
  bool answer_all(std::span<const std::byte> bytes) {
    const std::string text(reinterpret_cast<const char*>(bytes.data()), bytes.size());
    bool all_done = true;
    for (int rank = 1; rank < launch_.size; ++rank) {
      answer(rank, kBytes, text);
      all_done = all_done && guests_[static_cast<std::size_t>(rank)].done;
    }
    return all_done;
  }

  std::string too_late() const {
    std::vector<int> missing;
    for (int rank = 1; rank < launch_.size; ++rank) {
      const Guest& guest = guests_[static_cast<std::size_t>(rank)];
      if (!guest.done && (guest.nonce == 0 || guest.answered != 0)) missing.push_back(rank);
    }
    return to_string_of_ranks(missing) + " of " + std::to_string(launch_.size) +
           " did not come within " + std::to_string(deadline_.count()) + " ms";
  }

  [[noreturn]] void fail_all(const std::string& why) {
    for (int rank = 1; rank < static_cast<int>(guests_.size()); ++rank) {
      look_for(rank);
      answer(rank, kRefused, why);
    }
    remove_file(files_.root());
    throw CommError("rendezvous on rank 0 by " + path_ + ": " + why);
  }

  const Launch& launch_;
  const std::string& path_;
  Files files_;
  std::chrono::milliseconds deadline_;
  Note own_;
  std::vector<Guest> guests_;
};

}  // namespace

std::vector<std::byte> broadcast_by_file(const Launch& launch, std::span<const std::byte> bytes,
                                         const std::string& path,
                                         std::chrono::milliseconds deadline) {
  if (launch.rank != 0) return ask_root(launch, path, deadline);
  Root(launch, path, deadline).serve(bytes);
  return {bytes.begin(), bytes.end()};
}

}  // namespace octet::detail
