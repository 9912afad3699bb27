// SPDX-License-Identifier: Apache-2.0
// Parts of examples/train_gpt that its output does not show: how ranks fail, what batches hold.
#include <algorithm>
#include <set>
#include <string>
#include <vector>

#include "data.hpp"
#include "ranks.hpp"
#include "support/catch.hpp"
#include "support/errors.hpp"

using namespace octet::test;
using train_gpt::Rank;
using train_gpt::TextData;

constexpr octet::Schedule kSchedule = octet::Schedule::after_backward;

TEST_CASE("a failing rank ends the others and is named once", "[train_gpt]") {
  for (int failing : {0, 2}) {
    const std::string message = error_of([&] {
      train_gpt::run_ranks(octet::DeviceType::cpu, 3, kSchedule, [&](const Rank& rank) {
        if (rank.index == failing) octet::fail("out of paper");
        int value = rank.index, all[3];
        rank.comm.all_gather(&value, all, sizeof value);  // would wait for ever
      });
    });
    CHECK(message == "rank " + std::to_string(failing) + ": out of paper");
  }
}

TEST_CASE("every rank runs once with its own communicator", "[train_gpt]") {
  for (int count : {1, 2, 4}) {
    std::vector<int> seen(4, 0);
    train_gpt::run_ranks(octet::DeviceType::cpu, count, kSchedule, [&](const Rank& rank) {
      int value = rank.index + 1;
      std::vector<int> all(static_cast<std::size_t>(count));
      rank.comm.all_gather(&value, all.data(), sizeof value);
      for (int i : all) seen[static_cast<std::size_t>(rank.index)] += i;
    });
    for (int i = 0; i < 4; ++i) {
      CHECK(seen[static_cast<std::size_t>(i)] == (i < count ? count * (count + 1) / 2 : 0));
    }
  }
}

TEST_CASE("batches come from the training part and do not depend on their cut", "[train_gpt]") {
  // 1000 bytes, of which the last 50 are held out and marked.
  std::vector<std::uint8_t> text(1000);
  for (std::size_t i = 0; i < text.size(); ++i) {
    text[i] = static_cast<std::uint8_t>(i < 950 ? i % 200 : 250);
  }
  const std::int64_t context = 7, window = context + 1;
  const TextData data("text", text, context);
  std::set<int> starts;
  for (std::int64_t step = 0; step < 50; ++step) {
    const auto whole = data.training_windows(5, step, 0, 8);
    REQUIRE(whole.size() == static_cast<std::size_t>(8 * window));
    for (std::int64_t row = 0; row < 8; row += 2) {
      const auto part = data.training_windows(5, step, row, 2);
      REQUIRE(std::equal(part.begin(), part.end(), whole.begin() + row * window));
    }
    REQUIRE(std::count(whole.begin(), whole.end(), 250) == 0);
    for (std::int64_t row = 0; row < 8; ++row) {
      const auto first = whole.begin() + row * window;
      for (std::int64_t i = 1; i < window; ++i) REQUIRE(first[i] == (first[0] + i) % 200);
      starts.insert(first[0]);
    }
    REQUIRE(data.training_windows(6, step, 0, 8) != whole);
    REQUIRE(data.training_windows(5, step + 1, 0, 8) != whole);
  }
  CHECK(starts.size() > 100);  // 400 draws, 200 different first bytes

  const std::int64_t total = data.validation_count(2, 40);
  CHECK(total == 6);  // 50 bytes hold 6 windows
  const auto held_out = data.validation_windows(0, total, total);
  CHECK(std::count(held_out.begin(), held_out.end(), 250) == total * window);
  CHECK(data.validation_count(2, 2) == 4);
  CHECK(data.validation_count(16, 40) == 16);
}

TEST_CASE("validation windows reach from the first held-out byte to the last", "[train_gpt]") {
  std::vector<std::uint8_t> text(1000, 0);
  for (std::size_t i = 950; i < 1000; ++i) text[i] = static_cast<std::uint8_t>(i - 949);
  const TextData data("text", text, 7);
  const auto windows = data.validation_windows(0, 5, 5);
  CHECK(windows.front() == 1);
  CHECK(windows.back() == 50);
  CHECK(data.validation_windows(2, 1, 5) ==
        std::vector<std::uint8_t>(windows.begin() + 16, windows.begin() + 24));
  CHECK(data.validation_windows(0, 1, 1).front() == 1);
}
