// SPDX-License-Identifier: Apache-2.0
// The rendezvous by TCP. A rank says hello to rank 0 (magic, version, size, rank, job) and waits
// for the answer (magic, status, bytes or the reason of a refusal), which rank 0 gives to all at
// once when all have come. Everything is polled, so no peer can make anybody wait beyond a
// deadline.
#include <arpa/inet.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <thread>
#include <utility>

#include "comm/bootstrap.hpp"
#include "comm/bytes.hpp"
#include "octet/core/error.hpp"

namespace octet::detail {
namespace {

using Clock = std::chrono::steady_clock;
using namespace std::chrono_literals;

constexpr std::uint64_t kMagic = 0x7a76647274636f31u;  // of a rendezvous
constexpr std::uint64_t kVersion = 1;
enum Status : std::uint64_t { kBytes = 0, kRefused = 1 };
/// How long a connection may take to be made and to say hello.
constexpr auto kConnectionTime = 5s;
constexpr auto kRetryPause = 50ms;
/// Connections without a rank that may wait besides those that the job can have.
constexpr std::size_t kMaxStrangers = 64;
constexpr std::size_t kHelloBytes = 40 + kMaxJobBytes;
constexpr std::size_t kReplyBytes = 24 + kMaxRendezvousBytes;

class Socket {
 public:
  Socket() = default;
  explicit Socket(int fd) : fd_(fd) {}
  Socket(Socket&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Socket& operator=(Socket&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  ~Socket() {
    if (fd_ >= 0) close(fd_);
  }
  int fd() const { return fd_; }
  explicit operator bool() const { return fd_ >= 0; }

 private:
  int fd_ = -1;
};

int milliseconds_until(Clock::time_point until) {
  const auto left = std::chrono::ceil<std::chrono::milliseconds>(until - Clock::now()).count();
  return static_cast<int>(std::clamp<long long>(left, 0, 60000));
}

/// Whether `events` come in time; hang-ups and errors count, the next call on the socket tells
/// them.
bool wait_for(const Socket& socket, short events, Clock::time_point until) {
  for (;;) {
    pollfd entry{socket.fd(), events, 0};
    const int status = poll(&entry, 1, milliseconds_until(until));
    if (status > 0) return true;
    if (Clock::now() >= until) return false;
  }
}

/// False when the peer is gone or does not take the bytes in time.
bool send_all(const Socket& socket, std::span<const std::byte> bytes, Clock::time_point until) {
  while (!bytes.empty()) {
    const ssize_t sent = send(socket.fd(), bytes.data(), bytes.size(), MSG_NOSIGNAL);
    if (sent > 0) {
      bytes = bytes.subspan(static_cast<std::size_t>(sent));
    } else if (errno == EAGAIN || errno == EWOULDBLOCK) {
      if (!wait_for(socket, POLLOUT, until)) return false;
    } else if (errno != EINTR) {
      return false;
    }
  }
  return true;
}

enum class Heard { more, nothing, end };

/// Adds what has come to `bytes`, up to `longest` in all.
Heard hear(const Socket& socket, std::vector<std::byte>& bytes, std::size_t longest) {
  const std::size_t before = bytes.size();
  if (before >= longest) return Heard::nothing;
  bytes.resize(longest);
  const ssize_t count = recv(socket.fd(), bytes.data() + before, longest - before, 0);
  bytes.resize(before + static_cast<std::size_t>(std::max<ssize_t>(count, 0)));
  if (count > 0) return Heard::more;
  if (count < 0 && (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR)) {
    return Heard::nothing;
  }
  return Heard::end;
}

struct Addresses {
  addrinfo* list = nullptr;
  std::string problem;
  Addresses(const std::string& host, int port) {
    addrinfo hints{};
    hints.ai_family = AF_UNSPEC;
    hints.ai_socktype = SOCK_STREAM;
    const int status = getaddrinfo(host.c_str(), std::to_string(port).c_str(), &hints, &list);
    if (status != 0) problem = gai_strerror(status);
  }
  ~Addresses() {
    if (list != nullptr) freeaddrinfo(list);
  }
  Addresses(const Addresses&) = delete;
  Addresses& operator=(const Addresses&) = delete;
};

std::string place_of(const Launch& launch) {
  return launch.host + ":" + std::to_string(launch.port);
}

std::string error_text(int error) { return std::string(std::strerror(error)); }

// --- the other ranks ---

/// A port of this machine's that nobody listens on can be given to the very socket that connects to
/// it, which then meets itself.
bool is_connected_to_itself(const Socket& socket) {
  sockaddr_storage own{}, peer{};
  socklen_t own_length = sizeof(own), peer_length = sizeof(peer);
  if (getsockname(socket.fd(), reinterpret_cast<sockaddr*>(&own), &own_length) != 0 ||
      getpeername(socket.fd(), reinterpret_cast<sockaddr*>(&peer), &peer_length) != 0) {
    return false;
  }
  return own_length == peer_length && std::memcmp(&own, &peer, own_length) == 0;
}

/// A socket connected to one of the addresses; else none, and the last problem.
Socket connect_to(const Launch& launch, Clock::time_point until, std::string& problem) {
  const Addresses addresses(launch.host, launch.port);
  problem = addresses.problem;
  for (const addrinfo* at = addresses.list; at != nullptr; at = at->ai_next) {
    Socket socket(::socket(at->ai_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
    if (!socket) continue;
    int error = ::connect(socket.fd(), at->ai_addr, at->ai_addrlen) == 0 ? 0 : errno;
    if (error == EINPROGRESS) {
      error = ETIMEDOUT;
      if (wait_for(socket, POLLOUT, std::min(until, Clock::now() + kConnectionTime))) {
        socklen_t length = sizeof(error);
        getsockopt(socket.fd(), SOL_SOCKET, SO_ERROR, &error, &length);
      }
    }
    if (error == 0 && is_connected_to_itself(socket)) error = ECONNREFUSED;
    if (error == 0) return socket;
    problem = error_text(error);
  }
  return {};
}

std::vector<std::byte> hello_of(const Launch& launch) {
  Writer hello;
  for (std::uint64_t value : {kMagic, kVersion, static_cast<std::uint64_t>(launch.size),
                              static_cast<std::uint64_t>(launch.rank)}) {
    hello.number(value);
  }
  hello.text(launch.job);
  return hello.bytes();
}

/// The bytes that an answer carries; none when the connection ended before it was complete. Throws
/// for a refusal and for an answer that is not octet's.
std::optional<std::vector<std::byte>> answer_on(const Socket& socket, const std::string& who,
                                                Clock::time_point until) {
  std::vector<std::byte> heard;
  while (wait_for(socket, POLLIN, until)) {
    if (hear(socket, heard, kReplyBytes) == Heard::end) return std::nullopt;
    Reader reply(heard);
    const std::uint64_t magic = reply.number();
    if (!reply.good()) continue;
    if (magic != kMagic) {
      throw CommError(who +
                      ": what listens there is not rank 0 of an octet job (wrong magic); set "
                      "MASTER_PORT to a free port");
    }
    const std::uint64_t status = reply.number();
    const std::uint64_t length = reply.number();
    if (reply.good() && length > kMaxRendezvousBytes) {
      throw CommError(who + ": the answer is too long, " + std::to_string(length) + " bytes");
    }
    const auto data = reply.raw(length);
    if (!reply.good()) continue;
    if (status == kBytes) return std::vector<std::byte>(data.begin(), data.end());
    throw CommError(who + ": " +
                    std::string(reinterpret_cast<const char*>(data.data()), data.size()));
  }
  return std::nullopt;
}

std::vector<std::byte> ask_root(const Launch& launch, std::chrono::milliseconds deadline) {
  const auto until = Clock::now() + deadline;
  const std::string who =
      "rendezvous of rank " + std::to_string(launch.rank) + " with rank 0 at " + place_of(launch);
  std::string problem;
  for (;;) {
    const Socket socket = connect_to(launch, until, problem);
    if (socket && send_all(socket, hello_of(launch), until)) {
      problem = "the connection was closed without an answer";
      if (const auto bytes = answer_on(socket, who, until)) return *bytes;
      if (Clock::now() >= until) problem = "rank 0 took the connection but gave no answer";
    }
    if (Clock::now() + kRetryPause >= until) {
      throw CommError(who + ": no answer within " + std::to_string(deadline.count()) + " ms (" +
                      problem + ")");
    }
    std::this_thread::sleep_for(kRetryPause);
  }
}

// --- rank 0 ---

bool is_loopback(const sockaddr* address) {
  if (address->sa_family == AF_INET) {
    const auto* v4 = reinterpret_cast<const sockaddr_in*>(address);
    return (ntohl(v4->sin_addr.s_addr) >> 24) == 127;
  }
  return address->sa_family == AF_INET6 &&
         IN6_IS_ADDR_LOOPBACK(&reinterpret_cast<const sockaddr_in6*>(address)->sin6_addr);
}

/// Listens on the loopback address if that is what the host is, else on every address of the
/// machine, since a name may stand for an address that only others see.
Socket listen_at(const Launch& launch) {
  const auto give_up = [&](const char* call, int error) {
    std::string advice;
    if (error == EADDRINUSE) {
      advice =
          "; something else listens there, perhaps another job: set MASTER_PORT to another port";
    }
    throw CommError("rendezvous: rank 0 cannot listen at " + place_of(launch) + ": " + call + ": " +
                    error_text(error) + advice);
  };
  const Addresses addresses(launch.host, launch.port);
  sockaddr_storage address{};
  socklen_t length = sizeof(sockaddr_in);
  address.ss_family = AF_INET;
  if (addresses.list != nullptr) {
    length = addresses.list->ai_addrlen;
    address.ss_family = addresses.list->ai_addr->sa_family;
    if (is_loopback(addresses.list->ai_addr)) {
      std::memcpy(&address, addresses.list->ai_addr, length);
    }
  }
  const in_port_t port = htons(static_cast<std::uint16_t>(launch.port));
  if (address.ss_family == AF_INET6) {
    reinterpret_cast<sockaddr_in6*>(&address)->sin6_port = port;
  } else {
    reinterpret_cast<sockaddr_in*>(&address)->sin_port = port;
  }
  Socket socket(::socket(address.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (!socket) give_up("socket", errno);
  const int on = 1;
  setsockopt(socket.fd(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
  if (bind(socket.fd(), reinterpret_cast<sockaddr*>(&address), length) != 0) give_up("bind", errno);
  if (listen(socket.fd(), SOMAXCONN) != 0) give_up("listen", errno);
  return socket;
}

/// A connection: somebody yet unknown, or a rank.
struct Guest {
  Socket socket;
  Clock::time_point until;  ///< for the hello
  std::vector<std::byte> heard = {};
  int rank = -1;
  bool gone = false;
};

class Root {
 public:
  Root(const Launch& launch, std::chrono::milliseconds deadline)
      : launch_(launch),
        deadline_(deadline),
        until_(Clock::now() + deadline),
        listener_(listen_at(launch)) {}

  void serve(std::span<const std::byte> bytes) {
    while (!missing().empty()) {
      if (Clock::now() >= until_) fail_all(too_late());
      wait_for_news();
      accept_guests();
      for (std::size_t i = 0; i < guests_.size(); ++i) attend(guests_[i]);
      std::erase_if(guests_, [](const Guest& guest) { return guest.gone; });
    }
    for (const Guest& guest : guests_) {
      if (guest.rank >= 0) reply(guest, kBytes, bytes);
    }
  }

 private:
  std::vector<int> missing() const {
    std::vector<int> ranks;
    for (int rank = 1; rank < launch_.size; ++rank) {
      if (!is_here(rank)) ranks.push_back(rank);
    }
    return ranks;
  }

  bool is_here(int rank) const {
    return std::any_of(guests_.begin(), guests_.end(),
                       [rank](const Guest& guest) { return guest.rank == rank && !guest.gone; });
  }

  std::string too_late() const {
    std::string text = to_string_of_ranks(missing()) + " of " + std::to_string(launch_.size) +
                       " did not come within " + std::to_string(deadline_.count()) + " ms";
    if (refused_ > 0) {
      text += "; " + std::to_string(refused_) +
              " other connections were dropped, the last because " + last_refusal_;
    }
    return text;
  }

  void wait_for_news() const {
    std::vector<pollfd> entries{{listener_.fd(), POLLIN, 0}};
    for (const Guest& guest : guests_) entries.push_back({guest.socket.fd(), POLLIN, 0});
    const auto until = std::min(until_, Clock::now() + 100ms);  // guests run out of time meanwhile
    poll(entries.data(), entries.size(), milliseconds_until(until));
  }

  void accept_guests() {
    for (;;) {
      Socket socket(accept4(listener_.fd(), nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC));
      if (!socket && (errno == EMFILE || errno == ENFILE)) {
        fail_all("too many open files for the connections of " + std::to_string(launch_.size) +
                 " ranks; raise the limit (ulimit -n)");
      }
      if (!socket) return;
      if (guests_.size() >= static_cast<std::size_t>(launch_.size) + kMaxStrangers) {
        const auto oldest = std::find_if(guests_.begin(), guests_.end(),
                                         [](const Guest& guest) { return guest.rank < 0; });
        note("too many connections said nothing");
        guests_.erase(oldest);
      }
      guests_.push_back({.socket = std::move(socket), .until = Clock::now() + kConnectionTime});
    }
  }

  void attend(Guest& guest) {
    const Heard heard = hear(guest.socket, guest.heard, kHelloBytes);
    if (heard == Heard::end) {
      guest.gone = true;  // a rank may come again
      if (guest.rank < 0) note("it closed the connection without a hello");
      return;
    }
    if (guest.rank >= 0) {
      if (heard == Heard::more) drop(guest, "it said more than a hello");
      return;
    }
    listen_to(guest);
    if (guest.rank < 0 && !guest.gone && Clock::now() >= guest.until) {
      drop(guest, "it did not say hello in time");
    }
  }

  void listen_to(Guest& guest) {
    Reader hello(guest.heard);
    const std::uint64_t magic = hello.number();
    if (!hello.good()) return;
    if (magic != kMagic) return drop(guest, "it is no rank of an octet job (wrong magic)");
    const std::uint64_t version = hello.number();
    if (hello.good() && version != kVersion) {
      return refuse(guest, "its octet speaks version " + std::to_string(version) +
                               " of the rendezvous, that of rank 0 version " +
                               std::to_string(kVersion));
    }
    const std::uint64_t size = hello.number(), rank = hello.number();
    const std::uint64_t job_bytes = hello.number();
    if (!hello.good()) return;
    if (job_bytes > kMaxJobBytes) return drop(guest, "its hello is too long");
    const auto job_data = hello.raw(job_bytes);
    if (!hello.good()) return;
    admit(guest, size, rank, {reinterpret_cast<const char*>(job_data.data()), job_data.size()});
  }

  void admit(Guest& guest, std::uint64_t size, std::uint64_t rank, const std::string& job) {
    const std::string its_rank = "a process that is rank " + std::to_string(rank);
    if (job != launch_.job) {
      return refuse(guest, its_rank + " is of a job " + quoted_job(job) + ", but at " +
                               place_of(launch_) + " is a job " + quoted_job(launch_.job));
    }
    std::string problem;
    if (size != static_cast<std::uint64_t>(launch_.size)) {
      problem = its_rank + " says that the size is " + std::to_string(size) + ", but rank 0 says " +
                std::to_string(launch_.size);
    } else if (rank < 1 || rank >= size) {
      problem = its_rank + " of " + std::to_string(size) + " called rank 0";
    } else if (is_here(static_cast<int>(rank))) {
      problem = "two processes are rank " + std::to_string(rank);
    }
    if (!problem.empty()) {
      refuse(guest, problem);
      fail_all(problem);
    }
    guest.rank = static_cast<int>(rank);
  }

  void reply(const Guest& guest, Status status, std::span<const std::byte> bytes) const {
    Writer message;
    message.number(kMagic);
    message.number(status);
    message.number(bytes.size());
    message.raw(bytes);
    send_all(guest.socket, message.bytes(), Clock::now() + kConnectionTime);
    shutdown(guest.socket.fd(), SHUT_WR);
  }

  void refuse(Guest& guest, const std::string& why) {
    const std::string text = "rank 0 refused: " + why;
    reply(guest, kRefused,
          std::as_bytes(std::span(text)).first(std::min(text.size(), kReplyBytes - 24)));
    drop(guest, why);
  }

  void drop(Guest& guest, const std::string& why) {
    guest.gone = true;
    note(why);
  }

  void note(const std::string& why) {
    ++refused_;
    last_refusal_ = why;
  }

  [[noreturn]] void fail_all(const std::string& why) {
    for (const Guest& guest : guests_) {
      if (guest.rank >= 0 && !guest.gone) {
        reply(guest, kRefused,
              std::as_bytes(std::span(why)).first(std::min(why.size(), kMaxRendezvousBytes)));
      }
    }
    throw CommError("rendezvous on rank 0 at " + place_of(launch_) + ": " + why);
  }

  const Launch& launch_;
  std::chrono::milliseconds deadline_;
  Clock::time_point until_;
  Socket listener_;
  std::vector<Guest> guests_;
  int refused_ = 0;
  std::string last_refusal_;
};

}  // namespace

std::vector<std::byte> broadcast_by_tcp(const Launch& launch, std::span<const std::byte> bytes,
                                        std::chrono::milliseconds deadline) {
  if (launch.rank != 0) return ask_root(launch, deadline);
  Root(launch, deadline).serve(bytes);
  return {bytes.begin(), bytes.end()};
}

}  // namespace octet::detail
