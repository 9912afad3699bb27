// SPDX-License-Identifier: Apache-2.0
#include "octet/comm/communicator.hpp"

#include <algorithm>

#include "octet/runtime/tensor.hpp"

namespace octet {
namespace {

template <class Part>
void check_parts(std::span<const Part> parts, const Communicator& comm, const char* what) {
  for (std::size_t i = 0; i < parts.size(); ++i) {
    const Part& part = parts[i];
    require(part.peer >= 0 && part.peer < comm.size(), "exchange on rank ", comm.rank(), ": ", what,
            " ", i, " names rank ", part.peer, "; allowed are 0 to ", comm.size() - 1);
    require(part.peer != comm.rank(), "exchange on rank ", comm.rank(), ": ", what, " ", i,
            " is to this rank itself");
    require(part.data != nullptr || part.bytes == 0, "exchange on rank ", comm.rank(), ": ", what,
            " ", i, " of ", part.bytes, " bytes has a null pointer");
  }
}

class SingleRank final : public Communicator {
 public:
  using Communicator::Communicator;
  int rank() const override { return 0; }
  int size() const override { return 1; }
  std::string name() const override { return "single"; }

 protected:
  void do_exchange(std::span<const SendPart>, std::span<const RecvPart>) override {}
  void do_all_gather(const void* send, void* recv, std::size_t bytes) override {
    if (send != recv) copy_bytes(context(), recv, send, bytes);
  }
  std::string window_refusal() override { return {}; }
  std::unique_ptr<Window> do_make_window(std::size_t bytes) override {
    const auto memory = std::make_shared<Buffer>(context(), peer_flag_bytes(1) + bytes);
    zero_bytes(context(), memory->data(), peer_flag_bytes(1));
    return std::make_unique<Window>(context(), 0, std::vector<void*>{memory->data()}, bytes,
                                    memory->bytes(), 1, deadline(), memory);
  }
};

}  // namespace

std::string to_string(const CollectiveName& name) {
  std::string text = name.op;
  if (name.bucket >= 0) text += " of bucket " + std::to_string(name.bucket);
  return text;
}

std::string to_string_of_ranks(std::span<const int> ranks) {
  std::string text = ranks.size() == 1 ? "rank" : "ranks";
  for (std::size_t i = 0; i < ranks.size(); ++i) {
    text += (i == 0 ? " " : ", ") + std::to_string(ranks[i]);
  }
  return text;
}

Communicator::Communicator(const Context& ctx, std::chrono::milliseconds deadline)
    : ctx_(ctx), deadline_(deadline) {
  require(deadline.count() > 0, "Communicator: deadline is ", deadline.count(),
          " ms; it must be positive");
}

CommError Communicator::error(const Watched& collective, const std::string& reason,
                              std::vector<int> ranks) const {
  std::ostringstream text;
  CommError::Where where;
  where.rank = rank();
  where.ranks = std::move(ranks);
  if (collective.number > 0) {
    where.op = collective.name.op;
    where.bucket = collective.name.bucket;
    where.collective = collective.number;
    text << to_string(collective.name) << " (collective " << collective.number << ") on ";
  }
  text << "rank " << rank() << " of " << size() << ": " << reason;
  return CommError(text.str(), std::move(where));
}

void Communicator::set_failure(const CommError& error) {
  const std::lock_guard lock(failure_mutex_);
  if (failure_.has_value()) return;
  failure_.emplace(error);
  failed_.store(true, std::memory_order_release);
  for (const auto& words : windows_) words->abort();
}

std::optional<CommError> Communicator::window_failure() {
  std::optional<PeerStatus> status;
  {
    const std::lock_guard lock(failure_mutex_);
    for (const auto& words : windows_) {
      if (!status.has_value()) status = words->failure();
    }
  }
  if (!status.has_value()) return std::nullopt;
  const auto missing = static_cast<int>(status->missing);
  return error({{status->tag.op, status->tag.bucket}, status->tag.number},
               "rank " + std::to_string(missing) + " did not come to the kernel within " +
                   std::to_string(deadline_.count()) + " ms",
               {missing});
}

void Communicator::check() {
  if (aborted()) {
    const std::lock_guard lock(failure_mutex_);
    throw CommError(*failure_);
  }
  keep_failure([&] {
    do_check();
    if (const auto failure = window_failure()) throw CommError(*failure);
  });
}

void Communicator::synchronize() {
  keep_failure([&] { do_synchronize(); });
  check();
}

void Communicator::open(const CollectiveName& name) {
  check();
  if (open_scopes_ == 0) {
    current_ = {name, ++collectives_};
    try {
      do_begin();
    } catch (...) {
      current_ = {};
      throw;
    }
  }
  ++open_scopes_;
}

void Communicator::close() noexcept {
  if (--open_scopes_ > 0) return;
  do_end();
  current_ = {};
}

// What the transport throws once, it throws from then on.
template <class Call>
void Communicator::keep_failure(Call call) {
  try {
    call();
  } catch (const CommError& error) {
    set_failure(error);
    throw;
  }
}

void Communicator::exchange(std::span<const SendPart> sends, std::span<const RecvPart> recvs,
                            Traffic traffic) {
  check_parts(sends, *this, "send");
  check_parts(recvs, *this, "receive");
  const CollectiveScope scope(*this, {"exchange"});
  keep_failure([&] { do_exchange(sends, recvs); });
  for (const SendPart& part : sends) count_sent(traffic, part.bytes);
}

void Communicator::all_gather(const void* send, void* recv, std::size_t bytes) {
  require(bytes == 0 || (send != nullptr && recv != nullptr), "all_gather on rank ", rank(), " of ",
          bytes, " bytes has a null pointer");
  const CollectiveScope scope(*this, {"all_gather"});
  keep_failure([&] { do_all_gather(send, recv, bytes); });
  count_sent(Traffic::metadata, bytes * static_cast<std::uint64_t>(size() - 1));
}

void Communicator::count_sent(Traffic traffic, std::uint64_t bytes) {
  (traffic == Traffic::payload ? wire_.payload : wire_.metadata) += bytes;
}

WindowOffer Communicator::make_window(std::size_t bytes) {
  std::string reason = size() > kMaxPeers ? "windows serve at most " + std::to_string(kMaxPeers) +
                                                " ranks, here are " + std::to_string(size())
                                          : window_refusal();
  const std::vector<std::string> reasons = all_gather_text_sync(*this, reason);
  for (std::size_t r = 0; r < reasons.size(); ++r) {
    if (!reasons[r].empty()) return {nullptr, "rank " + std::to_string(r) + ": " + reasons[r]};
  }
  const std::vector<std::string> sizes = all_gather_text_sync(*this, std::to_string(bytes));
  for (std::size_t r = 0; r < sizes.size(); ++r) {
    require(sizes[r] == sizes[0], "make_window: rank 0 asks for ", sizes[0], " bytes, rank ", r,
            " for ", sizes[r], "; all ranks must ask for the same");
  }
  WindowOffer offer{do_make_window(bytes), {}};
  const std::lock_guard lock(failure_mutex_);
  std::erase_if(windows_, [](const auto& words) { return words.use_count() == 1; });
  windows_.push_back(offer.window->words());
  return offer;
}

std::string Communicator::window_refusal() {
  return name() + " ranks do not reach one another's memory";
}

std::unique_ptr<Window> Communicator::do_make_window(std::size_t) { fail(window_refusal()); }

void Communicator::broadcast(void* data, std::size_t bytes, int root, Traffic traffic) {
  require(root >= 0 && root < size(), "broadcast on rank ", rank(), ": root is ", root,
          "; allowed are 0 to ", size() - 1);
  require(bytes == 0 || data != nullptr, "broadcast on rank ", rank(), " of ", bytes,
          " bytes has a null pointer");
  const CollectiveScope scope(*this, {"broadcast"});
  keep_failure([&] { do_broadcast(data, bytes, root); });
  if (rank() == root) count_sent(traffic, bytes * static_cast<std::uint64_t>(size() - 1));
}

void Communicator::do_broadcast(void* data, std::size_t bytes, int root) {
  if (rank() != root) {
    const RecvPart recv{data, bytes, root};
    return do_exchange({}, std::span(&recv, 1));
  }
  std::vector<SendPart> sends;
  for (int peer = 0; peer < size(); ++peer) {
    if (peer != root) sends.push_back({data, bytes, peer});
  }
  do_exchange(sends, {});
}

void Communicator::sum_e4m3(void* codes, std::int64_t count) {
  require(count >= 0, "sum_e4m3 on rank ", rank(), ": count is ", count,
          "; it must not be negative");
  require(count == 0 || codes != nullptr, "sum_e4m3 on rank ", rank(), " of ", count,
          " codes has a null pointer");
  const CollectiveScope scope(*this, {"sum_e4m3"});
  keep_failure([&] { do_sum_e4m3(codes, count); });
  count_sent(Traffic::payload, sum_e4m3_bytes(count, size()));
}

void Communicator::do_sum_e4m3(void*, std::int64_t) {
  fail("sum_e4m3 on rank ", rank(), ": ", name(), " does not add codes itself");
}

std::unique_ptr<Communicator> make_single(const Context& ctx) {
  return std::make_unique<SingleRank>(ctx);
}

namespace {

// Of a length: the text says why its rank has failed.
constexpr std::uint64_t kFailed = std::uint64_t{1} << 63;

std::vector<std::string> gather_texts(Communicator& comm, const std::string& text, bool failed) {
  const CollectiveScope scope(comm, {"set-up"});
  const Context& ctx = comm.context();
  const auto ranks = static_cast<std::size_t>(comm.size());

  const std::uint64_t length = text.size() | (failed ? kFailed : 0);
  const Buffer own_length = upload_sync<std::uint64_t>(ctx, std::span(&length, 1));
  const Buffer all_lengths(ctx, ranks * sizeof(length));
  comm.all_gather(own_length.data(), all_lengths.data(), sizeof(length));
  const auto lengths = read_sync<std::uint64_t>(ctx, all_lengths.data(), ranks);

  std::vector<std::string> texts(ranks);
  std::size_t longest = 0;
  for (std::uint64_t each : lengths) longest = std::max(longest, each & ~kFailed);
  if (longest == 0) return texts;
  std::string padded = text;
  padded.resize(longest);
  const Buffer own = upload_sync<char>(ctx, std::span<const char>(padded));
  const Buffer all(ctx, ranks * longest);
  comm.all_gather(own.data(), all.data(), longest);
  const auto bytes = read_sync<char>(ctx, all.data(), ranks * longest);
  for (std::size_t r = 0; r < ranks; ++r) {
    texts[r].assign(bytes.data() + r * longest, lengths[r] & ~kFailed);
    if ((lengths[r] & kFailed) != 0) {
      throw SetUpError("rank " + std::to_string(r) + ": " + texts[r]);
    }
  }
  return texts;
}

}  // namespace

std::vector<std::string> all_gather_text_sync(Communicator& comm, const std::string& text) {
  return gather_texts(comm, text, false);
}

void set_up_together_sync(Communicator& comm, const std::function<void()>& work) {
  std::string problem;
  try {
    work();
  } catch (const SetUpError&) {
    throw;  // every rank does
  } catch (const CommError&) {
    throw;  // there is no way to tell them
  } catch (const std::exception& error) {
    problem = error.what();
    if (problem.empty()) problem = "it failed";  // a failure is told by its text
  }
  gather_texts(comm, problem, !problem.empty());
}

}  // namespace octet
