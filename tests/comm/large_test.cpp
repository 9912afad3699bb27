// SPDX-License-Identifier: Apache-2.0
// Reductions and gathers of a tensor of more than 2^31 elements: every index and length must have
// 64 bits. Zeros but for values at both ends, around 2^31 and around the cut between the ranks, so
// a wrong index is a value that is missing or in the wrong place.
#include <algorithm>
#include <fstream>

#include "octet/comm/collectives.hpp"
#include "support/catch.hpp"
#include "support/devices.hpp"
#include "support/ranks.hpp"

namespace octet::test {
namespace {

constexpr std::int64_t k2To31 = std::int64_t{1} << 31;
constexpr std::int64_t kCount = k2To31 + 3;
// Rank 0 owns the end, which begins just below 2^31; rank 1 all before it.
constexpr std::int64_t kCut = k2To31 - 5;
constexpr std::int64_t kMarks[] = {0, 1, kCut - 1, kCut, k2To31 - 1, k2To31, k2To31 + 2};

// Codes of whole numbers: rank 0 has 2 and rank 1 has 4 at even marks, 8 and 16 at odd ones.
constexpr std::uint8_t kTwo = 0x40, kFour = 0x48, kEight = 0x50, kSixteen = 0x58;
constexpr std::uint8_t kThree = 0x44, kTwelve = 0x54;

std::uint8_t code(int rank, std::size_t mark) {
  if (mark % 2 == 0) return rank == 0 ? kTwo : kFour;
  return rank == 0 ? kEight : kSixteen;
}

// Empty, or the first byte that is not what `expected(mark)` or zero says.
template <class Expected>
std::string wrong_in(const std::uint8_t* codes, const Expected& expected) {
  std::int64_t next = 0;
  for (std::size_t mark = 0; mark < std::size(kMarks); ++mark) {
    const auto* found =
        std::find_if(codes + next, codes + kMarks[mark], [](std::uint8_t c) { return c != 0; });
    if (found != codes + kMarks[mark]) return "a value at " + std::to_string(found - codes);
    if (codes[kMarks[mark]] != expected(mark)) return "wrong at " + std::to_string(kMarks[mark]);
    next = kMarks[mark] + 1;
  }
  return {};
}

// Bytes that can be had, as far as the system says; a container may be allowed fewer.
std::int64_t free_memory() {
  std::int64_t kib = 0, allowed = 0;
  std::ifstream file("/proc/meminfo");
  for (std::string key, rest; file >> key && key != "MemAvailable:";) std::getline(file, rest);
  if (!(file >> kib)) return 0;
  const bool is_limited = static_cast<bool>(std::ifstream("/sys/fs/cgroup/memory.max") >> allowed);
  return is_limited ? std::min(allowed, kib * 1024) : kib * 1024;
}

}  // namespace

TEST_CASE("means and gathers of 2^31 + 3 elements") {
  constexpr std::int64_t kNeeded = 4 * kCount;  // two ranks, each with its tensor and staging
  if (free_memory() < kNeeded + kNeeded / 4) {
    WARN("skipped: " << free_memory() << " bytes are free, " << kNeeded << " are needed");
    return;
  }
  const Owners owners = {{{0, kCut, kCount - kCut}}, {{0, 0, kCut}}};
  std::string wrong[2];
  run_ranks(2, [&](Communicator& comm) {
    const Context& ctx = comm.context();
    const int rank = comm.rank();
    const Tensor tensor(ctx, DType::e4m3, {kCount});
    auto* codes = tensor.as<std::uint8_t>();
    zero_bytes(ctx, codes, static_cast<std::size_t>(kCount));
    for (std::size_t m = 0; m < std::size(kMarks); ++m) codes[kMarks[m]] = code(rank, m);
    TensorScale scale = {1.0f, 1.0f, 448.0f};
    std::uint32_t flag = 0;
    MeanReducer reducer(comm, MeanReducer::Path::two_shot, {{tensor, {}}}, &scale, owners);
    reducer.run(&flag);
    wrong[rank] = wrong_in(codes, [](std::size_t m) { return m % 2 == 0 ? kThree : kTwelve; });
    if (flag != 0 || scale.scale != 1.0f) wrong[rank] += "flag or scale";
    if (reducer.payload_bytes() != static_cast<std::uint64_t>(kCount)) wrong[rank] += "payload";

    // What a rank does not own is poisoned; each has marks of its own to tell.
    for (const Piece& piece : owners[static_cast<std::size_t>(1 - rank)]) {
      std::fill_n(codes + piece.begin, piece.count, std::uint8_t{0x7F});
    }
    PieceGather gather(comm, {tensor}, owners);
    gather.run();
    wrong[rank] += wrong_in(codes, [](std::size_t m) { return m % 2 == 0 ? kThree : kTwelve; });
  });
  for (const std::string& text : wrong) CHECK(text == "");
}

}  // namespace octet::test
